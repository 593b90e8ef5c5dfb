"""What a decision rests on: the artifacts that a gate asks for, found, opened, and alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stages.alarms import FiredAlarm
from stages.artifacts import (
    Artifact,
    InputRef,
    Manifest,
    open_artifact,
    read_manifest,
    run_root,
)
from stages.artifacts.json_file import read_object
from stages.artifacts.manifest import MANIFEST_NAME
from stages.config import PromoteConfig, RunConfig
from stages.data.alike import way
from stages.data.measures import INTERVALS_FILE, MEASURES_FILE, METRICS_FILE, read_measures
from stages.decisions import Places, champion_evaluation, measured_at, rival_evaluation
from stages.errors import InputError
from stages.gates import (
    Evidence,
    Measured,
    Rival,
    check,
    player_suites,
    rivals,
)
from stages.layout import RunLayout, is_of_start


@dataclass(frozen=True)
class PromoteInputs:
    """Where what a decision rests on is found; see `find_evidence`."""

    evaluation: Path
    """Of the player."""
    champion_evaluation: Path | None
    """Of the champion, or of the start while there is no champion; see
    `decisions.champion_evaluation`."""
    suites: Mapping[str, Path] = field(default_factory=dict)
    """Evaluations of the player by suites; those that the gate asks for are read."""
    rivals: Mapping[str, Places] = field(default_factory=dict)
    """Likewise of whom the gate compares the player with: champion, opponent, start."""


def find_evidence(layout: RunLayout, gate: PromoteConfig, iteration: int) -> PromoteInputs:
    """Return where that is which decides on an iteration's player.

    A decision that is finished keeps the champion that it was made with.

    Raises:
        InputError: the champion was never evaluated.
    """
    evaluation = layout.stage(iteration, "evaluate")
    asked = [] if gate.gate is None else rivals(gate.gate)
    suites = [] if gate.gate is None else player_suites(gate.gate)
    return PromoteInputs(
        evaluation,
        champion_evaluation(layout, iteration),
        measured_at(layout, evaluation, suites).suites,
        {
            rival: measured_at(layout, rival_evaluation(layout, rival, iteration), suites)
            for rival in dict.fromkeys(rival for rival, _ in asked)
        },
    )


def recorded_evidence(layout: RunLayout, decision: Manifest) -> PromoteInputs:
    """Return where in a run that is which a decision rested on, of this run or of another one."""
    found = {name: layout.root / ref.path for name, ref in decision.inputs.items()}

    def suites(whose: str) -> dict[str, Path]:
        start = f"{whose}suite_"
        return {n.removeprefix(start): at for n, at in found.items() if n.startswith(start)}

    compared = {}
    for rival in ("champion", "opponent", "start"):
        known = [at for name, at in found.items() if name.startswith(f"{rival}_")]
        if known:
            compared[rival] = Places(known[0].parent / "evaluate", suites(f"{rival}_"))
    return PromoteInputs(
        found["evaluation"], found.get("champion_evaluation"), suites(""), compared
    )


def check_gate(config: RunConfig, suite: str | None, start: Path) -> None:
    """Check that a gate can be judged by what the start's evaluation has; see `gates.check`.

    Args:
        suite: whose evaluation of the start it is; None: the run's own.

    Raises:
        ConfigError: the gate asks for what is not measured.
    """
    if config.promote.gate is None:
        return
    found = open_artifact(start, stages=("evaluate", "suite"), verify=config.verify)
    is_told = any(file.path == INTERVALS_FILE for file in found.manifest.files)
    means = list(read_object(found, INTERVALS_FILE)) if is_told else None
    check(config, suite, list(read_object(found, METRICS_FILE)), means)


@dataclass(frozen=True)
class Opened:
    """The artifacts of a decision, by suite; None: the run's own evaluation."""

    player: Mapping[str | None, Artifact]
    champion: Artifact | None
    rivals: Mapping[str, Mapping[str | None, Artifact]]

    @property
    def evaluation(self) -> Artifact:
        """The run's own evaluation of the player."""
        return self.player[None]

    @property
    def champion_name(self) -> str:
        """What the champion is called: `start` where that stands for it."""
        return _named("champion", {None: self.champion}) if self.champion else "champion"

    def refs(self, root: Path) -> dict[str, InputRef]:
        """Return them as the inputs of a decision."""
        refs = {"evaluation": self.evaluation.input_ref(root)}
        if self.champion is not None:
            refs["champion_evaluation"] = self.champion.input_ref(root)
        refs |= {f"suite_{n}": a.input_ref(root) for n, a in self.player.items() if n is not None}
        for rival, found in self.rivals.items():
            for suite, artifact in found.items():
                name = "evaluation" if suite is None else f"suite_{suite}"
                refs[f"{rival}_{name}"] = artifact.input_ref(root)
        return refs

    def evidence(self, alarms: Sequence[FiredAlarm]) -> Evidence:
        """Read what was measured.

        Raises:
            CorruptError: the bytes of an artifact have changed.
        """
        player = {name: measured(artifact) for name, artifact in self.player.items()}
        compared = {
            rival: Rival(_named(rival, found), {n: measured(a) for n, a in found.items()})
            for rival, found in self.rivals.items()
        }
        return Evidence(player, compared, alarms)


