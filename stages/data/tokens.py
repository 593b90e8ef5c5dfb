"""Token ids of a pair, as they go from rows into a model."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class PairTokens(NamedTuple):
    """Token ids of one pair; every response ends in its EOS, unless it was cut off."""

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]


def pair_tokens(row: dict[str, Any]) -> PairTokens:
    """Return the token ids of a stored row."""
    return PairTokens(row["prompt_token_ids"], row["chosen_token_ids"], row["rejected_token_ids"])
