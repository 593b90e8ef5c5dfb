"""Intervals of means over examples, and tests of paired ones. Knows nothing of what was measured.

All tests are one-sided, of "the gain is at most so much"; docs/gates.md tells how often each errs,
measured by bench/gates.py.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000
BOOTSTRAPPED = 5_000
"""Examples up to which a mean is bootstrapped; above, the normal approximation is as good."""
_CHUNK = 2_000_000  # numbers drawn at once: 16 MB

Floats = NDArray[np.float64]
Interval = tuple[float, float]


def mean(values: Floats, weights: Floats) -> float:
    """Return the weighted mean."""
    return float(np.dot(values, weights) / weights.sum())


def linearized(values: Floats, weights: Floats) -> Floats:
    """Return numbers whose plain mean is the weighted mean, and whose spread is its error.

    Equally weighted they are the values themselves, otherwise the linearization of the quotient.
    """
    centre = mean(values, weights)
    parts: Floats = centre + weights / weights.mean() * (values - centre)
    return parts


def interval(values: Floats, weights: Floats, confidence: float = 0.95) -> Interval | None:
    """Return the two-sided confidence interval of a weighted mean over examples; see `intervals`.

    Args:
        values: of one example each, shape (examples,), at least one.
        weights: likewise, positive.
    """
    (found,) = intervals([(values, weights)], confidence)
    return found


def intervals(
    columns: Sequence[tuple[Floats, Floats]], confidence: float = 0.95
) -> list[Interval | None]:
    """Return the intervals of several means, those of equally many examples by the same resamples.

    Equally weighted zeros and ones have Wilson's interval; other values that of `Studentized`, or
    above BOOTSTRAPPED examples the normal one. None where values are not finite, or where all
    agree: how far others may lie nobody can tell then.
    """
    found: list[Interval | None] = [None] * len(columns)
    bootstrapped: dict[int, list[int]] = defaultdict(list)
    for place, (values, weights) in enumerate(columns):
        assert len(values) == len(weights) > 0, "an interval needs examples"
        if np.isin(values, (0.0, 1.0)).all() and (weights == weights[0]).all():
            found[place] = wilson(int(values.sum()), len(values), confidence)
        elif not np.isfinite(values).all() or (values == values[0]).all():
            continue
        elif len(values) > BOOTSTRAPPED:
            found[place] = _normal_interval(values, weights, confidence)
        else:
            bootstrapped[len(values)].append(place)
    for places in bootstrapped.values():
        sets = studentized_sets(np.stack([linearized(*columns[place]) for place in places]))
        for place, one in zip(places, sets, strict=True):
            found[place] = one.interval(confidence) if one.stderr else None
    return found


def _normal_interval(values: Floats, weights: Floats, confidence: float) -> Interval:
    centre, share = mean(values, weights), weights / weights.sum()
    error = float(np.sqrt(np.square(share * (values - centre)).sum()))
    width = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return centre - width, centre + width


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Return Wilson's score interval of a share (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, scale = successes / trials, 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    width = z / scale * (share * (1 - share) / trials + z * z / (4 * trials**2)) ** 0.5
    # none and all give 0 and 1 exactly, which rounding would miss by 2e-19
    low = max(0.0, centre - width) if successes else 0.0
    high = min(1.0, centre + width) if successes < trials else 1.0
    return low, high


def mcnemar(wins: int, losses: int, examples: int) -> float:
    """Return the one-sided p value of "no more wins than losses" (McNemar 1947).

    Where at most half of the examples differ it is the mid-p value (Lancaster 1961), otherwise the
    exact binomial one. So it errs in at most 5.01% of cases where 5% is allowed, whatever the size
    and the share that differs (enumerated by bench/gates.py); mid-p alone in up to 7.3% where all
    of a few examples differ, the exact value alone in 1 to 4.7%, and so it overlooks more gains.

    Args:
        examples: wins, losses and ties.
    """
    discordant = wins + losses
    count = np.arange(wins, discordant + 1)
    logs = _log_factorials(discordant)
    shares = np.exp(logs[-1] - logs[count] - logs[discordant - count] - discordant * np.log(2))
    return float(shares.sum() - (shares[0] / 2 if 2 * discordant <= examples else 0))


def share_bound(successes: int, trials: int, confidence: float = 0.95) -> float:
    """Return the one-sided lower bound of a share (Clopper and Pearson 1934).

    It is the share at which so many successes or more have a chance of 1 - confidence. Exact, where
    a bound by mid-p values errs in up to 10% of cases (20 examples) instead of 5%.
    """
    count = np.arange(successes, trials + 1)
    logs = _log_factorials(trials)
    ways = logs[-1] - logs[count] - logs[trials - count]
    low, high = 0.0, 1.0
    for _ in range(50):
        share = (low + high) / 2
        chances = np.exp(ways + count * np.log(share) + (trials - count) * np.log1p(-share))
        is_below = chances.sum() < 1 - confidence
        low, high = (share, high) if is_below else (low, share)
    return low


def score_p_value(wins: int, losses: int, examples: int, gain: float) -> float:
    """Return the one-sided p value of "the difference of two paired shares is at most `gain`".

    It is the probability of a score (Tango 1998) as high as the one seen, summed over all outcomes
    under the likeliest shares with that difference (an E p value; Lloyd 2008). The score's normal
    approximation errs in up to 7% of cases instead of 5%, where few examples differ.

    Args:
        examples: wins, losses and ties.
        gain: between -1 and 1.
    """
    assert -1 < gain < 1, "a difference of two shares"
    score, share = _score(np.array(wins), np.array(losses), examples, gain)
    if examples * (2 * float(share) + abs(gain)) > _ENUMERATED:
        return 1 - NormalDist().cdf(float(score))
    rates = max(float(share) + gain, 0.0), float(share)
    ranges = [_likely(examples, rate) for rate in rates]
    won, lost = np.meshgrid(*ranges, indexing="ij")
    tied = examples - won - lost
    possible = tied >= 0
    won, lost, tied = won[possible], lost[possible], tied[possible]
    logs = _log_factorials(examples)
    chance = logs[-1] - logs[won] - logs[lost] - logs[tied]
    for count, rate in ((won, rates[0]), (lost, rates[1]), (tied, 1 - sum(rates))):
        chance = chance + count * np.log(max(rate, _TINY))
    as_high = _score(won, lost, examples, gain)[0] >= float(score) - _ROUNDING
    return min(1.0, float(np.exp(chance[as_high]).sum()))


def score_interval(wins: int, losses: int, examples: int, confidence: float = 0.95) -> Interval:
    """Return the two-sided score interval of the difference of two paired shares (Tango 1998)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    low = _where_score_is(z, wins, losses, examples)
    return low, -_where_score_is(z, losses, wins, examples)


