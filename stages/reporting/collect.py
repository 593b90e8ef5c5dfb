"""What a report tells of a run, read from its manifests, metrics and tables.

Nothing is computed again that a stage knows. What is missing, unfinished or damaged leaves a gap,
and damage a line in `RunView.problems`: a report of half a run is worth having.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.compute as pc

from stages.artifacts import (
    Artifact,
    Manifest,
    open_artifact,
    read_batches,
    read_manifest,
    read_rows,
)
from stages.artifacts.json_file import read_object
from stages.artifacts.keys import KEY_CHARS
from stages.artifacts.manifest import MANIFEST_NAME
from stages.artifacts.pointer import Pointer, read_pointer
from stages.config import RunConfig
from stages.convergence import converged
from stages.data.alike import way
from stages.data.measures import (
    INTERVALS_FILE,
    MEASURES_FILE,
    METRICS_FILE,
    Column,
    read_measures,
)
from stages.data.rows import DROPPED, DROPPED_FILE, EXAMPLES, SFT_METRICS, TRAIN_METRICS
from stages.decisions import DECISION, outcome
from stages.errors import InputError, SpinError
from stages.layout import ITERATION_STAGES, RunLayout
from stages.lineage import without_root
from stages.recipe import Recipe
from stages.reporting.numbers import Units
from stages.run_record import read_recipe
from stages.status import stage_state

T = TypeVar("T")
PAIR_REPORT = "report.json"
EXAMPLES_FILE = "examples.parquet"
STEPS_FILE = "metrics.parquet"
_READ = (
    METRICS_FILE, INTERVALS_FILE, MEASURES_FILE, EXAMPLES_FILE, DECISION, PAIR_REPORT, STEPS_FILE,
)  # fmt: skip
"""Whose damage is told even where nothing of them is shown."""
SIDES = ("human", "opponent", "player")
_LENGTH_COLUMNS = {
    "human": "human_token_ids",
    "opponent": "opponent_sample_token_ids",
    "player": "sampled_token_ids",
}
_MARGIN_COLUMNS = {"human": "human_margin", "opponent": "opponent_margin"}


@dataclass(frozen=True)
class Piece:
    """One artifact of a run, or the place where it will be."""

    name: str
    """The stage; of a suite `suite-NAME`, of a member of the pool `pool-N`."""
    path: str
    """Relative to the run."""
    state: str
    """done, running, partial (an attempt that was cut off), missing or corrupt."""
    manifest: Manifest | None
    """None unless done."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation measured."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Those that are finite numbers."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Of 95% confidence."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Prompts that were not asked, by reason."""


NOTHING_MEASURED = Evaluation()


@dataclass(frozen=True)
class IterationView:
    """One iteration."""

    index: int
    pieces: tuple[Piece, ...]
    """In the order of the stages."""
    evaluation: Evaluation
    suites: Mapping[str, Evaluation]
    decision: Mapping[str, Any] | None
    """decision.json, as it stands there."""
    outcome: str
    """champion, promoted, rolled back, refused or undecided."""
    steps: Mapping[str, list[float]]
    """train's metrics.parquet, by column; empty where it is not there."""
    pairs: Mapping[str, Any] | None
    """pair's report."""
    lengths: Mapping[str, list[float]]
    """Tokens of the held-out responses, by whose they are."""
    margins: Mapping[str, list[float]]
    """Implicit rewards of the held-out responses, by whose they are."""
    converged: str | None

    def piece(self, name: str) -> Piece | None:
        """Return one of its artifacts; None for a stage that this recipe does not have."""
        return next((piece for piece in self.pieces if piece.name == name), None)

    def manifest(self, name: str) -> Manifest | None:
        """Return the manifest of one of its artifacts, None unless it is done."""
        piece = self.piece(name)
        return piece.manifest if piece else None

    def measured(self, metric: str) -> tuple[float | None, tuple[float, float] | None]:
        """Return a metric, SUITE.METRIC too, and its interval."""
        return measured(metric, self.evaluation, self.suites)


