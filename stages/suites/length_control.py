"""Win rates as they would be if all answers were as long as what they are compared with.

After Dubois et al. 2024 (Length-Controlled AlpacaEval, arXiv 2404.04475): a logistic regression of
who wins on how much longer an answer is, read off where it is no longer. Without that paper's term
for how hard each instruction is, which is fitted to other models' answers.
"""

import numpy as np

from stages.data.statistics import Floats

RIDGE = 0.01
"""Penalty on the coefficients: finite where lengths tell wins apart, and too small to be seen."""
MOST_STEPS = 100
_CONVERGED = 1e-10


def length_controlled(wins: Floats, lengths: Floats, other_lengths: Floats) -> Floats:
    """Return a value of each example, whose mean is the win rate at equal lengths.

    An example's value differs from the mean by its influence on it, so that intervals and paired
    differences of such means can be had as of any other. Values can lie outside of 0..1. Where all
    is won, or all lost, length explains nothing: the values are the wins, with their interval.

    Args:
        wins: 1 for a win, 0 for a loss, or what is between; shape (examples,).
        lengths: of our answers.
        other_lengths: of those that they are compared with.
    """
    if wins.min() == wins.max():
        return wins.copy()
    features = _features(lengths - other_lengths)
    coefficients = fit(wins, features)
    probabilities = _sigmoid(features @ coefficients)
    curvature = _curvature(features, probabilities)
    rate = float(_sigmoid(coefficients[:1])[0])
    slope = np.array([rate * (1 - rate), 0.0])
    scores = features * (wins - probabilities)[:, None]
    influence = len(wins) * scores @ np.linalg.solve(curvature, slope)
    # The penalty leaves a tiny rest: the mean is to be the rate itself.
    values: Floats = rate + influence - influence.mean()
    return values


def fit(wins: Floats, features: Floats) -> Floats:
    """Return the coefficients of a logistic regression, by Newton's method.

    Args:
        wins: targets in 0..1, shape (examples,).
        features: shape (examples, coefficients).
    """
    coefficients = np.zeros(features.shape[1])
    for _ in range(MOST_STEPS):
        probabilities = _sigmoid(features @ coefficients)
        gradient = features.T @ (wins - probabilities) - RIDGE * coefficients
        step = np.linalg.solve(_curvature(features, probabilities), gradient)
        # A full step from far away can overshoot; two is as far as log-odds need to go at once.
        coefficients = coefficients + step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-300))
        if np.abs(step).max() < _CONVERGED:
            break
    return coefficients


def _features(longer: Floats) -> Floats:
    """Return of each example 1 and tanh(difference in length / its standard deviation)."""
    deviation = float(np.std(longer, ddof=1)) if len(longer) > 1 else 0.0
    scaled = np.tanh(longer / deviation) if deviation else np.zeros(len(longer))
    return np.column_stack([np.ones(len(longer)), scaled])


def _curvature(features: Floats, probabilities: Floats) -> Floats:
    weights = probabilities * (1 - probabilities)
    penalty = RIDGE * np.eye(features.shape[1])
    curvature: Floats = (features * weights[:, None]).T @ features + penalty
    return curvature


def _sigmoid(values: Floats) -> Floats:
    found: Floats = 0.5 * (1 + np.tanh(values / 2))  # exp would overflow
    return found
