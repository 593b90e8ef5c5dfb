"""Making the chain of an artifact again, in another run directory; see stages/reproduce.py."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spin_cli.steps import Step, execute
from stages.artifacts import InputRef, Manifest, run_root
from stages.artifacts.locks import hold
from stages.config import RunConfig
from stages.errors import ConfigError, InputError
from stages.layout import RunLayout
from stages.lineage import Lineage, Node
from stages.recipe import Recipe
from stages.reproduce import Agreement, compare, recorded, replayed, threads_of
from stages.run_record import first_difference, read_recipe, start_or_resume

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

    What is there already, from an earlier call, is not made again.

    Args:
        overrides: settings that name places or change speed, such as where the start model lies
            on this machine.

    Raises:
        ConfigError: the place is taken, or lies in the original run; or an override would decide
            a result.
        InputError: a model from outside of the run is not there any more, or is another now.
        BusyError: another process is at work there.
    """
    assert original.root is not None, "chains are those of runs"
    recipe = _with_places(read_recipe(RunLayout(original.root)), overrides)
    _check_place(folder, original.root)
    _check_models(original, recipe, verify)
    layout = RunLayout(folder)
    same: dict[str, bool] = {}
    place = {"verify": verify, "threads": threads_of(original) or recipe.for_iteration().threads}
    with hold(layout.lock, f"run {layout.root}"):
        start_or_resume(layout, recipe)
        for node, manifest in original.made():
            step = step_of(node, original, layout, recipe)
            made = _make(step, manifest, layout, recipe, place)
            agree = all(same.get(name, True) for name in node.inputs.values())
            found = compare(node.path, manifest, made, inputs_agree=agree, tolerance=tolerance)
            same[node.id] = found.same_bytes
            yield found


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
    """
    manifest = node.manifest
    assert manifest is not None, "what was made has a manifest"
    iteration = manifest.config.get("iteration", layout.iteration_of(node.path))
    options: dict[str, str] = {}
    several: dict[str, list[str]] = {}
    for name, ref in sorted(_inputs(node, original).items(), key=lambda item: _number(item[0])):
        match = _SEVERAL.fullmatch(name)
        if match:
            several.setdefault(match[1], []).append(str(layout.root / ref.path))
        elif ref.inside_run and name in _SINGLE:
            options[name] = str(layout.root / ref.path)
        elif name in _MODELS:
            options |= _outside(name, recipe.for_iteration())
        elif name == "judged":
            raise InputError(
                f"{node.path} rests on what an outside judge found ({ref.path}), which spin cannot "
                "ask again; reproduce the answers that were judged instead"
            )
    part = manifest.config.get("part")
    if part is not None:
        options["part"] = f"{part['member']}/{part['members']}"
    stage = manifest.stage
    if stage == "suite":
        stage, options["suite"] = "evaluate", str(manifest.config["suite"])
    if stage == "prepare" and node.path != layout.relative(layout.data):
        options["suite"] = Path(node.path).name
    return Step(stage, layout.root / node.path, iteration, options, several)


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


def _make(
    step: Step,
    manifest: Manifest,
    layout: RunLayout,
    recipe: Recipe,
    place: Mapping[str, bool | int | None],
) -> Manifest:
    used = recorded(recipe, manifest, step.iteration)
    for name, value in replayed(recipe, used).items():
        log.info("%s: %s=%s, as it was", step.title(), name, value)
    config = used.for_iteration(step.iteration).model_copy(update=place)
    if step.stage == "promote":
        from stages import promote

        return promote.run(config, _promote_inputs(manifest, layout), step.out)
    return execute(step, config)


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
