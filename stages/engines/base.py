"""The one interface of all engines: token ids in, token ids and log-probabilities out."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from stages.errors import DivergedError


@dataclass(frozen=True)
class Request:
    """One prompt to answer once."""

    request_id: str
    """Unique within a call."""
    prompt_token_ids: list[int]
    seed: int
    """0 <= seed < 2**63; decides the sampled tokens of this request alone."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the same for all requests of a call."""

    temperature: float
    """0 takes the most probable token each time (greedy)."""
    top_p: float
    top_k: int
    """0 keeps the whole vocabulary."""
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """One answer."""

    request_id: str
    token_ids: list[int]
    """Ends with a stop token exactly when `finish_reason` is "stop"."""
    token_logprobs: list[float]
    """Of the model itself (temperature 1, no truncation), one a token, the stop token included."""
    finish_reason: str
    """"stop", or "length" for an answer that was cut off."""


class Engine(Protocol):
    """Answers requests. Engines know nothing of shards, rewards or pairs."""

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """Answer every request once, in any order, as they finish.

        Pulls requests lazily, a bounded number in flight.

        Raises:
            ValueError: a request does not fit the engine's length limit.
        """
        ...

    def close(self) -> None:
        """Free the model's memory; the engine is of no use afterwards."""
        ...


@runtime_checkable
class KeptEngine(Engine, Protocol):
    """An engine that can outlive its model: asleep while another stage trains."""

    @property
    def whole(self) -> bool:
        """Whether nothing of it has died."""
        ...

    def sleep(self) -> None:
        """Free the memory that training needs; a call of `generate` that was left is ended.

        Raises:
            EngineError: a process died.
        """
        ...

    def can_wake(self, model_dir: Path, *, max_model_len: int) -> bool:
        """Whether `wake` can take this model; where not, a new engine is to be opened."""
        ...

    def wake(self, model_dir: Path, *, max_model_len: int, reload: bool) -> None:
        """Load a model in place of the last one.

        Args:
            reload: false where the folder holds the very weights that were loaded last: they are
                read again only where sleeping discarded them.

        Raises:
            InputError: no loadable model.
            EngineError: a process died.
        """
        ...


def check_length(request: Request, sampling: Sampling, max_model_len: int) -> None:
    """Check that a request has a prompt, and that prompt and answer fit.

    Raises:
        ValueError: they do not.
    """
    name, length = f"request {request.request_id}", len(request.prompt_token_ids)
    if length == 0:
        raise ValueError(f"{name} has no prompt token")
    if length + sampling.max_new_tokens > max_model_len:
        raise ValueError(
            f"{name}: {length} prompt tokens and {sampling.max_new_tokens} new ones exceed "
            f"max_model_len={max_model_len}"
        )


def check_finite(completion: Completion, model_dir: Path) -> Completion:
    """Return an answer whose log-probabilities are finite.

    Raises:
        DivergedError: they are not.
    """
    if not all(map(math.isfinite, completion.token_logprobs)):
        raise DivergedError(
            f"generate: {model_dir} gives log-probabilities that are not finite, so its "
            "weights are broken; train it again with a lower learning rate"
        )
    return completion
