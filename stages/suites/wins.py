"""What is measured where one answer was preferred to another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from stages.data.measures import SHARE, Measure, usual_range
from stages.data.statistics import Interval
from stages.suites.length_control import length_controlled


@dataclass(frozen=True)
class Win:
    """An answer, and what it was compared with."""

    example_id: str
    win: float
    """1, 0, or what is between: a tie is one half."""
    response: str
    other: str


def measured_wins(wins: Sequence[Win]) -> Iterator[Measure]:
    """Yield the metrics of wins, example by example.

    `win_rate`; `length_controlled_win_rate`, see `length_control`; `tie_share`, of wins of one
    half; `identical_share`, of answers that equal each other; `mean_characters`,
    `other_mean_characters`.
    """
    controlled = length_controlled(
        np.array([one.win for one in wins]),
        np.array([len(one.response) for one in wins], np.float64),
        np.array([len(one.other) for one in wins], np.float64),
    )
    for one, value in zip(wins, controlled.tolist(), strict=True):
        values = {
            "win_rate": one.win,
            "length_controlled_win_rate": value,
            "tie_share": one.win == 0.5,
            "identical_share": one.response == one.other,
            "mean_characters": len(one.response),
            "other_mean_characters": len(one.other),
        }
        for name, found in values.items():
            yield Measure(one.example_id, name, float(found))


def range_of_wins(name: str) -> Interval | None:
    """Return the range of a metric of wins, `win_rate_…` of a part of them too.

    That of `length_controlled_win_rate` has no end: it is read off a fit.
    """
    return SHARE if name == "win_rate" or name.startswith("win_rate_") else usual_range(name)
