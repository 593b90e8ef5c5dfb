"""Who plays whom: what was decided in a run, read from its decisions and its pointer."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.artifacts import InputRef, open_artifact, read_manifest
from stages.artifacts.json_file import read_object
from stages.artifacts.manifest import MANIFEST_NAME
from stages.artifacts.pointer import Pointer, PointerEntry, read_pointer
from stages.config import RunConfig
from stages.errors import ConfigError, CorruptError, GateRefusedError, InputError
from stages.layout import RunLayout
from stages.recipe import Recipe

METRICS = "metrics.json"
DECISION = "decision.json"


@dataclass(frozen=True)
class Decision:
    """What the gate said; its fields are those of decision.json."""

    promoted: bool
    metric: str
    value: float | None
    """None when the evaluation could not say (NaN)."""
    champion_value: float | None
    min_value: float | None
    min_gain: float | None
    reasons: list[str]
    """One sentence a condition."""
    alarms: list[dict[str, Any]] = field(default_factory=list)
    """Those that fired: {name, stage, value, threshold, action, text}."""
    verdict: dict[str, Any] | None = None
    """Every condition with its figures, a tree: {kind, passed, text, figures, children}."""
    gain: dict[str, Any] | None = None
    """`metric` against the champion's on the same examples, with its 95% interval; see
    `data.paired.Paired`. None where the two cannot be compared example by example."""


@dataclass(frozen=True)
class Opponent:
    """A model to play against, and its own evaluation."""

    model: str
    """A path, or a hub id."""
    revision: str | None
    evaluation: str
    """The path of an evaluate artifact."""


def read_decision(out: Path) -> Decision:
    """Return the decision in a finished promote artifact.

    Raises:
        InputError: there is no such artifact.
        CorruptError: its bytes have changed.
    """
    values = read_object(open_artifact(out, stages=("promote",)), DECISION)
    try:
        return Decision(**values)
    except TypeError:
        raise CorruptError(
            f"{out / DECISION} lacks fields; delete {out} and run its stage again"
        ) from None


def outcome(layout: RunLayout, iteration: int, *, promoted: bool, pointer: Pointer | None) -> str:
    """Return what became of an iteration's player: champion, promoted, rolled back or refused.

    Args:
        promoted: what its decision says.
        pointer: the run's, which roll-backs move.
    """
    path = layout.relative(layout.stage(iteration, "train"))
    if pointer is not None and pointer.path == path:
        return "champion"
    if not promoted:
        return "refused"
    return "rolled back" if is_rolled_back(layout, iteration, pointer) else "promoted"


def champion_evaluation(layout: RunLayout, iteration: int) -> Path | None:
    """Return the evaluation that an iteration's player has to beat.

    It is the champion's before this iteration, found through the pointer; before there is a
    champion it is the start's. A decision that is finished keeps the one it was made with.

    Raises:
        InputError: the champion was never evaluated.
    """
    out = layout.stage(iteration, "promote")
    if (out / MANIFEST_NAME).is_file():
        recorded = open_artifact(out, stages=("promote",)).manifest.inputs
        ref = recorded.get("champion_evaluation")
        return None if ref is None else layout.root / ref.path
    pointer = read_pointer(layout.champion)
    champion = _before(pointer, layout.relative(layout.stage(iteration, "train")))
    if champion is None:
        start = layout.start_evaluation
        return start if (start / MANIFEST_NAME).is_file() else None
    number = layout.iteration_of(champion.path)
    evaluation = layout.stage(number, "evaluate") if number is not None else None
    if evaluation is None or not (evaluation / MANIFEST_NAME).is_file():
        raise InputError(
            f"{layout.champion} points to {champion.path}, which has no evaluation to compare "
            "with; evaluate it, or roll back: spin promote RUN --rollback"
        )
    return evaluation


@dataclass(frozen=True)
class Places:
    """Where a model's evaluation is, and its suites' evaluations."""

    evaluation: Path
    suites: Mapping[str, Path]


def measured_at(layout: RunLayout, evaluation: Path, suites: Iterable[str]) -> Places:
    """Return where a model was measured whose evaluation in the run is known."""
    number = layout.iteration_of(layout.relative(evaluation))
    return Places(evaluation, {name: layout.suite(number, name) for name in suites})


def rival_evaluation(layout: RunLayout, rival: str, iteration: int) -> Path:
    """Return the evaluation of whom an iteration's player is compared with.

    Args:
        rival: champion (the start, while there is none), opponent or start.

    Raises:
        InputError: the champion was never evaluated.
    """
    start = layout.start_evaluation
    if rival == "champion":
        return champion_evaluation(layout, iteration) or start
    played = _recorded_opponent(layout, iteration) if rival == "opponent" else None
    if played is None or not played.inside_run:
        return start
    return Path(_at(layout, played.path).evaluation)


def first_opponent(layout: RunLayout, config: RunConfig) -> Opponent:
    """Return the opponent of iteration 0: what sft makes, or the recipe's model itself.

    Raises:
        ConfigError: the recipe names no model to start from.
    """
    if config.sft is not None:
        return Opponent(str(layout.sft), None, str(layout.start_evaluation))
    if config.model.path is None:
        raise ConfigError(
            f"recipe {config.name}: no model to start from; set model.path=MODEL, or add an sft "
            "section with sft.init=random"
        )
    return Opponent(config.model.path, config.model.revision, str(layout.start_evaluation))


def player(layout: RunLayout, iteration: int) -> Opponent:
    """Return what an iteration trains, as the opponent of a later one."""
    model = str(layout.stage(iteration, "train"))
    return Opponent(model, None, str(layout.stage(iteration, "evaluate")))


def opponent_of(layout: RunLayout, recipe: Recipe, iteration: int) -> Opponent:
    """Return the opponent of an iteration, by what was decided in the one before it.

    Once an iteration has an artifact, its opponent stays who it was, whatever the pointer does.
    A player that was promoted and rolled back counts as refused; one whose pointer has not moved
    yet, since the process was killed before, as promoted.

    Raises:
        GateRefusedError: the player before was refused, and the recipe stops there, or has retried
            as often as it may.
        InputError: the iteration before is not decided yet.
        ConfigError: the recipe names no model to start from.
    """
    first = first_opponent(layout, recipe.for_iteration())
    if iteration == 0:
        return first
    recorded = _recorded_opponent(layout, iteration)
    if recorded is not None:
        return _at(layout, recorded.path) if recorded.inside_run else first
    before = iteration - 1
    promote = recipe.for_iteration(before).promote
    policy = promote.on_refusal
    out = layout.stage(before, "promote")
    if not (out / MANIFEST_NAME).is_file():
        raise InputError(
            f"{layout.root}: iteration {before} is not decided yet; "
            f"run: spin promote {layout.root} --iteration {before}"
        )
    decision = read_decision(out)
    last, pointer = player(layout, before), read_pointer(layout.champion)
    if policy == "player" or (decision.promoted and not is_rolled_back(layout, before, pointer)):
        return last
    retries = refusals_before(layout, before) if policy == "retry" else None
    if policy == "stop" or (retries is not None and retries >= promote.retry.times):
        undone = "it was promoted, and rolled back since"
        why = undone if decision.promoted else "; ".join(decision.reasons)
        raise _refusal(layout, before, why, retries)
    champion = _champion_before(layout, iteration)
    return first if champion is None else _at(layout, champion.path)


def refusals_before(layout: RunLayout, iteration: int) -> int:
    """Return how many players in a row were refused, and not played on from, before an iteration.

    Once an iteration has an artifact, its opponent tells, whatever the pointer does.

    Raises:
        InputError: an iteration before is not decided yet.
    """
    refusals, pointer = 0, read_pointer(layout.champion)
    for before in range(iteration - 1, -1, -1):
        last = layout.stage(before, "train")
        played = _recorded_opponent(layout, before + 1)
        if played is not None:
            is_refused = not played.inside_run or played.path != layout.relative(last)
        else:
            decision = read_decision(layout.stage(before, "promote"))
            is_refused = not decision.promoted or is_rolled_back(layout, before, pointer)
        if not is_refused:
            break
        refusals += 1
    return refusals


def optimizer_of(layout: RunLayout, recipe: Recipe, opponent: Opponent) -> str | None:
    """Return the player whose optimizer's state an iteration goes on from; None: it begins anew.

    It is the opponent itself, so that state and weights belong together, if its own training kept
    a state.
    """
    model = Path(opponent.model)
    if not model.is_relative_to(layout.root):
        return None
    iteration = layout.iteration_of(layout.relative(model))
    if iteration is None:
        return None
    carries = recipe.for_iteration(iteration).train.carry_optimizer
    if (model / MANIFEST_NAME).is_file():
        carries = read_manifest(model).config["train"].get("carry_optimizer", False)
    return opponent.model if carries else None


def reference_of(recipe: Recipe, iteration: int, opponent: Callable[[int], Opponent]) -> Opponent:
    """Return the reference of an iteration: what its pairs are scored under.

    Args:
        opponent: whom an iteration plays against, such as `opponent_of`.
    """
    reference = recipe.for_iteration(iteration).reference
    if reference.policy == "first":
        return opponent(0)
    return opponent(iteration - iteration % reference.update_every)


def pool_of(recipe: Recipe, iteration: int, opponent: Callable[[int], Opponent]) -> list[Opponent]:
    """Return the older opponents that answer in an iteration too, the newest first.

    They are those of as many iterations before; after a refusal one of them can be the newest
    opponent itself.
    """
    size = min(recipe.for_iteration(iteration).generate.pool.size, iteration)
    return [opponent(iteration - age) for age in range(1, size + 1)]


def replayed(recipe: Recipe, iteration: int) -> list[int]:
    """Return the iterations whose pairs are trained on again in this one, the newest first."""
    wanted = recipe.for_iteration(iteration).pair.replay.iterations
    return [iteration - age for age in range(1, min(wanted, iteration) + 1)]


def _recorded_opponent(layout: RunLayout, iteration: int) -> InputRef | None:
    """Return the opponent that the artifacts of an iteration name, or None where there are none."""
    for stage in ("generate", "pair", "train", "evaluate"):
        out = layout.stage(iteration, stage)
        if (out / MANIFEST_NAME).is_file():
            return read_manifest(out).inputs["opponent" if stage == "evaluate" else "model"]
    return None


def is_rolled_back(layout: RunLayout, iteration: int, pointer: Pointer | None) -> bool:
    """Tell whether the pointer came to an iteration's player and was taken back from it."""
    if pointer is None:
        return False
    path = layout.relative(layout.stage(iteration, "train"))
    was_there = any(entry.path == path and entry.decision_key for entry in pointer.history)
    return was_there and all(entry.path != path for entry in pointer.trail())


