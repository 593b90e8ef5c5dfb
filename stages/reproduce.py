"""reproduce: what has to be made again for an artifact, and whether what came of it agrees.

The chain is that of the manifests: opponents, references and settings that followed a measurement
are those that were used, whatever would be decided now. Making it is `spin_cli/replay.py`'s work.
"""

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stages.artifacts import Manifest, open_artifact
from stages.artifacts.files import write_durably
from stages.artifacts.json_file import read_object
from stages.artifacts.keys import open_sealed, sealed_text
from stages.artifacts.produce import first_difference, git_state, library_versions
from stages.config import RunConfig
from stages.data.measures import INTERVALS_FILE
from stages.errors import ConfigError, CorruptError, InputError, SpinError
from stages.layout import RunLayout
from stages.lineage import Lineage, code_of, flat, lineage
from stages.recipe import Recipe
from stages.run_record import first_difference as recipe_difference
from stages.run_record import read_recipe, start_or_resume
from stages.subjects import Subject

log = logging.getLogger("spin")

IN_BYTES = ("prepare", "pair", "promote")
"""Stages that promise equal bytes for equal inputs, wherever they run."""
TOLERANCE = 0.02
"""Of a metric without an interval, where bytes differ: so far apart, as a share of the larger."""
MARK = ".reproduction.json"
"""In a run directory that a reproduction began: which run it makes again."""
_MARK_FORMAT = 1
_HASH_NAME = "sha256"
_SMALL = 0.05
"""Metrics nearer to 0 are judged as if they were so large: no share of 0 is more than 0."""
_NORMAL_95 = 1.96
_STDERR = "_stderr"
_OF_THE_WHOLE_RUN = ("seed",)
_SHOWN = 3


@dataclass(frozen=True)
class Figure:
    """A metric or count that differs."""

    name: str
    original: Any
    made: Any
    agrees: bool
    """Whether they are as near as they must be; see `compare`."""
    deviation: float | None = None
    """How far they are apart, as a share of the larger one (a count: of the largest count); None
    where they are no numbers."""

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
    agrees: bool | None
    """In bytes, or where those may differ in every metric and count. None: not compared, since
    bytes differ and the original has no metrics."""
    other_key: str | None
    """Which setting, input or fingerprint gives it another key; None: it has the same."""
    files: list[str] = field(default_factory=list)
    """Those whose bytes differ."""
    figures: list[Figure] = field(default_factory=list)
    """Those that differ at all."""
    made_now: bool = True
    """Whether this call made it; else it was found."""

    def to_json(self) -> dict[str, Any]:
        """Return the agreement as plain JSON values."""
        return {**vars(self), "figures": [figure.to_json() for figure in self.figures]}

    def farthest(self) -> Figure | None:
        """Return the figure that deviates most; None where none does."""
        measured = [figure for figure in self.figures if figure.deviation is not None]
        return max(measured, key=lambda figure: figure.deviation or 0.0, default=None)

    def text(self) -> str:
        """Return the verdict in words."""
        key = f" (another key: {self.other_key})" if self.other_key else ""
        return f"{self._verdict()}{key}{'' if self.made_now else ', made by an earlier call'}"

    def _verdict(self) -> str:
        if self.same_bytes:
            return "same bytes"
        if self.agrees is None:
            return f"not compared: other bytes in {_few(self.files)}, and no metrics to judge by"
        apart = [str(f) for f in self.figures if not f.agrees]
        if not self.agrees:
            though = "" if self.other_key else ", though its inputs are the same"
            why = apart or [f"bytes of {_few(self.files)}{though}"]
            return f"DIFFERS: {_few(why, '; ')}"
        most = self.farthest()
        by = "" if most is None else f" (at most {most.deviation:.2g} of it: {most})"
        near = f", {len(self.figures)} not quite{by}" if self.figures else ""
        return f"same metrics{near}; other bytes in {_few(self.files)}"


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


