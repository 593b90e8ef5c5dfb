"""Two artifacts measured on the same examples: by how much one is better, and how surely."""

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from stages.data.measures import Column
from stages.data.statistics import (
    Floats,
    linearized,
    mcnemar,
    mean,
    score_interval,
    score_p_value,
    share_bound,
    studentized,
)

Method = Literal["mcnemar", "bootstrap"]


@dataclass(frozen=True)
class Paired:
    """What a paired comparison found; a gain is positive where the player is better."""

    value: float
    """The player's metric, on the examples that both have."""
    rival_value: float
    gain: float
    low: float | None
    """Of the two-sided interval of the gain; None where so few examples, which all agree, tell of
    none."""
    high: float | None
    confidence: float
    """Of the interval."""
    p_value: float
    """One-sided: of a gain as large as this one, or larger, where the true one is `above`."""
    above: float
    method: Method
    examples: int
    wins: int
    losses: int
    ties: int
    unmatched: int
    """Examples that only one of the two has; they are left out."""

    def figures(self) -> dict[str, float | int | str]:
        """Return all of it as plain JSON values."""
        return asdict(self)


def compare(
    player: Column,
    rival: Column,
    *,
    above: float = 0.0,
    confidence: float = 0.95,
    lower: bool = False,
) -> Paired | None:
    """Compare two columns of one metric, example by example; None where no example is in both.

    Zeros and ones, equally weighted, are compared by wins and losses: with `above` = 0 by
    McNemar's test, otherwise by a score test summed over all outcomes; the interval is Tango's.
    Other values are compared by the studentized bootstrap over examples, of a weighted mean its
    linearization.

    Args:
        above: what the gain is to exceed; minus a margin for "not worse by more than a margin".
        confidence: of the two-sided interval; 2c - 1 makes each end the one-sided bound at c.
        lower: lower values are better.
    """
    matched = _match(player, rival)
    mine, theirs = matched.player, matched.rival
    if not len(mine.values):
        return None
    sign = -1.0 if lower else 1.0
    differences = sign * (mine.values - theirs.values)
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    value, rival_value = (mean(c.values, c.weights) for c in (mine, theirs))
    method, p_value, low, high = _test(mine, theirs, sign, wins, losses, above, confidence)
    return Paired(
        value=value,
        rival_value=rival_value,
        gain=sign * (value - rival_value),
        low=low,
        high=high,
        confidence=confidence,
        p_value=p_value,
        above=above,
        method=method,
        examples=len(differences),
        wins=wins,
        losses=losses,
        ties=len(differences) - wins - losses,
        unmatched=matched.unmatched,
    )


def lower_bound(column: Column, confidence: float = 0.95) -> float | None:
    """Return the one-sided lower bound of a column's mean: exact binomial, or the bootstrap's.

    Values that all agree are their own bound from so many examples on that a sign test would rule
    out less (five at 95%); None with fewer.
    """
    if _are_right_or_wrong(column, column):
        return share_bound(int(column.values.sum()), len(column.values), confidence)
    found = studentized(linearized(column.values, column.weights)).interval(2 * confidence - 1)
    return None if found is None else found[0]


@dataclass(frozen=True)
class _Matched:
    player: Column
    rival: Column
    unmatched: int


def _match(player: Column, rival: Column) -> _Matched:
    """Return both columns with the examples that they share, in the player's order."""
    place = {example_id: index for index, example_id in enumerate(rival.example_ids)}
    mine = [i for i, example_id in enumerate(player.example_ids) if example_id in place]
    theirs = [place[player.example_ids[i]] for i in mine]
    unmatched = len(player.example_ids) + len(rival.example_ids) - 2 * len(mine)
    return _Matched(_taken(player, mine), _taken(rival, theirs), unmatched)


def _taken(column: Column, indices: list[int]) -> Column:
    return Column(
        [column.example_ids[i] for i in indices], column.values[indices], column.weights[indices]
    )


def _test(
    player: Column,
    rival: Column,
    sign: float,
    wins: int,
    losses: int,
    above: float,
    confidence: float,
) -> tuple[Method, float, float | None, float | None]:
    """Return method, p value and interval."""
    if _are_right_or_wrong(player, rival):
        count = len(player.values)
        low, high = score_interval(wins, losses, count, confidence)
        if not above:
            return "mcnemar", mcnemar(wins, losses, count), low, high
        if abs(above) >= 1:  # no difference of shares is larger
            return "mcnemar", 1.0 if above > 0 else 0.0, low, high
        return "mcnemar", score_p_value(wins, losses, count, above), low, high
    found = studentized(_gains(player, rival, sign))
    ends = found.interval(confidence) or (None, None)
    return "bootstrap", found.p_value(above), *ends


def _are_right_or_wrong(player: Column, rival: Column) -> bool:
    weights = np.concatenate([player.weights, rival.weights])
    values = np.concatenate([player.values, rival.values])
    return bool(np.isin(values, (0.0, 1.0)).all() and (weights == weights[0]).all())


def _gains(player: Column, rival: Column, sign: float) -> Floats:
    """Return each example's part in the gain, of which the gain is the plain mean."""
    mine, theirs = (linearized(each.values, each.weights) for each in (player, rival))
    gains: Floats = sign * (mine - theirs)
    return gains
