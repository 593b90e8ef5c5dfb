"""status: what a run holds, from its manifests alone; nothing is recomputed, nothing is written.

It works while the run goes on, and never makes a stage wait.
"""

import fcntl
import glob
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stages.artifacts import Artifact, Manifest, open_artifact
from stages.artifacts.json_file import read_object
from stages.artifacts.locks import lock_path
from stages.artifacts.manifest import MANIFEST_NAME
from stages.artifacts.pointer import Pointer, read_pointer
from stages.config import RunConfig
from stages.convergence import converged
from stages.data.measures import INTERVALS_FILE
from stages.decisions import DECISION, METRICS, is_rolled_back
from stages.ending import read_ending
from stages.errors import SpinError
from stages.layout import ITERATION_STAGES, RunLayout
from stages.recipe import Recipe
from stages.run_record import read_recipe


def status(run: Path) -> dict[str, Any]:
    """Return the state of a run as plain JSON values.

    `run` is the path as given; `champion` the champion's path relative to it, or None; `ended` how
    the last `spin run` ended before its time, as {at, exit_code, message}, or None; `start` what
    was found for the first opponent, as {metrics, intervals, suites}; `iterations` a list of
    {index, stages, metrics, intervals, suites, decision, rolled_back, reference, optimizer,
    changed, training, converged}. `stages` maps a name to {state, key, seconds}, state being done,
    running, partial (an attempt that was cut off), missing or corrupt. `metrics` are evaluate's,
    and pair's `identical_share`; `intervals` theirs at 95%; `suites` maps a suite to its {metrics,
    intervals}. `decision` is that of promote, or None, and `rolled_back` whether the pointer was
    taken back from it since. `reference` is the model that the pairs were scored under, `optimizer`
    the player whose optimizer's state was carried on, or "fresh"; `changed` maps settings that the
    player was trained with and that are others in the recipe, such as a learning rate that `retry`
    lowered, to {value, recipe}; `converged` says why the run may end with this iteration, or is
    None.

    Raises:
        InputError: `run` is no run directory.
        CorruptError: its run.json or its pointer is damaged.
    """
    layout = RunLayout(run)
    recipe = read_recipe(layout)
    pointer, ending = read_pointer(layout.champion), read_ending(layout)
    return {
        "run": str(run),
        "champion": pointer.path if pointer else None,
        "ended": asdict(ending) if ending else None,
        "start": {
            **_evaluation(layout.start_evaluation),
            "suites": _suites(layout, recipe.for_iteration(), None),
        },
        "iterations": [_iteration(layout, recipe, t, pointer) for t in layout.iterations()],
    }


def stage_state(out: Path) -> dict[str, Any]:
    """Return {state, key, seconds} of one artifact; key and seconds are None unless it is done."""
    done = _finished(out)
    if isinstance(done, Manifest):
        return {"state": "done", "key": done.key, "seconds": done.cost.wall_s}
    return {"state": done, "key": None, "seconds": None}


def _iteration(
    layout: RunLayout, recipe: Recipe, iteration: int, pointer: Pointer | None
) -> dict[str, Any]:
    config = recipe.for_iteration(iteration)
    places = {name: layout.stage(iteration, name) for name in ITERATION_STAGES}
    pool = range(1, min(config.generate.pool.size, iteration) + 1)
    places |= {f"pool-{member}": layout.pool(iteration, member) for member in pool}
    suites = config.suites_after(iteration)
    places |= {f"suite-{name}": layout.suite(iteration, name) for name in suites}
    stages = {name: stage_state(place) for name, place in places.items()}
    if stages["pair"]["state"] == "done":  # the pool that it was made with counts
        stages = {n: s for n, s in stages.items() if n[:5] != "pool-" or s["state"] != "missing"}
    if not config.pair.needs_rewards and stages["reward"]["state"] == "missing":
        del stages["reward"]
    evaluation = _evaluation(layout.stage(iteration, "evaluate"))
    metrics = evaluation["metrics"]
    pairs = _finished(layout.stage(iteration, "pair"))
    if isinstance(pairs, Manifest) and "identical_share" in pairs.metrics:
        metrics["identical_share"] = pairs.metrics["identical_share"]
    decision = _object(layout.stage(iteration, "promote"), DECISION)
    return {
        "index": iteration,
        "stages": stages,
        **evaluation,
        "suites": _suites(layout, config, iteration),
        "decision": decision,
        "rolled_back": is_rolled_back(layout, iteration, pointer),
        "reference": _reference(layout, iteration),
        "optimizer": _optimizer(layout, iteration),
        "changed": _changed(layout, config, iteration),
        "training": _training(layout, iteration),
        "converged": _converged(layout, recipe, iteration) if decision else None,
    }


