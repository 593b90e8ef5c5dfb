"""Claim: the largest model that one GPU trains whole, with all of its weights moving.

    python bench/largest.py --device cuda --json FILE
    python bench/largest.py --device cuda --optimizer adamw_8bit_torchao --json FILE
    python bench/largest.py --device cpu --shape tiny --highest 2     # that it runs at all

Layers of Qwen2.5-7B's shape are added until two training steps on pairs of the chat trace no
longer fit, by bisection, each try in a process of its own through the real stages (bf16,
activation checkpointing full, a micro-batch of 4,096 tokens). Prints weights and peak memory of
every try.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from _report import commit, hardware, write  # noqa: E402
from _traces import SHAPES, Shape, draw_pairs, write_model, write_pairs  # noqa: E402

SHAPES_7B = {"7b": Shape(28, 3584, 28, 4, 18_944, 152_064), **SHAPES}
NUM_PAIRS = 16
SECONDS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--shape", choices=SHAPES_7B, default="7b")
    parser.add_argument("--lowest", type=int, default=1, help="layers of the first try")
    parser.add_argument("--highest", type=int, default=28, help="layers of the last try")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--offload", action="store_true", help="sharding.cpu_offload")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--try-layers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.try_layers:
        try_layers(arguments)
        return
    tries = search(arguments)
    fits = [one for one in tries if one["fits"]]
    best = max(fits, key=lambda one: one["weights"], default=None)
    if best:
        print(
            f"the largest that fits: {best['layers']} layers, {best['weights'] / 1e9:.2f}B weights"
        )
    report = {"hardware": hardware(arguments.device), "commit": commit(),
              "optimizer": arguments.optimizer, "offload": arguments.offload, "tries": tries,
              "largest": best}  # fmt: skip
    write(report, arguments.json)


def search(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Bisect between the lowest and the highest number of layers."""
    tries: list[dict[str, Any]] = []
    low, high = arguments.lowest - 1, arguments.highest + 1
    while high - low > 1:
        layers = arguments.highest if not tries else (low + high) // 2
        tries.append(attempt(arguments, layers))
        if tries[-1]["fits"]:
            low = layers
        else:
            high = layers
    return tries


def attempt(arguments: argparse.Namespace, layers: int) -> dict[str, Any]:
    """Train for two steps in a process of its own, and tell how it went."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--try-layers", str(layers)]
        done = subprocess.run(
            [*command, "--folder", folder],
            capture_output=True, text=True, check=False, timeout=SECONDS,
        )  # fmt: skip
    weights = sized(arguments.shape, layers).num_weights
    found: dict[str, Any] = {"layers": layers, "weights": weights, "fits": done.returncode == 0}
    if found["fits"]:
        found["peak_bytes"] = json.loads(done.stdout.splitlines()[-1])["peak_bytes"]
    elif "out of memory" not in done.stderr.lower() and "OutOfMemory" not in done.stderr:
        raise SystemExit(f"{layers} layers failed, and not for want of memory:\n{done.stderr}")
    peak = f"{found['peak_bytes'] / 2**30:.1f} GiB" if found["fits"] else "does not fit"
    print(f"{layers:>3} layers  {weights / 1e9:6.2f}B  {peak}", flush=True)
    return found


def try_layers(arguments: argparse.Namespace) -> None:
    """Make a model and pairs, score and train; print the peak memory as JSON."""
    from stages import score, train
    from stages.recipe import load_recipe

    folder: Path = arguments.folder
    shape = sized(arguments.shape, arguments.try_layers)
    write_model(shape, folder / "model", arguments.device)
    write_pairs(draw_pairs("chat", NUM_PAIRS, shape.vocab_size), folder / "pairs")
    settings = [
        "chat.template=plain",
        "score.token_budget=4096",
        "train.token_budget=4096",
        "train.activation_checkpointing=full",
        f"train.device={arguments.device}",
        f"train.optimizer={arguments.optimizer}",
        f"train.sharding.cpu_offload={str(arguments.offload).lower()}",
        f"train.batch_size={NUM_PAIRS}",
        "train.epochs=2",
        "train.weights_dtype=bfloat16",
    ]
    config = load_recipe(None, settings).for_iteration(None)
    model = str(folder / "model")
    score.run(config, score.ScoreInputs(folder / "pairs", model), folder / "score")
    manifest = train.run(config, train.TrainInputs(folder / "score", model), folder / "train")
    on_gpu = manifest.info.get("peak_gpu_memory_bytes")
    print(json.dumps({"peak_bytes": on_gpu or manifest.cost.peak_memory_bytes}))


def sized(name: str, layers: int) -> Shape:
    """Return a shape with another number of layers."""
    return dataclasses.replace(SHAPES_7B[name], num_layers=layers)


if __name__ == "__main__":
    main()
