"""Making the chain of an artifact again, in another run directory; see stages/reproduce.py."""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin_cli.steps import Step, execute
from stages.artifacts import InputRef, Manifest, open_artifact, run_root
from stages.artifacts.locks import hold
from stages.artifacts.manifest import MANIFEST_NAME
from stages.config import RunConfig
from stages.errors import ConfigError, InputError
from stages.layout import RunLayout
from stages.lineage import Lineage, Node
from stages.recipe import Recipe
from stages.reproduce import (
    Agreement,
    begin,
    check_beginning,
    compare,
    recorded,
    recorded_intervals,
    replayed,
    threads_of,
)
from stages.run_record import first_difference, read_recipe

if TYPE_CHECKING:
    from stages.evidence import PromoteInputs

log = logging.getLogger("spin")

_MODELS = {"model": "revision", "opponent": "opponent_revision"}
"""Inputs that may lie outside of the run, as the recipe's model; with the options of the commit."""
_SEVERAL = re.compile(r"(generations|replay)(?:_(\d+))?")
_SINGLE = (
    "data", "model", "rewards", "pairs", "optimizer_from", "opponent", "opponent_evaluation",
    "answers", "against", "judged",
)  # fmt: skip
"""Inputs that have an option of the same name; others a stage finds by itself."""
_SHOWN_CHARS = 19
"""Of a key such as `folder:0123456789ab…`."""


def replay(
    original: Lineage,
    folder: Path,
    *,
    tolerance: float,
    overrides: Sequence[str] = (),
    verify: bool = True,
) -> Iterator[Agreement]:
    """Make a chain again in the run directory `folder`, and compare each artifact when it is made.

    Whether it can be made is checked at once; the work is done as what is returned is read. What is
    there already, from an earlier call, is not made again; its files are hashed.

    Args:
        overrides: settings that name places or change speed, such as where the start model lies
            on this machine.
        verify: check the bytes of what is read, and of what is there already.

    Raises:
        ConfigError: the place is taken, is another run, or lies in the original one; or an override
            would decide a result.
        InputError: a model from outside of the run is not there any more, or is another now; or
            something on the way cannot be made again.
        CorruptError: the bytes of what is there already have changed.
        BusyError: another process is at work there.
    """
    assert original.root is not None, "chains are those of runs"
    recipe = _with_places(read_recipe(RunLayout(original.root)), overrides)
    _check_place(folder, original.root)
    _check_models(original, recipe, verify)
    layout = RunLayout(folder)
    check_beginning(layout, recipe, original.root)
    works = _works(original, layout, recipe, verify)
    return _replayed(works, layout, recipe, original.root, tolerance, verify)


def _replayed(
    works: "Sequence[_Work]",
    layout: RunLayout,
    recipe: Recipe,
    root: Path,
    tolerance: float,
    verify: bool,
) -> Iterator[Agreement]:
    same: dict[str, bool] = {}
    with hold(layout.lock, f"run {layout.root}"):
        begin(layout, recipe, root)
        for work in works:
            node, place = work.node, work.step.out
            was_there = (place / MANIFEST_NAME).is_file()
            made = _make(work, layout)
            if was_there and verify:
                open_artifact(place).files()
            found = compare(
                node.path,
                work.manifest,
                made,
                inputs_agree=all(same.get(name, True) for name in node.inputs.values()),
                tolerance=tolerance,
                intervals=recorded_intervals(root / node.path, work.manifest),
                made_now=not was_there,
            )
            same[node.id] = found.same_bytes
            yield found


@dataclass(frozen=True)
class _Work:
    """One artifact that is to be made again."""

    node: Node
    manifest: Manifest
    step: Step
    config: RunConfig
    replayed: dict[str, Any]
    """Settings that are not what the recipe says, from dotted name to value."""


def _works(original: Lineage, layout: RunLayout, recipe: Recipe, verify: bool) -> list[_Work]:
    """Return all that is to be made, in order; what cannot be made is found before the first."""
    threads = threads_of(original, recipe.for_iteration().threads)
    works = []
    for node, manifest in original.made():
        step = step_of(node, original, layout, recipe)
        used = recorded(recipe, manifest, step.iteration)
        place = {"verify": verify, "threads": threads[node.id]}
        config = used.for_iteration(step.iteration).model_copy(update=place)
        works.append(_Work(node, manifest, step, config, replayed(recipe, used)))
    return works


