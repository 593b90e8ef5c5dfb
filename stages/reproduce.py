"""reproduce: what has to be made again for an artifact, and whether what came of it agrees.

The chain is that of the manifests: opponents, references and settings that followed a measurement
are those that were used, whatever would be decided now. Making it is `spin_cli/replay.py`'s work.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stages.artifacts import Manifest
from stages.artifacts.produce import first_difference, git_state, library_versions
from stages.config import RunConfig
from stages.errors import InputError
from stages.lineage import Lineage, code_of, flat, lineage
from stages.recipe import Recipe
from stages.subjects import Subject

IN_BYTES = ("prepare", "pair", "promote")
"""Stages that promise equal bytes for equal inputs, wherever they run."""
TOLERANCE = 0.02
"""Of a metric, where bytes differ: so far apart, as a share of the larger, or of 1 below that."""
_OF_THE_WHOLE_RUN = ("seed",)
_SHOWN = 3


@dataclass(frozen=True)
class Figure:
    """A metric or count that differs."""

    name: str
    original: Any
    made: Any
    agrees: bool
    """Whether they are within the tolerance."""

    def to_json(self) -> dict[str, Any]:
        """Return the figure as plain JSON values."""
        return dict(vars(self))

    def __str__(self) -> str:
        """Return both values in words."""
        return f"{self.name} {_shown(self.original)} there, {_shown(self.made)} here"


@dataclass(frozen=True)
class Agreement:
    """What came of making one artifact again."""

    place: str
    stage: str
    same_bytes: bool
    agrees: bool
    """In bytes, or where those may differ in every metric and count within the tolerance."""
    other_key: str | None
    """Which setting, input or fingerprint gives it another key; None: it has the same."""
    files: list[str] = field(default_factory=list)
    """Those whose bytes differ."""
    figures: list[Figure] = field(default_factory=list)
    """Those that differ at all."""

    def to_json(self) -> dict[str, Any]:
        """Return the agreement as plain JSON values."""
        return {**vars(self), "figures": [figure.to_json() for figure in self.figures]}

    def text(self) -> str:
        """Return the verdict in words."""
        key = f" (another key: {self.other_key})" if self.other_key else ""
        if self.same_bytes:
            return f"same bytes{key}"
        apart = [str(f) for f in self.figures if not f.agrees]
        if not self.agrees:
            though = "" if self.other_key else ", though its inputs are the same"
            why = apart or [f"bytes of {_few(self.files)}{though}"]
            return f"DIFFERS: {_few(why, '; ')}{key}"
        near = f", {len(self.figures)} not quite" if self.figures else ""
        return f"same metrics{near}; other bytes in {_few(self.files)}{key}"


def chain(subject: Subject) -> Lineage:
    """Return all that has to be made again, each artifact after its inputs.

    Raises:
        InputError: what is asked about lies in no run, is no artifact, or something that led to it
            is gone or was made anew since.
    """
    if subject.layout is None:
        raise InputError(
            f"{subject.name} lies in no run, so there is no recipe to make it again by; name an "
            "artifact in a run"
        )
    found = lineage(subject)
    problems = found.problems()
    if problems:
        raise InputError(f"{subject.name} cannot be made again: {problems[0]}")
    return found


def threads_of(original: Lineage) -> int | None:
    """Return the number of CPU threads that a chain was computed with, as far as it is one.

    Matrix products sum in another order with another number, and bytes follow.
    """
    found = {m.info["threads"] for _, m in original.made() if "threads" in m.info}
    return int(found.pop()) if len(found) == 1 else None


def recorded(recipe: Recipe, manifest: Manifest, iteration: int | None) -> Recipe:
    """Return the recipe with what decided an artifact, where that is not what the recipe says.

    Such are settings that followed a measurement or a refusal, and those of before an amendment.
    """
    config = recipe.for_iteration(iteration)
    changes: dict[str, Any] = {}
    for section, was in _of_sections(manifest, config).items():
        now = getattr(config, section)
        plain = now if section in _OF_THE_WHOLE_RUN or now is None else now.identity()
        changes |= _changes(section, plain, was)
    return replace(recipe, overrides=recipe.overrides | changes) if changes else recipe


def replayed(recipe: Recipe, used: Recipe) -> dict[str, Any]:
    """Return what `recorded` changed, from dotted name to value."""
    return {
        name: value
        for name, value in used.overrides.items()
        if name not in recipe.overrides or recipe.overrides[name] != value
    }


def other_makers(original: Lineage) -> list[str]:
    """Return, in words, where this code and these libraries are not those of the original."""
    now = library_versions() | code_of(git_state())
    lines = []
    for name, used in original.versions().items():
        here = now.get(name)
        others = sorted(v for v in used if v != here)
        if others:
            lines.append(f"{name}: {', '.join(others)} there, {here or 'none'} here")
    return lines


def compare(
    place: str,
    original: Manifest,
    made: Manifest,
    *,
    inputs_agree: bool = True,
    tolerance: float = TOLERANCE,
) -> Agreement:
    """Compare an artifact with what was made again.

    Args:
        inputs_agree: all its inputs were made again byte for byte; where not, nothing can have the
            same bytes, and metrics decide for every stage.
    """
    before, now = _hashes(original), _hashes(made)
    files = sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n))
    other_key = None
    if original.key != made.key:
        other_key = first_difference(original.key_fields(), made.key_fields())
    figures = _figures(original, made, tolerance)
    in_bytes = made.stage in IN_BYTES and inputs_agree
    agrees = not files or (not in_bytes and all(f.agrees for f in figures))
    return Agreement(place, made.stage, not files, agrees, other_key, files, figures)


def _of_sections(manifest: Manifest, config: RunConfig) -> dict[str, Any]:
    """Return what a manifest's config says of the recipe's sections, by their names there."""
    recorded = manifest.config
    was = {n: recorded[n] for n in recorded.keys() & type(config).model_fields.keys()}
    if manifest.stage == "suite":
        return {}  # no measurement and no refusal changes a suite
    if "engine" in recorded:  # evaluate's, which takes that of generate where it has none
        own = config.evaluate.engine is not None
        was |= _engine_of(own, was["evaluate"], recorded["engine"])
    if "alarms" in manifest.info:  # promote's: not in its key, and they can refuse
        was["alarms"] = manifest.info["alarms"]
    if recorded.get("beta") is not None:
        was["train"] = {"beta": recorded["beta"]}
    if "part" in recorded:
        was["generate"] = {**was["generate"], "pool": {"share": recorded["part"]["share"]}}
    return was


def _engine_of(own: bool, evaluate: dict[str, Any], engine: Any) -> dict[str, Any]:
    return {"evaluate": {**evaluate, "engine": engine}} if own else {"generate": {"engine": engine}}


def _changes(name: str, now: Any, was: Any) -> dict[str, Any]:
    """Return the leaves of `was` that are others in `now`, by dotted name.

    A name that only one of the two has says nothing: stages leave out what decides nothing.
    """
    if isinstance(now, Mapping) and isinstance(was, Mapping):
        found: dict[str, Any] = {}
        for inner in now.keys() & was.keys():
            found |= _changes(f"{name}.{inner}", now[inner], was[inner])
        return found
    if now == was or (was is None and name == "pair.replay"):  # None: nothing to replay was there
        return {}
    return flat({name: was}) if isinstance(was, Mapping) else {name: was}


def _hashes(manifest: Manifest) -> dict[str, str]:
    return {entry.path: entry.sha256 for entry in manifest.files if not entry.volatile}


def _figures(original: Manifest, made: Manifest, tolerance: float) -> list[Figure]:
    """Return the metrics and counts that differ."""
    largest = max([*original.counts.values(), *made.counts.values(), 1])
    # a count of dropped rows is judged as the share that it is
    scales: list[tuple[Mapping[str, Any], Mapping[str, Any], float | None]] = [
        (original.counts, made.counts, largest),
        (original.metrics, made.metrics, None),
    ]
    found = []
    for before, now, scale in scales:
        for name in sorted(before.keys() | now.keys()):
            pair = (before.get(name), now.get(name))
            if pair[0] != pair[1]:
                is_near = _is_near(*pair, scale, tolerance)
                found.append(Figure(name, *pair, agrees=is_near))
    return found


def _is_near(one: Any, other: Any, scale: float | None, tolerance: float) -> bool:
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (one, other))
    if not numbers or not (math.isfinite(one) and math.isfinite(other)):
        return False
    return bool(abs(one - other) <= tolerance * (scale or max(abs(one), abs(other), 1.0)))


def _shown(value: Any) -> str:
    return (
        f"{value:.6g}" if isinstance(value, float) else "nothing" if value is None else str(value)
    )


def _few(names: list[str], separator: str = ", ") -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return separator.join(names[:_SHOWN]) + more