@dataclass(frozen=True)
class RunView:
    """A run."""

    folder: str
    """The name of its directory."""
    recipe: Recipe | None
    """None where run.json is damaged."""
    before: tuple[Piece, ...]
    """prepare, sft, suites' data, and the start's evaluations."""
    start: Evaluation
    start_suites: Mapping[str, Evaluation]
    sft_steps: Mapping[str, list[float]]
    iterations: tuple[IterationView, ...]
    pointer: Pointer | None
    problems: tuple[str, ...]
    """One line each, as the reader of the damaged part said it."""
    layout: RunLayout
    champion_problem: str | None = None
    """Why what the pointer leads to is not what was promoted, one of `problems` too."""
    is_pointer_damaged: bool = False
    """Whether there is a pointer that cannot be read; `pointer` is None then too."""

    @property
    def config(self) -> RunConfig | None:
        """The recipe as it stands outside the iterations."""
        return self.recipe.for_iteration() if self.recipe else None

    @property
    def units(self) -> Units:
        """How the run's metrics are written; where the recipe cannot be read, by their names."""
        return Units.of(self.recipe.configs()) if self.recipe else Units()

    def pieces(self) -> Iterator[Piece]:
        """Yield all artifacts, in the order in which they are made."""
        yield from self.before
        for iteration in self.iterations:
            yield from iteration.pieces

    def manifests(self) -> dict[str, Manifest]:
        """Return all manifests by their artifacts' paths."""
        return {p.path: p.manifest for p in self.pieces() if p.manifest is not None}

    def champion_iteration(self) -> IterationView | None:
        """Return the iteration whose player is the champion, None while there is none."""
        if self.champion_problem is not None:
            return None
        return next((each for each in self.iterations if each.outcome == "champion"), None)

    def shown(self, problem: str) -> str:
        """Return a problem with paths as they are named within the run."""
        return without_root(problem, self.layout.root)

    def measured_at_start(self, metric: str) -> tuple[float | None, tuple[float, float] | None]:
        """Return a metric of the first opponent, SUITE.METRIC too, and its interval."""
        return measured(metric, self.start, self.start_suites)


def measured(
    metric: str, evaluation: Evaluation, suites: Mapping[str, Evaluation]
) -> tuple[float | None, tuple[float, float] | None]:
    """Return a metric, or that of a suite (SUITE.METRIC), and its interval; None: there is none."""
    suite, dot, name = metric.partition(".")
    source = suites.get(suite, NOTHING_MEASURED) if dot else evaluation
    wanted = name if dot else metric
    return source.metrics.get(wanted), source.intervals.get(wanted)


def collect(run: Path) -> RunView:
    """Return what is known of a run, whatever state it is in.

    Raises:
        InputError: `run` is no run directory.
    """
    return _Reader(RunLayout(run)).read()


@dataclass(frozen=True)
class Measured:
    """One metric of one evaluation, on each example."""

    column: Column
    asked: Any
    """What decides how the examples were asked and scored; equal where two can be compared."""


def measured_on_examples(layout: RunLayout, iteration: int | None, metric: str) -> Measured | None:
    """Return a metric, SUITE.METRIC too, on each example; iteration None: of the start.

    Raises:
        SpinError: there is no sound evaluation.
    """
    suite, dot, rest = metric.partition(".")
    name = rest if dot else metric
    place = layout.start_evaluation if iteration is None else layout.stage(iteration, "evaluate")
    artifact = open_artifact(layout.suite(iteration, suite) if dot else place)
    column = read_measures(artifact).get(name)
    return Measured(column, way(artifact.manifest)) if column else None