def _champion_before(layout: RunLayout, iteration: int) -> PointerEntry | None:
    """Return the champion that the iterations before one have made, roll-backs undone."""
    pointer = read_pointer(layout.champion)
    numbered = ((layout.iteration_of(e.path), e) for e in (pointer.trail() if pointer else []))
    earlier = [entry for number, entry in numbered if number is None or number < iteration]
    return earlier[-1] if earlier else None


def _before(pointer: Pointer | None, player: str) -> PointerEntry | None:
    """Return where the pointer was before it first pointed at `player`."""
    history = pointer.history if pointer else []
    own = (i for i, entry in enumerate(history) if entry.path == player)
    index = next(own, len(history))
    return history[index - 1] if index else None


def _at(layout: RunLayout, relative: str) -> Opponent:
    """Return the model at a place in the run, with the evaluation that lies beside it."""
    iteration = layout.iteration_of(relative)
    evaluation = (
        layout.start_evaluation if iteration is None else layout.stage(iteration, "evaluate")
    )
    return Opponent(str(layout.root / relative), None, str(evaluation))


def _refusal(layout: RunLayout, iteration: int, why: str, retries: int | None) -> GateRefusedError:
    again = "1 retry" if retries == 1 else f"{retries} retries"
    times = f", after {again} with a lower learning rate" if retries else ""
    return GateRefusedError(
        f"{layout.root}: iteration {iteration} was not promoted{times}: {why}; to play on all the "
        "same, run again with promote.on_refusal=champion (or player) --amend"
    )
