"""When does self-play beat continued SFT? The demo in miniature, one setting changed at a time.

    python bench/regimes.py --json bench/results/regimes.json --plots docs/plots
    python bench/regimes.py --only default,slips-20 --seeds 2
    python bench/regimes.py --quick

Every point is played by three arms that start from the same model, at the same learning rate, batch
and number of optimizer steps, two iterations each:

- **self-play**: the game as `spin run` plays it;
- **control**: `spin run --control`, supervised steps on the human answers of those same pairs, so
  on those that the opponent did not give itself; in iteration 1 on those of its own pairs;
- **sft**: supervised steps on all human rows, with no opponent at all: what one would do otherwise.

A point whose setting is the loss's alone (β, NLL weight) shares its control and sft arms with the
point that differs in nothing else. Held out are 250 careful rows, other ones for every seed.

What is finished stands in RUNS/done.jsonl and is not run again; RUNS also holds what the arms of a
point share: data, first opponent, its answers. Base models of its own kinds are trained there too.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import pyarrow.parquet as pq  # noqa: E402
import yaml  # noqa: E402
from _regimes_report import ARMS, draw, rounded, show, summarize  # noqa: E402
from _report import commit, hardware, write  # noqa: E402
from _word_noise import Noise, Row, human_rows, verdict, wrong_shares  # noqa: E402

BASE_ROWS = 80_000
"""Rows of the stream that base models are trained on."""
ROWS_A_SEED = 4_000
BASES: dict[str, list[str]] = {
    "under-trained": ["sft.max_steps=800"],
    "small": [
        *("sft.architecture.num_layers=2", "sft.architecture.hidden_size=64"),
        *("sft.architecture.intermediate_size=168", "sft.architecture.num_heads=2"),
    ],
}
"""Base models that the bench trains itself, as overrides of configs/demo-base.yaml."""


@dataclass(frozen=True)
class Start:
    """What the arms of a point share: data, first opponent, and its answers."""

    base: str = "demo"
    num_human: int = 1_000
    noise: Noise = "none"
    noise_share: float = 0.0
    sft_steps: int = 8
    """Of the light SFT on up to 512 of the human rows; 0: the base model is the first opponent."""
    num_samples: int = 1


@dataclass(frozen=True)
class Point:
    """One place on the map."""

    name: str
    axis: str
    label: str
    start: Start = Start()
    learning_rate: float = 1e-4
    loss: Mapping[str, float] = field(default_factory=dict)
    """Settings of `train` that only self-play has."""
    length: int = 1
    """Times as many optimizer steps an iteration."""


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    steps: tuple[int, ...] = (24, 12)
    """Optimizer steps of each iteration; about an epoch of the default point's pairs."""
    batch_size: int = 16
    heldout: int = 250
    most_human: int = 3_750
    most_sft_steps: int = 1_000


QUICK = Size(steps=(3, 2), heldout=40, most_human=120, most_sft_steps=2)
D = Start()


def _noisy(noise: Noise, share: float) -> Start:
    return replace(D, noise=noise, noise_share=share)