def begin(layout: RunLayout, recipe: Recipe, root: Path) -> None:
    """Begin a reproduction of the run `root`, or go on with one; the caller holds the lock.

    It marks the run directory: artifacts of any other run, such as a copy of the original, were
    not made again, and would agree all the same.

    Raises:
        ConfigError: the place is taken, is a run that no reproduction of this one began, or has
            another recipe.
        CorruptError: the mark is damaged.
    """
    original = check_beginning(layout, recipe, root)
    start_or_resume(layout, recipe)
    if original is None:
        mark = {"format": _MARK_FORMAT, "reproduces": str(root.resolve())}
        write_durably(layout.root / MARK, sealed_text(mark, _HASH_NAME))


def check_beginning(layout: RunLayout, recipe: Recipe, root: Path) -> str | None:
    """Check that a reproduction of the run `root` can begin in a place, or go on there.

    Returns:
        The run that is reproduced there already.

    Raises:
        ConfigError, CorruptError: see `begin`.
    """
    original = _reproduced(layout)
    if original is None and layout.record.exists():
        own = {layout.record.name}
        held = sorted(
            p.name for p in layout.root.iterdir() if p.name[:1] != "." and p.name not in own
        )
        if held:
            raise ConfigError(
                f"{layout.root} is a run that no reproduction began, and what it holds ({held[0]}) "
                "would not be made again; name another folder: --in DIR"
            )
    if original not in (None, str(root.resolve())):
        raise ConfigError(
            f"{layout.root} is a reproduction of {original}; name another folder: --in DIR"
        )
    _check_free(layout, recipe)
    return original


def _check_free(layout: RunLayout, recipe: Recipe) -> None:
    """Check what `start_or_resume` checks, whose advice is for `spin run`."""
    folder = layout.root
    what: str | None = None
    if layout.record.is_file():
        difference = recipe_difference(read_recipe(layout), recipe)
        what = difference and f"was started with another recipe: {difference}"
    elif folder.is_dir():
        strangers = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        if strangers:
            what = f"is no run directory and not empty (it holds {strangers[0]})"
    elif os.path.lexists(folder):
        what = "is a file, not a folder"
    if what:
        raise ConfigError(f"{folder} {what}; name another folder: --in DIR")


def _reproduced(layout: RunLayout) -> str | None:
    """Return the run that a run directory is a reproduction of, or None where it is none."""
    path = layout.root / MARK
    try:
        mark = open_sealed(path.read_bytes(), _HASH_NAME)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise CorruptError(
            f"{path} is damaged (its hash does not match); delete {layout.root} and reproduce again"
        ) from None
    return str(mark["reproduces"])


def threads_of(original: Lineage, default: int | None) -> dict[str, int | None]:
    """Return the number of CPU threads that each artifact is made with, by the ids of the nodes.

    Matrix products sum in another order with another number, and bytes follow. Stages that do not
    record theirs have that of the one before them in the chain.

    Args:
        default: of a chain without any record.
    """
    known = [int(m.info["threads"]) for _, m in original.made() if "threads" in m.info]
    last = known[0] if known else default
    found = {}
    for node, manifest in original.made():
        last = int(manifest.info["threads"]) if "threads" in manifest.info else last
        found[node.id] = last
    return found


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
    # last, whatever name is there already: an override of iterations beside it would win
    before = {name: value for name, value in recipe.overrides.items() if name not in changes}
    return replace(recipe, overrides=before | changes) if changes else recipe


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
    intervals: Mapping[str, Sequence[float | None]] | None = None,
    made_now: bool = True,
) -> Agreement:
    """Compare an artifact with what was made again.

    Where bytes may differ, a metric may be as far from the original as the half of its 95% interval
    there, from `intervals` or its `_stderr`; without one by `tolerance` times the larger value.

    Args:
        inputs_agree: all its inputs were made again byte for byte; where not, nothing can have the
            same bytes, and metrics decide for every stage.
        intervals: what was recorded with the original, by metric; see `recorded_intervals`.
        made_now: this call made it.
    """
    before, now = _hashes(original), _hashes(made)
    files = sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n))
    other_key = None
    if original.key != made.key:
        other_key = first_difference(original.key_fields(), made.key_fields())
    figures = [*_counts(original, made, tolerance)]
    if original.metrics:  # else it is of a version that did not measure, or nothing can be
        figures += _metrics(original.metrics, made.metrics, tolerance, intervals or {})
    in_bytes = made.stage in IN_BYTES and inputs_agree
    agrees: bool | None = not files or (not in_bytes and all(f.agrees for f in figures))
    if files and agrees and not original.metrics:
        agrees = None
    return Agreement(
        place, made.stage, not files, agrees, other_key, files, figures, made_now=made_now
    )


