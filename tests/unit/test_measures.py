"""What evaluations measure on each example, and the intervals of its means."""

import json
from pathlib import Path

import numpy as np
import pytest

from stages.artifacts import Outcome, Plan, Workspace, open_artifact, produce
from stages.data.measures import Measure, read_measures, write_measures
from stages.data.statistics import BOOTSTRAPPED, interval, wilson


def test_measures_come_back_as_they_were_written_with_their_means_and_intervals(
    tmp_path: Path,
) -> None:
    given = [Measure(f"p{i}", "accuracy", float(i % 2)) for i in range(10)]
    given += [Measure("p0", "logprob", -2.0, 3.0), Measure("p1", "logprob", -4.0, 1.0)]

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
    assert metrics == {"accuracy": 0.5, "extra": None, "logprob": -2.5, "prompts": 10}
    intervals = json.loads(evaluation.file("intervals.json").read_text())
    assert intervals["accuracy"] == pytest.approx(wilson(5, 10))
    assert intervals["logprob"] == [-4.0, -2.0]


def test_wilsons_interval_is_that_of_the_tables() -> None:
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(20, 20)[1] == pytest.approx(1.0)


@pytest.mark.parametrize("count", [400, BOOTSTRAPPED + 1])
def test_an_interval_is_about_two_standard_errors_wide_and_always_the_same(count: int) -> None:
    values = np.random.default_rng(7).normal(3.0, 2.0, count)
    weights = np.ones(count)
    low, high = interval(values, weights)
    error = values.std() / np.sqrt(count)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.3 * error)
    assert interval(values, weights) == (low, high)
