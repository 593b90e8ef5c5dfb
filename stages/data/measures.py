"""What an evaluation measured on each example: the table that gates and comparisons read.

Every evaluation holds `measures.parquet` (see rows.MEASURES), `metrics.json` (metric → value) and
`intervals.json` (metric → [low, high], 95%; nulls where examples that all agree tell of none; cut
where the metric can be no higher or lower, if whoever measured it says so). A metric that is the
mean of its measures, weighted, stands in all three; one that is no mean over examples only in
metrics.json.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.artifacts import Artifact, TableWriter, Workspace, read_rows
from stages.data.rows import MEASURES
from stages.data.statistics import Floats, Interval, intervals

MEASURES_FILE = "measures.parquet"
METRICS_FILE = "metrics.json"
INTERVALS_FILE = "intervals.json"
SHARE = (0.0, 1.0)
RangeOf = Callable[[str], Interval | None]
"""Returns the least and the highest value that a metric of some name can have, None: any."""


@dataclass(frozen=True)
class Measure:
    """What one metric is for one example."""

    example_id: str
    metric: str
    value: float
    weight: float = 1.0
    """In the metric's mean, such as a number of tokens."""


@dataclass(frozen=True)
class Column:
    """One metric over all examples that have it."""

    example_ids: list[str]
    values: Floats
    weights: Floats

    def mean(self) -> float:
        """Return the metric itself."""
        return float(np.dot(self.values, self.weights) / self.weights.sum())


def usual_range(name: str) -> Interval | None:
    """Return the range of a share, or of a number of tokens or characters, by a name of ours."""
    if name.endswith("_share"):
        return SHARE
    return (0.0, math.inf) if name.endswith(("mean_tokens", "mean_characters")) else None


def write_measures(
    space: Workspace,
    measures: Iterable[Measure],
    others: Mapping[str, float | None],
    range_of: RangeOf = usual_range,
) -> dict[str, float | None]:
    """Write the three files of an evaluation; return its metrics.

    Args:
        others: further metrics, or the same ones, known more exactly.
        range_of: where intervals are cut off, which takes nothing from how often they are right.
    """
    found = list(measures)
    with TableWriter(space.file(MEASURES_FILE), MEASURES) as table:
        table.extend(vars(measure) for measure in found)
    columns = _columns(found)
    metrics = {name: column.mean() for name, column in columns.items()} | dict(others)
    ends = intervals([(column.values, column.weights) for column in columns.values()])
    told = {
        name: _within(found, range_of(name)) if found else (None, None)
        for name, found in zip(columns, ends, strict=True)
    }
    _write(space.file(METRICS_FILE), {name: _finite(value) for name, value in metrics.items()})
    _write(
        space.file(INTERVALS_FILE),
        {name: [_finite(low), _finite(high)] for name, (low, high) in told.items()},
    )
    return metrics


def _within(found: Interval, possible: Interval | None) -> Interval:
    least, most = possible or (-math.inf, math.inf)
    return max(found[0], least), min(found[1], most)


def _finite(value: float | None) -> float | None:
    """Return None for what JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_measures(evaluation: Artifact) -> dict[str, Column]:
    """Return what an evaluation measured, by metric.

    Raises:
        InputError: it has no such table.
        CorruptError: its bytes have changed.
    """
    rows = read_rows([evaluation.file(MEASURES_FILE)], MEASURES)
    return _columns(Measure(**row) for row in rows)


def _columns(measures: Iterable[Measure]) -> dict[str, Column]:
    by_metric: dict[str, list[Measure]] = {}
    for measure in measures:
        by_metric.setdefault(measure.metric, []).append(measure)
    return {
        name: Column(
            [m.example_id for m in found],
            np.array([m.value for m in found], np.float64),
            np.array([m.weight for m in found], np.float64),
        )
        for name, found in by_metric.items()
    }