def open_evidence(gate: PromoteConfig, inputs: PromoteInputs, *, verify: bool) -> Opened:
    """Open what a decision needs.

    Raises:
        InputError: some of it is missing, is of another model, or was not measured alike.
    """
    evaluation = open_artifact(inputs.evaluation, stages=("evaluate",), verify=verify)
    champion = None
    if inputs.champion_evaluation is not None:
        champion = open_artifact(inputs.champion_evaluation, stages=("evaluate",), verify=verify)
    player: dict[str | None, Artifact] = {None: evaluation}
    compared: dict[str, dict[str | None, Artifact]] = {}
    if gate.gate is not None:
        own = Places(inputs.evaluation, inputs.suites)
        player |= {name: _open(own, name, verify=verify) for name in player_suites(gate.gate)}
        for rival, suite in rivals(gate.gate):
            found = _open(inputs.rivals[rival], suite, verify=verify)
            check_alike(player[suite], found)
            compared.setdefault(rival, {})[suite] = found
    return Opened(player, champion, compared)


def _open(places: Places, suite: str | None, *, verify: bool) -> Artifact:
    """Open a model's evaluation, or that of a suite, which must be of the same model.

    Raises:
        InputError: it is missing, or of another model.
    """
    place = places.evaluation if suite is None else places.suites[suite]
    if not (place / MANIFEST_NAME).is_file():
        what = "" if suite is None else f" --suite {suite}"
        raise InputError(
            f"promote.gate asks for {place}, which is missing; make it: spin evaluate{what} "
            f"--model MODEL --out {place} (spin run makes it, too)"
        )
    found = open_artifact(place, stages=("evaluate", "suite"), verify=verify)
    if suite is not None and (places.evaluation / MANIFEST_NAME).is_file():
        own, asked = read_manifest(places.evaluation).inputs.get("model"), found.manifest.inputs
        if own is None or asked.get("model") is None or not _is_same(own, asked["model"]):
            raise InputError(
                f"{place} is not of the model that {places.evaluation} is of; delete {place} and "
                f"run: spin evaluate --suite {suite} --model MODEL --out {place}"
            )
    return found


def _is_same(one: InputRef, other: InputRef) -> bool:
    return (one.key, one.content) == (other.key, other.content)


def measured(artifact: Artifact) -> Measured:
    """Read what an evaluation found; one of before there were measures has no columns.

    Raises:
        CorruptError: its bytes have changed.
    """
    has_measures = any(file.path == MEASURES_FILE for file in artifact.manifest.files)
    root = run_root(artifact.path)
    return Measured(
        where=str(artifact.path.absolute().relative_to(root) if root else artifact.path),
        metrics=read_object(artifact, METRICS_FILE),
        columns=read_measures(artifact) if has_measures else {},
    )


def check_alike(player: Artifact, rival: Artifact) -> None:
    """Check that two models were asked and scored alike.

    Raises:
        InputError: they were not, so their difference would be no gain.
    """
    differing = differences(player, rival)
    if differing:
        raise InputError(
            f"{rival.path} was made with another {' and '.join(differing)} than {player.path}, so "
            "there is no gain to tell; evaluate both in the same way, or leave out what compares "
            "them (promote.min_gain, promote.gate)"
        )


def differences(player: Artifact, rival: Artifact) -> list[str]:
    """Return the settings and inputs in which two artifacts measure differently; see `way`."""
    mine, theirs = way(player.manifest), way(rival.manifest)
    return [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]


def _named(rival: str, found: Mapping[str | None, Artifact]) -> str:
    """Return a rival's name, which tells where the start stands for the champion."""
    return "start" if all(is_of_start(artifact.path) for artifact in found.values()) else rival