POINTS = (
    Point("default", "demo", "the demo"),
    Point("slips-20", "noise", "20% of human answers slip", _noisy("slips", 0.2)),
    Point("sloppy-25", "noise", "25% of human answers sloppy", _noisy("sloppy", 0.25)),
    Point("human-64", "human examples", "64 human rows", replace(D, num_human=64)),
    Point(
        *("human-64x8", "human examples", "64 human rows, 8 samples each"),
        replace(D, num_human=64, num_samples=8),
    ),
    Point(
        *("long", "steps", "long: 3,750 rows, 6 times the steps"),
        replace(D, num_human=3_750),
        length=6,
    ),
    Point(
        *("sloppy-25-long", "steps", "long, 25% sloppy"),
        replace(_noisy("sloppy", 0.25), num_human=3_750),
        length=6,
    ),
    Point(
        *("slips-20-long", "steps", "long, 20% slip"),
        replace(_noisy("slips", 0.2), num_human=3_750),
        length=6,
    ),
    Point(
        *("sloppy-25-long-nll", "crossing", "long, 25% sloppy, NLL weight 1"),
        replace(_noisy("sloppy", 0.25), num_human=3_750),
        loss={"nll_weight": 1.0},
        length=6,
    ),
    Point(
        *("sloppy-25-long-beta", "crossing", "long, 25% sloppy, β 1"),
        replace(_noisy("sloppy", 0.25), num_human=3_750),
        loss={"beta": 1.0},
        length=6,
    ),
    Point(
        *("base-sloppy-25-long", "crossing", "long, 25% sloppy, no light SFT"),
        replace(_noisy("sloppy", 0.25), num_human=3_750, sft_steps=0),
        length=6,
    ),
    Point(
        *("base-sloppy-25-long-beta", "crossing", "long, 25% sloppy, no light SFT, β 0.3"),
        replace(_noisy("sloppy", 0.25), num_human=3_750, sft_steps=0),
        loss={"beta": 0.3},
        length=6,
    ),
    Point("lr-4e-4", "learning rate", "learning rate 4e-4", learning_rate=4e-4),
    Point("lr-3e-5", "learning rate", "learning rate 3e-5", learning_rate=3e-5),
    Point("beta-1", "loss", "β 1", loss={"beta": 1.0}),
    Point("beta-0.02", "loss", "β 0.02", loss={"beta": 0.02}),
    Point("nll-1", "loss", "NLL weight 1", loss={"nll_weight": 1.0}),
    Point("base", "opponent", "no light SFT", replace(D, sft_steps=0)),
    Point("saturated", "opponent", "64 SFT steps before", replace(D, sft_steps=64)),
    Point("under-trained", "opponent", "base after 800 steps", replace(D, base="under-trained")),
    Point("small", "capacity", "2 layers, width 64", replace(D, base="small")),
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One course of two iterations: what makes it differ from every other."""

    kind: str
    start: Start
    learning_rate: float
    loss: Mapping[str, float]
    length: int
    seed: int

    def name(self) -> str:
        """Return a name that stands for all of its fields."""
        return f"{self.kind}-{_digest(asdict(self))}"


@dataclass(frozen=True)
class Place:
    """Where the bench works, and on how much."""

    runs: Path
    size: Size

    @property
    def done(self) -> Path:
        """One line of figures for every arm that is finished."""
        return self.runs / "done.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", help="names of points, by commas; others are not run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one seed, one point, very few rows")
    parser.add_argument(
        "--report", action="store_true", help="report what is finished, run nothing"
    )
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plots", type=Path, help="a folder for SVG files")
    arguments = parser.parse_args()
    name = "regimes-quick" if arguments.quick else "regimes"
    place = Place(
        (arguments.runs or Path("runs") / name).resolve(), QUICK if arguments.quick else Size()
    )
    names = (
        arguments.only.split(",") if arguments.only else ["default"] if arguments.quick else None
    )
    points = [point for point in POINTS if names is None or point.name in names]
    seeds = range(1 if arguments.quick else arguments.seeds)
    if not arguments.report:
        play_all(points, seeds, place)
    report = reported(points, seeds, place)
    show(report["points"])
    write(rounded(report), arguments.json)
    if arguments.plots:
        draw(report["points"], arguments.plots)


def play_all(points: Sequence[Point], seeds: Sequence[int], place: Place) -> None:
    """Play what is not finished, seed by seed, so that a bench that is cut off has whole seeds."""
    finished = read_done(place)
    for seed in seeds:
        for point in points:
            for kind in ARMS:
                arm = arm_of(point, kind, seed)
                if arm.name() in finished:
                    continue
                line = {"arm": arm.name(), **play(arm, place), "commit": commit()}
                finished[arm.name()] = line
                with place.done.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                accuracies = [f"{100 * m['sampled_accuracy']:.1f}" for m in line["metrics"]]
                print(point.name, seed, kind, *accuracies, f"{line['seconds']} s", flush=True)


def arm_of(point: Point, kind: str, seed: int) -> Arm:
    """Return an arm of a point; control and sft know nothing of the game's loss."""
    loss = point.loss if kind == "self-play" else {}
    return Arm(kind, point.start, point.learning_rate, loss, point.length, seed)


def read_done(place: Place) -> dict[str, dict[str, Any]]:
    if not place.done.exists():
        return {}
    lines = map(json.loads, place.done.read_text().splitlines())
    return {line["arm"]: line for line in lines}


def reported(points: Sequence[Point], seeds: Sequence[int], place: Place) -> dict[str, Any]:
    """Return the report of those seeds of each point that have all arms."""
    done = read_done(place)
    summaries = []
    for point in points:
        runs = {
            seed: {kind: done[arm_of(point, kind, seed).name()] for kind in ARMS}
            for seed in seeds
            if all(arm_of(point, kind, seed).name() in done for kind in ARMS)
        }
        if runs:
            summaries.append({**asdict(point), **summarize(runs)})
    commits = sorted({line["commit"] for line in done.values()})
    return {
        "hardware": hardware(),
        "commit": commits,
        "size": asdict(place.size),
        "bases": BASES,
        "points": summaries,
    }


# One arm


def play(arm: Arm, place: Place) -> dict[str, Any]:
    """Play an arm and return its figures, from the start's on."""
    shared = make_start(arm.start, arm.seed, place)
    began = time.monotonic()
    run = shared / arm.name()
    shutil.rmtree(run, ignore_errors=True)
    code = (
        _continue_sft(arm, shared, run, place)
        if arm.kind == "sft"
        else _game(arm, shared, run, place)
    )
    iterations = [run / f"iterations/{t:03d}" for t in range(len(place.size.steps))]
    evaluations = [shared / "run/start/evaluate", *(folder / "evaluate" for folder in iterations)]
    prompts = _prompts(shared / "heldout.jsonl")
    metrics = [figures(e, prompts) for e in evaluations if (e / "metrics.json").exists()]
    pairs = [_pairs(folder / "pair/manifest.json") for folder in iterations]
    shutil.rmtree(run)
    seconds = round(time.monotonic() - began, 1)
    return {
        "seed": arm.seed,
        "kind": arm.kind,
        "exit_code": code,
        "seconds": seconds,
        "pairs": pairs,
        "metrics": metrics,
    }


def _game(arm: Arm, shared: Path, run: Path, place: Place) -> int:
    recipe = yaml.safe_load((shared / "recipe.yaml").read_text())
    recipe["train"] |= {"learning_rate": arm.learning_rate, "control": arm.kind == "control"}
    recipe["train"] |= arm.loss
    steps = place.size.steps
    recipe["iterations"] = {
        t: {"train": {"max_steps": num * arm.length}} for t, num in enumerate(steps)
    }
    of_arm = shared / f"{arm.name()}.yaml"
    of_arm.write_text(yaml.safe_dump(recipe))
    _must("init", str(run), "--config", str(of_arm), "--quiet")
    own = shutil.ignore_patterns("run.json", "*.lock", "champion")
    shutil.copytree(shared / "run", run, copy_function=os.link, dirs_exist_ok=True, ignore=own)
    return spin("run", str(of_arm), "--run", str(run), "--iterations", str(len(steps)), "--quiet")


def _continue_sft(arm: Arm, shared: Path, run: Path, place: Place) -> int:
    data, model = str(shared / "run/data"), first_opponent(arm.start, shared, place)
    words = ["--config", str(shared / "recipe.yaml"), "--data", data, "--quiet"]
    for t, steps in enumerate(place.size.steps):
        folder = run / f"iterations/{t:03d}"
        settings = {
            "max_steps": steps * arm.length,
            "max_examples": "null",
            "learning_rate": arm.learning_rate,
            "batch_size": place.size.batch_size,
            "betas": "[0.9, 0.98]",
            "precision": "fp32",
        }
        overrides = [f"sft.{name}={value}" for name, value in settings.items()]
        # A seed of its own, or every iteration would see the rows in one order.
        overrides.append(f"seed={arm.seed + 1000 * t}")
        _must("sft", "--model", model, "--out", str(folder / "train"), *words, *overrides)
        model = str(folder / "train")
        _must("evaluate", "--model", model, "--out", str(folder / "evaluate"), *words)
    return 0


def figures(evaluation: Path, prompts: Mapping[str, str]) -> dict[str, float]:
    """Return an evaluation's metrics, with what was wrong with the sampled answers."""
    metrics = json.loads((evaluation / "metrics.json").read_text())
    columns = ["human", "sampled", "sampled_reward"]
    rows = pq.read_table(evaluation / "examples.parquet", columns=columns).to_pylist()
    verdicts = [verdict(prompts[r["human"]], r["sampled"], r["sampled_reward"]) for r in rows]
    return {**metrics, **wrong_shares(verdicts)}


def _prompts(heldout: Path) -> dict[str, str]:
    """From an answer to a prompt with so many steps; two prompts of one answer have as many."""
    rows = map(json.loads, heldout.read_text().splitlines())
    return {row["response"]: row["prompt"] for row in rows}


def _pairs(manifest: Path) -> int | None:
    return json.loads(manifest.read_text())["counts"]["pairs"] if manifest.exists() else None


# What arms share


def make_start(start: Start, seed: int, place: Place) -> Path:
    """Make data, first opponent, its evaluation, answers and scored pairs, where missing."""
    folder = place.runs / "starts" / _digest([asdict(start), seed])
    finished = folder / "done"
    if finished.exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run, recipe = folder / "run", folder / "recipe.yaml"
    skip = BASE_ROWS + seed * ROWS_A_SEED
    size = place.size
    _write_rows(folder / "heldout.jsonl", human_rows(size.heldout, skip, "none", 0))
    num = min(start.num_human, size.most_human)
    human = human_rows(num, skip + size.heldout, start.noise, start.noise_share)
    _write_rows(folder / "human.jsonl", human)
    recipe.write_text(yaml.safe_dump(recipe_of(start, seed, folder, place)))
    _must("run", str(recipe), "--run", str(run), "--iterations", "0", "--quiet")
    model = ["--model", first_opponent(start, folder, place), "--config", str(recipe), "--quiet"]
    data = ["--data", str(run / "data")]
    stages = {name: str(run / "iterations/000" / name) for name in ("generate", "pair", "score")}
    generated = ["--generations", stages["generate"]]
    _must("generate", *model, *data, "--out", stages["generate"], "--iteration", "0")
    _must("pair", *model, *data, *generated, "--out", stages["pair"], "--iteration", "0")
    _must("score", *model, "--pairs", stages["pair"], "--out", stages["score"], "--iteration", "0")
    finished.touch()
    return folder


def recipe_of(start: Start, seed: int, folder: Path, place: Place) -> dict[str, Any]:
    """Return the demo's recipe with a start's settings."""
    recipe = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
    size = place.size
    recipe |= {"name": "regimes", "seed": seed, "threads": 1}
    recipe["model"] = {"path": base_model(start.base, place)}
    recipe["prepare"] = {
        "format": "prompt_response",
        "source": str(folder / "human.jsonl"),
        "heldout_source": str(folder / "heldout.jsonl"),
        "heldout_size": size.heldout,
    }
    recipe["sft"]["max_steps"] = max(1, min(start.sft_steps, size.most_sft_steps))
    if not start.sft_steps:
        del recipe["sft"]
    recipe["generate"] |= {"num_samples": start.num_samples, "parity": {"rows": 0}}
    recipe["train"]["batch_size"] = size.batch_size
    recipe["promote"]["on_refusal"] = "player"  # the whole curve is wanted, also where it falls
    return recipe


def first_opponent(start: Start, folder: Path, place: Place) -> str:
    return str(folder / "run/models/sft") if start.sft_steps else base_model(start.base, place)


def base_model(name: str, place: Place) -> str:
    """Return the folder of a base model, after training it where it is one of the bench's own."""
    if name == "demo":
        return str(ROOT / "configs/demo-base")
    folder = place.runs / "bases" / name
    words = ["--config", "demo-base", "--quiet", *BASES[name], "threads=1"]
    _must("prepare", "--out", str(place.runs / "bases/data"), "--config", "demo-base", "--quiet")
    _must("sft", "--data", str(place.runs / "bases/data"), "--out", str(folder), *words)
    return str(folder)


def spin(*words: str) -> int:
    """Run a command of `spin` in this process, where torch is loaded once; return its exit code."""
    from spin_cli.app import app

    with contextlib.redirect_stdout(io.StringIO()):
        return app(list(words), standalone_mode=False) or 0


def _must(*words: str) -> None:
    code = spin(*words)
    if code:
        sys.exit(f"regimes: spin {' '.join(words)} ended with exit code {code}")


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


if __name__ == "__main__":
    main()
