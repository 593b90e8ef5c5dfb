"""Draws that depend on ids alone: the same rows whatever their order or number of shards."""

import heapq
from collections.abc import Iterable

from stages.artifacts.keys import sha256_text


def smallest_by_hash(ids: Iterable[str], count: int, salt: str) -> set[str]:
    """Return `count` of the ids: those whose hash with `salt` is smallest; fewer if there are.

    A draw of more ids with the same salt contains the smaller one.
    """
    return set(heapq.nsmallest(count, ids, key=lambda one: sha256_text(f"{salt}/{one}")))
