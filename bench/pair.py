"""Claim: pair takes 1,000,000 samples in a minute and in less than 1 GB of memory, flat in rows.

    python bench/pair.py [--rows N] [--games human_vs_self best_vs_worst replay] [--json pair.json]

Makes up artifacts (prompts of about 60 tokens, responses of about 110, as the math trace has; one
in ten answers is the human one), runs the stage on them in a process of its own, and prints a line
for each game. `best_vs_worst` has 4 samples a prompt and a reward each; `replay` is human_vs_self
with the pairs of one iteration before beside its own. Memory is that process's high-water mark,
interpreter and libraries included; CPU seconds are those of all its threads.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from _report import commit, hardware, write  # noqa: E402

from stages.artifacts import Outcome, Plan, TableWriter, open_artifact, produce  # noqa: E402
from stages.data.rows import GENERATIONS, PROMPTS, REWARDS  # noqa: E402

SAMPLES = {"human_vs_self": 1, "replay": 1, "best_vs_worst": 4}
PROMPT_TOKENS, RESPONSE_TOKENS, SIGMA = 60, 110, 0.6
CHARACTERS = 330
"""Of a response: three a token."""
IDENTICAL_SHARE = 0.1
VOCAB_SIZE = 4096
BATCH_PROMPTS = 4096
WORDS = [f"{a}{b}{c}" for a in "bdfglmnprst" for b in ("a", "e", "ill", "ou") for c in "dnrst"]


def main() -> None:
    """Measure each game and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--games", nargs="+", choices=tuple(SAMPLES), default=list(SAMPLES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="make the artifacts here, and keep them")
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for game in arguments.games:
            place = (arguments.keep or Path(folder)) / f"{game}-{arguments.rows}"
            make(place, game, arguments.rows)
            results.append({"game": game, "rows": arguments.rows, **in_a_process(place, game)})
            sys.stderr.write(
                "{game}: {rows:,} rows in {seconds:.1f} s ({cpu_s:.1f} s of CPU), "
                "{peak_mib} MiB\n".format(**results[-1])
            )
    report = {"hardware": hardware(), "commit": commit(), "results": results}
    write(report, arguments.json)


