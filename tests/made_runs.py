"""Made-up runs: artifacts with figures in all the places that a report reads, in milliseconds."""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.artifacts import (
    Outcome,
    Plan,
    TableWriter,
    Workspace,
    open_artifact,
    produce,
    read_manifest,
)
from stages.artifacts.json_file import write_object
from stages.artifacts.manifest import MANIFEST_NAME, InputRef
from stages.artifacts.pointer import PointerEntry, move_pointer, read_pointer
from stages.data.rows import TRAIN_METRICS
from stages.decisions import DECISION
from stages.layout import RunLayout
from stages.recipe import Recipe, load_recipe
from stages.run_record import start_or_resume
from tests.made_samples import Sample, write_data, write_evaluation

PROMPTS = 40
PAIRS = 12
STEPS = 5


def write_run(
    folder: Path, iterations: int = 2, *overrides: str, refused: tuple[int, ...] = ()
) -> RunLayout:
    """Write a run whose player gets right two held-out prompts more in each iteration.

    Args:
        refused: iterations whose player is not promoted.
    """
    layout = RunLayout(folder)
    recipe = load_recipe(None, ["promote.metric=sampled_accuracy", *overrides])
    start_or_resume(layout, recipe)
    write_data(layout.data, samples(0))
    write_evaluation(layout.start_evaluation, samples(10), layout.data)
    for iteration in range(iterations):
        write_iteration(layout, recipe, iteration, promoted=iteration not in refused)
    return layout


def write_iteration(
    layout: RunLayout,
    recipe: Recipe,
    iteration: int,
    *,
    promoted: bool = True,
    from_champion: bool = False,
) -> None:
    """Write all stages of an iteration, its decision and the pointer's move.

    Args:
        from_champion: its opponent is the champion, or the start, and not the player before it.
    """
    before = layout.stage(iteration - 1, "train") if iteration else None
    if from_champion:
        pointer = read_pointer(layout.champion)
        before = layout.root / pointer.path if pointer else None
    opponent = {"model": ref(layout, before)} if before else {"model": outside("base")}
    data = {"data": ref(layout, layout.data)}
    make(layout, iteration, "generate", data | opponent, counts={
        "train_prompts": 2 * PROMPTS, "drawn": PROMPTS, "prompts": PROMPTS, "rows": PROMPTS,
    })  # fmt: skip
    generated = inputs(layout, iteration, generations="generate")
    make(layout, iteration, "pair", data | generated, counts={
        "candidates": PROMPTS, "pairs": PAIRS, "dropped_identical": PROMPTS - PAIRS - 1,
        "dropped_cut_off": 1,
    }, files={"report.json": pair_report()})  # fmt: skip
    make(layout, iteration, "score", opponent | inputs(layout, iteration, pairs="pair"))
    config = {"seed": 0, "train": recipe.for_iteration(iteration).train.identity()}
    make(
        layout, iteration, "train", opponent | inputs(layout, iteration, pairs="score"),
        counts={"pairs": PAIRS, "steps": STEPS}, config=config, tokens=1000,
        info={"processes": 2, "gpus": 2, "peak_gpu_memory_bytes": 3_000_000_000},
        tables={"metrics.parquet": (TRAIN_METRICS, steps(iteration))},
    )  # fmt: skip
    evaluated = layout.stage(iteration, "evaluate")
    write_evaluation(evaluated, samples(12 + 2 * iteration), layout.data)
    decide(layout, iteration, promoted=promoted)


def samples(right: int) -> list[Sample]:
    """Answers to held-out prompts, so many of which are right."""
    return [
        Sample(f"Question {i}?", f"human {i}", f"player {i} {'word ' * (i % 7)}", f"opponent {i}",
               greedy=f"greedy {i}", player_reward=float(i < right), opponent_reward=0.0,
               margin=i / 10 - 1)
        for i in range(PROMPTS)
    ]  # fmt: skip


