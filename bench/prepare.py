"""Claim: prepare takes 1,000,000 rows in well under 1 GB of memory.

    python bench/prepare.py [--rows N] [--form jsonl|parquet|csv] > prepare.json

Writes synthetic rows (1 in 20 a duplicate, 1 in 50 another response to a prompt that was there),
runs the stage in a process of its own, prints a line on stderr and a JSON object on stdout.
Memory is that process's high-water mark, interpreter and libraries included.
"""

import argparse
import csv
import json
import multiprocessing
import platform
import random
import resource
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


def synthetic_rows(num_rows: int) -> Iterator[dict[str, str]]:
    """Stream rows of about 500 characters."""
    rng = random.Random(0)
    for index in range(num_rows):
        prompt_index, response_index = index, index
        if index and index % 20 == 0:
            prompt_index = response_index = index - 1
        elif index and index % 50 == 1:
            prompt_index = index - 1
        asked = " ".join(random.Random(prompt_index).choices(WORDS, k=20))
        prompt = f"Question {prompt_index}: {asked}?"
        if index in (prompt_index, response_index):
            response = f"Answer {response_index}: {' '.join(rng.choices(WORDS, k=40))}."
        yield {"prompt": prompt, "response": response}


def write_rows(path: Path, num_rows: int) -> None:
    """Write the synthetic rows as the form that the path's suffix names."""
    rows = synthetic_rows(num_rows)
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


def measure(source: Path, out: Path, results: Connection) -> None:
    """Run prepare, and send its seconds, peak memory and counts."""
    from stages import prepare
    from stages.config import RunConfig

    section = {"source": str(source), "format": "prompt_response", "heldout_size": 1000}
    start = time.monotonic()
    manifest = prepare.run(RunConfig.model_validate({"prepare": section}), out)
    seconds = time.monotonic() - start
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results.send((seconds, peak_bytes, dict(manifest.counts)))


def main() -> None:
    """Measure once and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--form", choices=("jsonl", "parquet", "csv"), default="jsonl")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, f"rows.{arguments.form}")
        write_rows(source, arguments.rows)
        receiver, sender = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("spawn")
        child = context.Process(target=measure, args=(source, Path(folder, "data"), sender))
        child.start()
        sender.close()
        seconds, peak_bytes, counts = receiver.recv()
        child.join()
        result: dict[str, Any] = {
            "rows": arguments.rows,
            "form": arguments.form,
            "source_bytes": source.stat().st_size,
            "seconds": round(seconds, 1),
            "rows_per_s": round(arguments.rows / seconds),
            "peak_memory_bytes": peak_bytes,
            "counts": counts,
            "hardware": hardware(),
            "python": platform.python_version(),
            "commit": commit(),
        }
    sys.stderr.write(
        f"{result['rows']:,} rows, {result['source_bytes'] / 2**20:.0f} MiB of {result['form']}: "
        f"{result['seconds']} s, {result['peak_memory_bytes'] / 2**20:.0f} MiB\n"
    )
    json.dump(result, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
