"""pass@k and majority@k against listing all subsets of k samples."""

from collections import Counter
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.suites.estimates import MOST_SAMPLES, majority_at, pass_at

Votes = tuple[tuple[int, float], ...]


def slow_pass_at(num_samples: int, num_passed: int, k: int) -> float:
    """The share of subsets with a passed sample."""
    subsets = list(combinations([1] * num_passed + [0] * (num_samples - num_passed), k))
    return float(Fraction(sum(any(subset) for subset in subsets), len(subsets)))


def slow_majority_at(votes: Votes, abstained: int, k: int) -> float:
    """The mean over subsets of the share of most frequent answers that pass."""
    samples: list[int | None] = [i for i, (count, _) in enumerate(votes) for _ in range(count)]
    samples += [None] * abstained
    found = []
    for subset in combinations(samples, k):
        counts = Counter(vote for vote in subset if vote is not None)
        winners = [vote for vote, n in counts.items() if n == max(counts.values())]
        found.append(sum(votes[w][1] for w in winners) / len(winners) if winners else 0.0)
    return sum(found) / len(found)


@st.composite
def elections(draw: st.DrawFn) -> tuple[Votes, int, int]:
    """Votes, abstentions, and a k that there are samples for."""
    counts = draw(st.lists(st.integers(1, 4), max_size=4))
    shares = [draw(st.sampled_from([0.0, 0.0, 1.0, 0.5])) for _ in counts]
    abstained = draw(st.integers(0 if counts else 1, 3))
    k = draw(st.integers(1, min(6, sum(counts) + abstained)))
    return tuple(zip(counts, shares, strict=True)), abstained, k


def test_pass_at_k_is_the_share_of_subsets_with_a_passed_sample() -> None:
    for n in range(1, 8):
        for passed in range(n + 1):
            for k in range(1, n + 1):
                assert pass_at(n, passed, k) == pytest.approx(slow_pass_at(n, passed, k))


def test_pass_at_k_is_that_of_the_papers_program() -> None:
    """Chen et al. 2021, figure 3: 1 − ∏ (1 − k / i) over i from n − c + 1 to n."""
    for n, c, k in [(200, 13, 100), (200, 1, 10), (64, 40, 8), (1000, 3, 500)]:
        product = 1.0
        for i in range(n - c + 1, n + 1):
            product *= 1 - k / i
        assert pass_at(n, c, k) == pytest.approx(1 - product)
    assert pass_at(10, 6, 5) == 1.0


@given(elections())
def test_majority_at_k_is_the_mean_over_subsets(election: tuple[Votes, int, int]) -> None:
    assert majority_at(*election) == pytest.approx(slow_majority_at(*election))


@given(elections())
def test_majority_at_1_is_pass_at_1_and_at_n_the_plain_vote(
    election: tuple[Votes, int, int],
) -> None:
    votes, abstained, _ = election
    total = abstained + sum(count for count, _ in votes)
    mean = sum(count * share for count, share in votes) / total
    assert majority_at(votes, abstained, 1) == pytest.approx(mean)
    most = max((count for count, _ in votes), default=0)
    winners = [share for count, share in votes if count == most]
    plain = sum(winners) / len(winners) if winners else 0.0
    assert majority_at(votes, abstained, total) == pytest.approx(plain)


@given(elections())
def test_a_vote_is_between_never_and_as_often_as_one_of_k_passes(
    election: tuple[Votes, int, int],
) -> None:
    votes, abstained, k = election
    whole = tuple((count, float(share > 0)) for count, share in votes)
    passed = sum(count for count, share in whole if share)
    total = abstained + sum(count for count, _ in votes)
    assert 0 <= majority_at(whole, abstained, k) <= pass_at(total, passed, k) + 1e-12
    assert majority_at(tuple(reversed(whole)), abstained, k) == pytest.approx(
        majority_at(whole, abstained, k)
    )


@given(st.integers(1, 40), st.data())
def test_more_tries_never_pass_less_often(n: int, data: st.DataObject) -> None:
    passed = data.draw(st.integers(0, n))
    values = [pass_at(n, passed, k) for k in range(1, n + 1)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(passed / n)


def test_as_many_samples_as_a_recipe_may_draw_can_be_told() -> None:
    votes = tuple([(1, 0.0)] * 400 + [(200, 1.0), (300, 0.0)])
    rng = np.random.default_rng(0)
    drawn = rng.multivariate_hypergeometric([500, 200, 300], 64, 20_000)  # single votes never win
    won = np.mean((drawn[:, 1] > drawn[:, 2]) + 0.5 * (drawn[:, 1] == drawn[:, 2]))
    assert majority_at(votes, 100, 64) == pytest.approx(won, abs=0.01)
    two = majority_at(((MOST_SAMPLES // 2, 1.0), (MOST_SAMPLES // 2, 0.0)), 0, 501)
    assert two == pytest.approx(0.5)
    assert comb(MOST_SAMPLES, MOST_SAMPLES // 2) < 1e300