def decide(layout: RunLayout, iteration: int, *, promoted: bool = True, **changes: Any) -> None:
    """Write a decision, and move the pointer where it promotes."""
    decision = {
        "promoted": promoted, "metric": "sampled_accuracy", "value": 0.5, "champion_value": 0.25,
        "min_value": None, "min_gain": 0.0, "reasons": [f"the reason of {iteration}"],
        "alarms": [alarm()] if not promoted else [],
    }  # fmt: skip
    files = {DECISION: decision | changes}
    make(
        layout, iteration, "promote", inputs(layout, iteration, evaluation="evaluate"), files=files
    )
    if promoted:
        train = open_artifact(layout.stage(iteration, "train"))
        path = layout.relative(train.path)
        move_pointer(layout.champion, PointerEntry(
            path=path, key=train.manifest.key, reason=f"the reason of {iteration}",
            decision_key=f"decision {iteration}", at="2026-01-02T03:04:05+00:00",
        ))  # fmt: skip


def alarm() -> dict[str, Any]:
    return {"name": "length_drift", "stage": "evaluate", "value": 2.0, "threshold": 1.5,
            "action": "refuse", "text": "answers are twice as long"}  # fmt: skip


def make(
    layout: RunLayout,
    iteration: int,
    stage: str,
    refs: dict[str, InputRef],
    *,
    counts: dict[str, int] | None = None,
    config: dict[str, Any] | None = None,
    files: dict[str, dict[str, Any]] | None = None,
    info: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    tokens: int = 0,
    tables: Mapping[str, tuple[pa.Schema, Sequence[Mapping[str, Any]]]] | None = None,
) -> None:
    """Make one artifact of an iteration; `pool-N` is what a member of the pool answers."""

    def fill(space: Workspace) -> Outcome:
        for name, value in (files or {"config.json": {}}).items():
            write_object(space.file(name), value)
        for name, (schema, rows) in (tables or {}).items():
            with TableWriter(space.file(name), schema) as table:
                table.extend(rows)
        return Outcome(
            counts=counts or {}, info=info or {}, metrics=metrics or {}, tokens=tokens,
            peak_memory_bytes=1_000_000,
        )  # fmt: skip

    name, dash, member = stage.partition("-")
    out = layout.pool(iteration, int(member)) if dash else layout.stage(iteration, stage)
    made_by = "generate" if name == "pool" else stage
    produce(out, Plan(made_by, 1, config or {"seed": 0}, refs, {}), fill)


def steps(iteration: int) -> list[dict[str, Any]]:
    """Rows of TRAIN_METRICS; no two figures of any column, step and iteration are the same."""
    places = {name: place for place, name in enumerate(TRAIN_METRICS.names)}
    return [
        {name: (place + iteration / 10 + step / 100) / 20 for name, place in places.items()}
        | {"step": step, "loss": math.log(2) - step / 10 - iteration / 100, "pairs": 4,
           "tokens": 100}
        for step in range(STEPS)
    ]  # fmt: skip


def charge(artifact: Path, **cost: float) -> None:
    """Say in an artifact's manifest that making it took this."""
    manifest = read_manifest(artifact)
    charged = {"cost": manifest.cost.model_copy(update=cost)}
    (artifact / MANIFEST_NAME).write_text(manifest.model_copy(update=charged).to_text())


def pair_report() -> dict[str, Any]:
    tokens = {"mean": 20.5, "quantiles": {"0.5": 20}}
    length = {"chosen_longer_share": 0.75, "rule": "longer", "rule_accuracy": 0.75, "auc": 0.8}
    return {"pairs": {"pairs": PAIRS, "chosen_tokens": tokens, "rejected_tokens": tokens,
                      "margin": None, "length": length}}  # fmt: skip


def inputs(layout: RunLayout, iteration: int, **stages: str) -> dict[str, InputRef]:
    return {name: ref(layout, layout.stage(iteration, stage)) for name, stage in stages.items()}


def ref(layout: RunLayout, place: Path) -> InputRef:
    return open_artifact(place).input_ref(layout.root)


def outside(name: str) -> InputRef:
    return InputRef(path=name, inside_run=False, key=f"folder:{name}", content=name)


def ask_otherwise(evaluation: Path, data: Path) -> None:
    """Make an evaluation anew, as one that asked at another temperature."""
    shutil.rmtree(evaluation)
    write_evaluation(evaluation, samples(10), data, config={"evaluate": {"temperature": 0.5}})