def _with_places(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    moved = recipe.with_overrides(overrides)
    difference = first_difference(recipe, moved)
    if difference is not None:
        raise ConfigError(
            f"a reproduction has the settings of the original, and only places and speed may be "
            f"others: {difference}; leave that out"
        )
    return moved


def step_of(node: Node, original: Lineage, layout: RunLayout, recipe: Recipe) -> Step:
    """Return the step that makes an artifact at the same place of another run.

    Args:
        original: the chain that the artifact is of.
        layout: of the other run.
        recipe: names the model that inputs from outside of the run mean.

    Raises:
        InputError: it was made from something outside of the run that no recipe names.
    """
    manifest = node.manifest
    assert manifest is not None, "what was made has a manifest"
    iteration = manifest.config.get("iteration", layout.iteration_of(node.path))
    options: dict[str, str] = {}
    several: dict[str, list[str]] = {}
    for name, ref in sorted(_inputs(node, original).items(), key=lambda item: _number(item[0])):
        match = _SEVERAL.fullmatch(name)
        if not ref.inside_run and (match or name in _SINGLE) and name not in _MODELS:
            raise _from_outside(node, name, ref)
        if match:
            several.setdefault(match[1], []).append(str(layout.root / ref.path))
        elif ref.inside_run and name in _SINGLE:
            options[name] = str(layout.root / ref.path)
        elif name in _MODELS:
            options |= _outside(name, recipe.for_iteration())
    part = manifest.config.get("part")
    if part is not None:
        options["part"] = f"{part['member']}/{part['members']}"
    stage = manifest.stage
    if stage == "suite":
        stage, options["suite"] = "evaluate", str(manifest.config["suite"])
    if stage == "prepare" and node.path != layout.relative(layout.data):
        options["suite"] = Path(node.path).name
    return Step(stage, layout.root / node.path, iteration, options, several)


def _from_outside(node: Node, name: str, ref: InputRef) -> InputError:
    if name == "judged":
        return InputError(
            f"{node.path} rests on what an outside judge found ({ref.path}), which spin cannot "
            "ask again; reproduce the answers that were judged instead"
        )
    return InputError(
        f"{node.path} was made from {ref.path} (its {name}), which lies outside of the run and has "
        "no place in its recipe; reproduce what is in the run instead"
    )


def _inputs(node: Node, original: Lineage) -> dict[str, InputRef]:
    """Return the inputs of an artifact; of pair also the model, which its manifest leaves out.

    Only the tokenizer decides there: it is that of the model which answered.
    """
    assert node.manifest is not None, "what was made has a manifest"
    inputs = dict(node.manifest.inputs)
    if node.manifest.stage == "pair":
        answered = original.nodes[node.inputs["generations"]].manifest
        assert answered is not None, "a chain without problems lacks nothing"
        inputs["model"] = answered.inputs["model"]
    return inputs


def _make(work: _Work, layout: RunLayout) -> Manifest:
    for name, value in work.replayed.items():
        log.info("%s: %s=%s, as it was", work.step.title(), name, value)
    if work.step.stage == "promote":
        from stages import promote

        return promote.run(work.config, _promote_inputs(work.manifest, layout), work.step.out)
    return execute(work.step, work.config)


def _promote_inputs(manifest: Manifest, layout: RunLayout) -> "PromoteInputs":
    """Return what a decision rested on; whom the pointer says now is not asked."""
    from stages.evidence import recorded_evidence

    return recorded_evidence(layout, manifest)


def _outside(name: str, config: RunConfig) -> dict[str, str]:
    """Return the options that name the recipe's own model."""
    path, revision = config.model.path, config.model.revision
    return {
        **({name: path} if path is not None else {}),
        **({_MODELS[name]: revision} if revision is not None else {}),
    }


def _number(name: str) -> int:
    match = _SEVERAL.fullmatch(name)
    return int(match[2] or 0) if match else 0


def _check_place(folder: Path, root: Path) -> None:
    """Check that a new run at `folder` would lie in no other."""
    place = folder.resolve()
    above = run_root(place)
    if place == root.resolve() or above is not None:
        raise ConfigError(
            f"{folder} lies in the run {above or root}; name a folder outside of it: --in DIR"
        )


def _check_models(original: Lineage, recipe: Recipe, verify: bool) -> None:
    """Check that the models from outside of the run are those that were used."""
    from stages.model.source import resolve_model

    model = recipe.for_iteration().model
    checked: set[tuple[str, str]] = set()
    for node, manifest in original.made():
        for name, ref in manifest.inputs.items():
            if ref.inside_run or name not in _MODELS or (ref.key, ref.content) in checked:
                continue
            if model.path is None:
                raise _other_model(node, ref, "the recipe names no model (model.path)")
            found = resolve_model(model.path, model.revision, None, verify).ref
            if (found.key, found.content) != (ref.key, ref.content):
                now = f"the recipe's model.path={model.path} has {found.key[:_SHOWN_CHARS]} now"
                raise _other_model(node, ref, now)
            checked.add((ref.key, ref.content))


def _other_model(node: Node, ref: InputRef, why: str) -> InputError:
    used = f"the model {ref.path} (key {ref.key[:_SHOWN_CHARS]})"
    return InputError(
        f"{node.path} was made from {used}, but {why}; put it back, or name it: model.path=PATH"
    )