@dataclass
class _Reader:
    """Reads what can be read, and notes what cannot."""

    layout: RunLayout
    problems: list[str] = field(default_factory=list)

    def read(self) -> RunView:
        layout = self.layout
        if not layout.record.is_file():
            read_recipe(layout)  # says what is wrong with the path
            raise InputError(f"{layout.root} is no run directory (no run.json); correct the path")
        recipe = self._attempt(lambda: read_recipe(layout), None)
        known = len(self.problems)
        pointer = self._attempt(lambda: read_pointer(layout.champion), None)
        is_pointer_damaged = len(self.problems) > known
        champion_problem = _champion_problem(layout, pointer)
        if champion_problem is not None:
            self.problems.append(champion_problem)
        before = tuple(self._before(recipe))
        start_suites = {
            piece.name.removeprefix("suite-"): self._evaluation(layout.root / piece.path)
            for piece in before
            if piece.name.startswith("suite-") and piece.manifest is not None
        }
        return RunView(
            folder=layout.root.resolve().name,
            recipe=recipe,
            before=before,
            start=self._evaluation(layout.start_evaluation),
            start_suites=start_suites,
            sft_steps=self._steps(layout.sft, SFT_METRICS),
            iterations=tuple(self._iteration(t, recipe, pointer) for t in layout.iterations()),
            pointer=pointer,
            problems=tuple(dict.fromkeys(self.problems)),
            layout=layout,
            champion_problem=champion_problem,
            is_pointer_damaged=is_pointer_damaged,
        )

    def _attempt(self, read: Callable[[], T], otherwise: T) -> T:
        """Return what is read; where it is damaged, note that and return something else."""
        try:
            return read()
        except (SpinError, OSError) as error:
            self.problems.append(self._shown(str(error)))
            return otherwise

    def _shown(self, problem: str) -> str:
        """Return a problem with paths as they are named within the run."""
        return without_root(problem, self.layout.root)

    def _piece(self, name: str, place: Path) -> Piece:
        path = self.layout.relative(place)
        state = stage_state(place)["state"]
        if state != "done":
            if state == "corrupt":
                self._attempt(lambda: open_artifact(place), None)
            return Piece(name, path, state, None)
        artifact = self._attempt(lambda: open_artifact(place), None)
        if artifact is None:
            return Piece(name, path, "corrupt", None)
        for relative in _READ:
            if _has(artifact, relative):
                self._attempt(lambda: artifact.file(relative), None)  # noqa: B023
        return Piece(name, path, "done", artifact.manifest)

    def _before(self, recipe: Recipe | None) -> Iterator[Piece]:
        layout = self.layout
        yield self._piece("prepare", layout.data)
        sft = self._piece("sft", layout.sft)
        if sft.state != "missing":
            yield sft
        for folder in _folders(layout.root / "suites"):
            yield self._piece(f"data of suite {folder.name}", folder)
        yield self._piece("evaluate", layout.start_evaluation)
        yield from self._suites(None, recipe)

    def _suites(self, iteration: int | None, recipe: Recipe | None) -> Iterator[Piece]:
        """Yield the suites that the recipe asks here, and others that were asked."""
        asked = recipe.for_iteration(iteration).suites_after(iteration) if recipe else {}
        # before the first iteration nobody plays against another
        names = [n for n, s in asked.items() if iteration is not None or s.kind != "win_rate"]
        parent = self.layout.suite(iteration, "x").parent
        found = [p.name.removeprefix("suite-") for p in _folders(parent) if "suite-" in p.name[:6]]
        for name in dict.fromkeys([*names, *found]):
            yield self._piece(f"suite-{name}", self.layout.suite(iteration, name))

    def _iteration(
        self, index: int, recipe: Recipe | None, pointer: Pointer | None
    ) -> IterationView:
        layout = self.layout
        pieces = {name: self._piece(name, layout.stage(index, name)) for name in ITERATION_STAGES}
        config = recipe.for_iteration(index) if recipe else None
        if pieces["reward"].state == "missing" and not (config and config.pair.needs_rewards):
            del pieces["reward"]
        folder = layout.stage(index, "generate").parent
        pool = [self._piece(p.name, p) for p in _folders(folder) if p.name.startswith("pool-")]
        suites = list(self._suites(index, recipe))
        ordered = _in_order([*pieces.values(), *pool, *suites])
        evaluated = layout.stage(index, "evaluate")
        lengths, margins = self._shapes(evaluated)
        decision = self._object(layout.stage(index, "promote"), DECISION)
        is_decided = recipe is not None and decision is not None
        return IterationView(
            index=index,
            pieces=ordered,
            evaluation=self._evaluation(evaluated),
            suites={
                piece.name.removeprefix("suite-"): self._evaluation(layout.root / piece.path)
                for piece in suites
                if piece.manifest is not None
            },
            decision=decision,
            outcome=_outcome(layout, index, decision, pointer),
            steps=self._steps(layout.stage(index, "train"), TRAIN_METRICS),
            pairs=self._object(layout.stage(index, "pair"), PAIR_REPORT),
            lengths=lengths,
            margins=margins,
            converged=self._converged(recipe, index) if recipe and is_decided else None,
        )

    def _converged(self, recipe: Recipe, index: int) -> str | None:
        try:
            return converged(self.layout, recipe, index)
        except SpinError:  # what is missing or damaged is told of its own piece
            return None

    def _artifact(self, place: Path) -> Artifact | None:
        """Open an artifact; one that is unsound was told of as a piece."""
        if not (place / MANIFEST_NAME).is_file():
            return None
        try:
            return open_artifact(place)
        except (SpinError, OSError):
            return None

    def _object(self, place: Path, relative: str) -> dict[str, Any] | None:
        artifact = self._artifact(place)
        if artifact is None or not _has(artifact, relative):
            return None
        return self._attempt(lambda: read_object(artifact, relative), None)

    def _evaluation(self, place: Path) -> Evaluation:
        metrics = self._object(place, METRICS_FILE) or {}
        intervals = self._object(place, INTERVALS_FILE) or {}
        return Evaluation(
            {name: float(value) for name, value in metrics.items() if _is_number(value)},
            {
                name: (float(pair[0]), float(pair[1]))
                for name, pair in intervals.items()
                if isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair))
            },
            self._left_out(place),
        )

    def _left_out(self, place: Path) -> dict[str, int]:
        artifact = self._artifact(place)
        if artifact is None:
            return {}
        if not _has(artifact, DROPPED_FILE):
            refused = artifact.manifest.counts.get("dropped_refused", 0)
            return {"refused": refused} if refused else {}

        def read() -> dict[str, int]:
            rows = read_rows([artifact.file(DROPPED_FILE)], DROPPED, columns=["reason"])
            return dict(Counter(str(row["reason"]) for row in rows).most_common())

        return self._attempt(read, {})

    def _steps(self, place: Path, schema: Any) -> dict[str, list[float]]:
        artifact = self._artifact(place)
        if artifact is None or not _has(artifact, STEPS_FILE):
            return {}

        def read() -> dict[str, list[float]]:
            rows = list(read_rows([artifact.file(STEPS_FILE)], schema))
            return {name: [float(row[name]) for row in rows] for name in schema.names}

        return self._attempt(read, {})

    def _shapes(self, place: Path) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """Return lengths and margins of an evaluation's responses."""
        artifact = self._artifact(place)
        if artifact is None or not _has(artifact, EXAMPLES_FILE):
            return {}, {}

        def read() -> tuple[dict[str, list[float]], dict[str, list[float]]]:
            columns = [*_LENGTH_COLUMNS.values(), *_MARGIN_COLUMNS.values()]
            found: dict[str, list[Any]] = {name: [] for name in columns}
            path = artifact.file(EXAMPLES_FILE)
            for batch in read_batches([path], EXAMPLES, columns=columns):
                for name in columns:
                    column = batch.column(name)
                    is_tokens = name in _LENGTH_COLUMNS.values()
                    found[name] += (
                        pc.list_value_length(column) if is_tokens else column
                    ).to_pylist()
            lengths, margins = (
                {
                    side: [float(v) for v in found[name] if _is_number(v)]
                    for side, name in of.items()
                }
                for of in (_LENGTH_COLUMNS, _MARGIN_COLUMNS)
            )
            return _not_empty(lengths), _not_empty(margins)

        nothing: tuple[dict[str, list[float]], dict[str, list[float]]] = ({}, {})
        return self._attempt(read, nothing)


