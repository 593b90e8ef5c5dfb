"""A demo at several seeds: does sampled held-out accuracy rise to 0.90 each time?

    python bench/demo_seeds.py --seeds 5 --json bench/results/demo_seeds.json
    python bench/demo_seeds.py --recipe demo-ranked --json bench/results/demo_ranked_seeds.json

Runs `spin run RECIPE` (and with --control its control arm) once a seed, reads
`spin status --json`, prints a table and writes the figures.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _report import commit, hardware, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--control", action="store_true", help="the control arm as well")
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--json", type=Path)
    arguments, overrides = parser.parse_known_args()
    rows = [
        play(seed, control, arguments, overrides)
        for seed in range(arguments.seeds)
        for control in ([False, True] if arguments.control else [False])
    ]
    show(rows)
    report = {
        "recipe": arguments.recipe,
        "hardware": hardware(),
        "commit": commit(),
        "overrides": overrides,
        "runs": rows,
    }
    write(report, arguments.json)


def play(
    seed: int, control: bool, arguments: argparse.Namespace, overrides: list[str]
) -> dict[str, Any]:
    """Run the recipe once and return its curve."""
    run = arguments.runs / arguments.recipe / f"{seed}"
    command = [sys.executable, "-m", "spin_cli", "run", arguments.recipe, "--run", str(run)]
    command += ["--iterations", str(arguments.iterations), "--quiet"]
    command += (["--control"] if control else []) + [f"seed={seed}", *overrides]
    started = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    seconds = time.monotonic() - started
    place = f"{run}-control" if control else str(run)
    status = json.loads(
        subprocess.check_output([sys.executable, "-m", "spin_cli", "status", place, "--json"])
    )
    metrics = [status["start"]["metrics"], *(i["metrics"] for i in status["iterations"])]
    return {
        "seed": seed,
        "arm": "control" if control else "self-play",
        "exit_code": done.returncode,
        "seconds": round(seconds, 1),
        "sampled_accuracy": [m.get("sampled_accuracy") for m in metrics],
        "greedy_accuracy": [m.get("greedy_accuracy") for m in metrics],
        "identical_share": [m.get("identical_share") for m in metrics],
        "heldout_reward_accuracy": [m.get("heldout_reward_accuracy") for m in metrics],
    }


def show(rows: list[dict[str, Any]]) -> None:
    iterations = max(len(row["sampled_accuracy"]) for row in rows) - 1
    heads = ["seed", "arm", "start", *(f"it. {t}" for t in range(iterations)), "exit", "seconds"]
    print("  ".join(f"{head:>9}" for head in heads))
    for row in rows:
        curve = [f"{100 * x:.1f}%" if x is not None else "-" for x in row["sampled_accuracy"]]
        curve += ["-"] * (iterations + 1 - len(curve))
        cells = [row["seed"], row["arm"], *curve, row["exit_code"], row["seconds"]]
        print("  ".join(f"{cell!s:>9}" for cell in cells))


if __name__ == "__main__":
    main()
