"""The one interface of all rewards: questions with their answers in, scores out."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Message = Mapping[str, str]

Reason = Literal["no_score", "failed", "too_costly", "refused", "unparsable"]
REASONS: tuple[Reason, ...] = ("no_score", "failed", "too_costly", "refused", "unparsable")
"""Why a response has no score: the human response holds nothing to compare with; the reward's own
code failed on it; it took more time or memory than a row may; the reward's model or server does
not take it; its answer could not be read."""

_MOST_DETAIL = 500


@dataclass(frozen=True)
class Question:
    """A prompt, and the answers to it that are to be scored."""

    prompt_id: str
    messages: Sequence[Message]
    human: str
    """The human response."""
    responses: tuple[str, ...]


@dataclass(frozen=True)
class Unscored:
    """Why a response has no score; the stage leaves it out and counts it, or stops."""

    reason: Reason
    detail: str

    def __post_init__(self) -> None:
        """Make one line of the detail, bounded and fit for a terminal: models write in it."""
        text = self.detail.encode("utf-8", "replace").decode()
        line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        object.__setattr__(self, "detail", line[:_MOST_DETAIL])


Score = float | Unscored


@dataclass(frozen=True)
class Scored:
    """What a reward says of one question."""

    scores: tuple[Score, ...]
    """One a response, in order; finite."""
    judgements: tuple[dict[str, Any], ...] = ()
    """What cost money and is kept: rows of JUDGEMENTS, but for their prompt id."""


class Reward(Protocol):
    """Scores responses. An error is an error, never a default score."""

    def score(self, questions: Iterable[Question]) -> Iterator[Scored]:
        """Yield what is said of each question, in order; reads a bounded number of them ahead.

        Raises:
            SpinError: nothing more can be scored: a process cannot start, a server is gone.
        """
        ...

    def close(self) -> None:
        """End what was started for it: processes, models, connections."""
        ...


@dataclass(frozen=True)
class RuleReward:
    """A reward that is a short function of the two texts, and needs no limits."""

    rule: Callable[[str, str], float]
    """(response, human response) → score; raises ValueError where there is none."""

    def score(self, questions: Iterable[Question]) -> Iterator[Scored]:
        """See `Reward.score`."""
        for question in questions:
            yield Scored(tuple([self._one(text, question.human) for text in question.responses]))

    def close(self) -> None:
        """See `Reward.close`."""

    def _one(self, response: str, human: str) -> Score:
        try:
            return self.rule(response, human)
        except ValueError as error:
            return Unscored("no_score", str(error))
