"""Intervals of means over examples. Knows nothing of what was measured."""

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000
BOOTSTRAPPED = 5_000
"""Examples up to which a mean is bootstrapped; above, the normal approximation is as good."""
_CHUNK = 2_000_000  # numbers drawn at once: 16 MB

Floats = NDArray[np.float64]


def mean(values: Floats, weights: Floats) -> float:
    """Return the weighted mean."""
    return float(np.dot(values, weights) / weights.sum())


def interval(values: Floats, weights: Floats, confidence: float = 0.95) -> tuple[float, float]:
    """Return the two-sided confidence interval of a weighted mean over examples.

    Equally weighted zeros and ones have Wilson's interval; other values the bootstrap's percentiles
    over examples, always the same resamples, or above BOOTSTRAPPED examples the normal one.

    Args:
        values: of one example each, shape (examples,), at least one.
        weights: likewise, positive.
    """
    assert len(values) == len(weights) > 0, "an interval needs examples"
    if np.isin(values, (0.0, 1.0)).all() and (weights == weights[0]).all():
        return wilson(int(values.sum()), len(values), confidence)
    tail = (1 - confidence) / 2
    if len(values) > BOOTSTRAPPED:
        centre = mean(values, weights)
        share = weights / weights.sum()
        error = float(np.sqrt(np.square(share * (values - centre)).sum()))
        width = NormalDist().inv_cdf(1 - tail) * error
        return centre - width, centre + width
    low, high = np.quantile(resampled_means(values, weights), (tail, 1 - tail))
    return float(low), float(high)


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a share (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, scale = successes / trials, 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    width = z / scale * (share * (1 - share) / trials + z * z / (4 * trials**2)) ** 0.5
    return max(0.0, centre - width), min(1.0, centre + width)


def resampled_means(values: Floats, weights: Floats, resamples: int = RESAMPLES) -> Floats:
    """Return weighted means over examples drawn with replacement; the draws are always the same."""
    rng = np.random.default_rng(len(values))
    at_once = max(1, _CHUNK // len(values))
    means = np.empty(resamples)
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        drawn = rng.integers(0, len(values), (size, len(values)))
        means[start : start + size] = (values * weights)[drawn].sum(1) / weights[drawn].sum(1)
    return means