def in_a_process(place: Path, game: str) -> dict[str, Any]:
    """Run the stage on the artifacts in a fresh process; return what it took and counted."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=measure, args=(place, game, sender))
    child.start()
    sender.close()
    found: dict[str, Any] = receiver.recv()
    child.join()
    return found


def measure(place: Path, game: str, results: Connection) -> None:
    """Run pair, and send its seconds, peak memory and counts."""
    from stages import pair
    from stages.config import RunConfig

    replay = (place / "pair-before",) if game == "replay" else ()
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    inputs = pair.PairInputs(
        place / "data",
        (place / "generate",),
        str(place / "model"),
        rewards=place / "reward",
        iteration=len(replay),
        replay=replay,
    )
    config = RunConfig.model_validate(settings(game, len(replay)))
    manifest = pair.run(config, inputs, place / f"pair-{time.time_ns()}")
    seconds, used = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    results.send(
        {
            "seconds": round(seconds, 1),
            "cpu_s": round(cpu_s, 1),
            "peak_mib": used.ru_maxrss // 1024,
            "counts": dict(manifest.counts),
        }
    )


def settings(game: str, back: int) -> dict[str, Any]:
    """Return the recipe of a game."""
    if game == "best_vs_worst":
        pairing = {"policy": game}
        return {"pair": pairing, "reward": {"name": "gsm8k"}, "generate": {"num_samples": 4}}
    return {"pair": {"replay": {"iterations": back}}}


def make(place: Path, game: str, num_rows: int) -> None:
    """Make the artifacts that a game reads, unless they are there."""
    num_prompts, num_samples = num_rows // SAMPLES[game], SAMPLES[game]
    make_model(place / "model")
    made_up = MadeUp(num_prompts, num_samples)
    _produce(place / "data", "prepare", {"train-00000.parquet": (PROMPTS, made_up.prompts)}, {})
    data = {"data": open_artifact(place / "data").input_ref(None)}
    parts = {"part-00000.parquet": (GENERATIONS, made_up.generations)}
    _produce(place / "generate", "generate", parts, data, place / "model")
    generations = {"generations": open_artifact(place / "generate").input_ref(None)}
    scores = {"rewards.parquet": (REWARDS, made_up.rewards)}
    _produce(place / "reward", "reward", scores, data | generations)
    if game == "replay":
        _pair_before(place, made_up)


class MadeUp:
    """Streams of rows, the same at each call."""

    def __init__(self, num_prompts: int, num_samples: int) -> None:
        self._num_prompts, self._num_samples = num_prompts, num_samples
        words = np.random.default_rng(0).choice(WORDS, 1_000_000 // 4)
        self._text = np.frombuffer(" ".join(words).encode(), np.uint8)

    def prompts(self) -> Iterator[dict[str, Any]]:
        """Yield columns of PROMPTS."""
        for number, ids in self._ids():
            messages = [[{"role": "user", "content": f"Question {one}?"}] for one in ids]
            yield {
                "prompt_id": ids,
                "messages": messages,
                "response": self._texts(number, len(ids)),
                "source": ["made up"] * len(ids),
                "source_row": np.zeros(len(ids), np.int64),
            }

    def generations(self, salt: int = 1) -> Iterator[dict[str, Any]]:
        """Yield columns of GENERATIONS."""
        for number, ids in self._ids():
            rng = np.random.default_rng([number, salt])
            count = len(ids) * self._num_samples
            human = self._texts(number, len(ids)).take(np.arange(count) // self._num_samples)
            is_human = pa.array(rng.random(count) < IDENTICAL_SHARE)
            own = self._texts(number + (salt << 32), count)
            yield {
                "prompt_id": np.repeat(ids, self._num_samples),
                "sample_index": np.tile(np.arange(self._num_samples), len(ids)).astype(np.int32),
                "seed": np.zeros(count, np.int64),
                "prompt_token_ids": _token_lists(rng, count, PROMPT_TOKENS),
                "response_token_ids": _token_lists(rng, count, RESPONSE_TOKENS),
                "response": pc.if_else(is_human, human, own),
                "finish_reason": np.where(rng.random(count) < 0.01, "length", "stop"),
                "token_logprobs": _token_lists(rng, count, RESPONSE_TOKENS).cast(
                    pa.list_(pa.float32())
                ),
            }

    def rewards(self) -> Iterator[dict[str, Any]]:
        """Yield columns of REWARDS."""
        for number, ids in self._ids():
            count = len(ids) * self._num_samples
            yield {
                "prompt_id": np.repeat(ids, self._num_samples),
                "sample_index": np.tile(np.arange(self._num_samples), len(ids)).astype(np.int32),
                "reward": np.random.default_rng(number).integers(0, 2, count).astype(np.float64),
            }

    def _ids(self) -> Iterator[tuple[int, list[str]]]:
        for start in range(0, self._num_prompts, BATCH_PROMPTS):
            stop = min(start + BATCH_PROMPTS, self._num_prompts)
            yield start, [f"{number:032x}" for number in range(start, stop)]

    def _texts(self, seed: int, count: int) -> pa.Array:
        """Return texts that are pieces of one long one."""
        rng = np.random.default_rng(seed)
        lengths = _lengths(rng, count, CHARACTERS)
        offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
        starts = rng.integers(0, len(self._text) - int(lengths.max()), count)
        places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(self._text[places])]
        return pa.Array.from_buffers(pa.string(), count, buffers)


def make_model(folder: Path) -> None:
    """Write a tokenizer, and weights that nobody reads."""
    import torch
    from safetensors.torch import save_file

    from stages.model.tokenizer import train_tokenizer

    if folder.exists():
        return
    words = np.random.default_rng(0).choice(WORDS, 20_000)
    train_tokenizer([" ".join(words)], VOCAB_SIZE).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")


def _pair_before(place: Path, made_up: MadeUp) -> None:
    """Make the pairs of an iteration before, from samples of its own."""
    from stages import pair
    from stages.config import RunConfig

    parts = {"part-00000.parquet": (GENERATIONS, lambda: made_up.generations(salt=2))}
    data = {"data": open_artifact(place / "data").input_ref(None)}
    _produce(place / "generate-before", "generate", parts, data, place / "model")
    inputs = pair.PairInputs(place / "data", (place / "generate-before",), str(place / "model"))
    pair.run(RunConfig(), inputs, place / "pair-before")


def _produce(
    out: Path,
    stage: str,
    files: dict[str, tuple[pa.Schema, Callable[[], Iterator[dict[str, Any]]]]],
    inputs: dict[str, Any],
    model: Path | None = None,
) -> None:
    def fill(space: Any) -> Outcome:
        for name, (schema, batches) in files.items():
            with TableWriter(space.file(name), schema) as table:
                for columns in batches():
                    rows = pa.table(columns, schema=schema)
                    for batch in rows.to_batches(max_chunksize=BATCH_PROMPTS):
                        table.append_batch(batch)
        return Outcome(counts={})

    from stages.config import ChatConfig
    from stages.data.chat import chat_fingerprints

    fingerprints = chat_fingerprints(model, ChatConfig()) if model else {}
    produce(out, Plan(stage, 1, {}, inputs, fingerprints), fill)


def _lengths(rng: "np.random.Generator", count: int, median: int) -> "np.ndarray[Any, Any]":
    drawn = median * np.exp(SIGMA * rng.standard_normal(count))
    return np.clip(drawn.astype(np.int64), 2, 8 * median)


def _token_lists(rng: "np.random.Generator", count: int, median: int) -> pa.ListArray:
    lengths = _lengths(rng, count, median)
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
    values = rng.integers(3, VOCAB_SIZE, int(offsets[-1]), np.int32)
    return pa.ListArray.from_arrays(offsets, values)


if __name__ == "__main__":
    main()
