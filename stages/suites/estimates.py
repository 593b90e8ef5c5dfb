"""What n samples to a prompt tell of k: the chance that one of k passes, or that their vote does.

Both are means over all subsets of k samples, computed without listing them.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import comb

import numpy as np

from stages.data.statistics import Floats

MOST_SAMPLES = 1000
"""Binomial coefficients of more do not fit a float."""


def pass_at(num_samples: int, num_passed: int, k: int) -> float:
    """Return how often at least one of k samples passes.

    It is 1 − C(n−c, k) / C(n, k), the unbiased estimate of pass@k (Chen et al. 2021,
    arXiv 2107.03374).
    """
    assert 0 <= num_passed <= num_samples >= k >= 1, (num_samples, num_passed, k)
    return 1 - comb(num_samples - num_passed, k) / comb(num_samples, k)


@lru_cache(maxsize=4096)  # few patterns of votes make up most prompts
def majority_at(votes: tuple[tuple[int, float], ...], abstained: int, k: int) -> float:
    """Return how often the answer that most of k samples give passes.

    Where several answers have most votes, each of them counts in equal parts. Where all k samples
    abstain there is no answer, and nothing passes.

    Args:
        votes: of each answer, the number of its samples and the share of them that pass.
        abstained: number of samples that hold no answer.
    """
    num_samples = abstained + sum(count for count, _ in votes)
    assert num_samples >= k >= 1, (votes, abstained, k)
    assert num_samples <= MOST_SAMPLES, f"{num_samples} samples, at most {MOST_SAMPLES}"
    most = min(k, max((count for count, _ in votes), default=0))
    won = sum(_won_with(winning, votes, abstained, k) for winning in range(1, most + 1))
    return min(1.0, won / comb(num_samples, k))


def _won_with(winning: int, votes: Sequence[tuple[int, float]], abstained: int, k: int) -> float:
    """Return in how many subsets an answer passes that wins with so many votes.

    Goes through the answers one by one. `ways_TK` is the number of ways to draw K samples of
    those gone through, T answers among them having `winning` votes and none having more;
    `passed_TK` is the sum over these ways of the shares of those T answers that pass.
    """
    ties = min(sum(count >= winning for count, _ in votes), k // winning)
    ways_TK = np.zeros((ties + 1, k + 1))
    passed_TK = np.zeros_like(ways_TK)
    ways_TK[0] = [comb(abstained, drawn) for drawn in range(k + 1)]
    for count, share in votes:
        fewer = [comb(count, drawn) for drawn in range(min(count, winning - 1) + 1)]
        more_ways_TK, more_passed_TK = _drawn(ways_TK, fewer), _drawn(passed_TK, fewer)
        if count >= winning:
            as_many = comb(count, winning)
            before_TK = ways_TK[:-1, : k + 1 - winning]
            more_ways_TK[1:, winning:] += as_many * before_TK
            more_passed_TK[1:, winning:] += as_many * (
                passed_TK[:-1, : k + 1 - winning] + share * before_TK
            )
        ways_TK, passed_TK = more_ways_TK, more_passed_TK
    return float((passed_TK[1:, k] / np.arange(1, ties + 1)).sum())


def _drawn(sums_TK: Floats, ways: Sequence[int]) -> Floats:
    """Return the sums when further samples are drawn, 0, 1, … of them in so many ways."""
    total_TK = np.zeros_like(sums_TK)
    for drawn, number in enumerate(ways[: sums_TK.shape[1]]):
        total_TK[:, drawn:] += number * sums_TK[:, : sums_TK.shape[1] - drawn]
    return total_TK
