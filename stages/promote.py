"""promote: a gate decides whether the player becomes champion, and the pointer follows."""

import datetime
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.alarms import FiredAlarm, fired
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
from stages.artifacts.manifest import MANIFEST_NAME
from stages.artifacts.pointer import Pointer, PointerEntry, move_pointer, read_pointer, roll_back
from stages.config import PromoteConfig, RunConfig
from stages.decisions import DECISION, METRICS, Decision, read_decision
from stages.errors import ConfigError, InputError
from stages.layout import RunLayout

log = logging.getLogger("spin")

FORMAT_VERSION = 1
_MADE_FROM = {"train": "pairs", "score": "pairs", "pair": "generations"}
"""Stage → how the names of those inputs begin that lead back to where its rows were made."""
_ROUNDING = 1e-9  # 0.3 - 0.2 < 0.1 in binary, and a gate means decimal numbers
_MEASURE = ("evaluate", "chat", "reward")
"""Settings that decide what an evaluation's metrics mean."""
_MEASURED_BY = ("data", "reward_model")
"""Likewise inputs."""


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

    The alarms are those of the evaluation, and of what it is of: train, pair and generate are found
    by their manifests' inputs, which the evaluation's key vouches for.

    Raises:
        ConfigError: the gate's metric is not among evaluate's, or `out` is in no run.
        InputError: the evaluation is not one of a model in this run, or something on the way to
            it was made anew since.
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
        # on_refusal steers the run, not the decision: changing it later keeps what was decided, and
        # so does changing an alarm, or no threshold could be amended once an iteration is decided
        config={"promote": gate.model_dump(mode="json", exclude={"on_refusal"})},
        inputs=refs,
    )

    def fill(workspace: Workspace) -> Outcome:
        manifests = [evaluation.manifest, *_way_to(player, root)]
        if champion is not None and gate.min_gain is not None:
            _check_same_measure(evaluation, champion)
        decision = decide(
            gate,
            read_object(evaluation, METRICS),
            read_object(champion, METRICS) if champion is not None else None,
            str(inputs.evaluation),
            [
                alarm
                for each in manifests
                for alarm in fired(each.stage, each.metrics, config.alarms)
            ],
        )
        write_object(workspace.file(DECISION), asdict(decision))
        return Outcome(
            counts={},
            metrics={"promoted": decision.promoted, decision.metric: decision.value},
            info={"alarms": config.alarms.identity()},
        )

    manifest = produce(out, plan, fill)
    _move(RunLayout(root), read_decision(out), player, manifest.key)
    return manifest


def decide(
    gate: PromoteConfig,
    metrics: Mapping[str, Any],
    champion_metrics: Mapping[str, Any] | None,
    where: str,
    alarms: Sequence[FiredAlarm] = (),
) -> Decision:
    """Return what a gate says to a player's metrics, and to the alarms that fired.

    Args:
        champion_metrics: None, or no value under the gate's metric, leaves `min_gain` out.
        where: the evaluation, to be named in errors.
        alarms: one whose action is refuse refuses, whatever the metric says; stop, too: the stage
            was finished under another setting.

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
    refusals = [(False, f"alarm {each.name}: {each.text}") for each in alarms if each.refuses]
    verdicts = [*refusals, *verdicts]
    return Decision(
        promoted=all(good for good, _ in verdicts),
        metric=gate.metric,
        value=value,
        champion_value=champion_value,
        min_value=gate.min_value,
        min_gain=gate.min_gain,
        reasons=[text for _, text in verdicts],
        alarms=[asdict(alarm) for alarm in alarms],
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


def _check_same_measure(evaluation: Artifact, champion: Artifact) -> None:
    """Check that the player and the champion were asked and scored alike.

    Raises:
        InputError: they were not, so their difference would be no gain.
    """
    mine, theirs = evaluation.manifest, champion.manifest
    differing = [n for n in _MEASURE if mine.config.get(n) != theirs.config.get(n)]
    keys = [
        {name: (ref.key, ref.content) for name, ref in each.inputs.items() if name in _MEASURED_BY}
        for each in (mine, theirs)
    ]
    differing += [name for name in _MEASURED_BY if keys[0].get(name) != keys[1].get(name)]
    if differing:
        raise InputError(
            f"{champion.path} was made with another {' and '.join(differing)} than "
            f"{evaluation.path}, so there is no gain to tell; evaluate the champion in the same "
            "way, or set promote.min_gain=null"
        )


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


def _way_to(player: InputRef, root: Path) -> Iterator[Manifest]:
    """Yield the manifests of a player's train, score, pair and generate, as far as they are there.

    Raises:
        InputError: one of them was made anew since.
    """
    ahead = [player]
    while ahead:
        ref = ahead.pop(0)
        place = inner_path(root, ref.path)
        if not (place / MANIFEST_NAME).is_file():
            log.warning("%s is gone: what alarms it set off is not known", place)
            continue
        manifest = read_manifest(place)
        if (manifest.key, manifest.content()) != (ref.key, ref.content):
            raise InputError(
                f"{place} was made anew since the player was trained from it; delete what was made "
                "from it, and run those stages again"
            )
        yield manifest
        wanted = _MADE_FROM.get(manifest.stage)
        for name, source in manifest.inputs.items():
            if wanted and name.startswith(wanted) and source.inside_run:
                ahead.append(source)


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
