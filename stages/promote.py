"""promote: a gate decides whether the player becomes champion, and the pointer follows."""

import datetime
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
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
    produce,
    read_manifest,
    run_root,
)
from stages.artifacts.files import inner_path
from stages.artifacts.json_file import read_object, write_object
from stages.artifacts.manifest import MANIFEST_NAME
from stages.artifacts.pointer import (
    Pointer,
    PointerEntry,
    move_again,
    move_pointer,
    roll_back,
)
from stages.config import OF_COMPARISON, PromoteConfig, RunConfig
from stages.data.paired import compare
from stages.decisions import DECISION, METRICS, Decision, read_decision
from stages.errors import ConfigError, GateRefusedError, InputError, choices
from stages.evidence import (
    Opened,
    PromoteInputs,
    check_alike,
    differences,
    measured,
    open_evidence,
)
from stages.gates import (
    ROUNDING,
    Figures,
    Verdict,
    alarms_clear,
    both,
    check_comparable,
    judge,
    number,
    reaches,
    sentences,
    shown,
)
from stages.layout import RunLayout

__all__ = ["PromoteInputs", "decide", "promote_again", "rollback", "run"]

log = logging.getLogger("spin")

FORMAT_VERSION = 3
_MADE_FROM = {"train": "pairs", "score": "pairs", "pair": "generations"}
"""Stage → how the names of those inputs begin that lead back to where its rows were made."""


def run(config: RunConfig, inputs: PromoteInputs, out: Path) -> Manifest:
    """Decide on a player, commit the decision as the artifact `out`, then move the pointer.

    A kill between the two leaves a decision without its move; running again completes it. A
    decision moves the pointer once, so running again does not undo a later roll-back.

    The alarms are those of the evaluation, and of what it is of: train, pair and generate are found
    by their manifests' inputs, which the evaluation's key vouches for.

    Raises:
        ConfigError: the gate asks for a metric that is not there, or compares what is a comparison
            itself, or `out` is in no run.
        InputError: the evaluation is not one of a model in this run, something on the way to it was
            made anew since, or those compared were not measured alike.
    """
    root = run_root(out)
    if root is None:
        raise ConfigError(
            f"{out} lies in no run directory, so there is no champion to promote; "
            "start one: spin init RUN --config RECIPE"
        )
    check_comparable(config)
    gate = config.promote
    opened = open_evidence(gate, inputs, verify=config.verify)
    player = _player(opened.evaluation, root)
    plan = Plan(
        stage="promote",
        format_version=FORMAT_VERSION,
        # what steers the run is no part of the decision: changing it later keeps what was decided,
        # and so does changing an alarm, or no threshold could be amended once one is decided
        config={"promote": gate.model_dump(mode="json", exclude={"on_refusal", "retry"})},
        inputs=opened.refs(root),
    )

    def fill(workspace: Workspace) -> Outcome:
        manifests = [opened.evaluation.manifest, *_way_to(player, root)]
        alarms = [
            alarm for each in manifests for alarm in fired(each.stage, each.metrics, config.alarms)
        ]
        decision = _decide(gate, opened, str(inputs.evaluation), alarms)
        write_object(workspace.file(DECISION), asdict(decision))
        return Outcome(
            counts={},
            metrics={"promoted": decision.promoted, decision.metric: decision.value},
            info={"alarms": config.alarms.identity()},
        )

    manifest = produce(out, plan, fill)
    _move(RunLayout(root), read_decision(out), player, manifest.key)
    return manifest


def _decide(
    gate: PromoteConfig, opened: Opened, where: str, alarms: Sequence[FiredAlarm]
) -> Decision:
    champion = opened.champion
    if champion is not None and gate.min_gain is not None:
        check_alike(opened.evaluation, champion)
    decision = decide(
        gate,
        read_object(opened.evaluation, METRICS),
        read_object(champion, METRICS) if champion is not None else None,
        where,
        alarms,
        judge(gate.gate, opened.evidence(alarms)) if gate.gate is not None else None,
        opened.champion_name,
    )
    return replace(decision, gain=_gain(gate.metric, opened))


def _gain(metric: str, opened: Opened) -> dict[str, Any] | None:
    """Return the gain of a metric on the champion, where both were measured alike on examples."""
    champion = opened.champion
    if champion is None or metric.startswith(OF_COMPARISON):
        return None
    if differences(opened.evaluation, champion):
        return None
    mine, theirs = measured(opened.evaluation), measured(champion)
    if metric not in mine.columns or metric not in theirs.columns:
        return None
    found = compare(mine.columns[metric], theirs.columns[metric])
    if found is None or number(found.gain) is None:
        return None
    return {"metric": metric, "rival": theirs.where, **found.figures()}


