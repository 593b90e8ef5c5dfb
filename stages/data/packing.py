"""Packing rows of different lengths into micro-batches of a token budget, without padding."""

import heapq
from collections.abc import Sequence


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Packs rows, given by their token counts, into bins of at most `budget` tokens.

    Best fit decreasing: longest row first, each into the fullest bin that still takes it; no two
    bins could be one, and asymptotically there are at most 11/9 of the fewest possible (Johnson,
    Near-optimal bin packing algorithms, 1973). Returns row indices a bin, ascending inside a bin,
    bins in order of their longest row. Depends on the arguments alone: among rows of one length
    the lower index comes first, among bins of one room the last to reach it. O(n (log n +
    log budget)). Raises ValueError with the row's index if a row is longer than the budget, or
    has no tokens.
    """
    if budget < 1:
        raise ValueError(f"the token budget is {budget}; it must be at least 1")
    for row, length in enumerate(lengths):
        if not 0 < length <= budget:
            raise ValueError(
                f"row {row} has {length} tokens, and a micro-batch holds 1 to {budget}; "
                "raise the token budget or drop the row"
            )
    bins: list[list[int]] = []
    open_bins: list[list[int]] = [[] for _ in range(budget + 1)]  # by room left, newest last
    rooms = _SmallestAtLeast(budget + 1)
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        room = rooms.find(lengths[row])
        if room is None:
            index, room = len(bins), budget
            bins.append([])
        else:
            index = open_bins[room].pop()
            if not open_bins[room]:
                rooms.discard(room)
        bins[index].append(row)
        left = room - lengths[row]
        if not open_bins[left]:
            rooms.add(left)
        open_bins[left].append(index)
    return [sorted(rows) for rows in bins]


def balance(
    bins: Sequence[Sequence[int]], lengths: Sequence[int], num_ranks: int, budget: int
) -> list[list[list[int]]]:
    """Deals the rows of `pack`'s bins to ranks in equally many micro-batches of nearly equal size.

    All ranks take the same number, because they wait for each other at every micro-batch: so the
    bins are rounded up to a multiple of `num_ranks`, and the rows dealt anew, longest first, each
    to the emptiest bin. Where that would break the budget the bins stay as they are, and the
    fullest are halved until their number is a multiple. The k-th micro-batches of all ranks are
    neighbours in size. Returns [rank][micro-batch] -> row indices, ascending. Raises ValueError if
    there are too few rows, which never happens if their number is a multiple of `num_ranks`.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks is {num_ranks}; it must be at least 1")

    def tokens(rows: list[int]) -> int:
        return sum(lengths[row] for row in rows)

    rows = [row for rows in bins for row in rows]
    count = -(-len(bins) // num_ranks) * num_ranks
    if len(rows) < count:
        raise ValueError(
            f"{len(rows)} rows cannot be dealt evenly to {num_ranks} ranks; "
            "take a global batch that is a multiple of the number of ranks"
        )
    micro_batches = _emptiest_first(rows, lengths, count)
    if any(tokens(rows) > budget for rows in micro_batches):
        micro_batches = [list(rows) for rows in bins]
        while len(micro_batches) < count:
            fullest = max((rows for rows in micro_batches if len(rows) > 1), key=tokens)
            micro_batches.remove(fullest)
            micro_batches += _emptiest_first(fullest, lengths, 2)

    micro_batches.sort(key=tokens, reverse=True)
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    totals = [0] * num_ranks
    for start in range(0, count, num_ranks):
        neediest = sorted(range(num_ranks), key=lambda rank: (totals[rank], rank))
        for rank, dealt in zip(neediest, micro_batches[start : start + num_ranks], strict=True):
            ranks[rank].append(sorted(dealt))
            totals[rank] += tokens(dealt)
    return ranks


def _emptiest_first(rows: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """`count` parts of nearly equal tokens; none is empty if there are at least `count` rows."""
    parts: list[list[int]] = [[] for _ in range(count)]
    emptiest = [(0, part) for part in range(count)]
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        total, part = heapq.heappop(emptiest)
        parts[part].append(row)
        heapq.heappush(emptiest, (total + lengths[row], part))
    return parts


class _SmallestAtLeast:
    """A set of integers below `size` that finds its smallest member >= x in O(log size)."""

    def __init__(self, size: int) -> None:
        self._leaves = 1 << (size - 1).bit_length()
        self._members = [0] * (2 * self._leaves)  # node i counts what its children 2i, 2i+1 hold

    def add(self, value: int) -> None:
        self._change(value, 1)

    def discard(self, value: int) -> None:
        self._change(value, -1)

    def _change(self, value: int, by: int) -> None:
        node = value + self._leaves
        while node:
            self._members[node] += by
            node //= 2

    def find(self, value: int) -> int | None:
        node = value + self._leaves
        if self._members[node]:
            return value
        while node > 1 and (node % 2 or not self._members[node + 1]):
            node //= 2
        if node <= 1:
            return None
        node += 1
        while node < self._leaves:
            node = 2 * node if self._members[2 * node] else 2 * node + 1
        return node - self._leaves