def recorded_intervals(artifact: Path, manifest: Manifest) -> dict[str, Any]:
    """Return the 95% intervals of an artifact's metrics, as far as they are there and sound.

    Damaged ones are no obstacle to making it again: they are told of, and left out.
    """
    if not any(entry.path == INTERVALS_FILE for entry in manifest.files):
        return {}
    try:
        return read_object(open_artifact(artifact), INTERVALS_FILE)
    except SpinError as error:
        log.warning("metrics are compared without their intervals: %s", error)
        return {}


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


def _counts(original: Manifest, made: Manifest, tolerance: float) -> Iterator[Figure]:
    """Yield the counts that differ; dropped rows are judged as the share that they are."""
    largest = max([*original.counts.values(), *made.counts.values(), 1])
    for name, one, other in _differing(original.counts, made.counts):
        yield _figure(name, one, other, tolerance * largest, largest)


def _metrics(
    original: Mapping[str, Any],
    made: Mapping[str, Any],
    tolerance: float,
    intervals: Mapping[str, Sequence[float | None]],
) -> Iterator[Figure]:
    """Yield the metrics that differ."""
    for name, one, other in _differing(original, made):
        larger = max([abs(v) for v in (one, other) if _is_number(v)], default=0.0)
        allowed = _uncertainty(name, original, intervals)
        if allowed is None:
            allowed = tolerance * max(larger, _SMALL)
        yield _figure(name, one, other, allowed, larger)


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            yield name, one.get(name), other.get(name)


def _figure(name: str, one: Any, other: Any, allowed: float, scale: float) -> Figure:
    if not (_is_number(one) and _is_number(other)):
        return Figure(name, one, other, agrees=False)
    apart = abs(one - other)
    return Figure(name, one, other, apart <= allowed, apart / scale if scale else 0.0)


def _uncertainty(
    name: str, metrics: Mapping[str, Any], intervals: Mapping[str, Sequence[float | None]]
) -> float | None:
    """Return the half of a metric's 95% interval; None where none was recorded, or it has no width.

    A standard error is such a measure itself, and known roughly: a half of it.
    """
    ends = intervals.get(name) or ()
    stderr = metrics.get(f"{name}{_STDERR}")
    half = 0.0
    if len(ends) == 2 and all(map(_is_number, ends)):
        half = (float(ends[1] or 0.0) - float(ends[0] or 0.0)) / 2
    elif _is_number(stderr):
        half = _NORMAL_95 * float(stderr or 0.0)
    elif name.endswith(_STDERR) and name.removesuffix(_STDERR) in metrics:
        half = abs(metrics[name]) / 2 if _is_number(metrics.get(name)) else 0.0
    return half if half > 0 else None


def _is_number(value: Any) -> bool:
    is_plain = isinstance(value, int | float) and not isinstance(value, bool)
    return is_plain and math.isfinite(value)


def _shown(value: Any) -> str:
    return (
        f"{value:.6g}" if isinstance(value, float) else "nothing" if value is None else str(value)
    )


def _few(names: list[str], separator: str = ", ") -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return separator.join(names[:_SHOWN]) + more
