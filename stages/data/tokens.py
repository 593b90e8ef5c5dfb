"""Token ids of a pair, as they go from rows into a model."""

from collections.abc import Sequence
from typing import Any, NamedTuple

TOKEN_COLUMNS = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
"""Where rows hold the three lists of `PairTokens`, in its order."""


class PairTokens(NamedTuple):
    """Token ids of one pair; every response ends in its EOS, unless it was cut off."""

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]


def pair_tokens(row: dict[str, Any]) -> PairTokens:
    """Return the token ids of a stored row."""
    return PairTokens(*(row[name] for name in TOKEN_COLUMNS))
