"""Draws that depend on ids alone: the same rows whatever their order or number of shards.

A draw of prompts is a mask over the ids as they were given, so that of a million ids only numbers
are held. Their hashes are cut to 64 bits: two of a million ids share one in 1 of 40 million draws,
and then the one that was given first comes first.
"""

import hashlib
import heapq
from collections.abc import Iterable

import numpy as np

from stages.artifacts.keys import sha256_text

_HASH_BYTES = 8
NUMBERS = float(2 ** (8 * _HASH_BYTES))
"""How many numbers a draw can give: 0, 1, … below this."""


def drawn_number(*what: object) -> int:
    """Return a number below `NUMBERS` that depends on nothing but `what`."""
    return int(sha256_text("/".join(map(str, what)))[: 2 * _HASH_BYTES], 16)


def smallest_by_hash(ids: Iterable[str], count: int, salt: str) -> set[str]:
    """Return `count` of the ids: those whose hash with `salt` is smallest; fewer if there are.

    A draw of more ids with the same salt contains the smaller one.
    """
    return set(heapq.nsmallest(count, ids, key=lambda one: sha256_text(f"{salt}/{one}")))


def wanted(total: int, count: int | None, share: float | None) -> int:
    """Return how many of `total` are drawn: `count`, or a share of them; of neither, all.

    Never more than there are, and of a share never none.
    """
    if share is not None:
        count = max(1, round(share * total))
    return total if count is None else min(count, total)


def smallest(hashes: np.ndarray, count: int) -> np.ndarray:
    """Return the mask of the `count` smallest hashes; `smallest_by_hash` is its slow twin."""
    return _mask(len(hashes), _order(hashes)[:count])


def circular_slice(hashes: np.ndarray, count: int, turn: int) -> np.ndarray:
    """Return the mask of the slice that has its turn, in the order of the hashes.

    Turn t takes the places t·count to (t+1)·count of the order, which begins anew where it ends.
    So any turns in a row take all ids before they take one again. With `count` no larger than
    the number of ids, no id comes twice in one slice.

    Args:
        turn: from 0.
    """
    total = len(hashes)
    assert 0 <= count <= total, f"a slice of {count} of {total}"
    first = turn * count % total if total else 0
    order = _order(hashes)
    return _mask(total, np.concatenate([order[first : first + count],
                                        order[: max(0, first + count - total)]]))  # fmt: skip


def parts(hashes: np.ndarray, share: float, members: int) -> np.ndarray:
    """Return which part each id is of: 1 to `members` share `share` of them evenly, 0 has the rest.

    By each hash alone: sizes are right on average, and no id changes its part with the others.
    """
    place = hashes / NUMBERS
    member = 1 + np.minimum(place * (members / share), members - 1).astype(np.int64)
    return np.where(place < share, member, 0)


def salted_hashes(ids: Iterable[str], salt: str) -> np.ndarray:
    """Return the first 64 bits of each id's SHA-256 with `salt`, as uint64, 8 bytes an id."""
    prefix = hashlib.sha256(f"{salt}/".encode())

    def digest(one: str) -> bytes:
        whole = prefix.copy()
        whole.update(one.encode("utf-8", "surrogatepass"))
        return whole.digest()[:_HASH_BYTES]

    data = bytearray()
    for one in ids:
        data += digest(one)
    return np.frombuffer(bytes(data), ">u8").astype(np.uint64)


def _order(hashes: np.ndarray) -> np.ndarray:
    return np.argsort(hashes, kind="stable")


def _mask(total: int, chosen: np.ndarray) -> np.ndarray:
    mask = np.zeros(total, bool)
    mask[chosen] = True
    return mask