@dataclass(frozen=True)
class Studentized:
    """A mean over examples, with its t statistic's own spread (the bootstrap-t of Hall 1988).

    Of Student's t and the bootstrap the more careful one counts: t alone errs in up to 11% of cases
    instead of 5% where few large losses stand against many small gains (100 examples, as skewed as
    a log-normal), the bootstrap alone in up to 13% where few examples differ at all.
    """

    mean: float
    stderr: float
    draws: Floats
    """t statistics of resamples, sorted."""
    examples: int

    def p_value(self, gain: float) -> float:
        """Return the one-sided p value of "the mean is at most `gain`"."""
        if not self.stderr:  # all examples agree, so that only their number speaks: a sign test
            return 0.5**self.examples if self.mean > gain else 1.0
        seen = (self.mean - gain) / self.stderr
        above = len(self.draws) - int(np.searchsorted(self.draws, seen, side="left"))
        return max((1 + above) / (1 + len(self.draws)), _student_tail(seen, self.examples - 1))

    def interval(self, confidence: float = 0.95) -> Interval | None:
        """Return the two-sided interval: the gains that the p value does not rule out.

        Where all examples agree that is their one value from so many examples on that the sign test
        rules out all else (six at 95%); with fewer there is none.
        """
        tail = (1 - confidence) / 2
        if not self.stderr:
            is_told = math.isfinite(self.mean) and 0.5**self.examples <= tail
            return (self.mean, self.mean) if is_told else None
        low, high = np.quantile(self.draws, (tail, 1 - tail), method="inverted_cdf")
        student = _student_quantile(1 - tail, self.examples - 1)
        # of a few examples many resamples show no spread, and their t no bound: Student's is left
        below, above = (
            max(student, float(t)) if math.isfinite(t) else student for t in (high, -low)
        )
        return self.mean - below * self.stderr, self.mean + above * self.stderr


def studentized(differences: Floats) -> Studentized:
    """Return what can be said of the mean of differences, those of one example each."""
    (found,) = studentized_sets(differences[None, :])
    return found


