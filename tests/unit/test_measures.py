"""What evaluations measure on each example, and the intervals of its means."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.artifacts import Outcome, Plan, Workspace, open_artifact, produce
from stages.data.measures import Measure, read_measures, write_measures
from stages.data.statistics import BOOTSTRAPPED, interval, intervals, wilson


def test_measures_come_back_as_they_were_written_with_their_means_and_intervals(
    tmp_path: Path,
) -> None:
    given = [Measure(f"p{i}", "accuracy", float(i % 2)) for i in range(10)]
    given += [Measure("p0", "logprob", -2.0, 3.0), Measure("p1", "logprob", -4.0, 1.0)]
    given += [Measure("p0", "tokens", 9.0), Measure("p1", "tokens", 9.0)]

    def fill(space: Workspace) -> Outcome:
        metrics = write_measures(space, given, {"extra": float("nan"), "prompts": 10})
        assert metrics["logprob"] == -2.5
        return Outcome(counts={})

    produce(tmp_path / "e", Plan("evaluate", 1, {}, {}, {}), fill)
    evaluation = open_artifact(tmp_path / "e")
    columns = read_measures(evaluation)
    assert columns["logprob"].example_ids == ["p0", "p1"]
    assert columns["logprob"].mean() == -2.5
    assert columns["accuracy"].mean() == 0.5
    metrics = json.loads(evaluation.file("metrics.json").read_text())
    assert metrics == {
        "accuracy": 0.5, "extra": None, "logprob": -2.5, "prompts": 10, "tokens": 9.0,
    }  # fmt: skip
    intervals = json.loads(evaluation.file("intervals.json").read_text())
    assert intervals["accuracy"] == pytest.approx(wilson(5, 10))
    low, high = intervals["logprob"]
    assert low < -2.5 < high
    assert [low, high] == list(
        interval(columns["logprob"].values, columns["logprob"].weights) or ()
    )
    assert intervals["tokens"] == [None, None]  # a key all the same: it is a mean over examples


def test_intervals_are_cut_where_a_metric_can_be_no_higher_or_lower(tmp_path: Path) -> None:
    values = {"pass@4": (0.1, 0.9, 1.0), "margin": (-1.0, 0.0, 5.0), "cut_off_share": (0, 0.5, 0)}
    given = [
        Measure(f"p{i}", name, value) for name, of in values.items() for i, value in enumerate(of)
    ]

    def written(place: Path, **options: Any) -> dict[str, list[float]]:
        def fill(space: Workspace) -> Outcome:
            write_measures(space, given, {}, **options)
            return Outcome(counts={})

        produce(place, Plan("evaluate", 1, {}, {}, {}), fill)
        found: dict[str, list[float]] = json.loads(
            open_artifact(place).file("intervals.json").read_text()
        )
        return found

    free = written(tmp_path / "free", range_of=lambda _: None)
    assert all(low < 0 < high for low, high in free.values())
    assert free["pass@4"][1] > 1
    cut = written(tmp_path / "cut", range_of={"pass@4": (0.0, 1.0)}.get)
    assert cut == free | {"pass@4": [0.0, 1.0]}
    (_, high) = free["cut_off_share"]
    assert written(tmp_path / "usual") == free | {"cut_off_share": [0.0, min(1.0, high)]}


def test_wilsons_interval_is_that_of_the_tables() -> None:
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


@pytest.mark.parametrize("trials", [1, 3, 7, 20, 100, 999, 1000])
def test_wilsons_interval_ends_at_none_and_all_exactly(trials: int) -> None:
    low, high = wilson(0, trials)
    assert (low, wilson(trials, trials)[1]) == (0.0, 1.0)
    assert 0 < high < 1


@pytest.mark.parametrize("count", [3, 5, 10])
@pytest.mark.parametrize("weighted", [False, True])
def test_an_interval_of_few_examples_covers_as_often_as_it_says(count: int, weighted: bool) -> None:
    rng = np.random.default_rng(count)
    values = rng.normal(3.0, 2.0, (1000, count))
    weights = rng.uniform(1, 2, (1000, count)) if weighted else np.ones((1000, count))
    found = [ends for ends in intervals(list(zip(values, weights, strict=True))) if ends]
    assert len(found) == 1000
    covered = np.mean([low <= 3.0 <= high for low, high in found])
    assert covered >= 0.95 - 3 * (0.95 * 0.05 / 1000) ** 0.5


@pytest.mark.parametrize(
    "values", [[0.5] * 10, [3.0], [0.1] * BOOTSTRAPPED + [0.1], [1.0, float("nan"), 2.0]]
)
def test_what_no_interval_can_be_told_of_has_none(values: list[float]) -> None:
    """Ten ties say nothing of how often there is no tie."""
    assert interval(np.array(values), np.ones(len(values))) is None


def test_an_interval_is_the_same_alone_and_among_others() -> None:
    rng = np.random.default_rng(0)
    columns = [(rng.normal(size=n), rng.uniform(1, 9, n)) for n in (4, 90, 4, 90)]
    for among, column in zip(intervals(columns), columns, strict=True):
        assert among == pytest.approx(interval(*column))


@pytest.mark.parametrize("count", [400, BOOTSTRAPPED + 1])
def test_an_interval_is_about_two_standard_errors_wide_and_always_the_same(count: int) -> None:
    values = np.random.default_rng(7).normal(3.0, 2.0, count)
    weights = np.ones(count)
    found = interval(values, weights)
    assert found is not None
    low, high = found
    error = values.std() / np.sqrt(count)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.3 * error)
    assert interval(values, weights) == (low, high)