def _champion_problem(layout: RunLayout, pointer: Pointer | None) -> str | None:
    """Return why an artifact at the pointer's place is not the one that was promoted, if so."""
    if pointer is None:
        return None
    try:
        key = read_manifest(layout.root / pointer.path).key
    except (SpinError, OSError):  # what is missing or damaged is told of its own piece
        return None
    if key == pointer.key:
        return None
    return (
        f"{layout.champion.name} points to {pointer.path} with key {pointer.key[:KEY_CHARS]}, but "
        f"{key[:KEY_CHARS]} is there; roll back: spin promote RUN --rollback"
    )


def _outcome(
    layout: RunLayout, index: int, decision: Mapping[str, Any] | None, pointer: Pointer | None
) -> str:
    promoted = bool(decision and decision.get("promoted"))
    found = outcome(layout, index, promoted=promoted, pointer=pointer)
    if found == "champion" and _champion_problem(layout, pointer) is not None:
        found = "promoted" if promoted else "refused"
    return "undecided" if decision is None and found != "champion" else found


def _in_order(pieces: list[Piece]) -> tuple[Piece, ...]:
    """Return pieces as they are made: a pool's after generate, suites after evaluate."""
    places = {name: 10 * i for i, name in enumerate(ITERATION_STAGES)}

    def place(piece: Piece) -> tuple[int, str]:
        if piece.name in places:
            return places[piece.name], ""
        after = "generate" if piece.name.startswith("pool-") else "evaluate"
        return places[after] + 1, piece.name

    return tuple(sorted(pieces, key=place))


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(p for p in parent.iterdir() if p.is_dir() and not p.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _has(artifact: Artifact, relative: str) -> bool:
    return any(entry.path == relative for entry in artifact.manifest.files)


def _not_empty(found: Mapping[str, list[float]]) -> dict[str, list[float]]:
    return {name: values for name, values in found.items() if values}


def _is_number(value: Any) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and math.isfinite(value)
