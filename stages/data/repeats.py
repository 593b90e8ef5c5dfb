"""How much a response repeats itself."""

from collections.abc import Sequence

N_GRAM = 4
"""Tokens of what is looked for: short enough to see a loop of a few words, long enough that the
grammar of a language alone makes few."""


def repeated_share(token_ids: Sequence[int], n: int = N_GRAM) -> float:
    """Return the share of a response's n-grams that stood earlier in the same response.

    0 where it has no two of them. `a b a b a b a b` has five, three of them repeats: 0.6.
    """
    grams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