def decide(
    gate: PromoteConfig,
    metrics: Mapping[str, Any],
    champion_metrics: Mapping[str, Any] | None,
    where: str,
    alarms: Sequence[FiredAlarm] = (),
    verdict: Verdict | None = None,
    rival: str = "champion",
) -> Decision:
    """Return what a gate says to a player's metrics, and to the alarms that fired.

    Args:
        champion_metrics: None, or no value under the gate's metric, leaves `min_gain` out.
        where: the evaluation, to be named in errors.
        alarms: one whose action is refuse refuses, whatever the metric says; stop, too: the stage
            was finished under another setting.
        verdict: on `gate.gate`.
        rival: what the champion is called: `start` where that stands for it.

    Raises:
        ConfigError: the player has no such metric, or it is no number.
    """
    value = _metric(gate.metric, metrics, where)
    champion_value = number((champion_metrics or {}).get(gate.metric))
    conditions = list(_of_the_metric(gate, value, champion_value, rival))
    if verdict is not None:
        conditions.append(verdict)
    whole = both([alarms_clear(alarms, any_counts=False), *conditions])
    # that no alarm fired goes without saying
    refusals = [alarms_clear([alarm], any_counts=False) for alarm in alarms if alarm.refuses]
    reasons = sentences(both([*refusals, *conditions]))
    if value is not None and gate.min_value is None:
        place = 0 if whole.passed else len(reasons)  # what refuses comes first
        reasons.insert(place, f"{gate.metric} is {shown(value)}")
    return Decision(
        promoted=whole.passed,
        metric=gate.metric,
        value=value,
        champion_value=champion_value,
        min_value=gate.min_value,
        min_gain=gate.min_gain,
        reasons=reasons,
        alarms=[asdict(alarm) for alarm in alarms],
        verdict=whole.as_dict(),
    )


def _of_the_metric(
    gate: PromoteConfig, value: float | None, champion_value: float | None, rival: str
) -> Iterator[Verdict]:
    """Yield the conditions on a gate's own metric, as far as there are any."""
    text = f"{gate.metric} is {shown(value)}"
    if value is None:
        yield Verdict("number", False, text, {"metric": gate.metric})
        return
    if gate.min_value is not None:
        passed = value >= gate.min_value
        text += f", which {reaches(passed)} min_value {gate.min_value:g}"
        figures: Figures = {"metric": gate.metric, "value": value, "min_value": gate.min_value}
        yield Verdict("min_value", passed, text, figures)
    if gate.min_gain is not None:
        yield _reaches_gain(gate.metric, gate.min_gain, value, champion_value, rival)


def _reaches_gain(
    metric: str, min_gain: float, value: float, champion_value: float | None, rival: str
) -> Verdict:
    figures: Figures = {"metric": metric, "value": value, "rival_value": champion_value}
    figures |= {"min_gain": min_gain, "gain": None}
    if champion_value is None:
        text = "there is no champion's value to compare with"
        return Verdict("min_gain", True, text, figures)
    gain = value - champion_value
    passed = gain >= min_gain - ROUNDING
    what = f"the gain of {gain:g} on the {rival}'s {champion_value:g}"
    text = f"{what} {reaches(passed)} min_gain {min_gain:g}"
    return Verdict("min_gain", passed, text, figures | {"gain": gain})


def rollback(layout: RunLayout) -> tuple[str, Pointer]:
    """Point back to the previous champion; return the path left and where the pointer is now.

    Raises:
        InputError: there is no previous champion, or it is gone.
        CorruptError: it is damaged, or was made anew.
    """
    now = roll_back(layout.champion)
    return now.history[-2].path, now


def promote_again(layout: RunLayout, iteration: int) -> tuple[str, Pointer]:
    """Undo a roll-back: point again to a player that was promoted, and rolled back since.

    Nothing is decided: its decision stands.

    Returns:
        The path left, and where the pointer is now.

    Raises:
        GateRefusedError: the gate refused the player.
        ConfigError: it is champion, or was never rolled back.
        InputError: it is not decided yet, or is gone.
        CorruptError: it is damaged, or was made anew.
    """
    out = layout.stage(iteration, "promote")
    again = f"spin promote {layout.root} --iteration {iteration}"
    if not (out / MANIFEST_NAME).is_file():
        raise InputError(f"{layout.root}: iteration {iteration} is not decided yet; run: {again}")
    decision = read_decision(out)
    if not decision.promoted:
        raise GateRefusedError(
            f"{layout.root}: iteration {iteration} is not promoted: {'; '.join(decision.reasons)}"
        )
    now = move_again(layout.champion, read_manifest(out).key)
    return now.history[-2].path, now


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
            f"promote.metric={name}: {where} has no such metric; {choices(name, metrics, 'it has')}"
        )
    value = metrics[name]
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ConfigError(
            f"promote.metric={name}: {where} gives {value!r}, which is no number; name another"
        )
    return number(value)