def _reference(layout: RunLayout, iteration: int) -> str | None:
    """Return the model that the pairs were scored under, or None where they are not yet."""
    scored = _finished(layout.stage(iteration, "score"))
    return scored.inputs["model"].path if isinstance(scored, Manifest) else None


def _optimizer(layout: RunLayout, iteration: int) -> str | None:
    """Return the player whose optimizer was gone on with, "fresh", or None before training."""
    trained = _finished(layout.stage(iteration, "train"))
    if not isinstance(trained, Manifest):
        return None
    carried = trained.inputs.get("optimizer_from")
    return carried.path if carried else "fresh"


def _changed(layout: RunLayout, config: RunConfig, iteration: int) -> dict[str, Any]:
    """Return the settings that `adapt` and `retry` change, where training had others."""
    trained = _finished(layout.stage(iteration, "train"))
    own = trained.config.get("train", {}) if isinstance(trained, Manifest) else {}
    found = {}
    for name in ("learning_rate", "beta"):
        recipe = getattr(config.train, name)
        if own.get(name, recipe) != recipe:
            found[f"train.{name}"] = {"value": own[name], "recipe": recipe}
    return found


def _training(layout: RunLayout, iteration: int) -> dict[str, Any] | None:
    """Return train's own metrics, or None before training."""
    trained = _finished(layout.stage(iteration, "train"))
    return dict(trained.metrics) if isinstance(trained, Manifest) else None


def _converged(layout: RunLayout, recipe: Recipe, iteration: int) -> str | None:
    try:
        return converged(layout, recipe, iteration)
    except SpinError:  # a stage's state says what is wrong
        return None


def _suites(layout: RunLayout, config: RunConfig, iteration: int | None) -> dict[str, Any]:
    found = {name: _evaluation(layout.suite(iteration, name)) for name in config.suites}
    return {name: evaluation for name, evaluation in found.items() if evaluation["metrics"]}


def _evaluation(out: Path) -> dict[str, Any]:
    return {
        "metrics": _object(out, METRICS) or {},
        "intervals": _object(out, INTERVALS_FILE) or {},
    }


def _object(out: Path, relative: str) -> dict[str, Any] | None:
    """Return a JSON file of an artifact, or None when the artifact is not there or not sound."""
    try:
        return read_object(open_artifact(out), relative)
    except SpinError:  # the stage's state says what is wrong
        return None


def _finished(out: Path) -> Manifest | str:
    """Return the manifest of a finished, complete artifact, or the state that it is in."""
    for _ in range(2):  # a second look, for what was renamed into place during the first
        if (out / MANIFEST_NAME).exists():
            try:
                artifact = open_artifact(out)
                _check_small_files(artifact)
            except (SpinError, OSError):
                return "corrupt"
            return artifact.manifest
        if _is_locked(lock_path(out)):
            return "running"
        attempts = out.parent.glob(f".{glob.escape(out.name)}.*.partial")
        state = "partial" if any(attempts) else "missing"
    strangers = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    return "corrupt" if strangers else state


def _check_small_files(artifact: Artifact) -> None:
    """Check the hashes of the files that status itself reads."""
    for entry in artifact.manifest.files:
        if entry.path in (METRICS, DECISION, INTERVALS_FILE):
            artifact.file(entry.path)


def _is_locked(path: Path) -> bool:
    """Tell whether a living process holds a lock, without creating its file.

    A shared lock is tried for an instant, and only where a holder's note stands: a process that
    starts at that moment finds no note, so it is not turned away.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        if os.fstat(descriptor).st_size == 0:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
