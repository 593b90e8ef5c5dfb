"""Claim: prepare takes 1,000,000 rows in well under 1 GB of memory.

    python bench/prepare.py [--rows N] [--form jsonl|parquet|csv] > prepare.json
    python bench/prepare.py --rounds 3 --words 250 > prepare-contamination.json

Writes synthetic rows (1 in 20 a duplicate, 1 in 50 another response to a prompt that was there),
runs the stage in a process of its own, prints a line on stderr and a JSON object on stdout.
Memory is that process's high-water mark, interpreter and libraries included.

With `--rounds N` it claims instead that the report of contamination is cheap: N pairs of runs, with
and without it, in turn; the ratios of their processor times hold on a loaded machine too.
"""

import argparse
import csv
import json
import multiprocessing
import platform
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from _report import commit, hardware  # noqa: E402

WORDS = [f"word{i:04d}" for i in range(2000)]


def synthetic_rows(num_rows: int, num_words: int) -> Iterator[dict[str, str]]:
    """Stream rows of so many words of nine characters, a third of them in the prompt."""
    rng = random.Random(0)
    for index in range(num_rows):
        prompt_index, response_index = index, index
        if index and index % 20 == 0:
            prompt_index = response_index = index - 1
        elif index and index % 50 == 1:
            prompt_index = index - 1
        asked = " ".join(random.Random(prompt_index).choices(WORDS, k=num_words // 3))
        prompt = f"Question {prompt_index}: {asked}?"
        if index in (prompt_index, response_index):
            response = (
                f"Answer {response_index}: {' '.join(rng.choices(WORDS, k=num_words * 2 // 3))}."
            )
        yield {"prompt": prompt, "response": response}


def write_rows(path: Path, num_rows: int, num_words: int) -> None:
    """Write the synthetic rows as the form that the path's suffix names."""
    rows = synthetic_rows(num_rows, num_words)
    if path.suffix == ".parquet":
        import pyarrow as pa

        from stages.artifacts import TableWriter

        schema = pa.schema([("prompt", pa.string()), ("response", pa.string())])
        with TableWriter(path, schema) as table:
            table.extend(rows)
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, ["prompt", "response"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def measure(source: Path, out: Path, ngram: int, results: Connection) -> None:
    """Run prepare, and send its seconds, those of its processor, peak memory and counts."""
    from stages import prepare
    from stages.config import RunConfig

    section = {
        "source": str(source), "format": "prompt_response", "heldout_size": 1000,
        "contamination": {"ngram": ngram},
    }  # fmt: skip
    start, cpu_start = time.monotonic(), time.process_time()
    manifest = prepare.run(RunConfig.model_validate({"prepare": section}), out)
    seconds, cpu_s = time.monotonic() - start, time.process_time() - cpu_start
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results.send((seconds, cpu_s, peak_bytes, dict(manifest.counts)))


def run(source: Path, folder: Path, ngram: int = 13) -> tuple[float, float, int, dict[str, int]]:
    """Measure once, in a process of its own."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        child = context.Process(target=measure, args=(source, Path(place, "data"), ngram, sender))
        child.start()
        sender.close()
        found: tuple[float, float, int, dict[str, int]] = receiver.recv()
        child.join()
    return found


def compare(source: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Measure with and without the report of contamination, in turn."""
    pairs = [[run(source, folder, ngram)[:3] for ngram in (13, 0)] for _ in range(rounds)]
    ratios = sorted(with_[1] / without[1] for with_, without in pairs)
    return {
        "cpu_s_with": [round(with_[1], 1) for with_, _ in pairs],
        "cpu_s_without": [round(without[1], 1) for _, without in pairs],
        "ratios": [round(ratio, 3) for ratio in ratios],
        "median_ratio": round(statistics.median(ratios), 3),
        "peak_memory_bytes_with": max(with_[2] for with_, _ in pairs),
        "peak_memory_bytes_without": max(without[2] for _, without in pairs),
    }


def measured(source: Path, folder: Path, rows: int) -> dict[str, Any]:
    """Measure once as prepare is."""
    seconds, _, peak_bytes, counts = run(source, folder)
    return {
        "seconds": round(seconds, 1),
        "rows_per_s": round(rows / seconds),
        "peak_memory_bytes": peak_bytes,
        "counts": counts,
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--form", choices=("jsonl", "parquet", "csv"), default="jsonl")
    parser.add_argument("--words", type=int, default=60, help="of a row")
    parser.add_argument("--rounds", type=int, default=0, help="with and without contamination")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, f"rows.{arguments.form}")
        write_rows(source, arguments.rows, arguments.words)
        result: dict[str, Any] = {
            "rows": arguments.rows,
            "form": arguments.form,
            "source_bytes": source.stat().st_size,
            **(
                compare(source, Path(folder), arguments.rounds)
                if arguments.rounds
                else measured(source, Path(folder), arguments.rows)
            ),
            "hardware": hardware(),
            "python": platform.python_version(),
            "commit": commit(),
        }
    what = f"{result['rows']:,} rows, {result['source_bytes'] / 2**20:.0f} MiB of {result['form']}"
    told = (
        f"{result['median_ratio']} times the processor time without contamination"
        if arguments.rounds
        else f"{result['seconds']} s, {result['peak_memory_bytes'] / 2**20:.0f} MiB"
    )
    sys.stderr.write(f"{what}: {told}\n")
    json.dump(result, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
