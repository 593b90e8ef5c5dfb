"""How far two computations of the same log-probabilities are apart, and how far they may be."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Logprobs = Sequence[npt.NDArray[np.float64]]
"""One array a row, one number a response token."""
OUTLIERS = 1000
"""One token in so many may be farther off than any limit: rounding is heavy-tailed, and a rare
token can be far off by itself. What matters hits a token of every row, or all of one row."""


@dataclass(frozen=True)
class Answered:
    """One answer with the engine's log-probabilities."""

    prompt_id: str
    sample_index: int
    prompt: list[int]
    response: list[int]
    logprobs: list[float]

    @property
    def name(self) -> str:
        """What a person finds the row by."""
        return f"{self.prompt_id}/{self.sample_index}"


@dataclass(frozen=True)
class Gap:
    """Differences a token: the engine's log-probability minus the trainer's."""

    mean: float
    """Of the absolute differences."""
    worst: float
    tail: float
    """The worst of the absolute differences but for one in `OUTLIERS`."""
    bias: float
    """Mean of the differences with their signs."""
    tokens: int
    row: int
    """Where the worst is."""
    token: int
    """Likewise, within the response."""


@dataclass(frozen=True)
class Tolerance:
    """How large a gap may be."""

    mean: float
    tail: float

    def allows(self, gap: Gap) -> bool:
        """Tell whether a gap is small enough; NaN is not."""
        return gap.mean <= self.mean and gap.tail <= self.tail


def measure(engine: Logprobs, ours: Logprobs) -> Gap:
    """Compare row by row; there must be a token."""
    differences = np.concatenate([e - o for e, o in zip(engine, ours, strict=True)])
    absolute = np.abs(differences)
    at = int(absolute.argmax())
    starts = np.cumsum([0, *map(len, engine)])
    row = int(np.searchsorted(starts, at, side="right")) - 1
    spared = len(absolute) // OUTLIERS
    return Gap(
        mean=float(absolute.mean()),
        worst=float(absolute[at]),
        tail=float(np.partition(absolute, -1 - spared)[-1 - spared]),
        bias=float(differences.mean()),
        tokens=len(absolute),
        row=row,
        token=at - int(starts[row]),
    )


def row_means(engine: Logprobs, ours: Logprobs) -> npt.NDArray[np.float64]:
    """Return the mean absolute difference of each row."""
    return np.array([np.abs(e - o).mean() for e, o in zip(engine, ours, strict=True)])
