"""Short iterations with vLLM: what `spin run --keep-engine` saves.

    python bench/keep_engine.py --json bench/results/keep_engine.json

Plays the same small run with and without the flag, 64 prompts and one optimizer step an iteration,
prints seconds an iteration, and checks that both gave the same answers. Other settings, such as
`generate.engine.name=transformers`, may follow.
"""

import argparse
import itertools
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import pyarrow.parquet as pq
from _report import commit, hardware, write

from stages.artifacts import read_manifest
from stages.layout import RunLayout

RECIPE = """
name: keep-engine
threads: 1  # two that wait for each other suffer most from other work on the machine
chat: {template: plain}
prepare:
  format: word_sums
  word_sums: {num_examples: 800}
  heldout_size: 64
sft:
  init: random
  architecture: {num_layers: 4, hidden_size: 128, intermediate_size: 256, num_heads: 4}
  learning_rate: 2.0e-3
  batch_size: 32
  epochs: 2
  precision: fp32
generate:
  max_new_tokens: 64
  max_prompts: 64
  engine: {name: vllm, dtype: float32}
reward: {name: gsm8k}
pair: {drop_cut_off: false}
score: {precision: fp32}
train: {learning_rate: 1.0e-4, batch_size: 64, precision: fp32}
evaluate: {max_new_tokens: 64, precision: fp32}
promote: {metric: heldout_reward_accuracy, min_value: 0.0}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments, overrides = parser.parse_known_args()
    with TemporaryDirectory(prefix="keep-engine-") as folder:
        recipe = Path(folder, "recipe.yaml")
        recipe.write_text(RECIPE)
        arms = {
            name: play(recipe, Path(folder, name), flags, arguments.iterations, overrides)
            for name, flags in {"cold": [], "kept": ["--keep-engine"]}.items()
        }
        same = same_answers(Path(folder, "cold"), Path(folder, "kept"), arguments.iterations)
    show(arms, same)
    report = {
        "hardware": hardware(),
        "commit": commit(),
        "load_average": round(os.getloadavg()[0], 2),
        "overrides": overrides,
        "arms": arms,
        "same_tokens_share": same,
    }
    write(report, arguments.json)


def play(
    recipe: Path, run: Path, flags: list[str], iterations: int, overrides: list[str]
) -> dict[str, Any]:
    """Run the loop once; return seconds, those of an iteration from gate to gate."""
    command = [sys.executable, "-m", "spin_cli", "run", str(recipe), "--run", str(run)]
    command += ["--iterations", str(iterations), "--quiet", *flags, *overrides]
    started, cpu = time.monotonic(), cpu_seconds()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    total, cpu = time.monotonic() - started, cpu_seconds() - cpu
    layout = RunLayout(run)
    played = range(iterations)
    steps = [read_manifest(layout.stage(t, "train")).counts["steps"] for t in played]
    gates = [layout.start_evaluation, *(layout.stage(t, "promote") for t in played)]
    ends = [(gate / "manifest.json").stat().st_mtime for gate in gates]
    seconds = [round(end - begin, 2) for begin, end in itertools.pairwise(ends)]
    return {
        "total_seconds": round(total, 2),
        "cpu_seconds": round(cpu, 1),
        "seconds_an_iteration": seconds,
        "median_seconds_an_iteration": round(statistics.median(seconds), 2),
        "generate_and_evaluate_seconds": [round(engine_seconds(layout, t), 2) for t in played],
        "optimizer_steps": steps,
    }


def engine_seconds(layout: RunLayout, iteration: int) -> float:
    """Return the time of the stages that an engine works in."""
    stages = ("generate", "evaluate")
    return sum(read_manifest(layout.stage(iteration, s)).cost.wall_s for s in stages)


def cpu_seconds() -> float:
    """Return the processor time of all processes that ended: steadier than the clock's."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def same_answers(one: Path, other: Path, iterations: int) -> float:
    """Return the share of all generated rows whose tokens are the same in both runs."""
    answers = [tokens(run, iterations) for run in (one, other)]
    assert answers[0].keys() == answers[1].keys()
    equal = sum(answers[0][name] == answers[1][name] for name in answers[0])
    return round(equal / len(answers[0]), 4)


def tokens(run: Path, iterations: int) -> dict[tuple[int, str], list[int]]:
    return {
        (iteration, row["prompt_id"]): row["response_token_ids"]
        for iteration in range(iterations)
        for file in RunLayout(run).stage(iteration, "generate").glob("part-*.parquet")
        for row in pq.read_table(file).to_pylist()
    }


def show(arms: dict[str, dict[str, Any]], same: float) -> None:
    for name, arm in arms.items():
        each = "  ".join(f"{seconds:6.1f}" for seconds in arm["seconds_an_iteration"])
        median, total, cpu = (
            arm[key] for key in ("median_seconds_an_iteration", "total_seconds", "cpu_seconds")
        )
        print(
            f"{name:>5}: {each}  median {median:6.1f} s an iteration, {total:.1f} s in all, "
            f"{cpu:.1f} s of processors"
        )
    cold, kept = (arms[name]["median_seconds_an_iteration"] for name in ("cold", "kept"))
    print(
        f"kept iterations are {cold / kept:.2f} times as fast; "
        f"{100 * same:.1f}% of the rows are equal"
    )


if __name__ == "__main__":
    main()
