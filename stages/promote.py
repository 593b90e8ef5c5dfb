"""promote: a gate decides whether the player becomes champion, and the pointer follows."""

import datetime
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.artifacts import (
    Artifact,
    InputRef,
    Manifest,
    Outcome,
    Plan,
    Workspace,
    open_artifact,
    produce,
    read_manifest,
    run_root,
)
from stages.artifacts.files import inner_path
from stages.artifacts.json_file import read_object, write_object
from stages.artifacts.pointer import Pointer, PointerEntry, move_pointer, read_pointer, roll_back
from stages.config import PromoteConfig, RunConfig
from stages.decisions import DECISION, METRICS, Decision, read_decision
from stages.errors import ConfigError, InputError
from stages.layout import RunLayout

FORMAT_VERSION = 1
_ROUNDING = 1e-9  # 0.3 - 0.2 < 0.1 in binary, and a gate means decimal numbers


@dataclass(frozen=True)
class PromoteInputs:
    """What a decision rests on."""

    evaluation: Path
    """Of the player."""
    champion_evaluation: Path | None
    """Of the champion, or of the start while there is no champion; see
    `decisions.champion_evaluation`."""


def run(config: RunConfig, inputs: PromoteInputs, out: Path) -> Manifest:
    """Decide on a player, commit the decision as the artifact `out`, then move the pointer.

    A kill between the two leaves a decision without its move; running again completes it. A
    decision moves the pointer once, so running again does not undo a later roll-back.

    Raises:
        ConfigError: the gate's metric is not among evaluate's, or `out` is in no run.
        InputError: the evaluation is not one of a model in this run.
    """
    root = run_root(out)
    if root is None:
        raise ConfigError(
            f"{out} lies in no run directory, so there is no champion to promote; "
            "start one: spin init RUN --config RECIPE"
        )
    evaluation = open_artifact(inputs.evaluation, stages=("evaluate",), verify=config.verify)
    player = _player(evaluation, root)
    champion = None
    if inputs.champion_evaluation is not None:
        champion = open_artifact(
            inputs.champion_evaluation, stages=("evaluate",), verify=config.verify
        )
    gate = config.promote
    refs = {"evaluation": evaluation.input_ref(root)}
    if champion is not None:
        refs["champion_evaluation"] = champion.input_ref(root)
    plan = Plan(
        stage="promote",
        format_version=FORMAT_VERSION,
        # on_refusal steers the run, not the decision: changing it later keeps what was decided
        config={"promote": gate.model_dump(mode="json", exclude={"on_refusal"})},
        inputs=refs,
    )

    def fill(workspace: Workspace) -> Outcome:
        decision = decide(
            gate,
            read_object(evaluation, METRICS),
            read_object(champion, METRICS) if champion is not None else None,
            str(inputs.evaluation),
        )
        write_object(workspace.file(DECISION), asdict(decision))
        return Outcome(
            counts={}, metrics={"promoted": decision.promoted, decision.metric: decision.value}
        )

    manifest = produce(out, plan, fill)
    _move(RunLayout(root), read_decision(out), player, manifest.key)
    return manifest


def decide(
    gate: PromoteConfig,
    metrics: Mapping[str, Any],
    champion_metrics: Mapping[str, Any] | None,
    where: str,
) -> Decision:
    """Return what a gate says to a player's metrics.

    Args:
        champion_metrics: None, or no value under the gate's metric, leaves `min_gain` out.
        where: the evaluation, to be named in errors.

    Raises:
        ConfigError: the player has no such metric, or it is no number.
    """
    value = _metric(gate.metric, metrics, where)
    champion_value = _number((champion_metrics or {}).get(gate.metric))
    verdicts = [(value is not None, f"{gate.metric} is {_shown(value)}")]
    if value is not None and gate.min_value is not None:
        good = value >= gate.min_value
        verdicts.append((good, f"which {_reaches(good)} min_value {gate.min_value:g}"))
    if value is not None and gate.min_gain is not None:
        if champion_value is None:
            verdicts.append((True, "there is no champion's value to compare with"))
        else:
            gain = value - champion_value
            good = gain >= gate.min_gain - _ROUNDING
            what = f"the gain of {gain:g} on the champion's {champion_value:g}"
            verdicts.append((good, f"{what} {_reaches(good)} min_gain {gate.min_gain:g}"))
    return Decision(
        promoted=all(good for good, _ in verdicts),
        metric=gate.metric,
        value=value,
        champion_value=champion_value,
        min_value=gate.min_value,
        min_gain=gate.min_gain,
        reasons=[text for _, text in verdicts],
    )


def rollback(layout: RunLayout) -> tuple[str, Pointer]:
    """Point back to the previous champion; return the path left and where the pointer is now.

    Raises:
        InputError: there is no previous champion.
    """
    before = read_pointer(layout.champion)
    now = roll_back(layout.champion)
    assert before is not None, "a roll-back needs a pointer"
    return before.path, now


def _player(evaluation: Artifact, root: Path) -> InputRef:
    """Return the model that was evaluated, which must be in the run, unchanged."""
    player = evaluation.manifest.inputs.get("model")
    if player is None or not player.inside_run:
        name = player.path if player else "nothing"
        raise InputError(
            f"{evaluation.path} is of {name}, which is no model in this run; "
            "evaluate an iteration's player: spin evaluate --model RUN/iterations/NNN/train"
        )
    present = read_manifest(inner_path(root, player.path))
    if (present.key, present.content()) != (player.key, player.content):
        raise InputError(
            f"{root / player.path} is not the model that {evaluation.path} is of: it was made "
            f"anew since; delete {evaluation.path} and evaluate again"
        )
    return player


def _move(layout: RunLayout, decision: Decision, player: InputRef, decision_key: str) -> None:
    if decision.promoted:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        entry = PointerEntry(
            path=player.path,
            key=player.key,
            reason="; ".join(decision.reasons),
            decision_key=decision_key,
            at=now,
        )
        move_pointer(layout.champion, entry)


def _metric(name: str, metrics: Mapping[str, Any], where: str) -> float | None:
    """Return a metric's value, None where it is NaN or infinite (which JSON writes as null)."""
    if name not in metrics:
        raise ConfigError(
            f"promote.metric={name}: {where} has no such metric; it has "
            f"{', '.join(sorted(metrics))}"
        )
    value = metrics[name]
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ConfigError(
            f"promote.metric={name}: {where} gives {value!r}, which is no number; name another"
        )
    return _number(value)


def _number(value: Any) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if usable and math.isfinite(value) else None


def _shown(value: float | None) -> str:
    return "not a finite number" if value is None else f"{value:g}"


def _reaches(good: bool) -> str:
    return "reaches" if good else "is below"