def studentized_sets(differences: Floats, resamples: int = RESAMPLES) -> list[Studentized]:
    """Return the same of several sets of equally many examples; the draws are always the same.

    Args:
        differences: shape (sets, examples), at least one of each.
    """
    num_sets, count = differences.shape
    means, errors = differences.mean(1), differences.std(1) / np.sqrt(max(1, count - 1))
    errors = np.where(errors > _ROUNDING * np.abs(means), errors, 0.0)  # rounding is no spread
    draws = np.empty((num_sets, resamples))
    done = 0
    for counts in _resampled_counts(count, resamples):
        draws[:, done : done + len(counts)] = _t_statistics(differences - means[:, None], counts)
        done += len(counts)
    draws.sort(axis=1)
    return [
        Studentized(float(mean), float(error), drawn, count)
        for mean, error, drawn in zip(means, errors, draws, strict=True)
    ]


_ENUMERATED = 20_000  # examples that differ, up to which outcomes are enumerated: 3M at most
_SPREAD = 7.0  # standard deviations of a count; what lies beyond has a chance below 1e-11
_TINY = 1e-300
_ROUNDING = 1e-9
_CANCELLED = 1e-6  # of a spread by squares, rounding leaves 1e-8


def _resampled_counts(count: int, resamples: int) -> Iterator[Floats]:
    """Yield how often each example is drawn in each resample, shape (some resamples, examples)."""
    rng = np.random.default_rng(count)
    at_once = max(1, _CHUNK // count)
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        drawn = rng.integers(0, count, (size, count)) + count * np.arange(size)[:, None]
        counted = np.bincount(drawn.ravel(), minlength=size * count)
        yield counted.reshape(size, count).astype(np.float64)


def _t_statistics(centred: Floats, counts: Floats) -> Floats:
    """Return the t statistics of resamples, infinite where one shows no spread.

    Args:
        centred: shape (sets, examples), of mean zero.
        counts: shape (resamples, examples).
    """
    count = centred.shape[1]
    means, squares = centred @ counts.T / count, centred**2 @ counts.T / count
    spread = np.sqrt(np.maximum(squares - means**2, 0.0))
    errors = spread / np.sqrt(max(1, count - 1))
    is_spread = spread > _CANCELLED * np.sqrt(squares)
    with np.errstate(divide="ignore", invalid="ignore"):
        limits = np.where(means, np.sign(means) * np.inf, 0.0)
        return np.where(is_spread, means / errors, limits)


def _student_tail(t: float, freedom: int) -> float:
    """Return P(T > t) of Student's t, to 0.0005 from four degrees of freedom on (Wallace 1959)."""
    shrink = (8 * freedom + 1) / (8 * freedom + 3)
    z = shrink * math.sqrt(freedom * math.log1p(t * t / freedom))
    return NormalDist().cdf(-math.copysign(z, t))


def _student_quantile(share: float, freedom: int) -> float:
    """Return the t below which that share of Student's t lies, at least one half."""
    z = NormalDist().inv_cdf(share) * (8 * freedom + 3) / (8 * freedom + 1)
    return math.sqrt(freedom * math.expm1(z * z / freedom))


def _score(
    wins: NDArray[np.int64], losses: NDArray[np.int64], examples: int, gain: float
) -> tuple[Floats, Floats]:
    """Return Tango's score of outcomes, and the likeliest share of losses under `gain`."""
    linear = wins + losses + gain * (wins - losses) - 2 * examples * gain
    root = np.sqrt(np.maximum(linear**2 + 8 * examples * losses * gain * (1 - gain), 0.0))
    share = np.maximum((linear + root) / (4 * examples), max(0.0, -gain))
    variance = examples * (2 * share + gain - gain**2)
    distance = wins - losses - examples * gain
    return np.where(variance > 0, distance / np.sqrt(np.maximum(variance, _TINY)), 0.0), share


def _where_score_is(z: float, wins: int, losses: int, examples: int) -> float:
    """Return the gain below the one seen at which the score is `z`."""
    low, high = -1.0 + _ROUNDING, (wins - losses) / examples
    for _ in range(60):
        middle = (low + high) / 2
        score = float(_score(np.array(wins), np.array(losses), examples, middle)[0])
        low, high = (middle, high) if score > z else (low, middle)
    return (low + high) / 2


def _likely(trials: int, rate: float) -> NDArray[np.int64]:
    """Return the counts that trials of one rate are likely to have."""
    spread = _SPREAD * (trials * rate * (1 - rate)) ** 0.5 + _SPREAD**2
    low, high = max(0, int(trials * rate - spread)), min(trials, int(trials * rate + spread))
    return np.arange(low, high + 1)


def _log_factorials(count: int) -> Floats:
    """Return log k! for k = 0, …, count."""
    return np.concatenate([np.zeros(1), np.log(np.arange(1, count + 1)).cumsum()])
