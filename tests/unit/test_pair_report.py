"""What the report of pair says, against the plain way to count it."""

from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data.pair_report import Distribution, PairReport, WithinPrompts, length_confound

NUMBERS = st.lists(st.integers(-5, 5), min_size=1, max_size=40)


@given(differences=NUMBERS)
def test_the_length_rule_and_its_curve_equal_the_count_of_all_couples(
    differences: list[int],
) -> None:
    found = length_confound(Counter(differences))
    longer = sum((d > 0) + 0.5 * (d == 0) for d in differences) / len(differences)
    assert found["chosen_longer_share"] == pytest.approx(longer)
    assert found["rule_accuracy"] == pytest.approx(max(longer, 1 - longer))
    assert found["rule"] == ("longer" if longer >= 0.5 else "shorter")
    # Scores of "the first is chosen": d for pairs shown one way round, −d for the other.
    couples = [(d > -e) + 0.5 * (d == -e) for d, e in product(differences, repeat=2)]
    assert found["auc"] == pytest.approx(sum(couples) / len(couples))


def test_lengths_that_tell_all_and_nothing() -> None:
    assert length_confound({3: 10, 40: 2})["auc"] == 1
    assert length_confound({-3: 10}) == {
        "chosen_longer_share": 0, "rule": "shorter", "rule_accuracy": 1, "auc": 0,
    }  # fmt: skip
    assert length_confound({-3: 5, 3: 5})["auc"] == 0.5
    assert length_confound({0: 7})["rule_accuracy"] == 0.5
    # One in two is longer, but then by far.
    assert length_confound({-1: 5, 100: 5})["auc"] == pytest.approx(0.75)


@given(values=NUMBERS, batches=st.integers(1, 5))
def test_quantiles_are_values_that_so_large_a_share_does_not_exceed(
    values: list[int], batches: int
) -> None:
    distribution = Distribution()
    for part in np.array_split(np.array(values), batches):
        distribution.add(part)
    summary = distribution.summary()
    assert summary["mean"] == pytest.approx(np.mean(values))
    for share, value in summary["quantiles"].items():
        assert np.mean(np.array(values) <= value) >= float(share) - 1e-12
        assert np.mean(np.array(values) < value) <= float(share)


def _groups(sizes: list[int]) -> Any:
    prompts = np.repeat(np.arange(len(sizes)), sizes)
    numbers = np.random.default_rng(0).normal(size=(2, len(prompts)))
    return prompts, numbers[0] + prompts, 0.5 * numbers[0] + numbers[1] - prompts


def test_the_correlation_leaves_out_differences_between_prompts() -> None:
    prompts, x, y = _groups([1, 4, 7, 30, 2] * 20)
    found = WithinPrompts()
    found.add(prompts, x, y)
    less = [v - np.array([v[prompts == p].mean() for p in prompts]) for v in (x, y)]
    assert found.correlation() == pytest.approx(np.corrcoef(*less)[0, 1])
    assert np.corrcoef(x, y)[0, 1] < 0
    assert (found.samples, found.prompts) == (len(x), 100)


def test_the_correlation_is_the_same_to_the_last_bit_in_any_division() -> None:
    prompts, x, y = _groups([3] * 500)
    whole, parts = WithinPrompts(), WithinPrompts()
    whole.add(prompts, x, y)
    for rows in (slice(0, 3), slice(3, 600), slice(600, None)):
        parts.add(prompts[rows], x[rows], y[rows])
    assert whole == parts


def test_no_correlation_where_nothing_varies() -> None:
    found = WithinPrompts()
    found.add(np.array([0, 0]), np.array([1.0, 1.0]), np.array([1.0, 2.0]))
    assert found.correlation() is None
    assert PairReport(iteration=0, candidates=1).metrics() == {
        "identical_share": 0, "empty_share": 0, "cut_off_share": 0, "dropped_share": 1,
    }  # fmt: skip
