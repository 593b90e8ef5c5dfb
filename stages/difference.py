"""diff: how two artifacts, iterations or runs differ, read off their manifests."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from stages.artifacts import InputRef, Manifest, read_manifest
from stages.artifacts.pointer import read_pointer
from stages.config import RunConfig
from stages.errors import ConfigError, CorruptError
from stages.layout import RunLayout
from stages.lineage import flat, made_with
from stages.run_record import read_recipe
from stages.subjects import Subject

ABSENT = "(absent)"
"""The value of what only the other has."""


@dataclass(frozen=True)
class Change:
    """One value that is another in the second."""

    name: str
    one: Any
    other: Any

    @property
    def delta(self) -> float | None:
        """By how much the second is larger; None where they are no numbers."""
        values = (self.one, self.other)
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        return self.other - self.one if numbers else None

    def to_json(self) -> dict[str, Any]:
        """Return the change as plain JSON values."""
        delta = {} if self.delta is None else {"delta": self.delta}
        return {"name": self.name, "a": self.one, "b": self.other, **delta}


@dataclass(frozen=True)
class ArtifactDifference:
    """How two artifacts differ; an empty list means: not at all."""

    name: str
    same_key: bool
    same_bytes: bool
    """Of all files that are meant to be reproducible."""
    stage: list[Change]
    config: list[Change]
    inputs: list[Change]
    """By key; where only the bytes differ, by content."""
    fingerprints: list[Change]
    files: list[Change]
    """By SHA-256."""
    counts: list[Change]
    metrics: list[Change]
    info: list[Change]
    """What decides no result and was told beside it: threads, processes, GPUs, alarms."""
    code: list[Change]
    """Commit, Python and libraries."""
    cost: list[Change]

    def parts(self) -> dict[str, list[Change]]:
        """Return what differs, by kind; kinds without a difference are left out."""
        return {n: v for n, v in vars(self).items() if isinstance(v, list) and v}

    def to_json(self) -> dict[str, Any]:
        """Return the difference as plain JSON values."""
        parts = {n: [c.to_json() for c in v] for n, v in vars(self).items() if isinstance(v, list)}
        return {"name": self.name, "same_key": self.same_key, "same_bytes": self.same_bytes} | parts


@dataclass(frozen=True)
class Difference:
    """How two things of a kind differ."""

    one: str
    other: str
    kind: str
    artifacts: list[ArtifactDifference]
    """Of all that both have."""
    only_one: list[str] = field(default_factory=list)
    only_other: list[str] = field(default_factory=list)
    recipe: list[Change] = field(default_factory=list)
    """Of runs: settings that decide results, and the champion."""
    problems: dict[str, str] = field(default_factory=dict)
    """What both have and one cannot be read of, by name."""

    def to_json(self) -> dict[str, Any]:
        """Return the difference as plain JSON values; `a` and `b` are the two."""
        return {
            "a": self.one,
            "b": self.other,
            "kind": self.kind,
            "same_bytes": self.is_same(),
            "recipe": [change.to_json() for change in self.recipe],
            "only_a": self.only_one,
            "only_b": self.only_other,
            "problems": self.problems,
            "artifacts": [each.to_json() for each in self.artifacts],
        }

    def is_same(self) -> bool:
        """Tell whether both hold the same artifacts, to the last byte."""
        others = [*self.only_one, *self.only_other, *self.problems]
        return all(d.same_bytes for d in self.artifacts) and not others


def difference(one: Subject, other: Subject) -> Difference:
    """Return how two artifacts, two iterations or two runs differ.

    Artifacts of iterations and runs are compared with those at the same place in the other.

    Raises:
        ConfigError: they are not of a kind.
        InputError, CorruptError: a manifest or a recipe cannot be read. A damaged manifest of an
            iteration or a run is a problem at its place instead.
    """
    if one.kind != other.kind:
        raise ConfigError(
            f"{one.name} is {_a(one.kind)}, and {other.name} {_a(other.kind)}: name two of a kind; "
            "RUN:N is an iteration"
        )
    here, there = one.artifacts(), other.artifacts()
    if one.artifact is not None and other.artifact is not None:
        here, there = {one.name: one.artifact}, {one.name: other.artifact}
    compared: list[ArtifactDifference] = []
    problems: dict[str, str] = {}
    for name in [name for name in here if name in there]:
        try:
            compared.append(_compare(name, here[name], there[name]))
        except CorruptError as error:
            if one.kind == "artifact":
                raise
            problems[name] = str(error)
    return Difference(
        one.name,
        other.name,
        one.kind,
        compared,
        [name for name in here if name not in there],
        [name for name in there if name not in here],
        _recipes(one, other) if one.kind == "run" else [],
        problems,
    )


def _compare(name: str, one: Path, other: Path) -> ArtifactDifference:
    a, b = read_manifest(one), read_manifest(other)
    return ArtifactDifference(
        name=name,
        same_key=a.key == b.key,
        same_bytes=a.content() == b.content(),
        stage=_changes(
            {"stage": a.stage, "format_version": a.format_version},
            {"stage": b.stage, "format_version": b.format_version},
        ),
        config=_settings(flat(a.config), flat(b.config)),
        inputs=_inputs(a.inputs, b.inputs),
        fingerprints=_changes(a.fingerprints, b.fingerprints),
        files=_changes(_hashes(a), _hashes(b)),
        counts=_changes(a.counts, b.counts),
        metrics=_changes(a.metrics, b.metrics),
        info=_changes(flat(a.info), flat(b.info)),
        code=_changes(made_with(a), made_with(b)),
        cost=_changes(_cost(a), _cost(b)),
    )


def _changes(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Change]:
    pairs = ((n, one.get(n, ABSENT), other.get(n, ABSENT)) for n in _names(one, other))
    return [Change(name, a, b) for name, a, b in pairs if a != b]


def _settings(
    one: Mapping[str, Any],
    other: Mapping[str, Any],
    configs: tuple[RunConfig, RunConfig] | None = None,
) -> list[Change]:
    """Return the settings that differ.

    A section that only one has is told by its settings that are no defaults, or where it has none
    such as set.

    Args:
        configs: the recipes that they are of; without, no defaults are known.
    """
    changes = _changes(one, other)
    names = [*one, *other]
    empty = {c.name for c in changes if any(n.startswith(f"{c.name}.") for n in names)}
    if configs is not None:
        changes = [c for c in changes if c.name in empty or not _is_default(c, *configs)]
    found = []
    for change in changes:
        if change.name not in empty:
            found.append(change)
        elif not any(c.name.startswith(f"{change.name}.") for c in changes):
            values = ("(set)" if v == ABSENT else v for v in (change.one, change.other))
            found.append(Change(change.name, *values))
    return found


def _is_default(change: Change, one: RunConfig, other: RunConfig) -> bool:
    """Tell whether only one has this setting, and it is the default there."""
    if ABSENT not in (change.one, change.other):
        return False
    part: Any = other if change.one == ABSENT else one
    *above, last = change.name.split(".")
    for name in above:
        part = part.get(name) if isinstance(part, Mapping) else getattr(part, name, None)
    known = type(part).model_fields.get(last) if isinstance(part, BaseModel) else None
    if known is None or known.is_required():
        return False
    default = known.get_default(call_default_factory=True)
    return bool(getattr(part, last) == default) and not isinstance(default, BaseModel)


def _names(one: Iterable[str], other: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*one, *other]))


def _inputs(one: Mapping[str, InputRef], other: Mapping[str, InputRef]) -> list[Change]:
    found = []
    for name in _names(one, other):
        a, b = one.get(name), other.get(name)
        if a is None or b is None or a.key != b.key:
            found.append(Change(name, _input(a, "key"), _input(b, "key")))
        elif a.content != b.content:
            found.append(Change(name, _input(a, "content"), _input(b, "content")))
    return found


def _input(ref: InputRef | None, part: str) -> str:
    return ABSENT if ref is None else f"{ref.path} ({part} {getattr(ref, part)})"


def _hashes(manifest: Manifest) -> dict[str, str]:
    return {entry.path: entry.sha256 for entry in manifest.files if not entry.volatile}


def _cost(manifest: Manifest) -> dict[str, Any]:
    return manifest.cost.model_dump(mode="json", exclude={"started_at"})


def _recipes(one: Subject, other: Subject) -> list[Change]:
    """Return the settings in which two runs' recipes differ, and their champions."""
    assert one.layout is not None and other.layout is not None, "runs have a layout"
    a, b = read_recipe(one.layout), read_recipe(other.layout)
    found: dict[str, Change] = {}
    for iteration in [None, *sorted({*a.turning_points(), *b.turning_points()})]:
        configs = (a.for_iteration(iteration), b.for_iteration(iteration))
        for change in _settings(a.settings(iteration), b.settings(iteration), configs):
            known = found.get(change.name)
            if known is None:
                found[change.name] = change
            elif (known.one, known.other) != (change.one, change.other):
                name = f"{change.name} (iteration {iteration})"
                found[name] = Change(name, change.one, change.other)
    champions = [_champion(layout) for layout in (one.layout, other.layout)]
    return [*found.values(), *_changes(*champions)]


def _champion(layout: RunLayout) -> dict[str, str | None]:
    pointer = read_pointer(layout.champion)
    return {
        "champion": pointer.path if pointer else None,
        "champion's key": pointer.key if pointer else None,
    }


def _a(kind: str) -> str:
    return f"{'a' if kind == 'run' else 'an'} {kind}"
