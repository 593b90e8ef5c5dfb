"""Packing: every row exactly once, no bin over the budget, ranks in step with each other."""

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data.packing import balance, pack

BUDGET = 100
row_lengths = st.lists(st.integers(1, BUDGET), max_size=60)


def totals(bins: list[list[int]], lengths: list[int]) -> list[int]:
    return [sum(lengths[row] for row in rows) for rows in bins]


def slow_best_fit(lengths: list[int], budget: int) -> list[int]:
    """The plain twin: bin totals of best fit decreasing by a look at every bin."""
    bins: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [total for total in bins if total + length <= budget]
        if fitting:
            bins[bins.index(max(fitting))] += length
        else:
            bins.append(length)
    return sorted(bins)


@given(row_lengths)
def test_every_row_is_packed_exactly_once_within_the_budget(lengths: list[int]) -> None:
    bins = pack(lengths, BUDGET)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    assert all(0 < total <= BUDGET for total in totals(bins, lengths))


@given(row_lengths)
def test_bins_are_those_of_plain_best_fit_decreasing(lengths: list[int]) -> None:
    assert sorted(totals(pack(lengths, BUDGET), lengths)) == slow_best_fit(lengths, BUDGET)


@given(row_lengths)
def test_no_two_bins_could_be_one(lengths: list[int]) -> None:
    filled = sorted(totals(pack(lengths, BUDGET), lengths))
    assert len(filled) < 2 or filled[0] + filled[1] > BUDGET


@given(row_lengths)
def test_packing_is_deterministic(lengths: list[int]) -> None:
    assert pack(lengths, BUDGET) == pack(list(lengths), BUDGET)


def test_packing_worked_by_hand() -> None:
    # 60 opens a bin, 50 another, 40 fits the first exactly, 30 and 20 fill the second.
    assert pack([20, 60, 30, 50, 40], 100) == [[1, 4], [0, 2, 3]]
    assert pack([], 100) == []


def test_a_row_longer_than_the_budget_is_an_error_with_its_index() -> None:
    with pytest.raises(ValueError, match="row 2 has 101 tokens, and a micro-batch holds 1 to 100"):
        pack([3, 100, 101, 4], BUDGET)
    with pytest.raises(ValueError, match="row 1 has 0 tokens"):
        pack([3, 0], BUDGET)
    with pytest.raises(ValueError, match="token budget is 0"):
        pack([3], 0)


def test_a_hundred_thousand_rows_are_packed_in_seconds() -> None:
    lengths = [1 + (row * 7919) % 1024 for row in range(100_000)]
    start_s = time.process_time()
    bins = pack(lengths, 8192)
    assert time.process_time() - start_s < 10
    assert len(bins) <= -(-sum(lengths) // 8192) + 1


@given(st.lists(row_lengths, min_size=1, max_size=4), st.integers(1, 8))
def test_ranks_take_equally_many_micro_batches_of_all_rows(
    parts: list[list[int]], num_ranks: int
) -> None:
    lengths = [length for part in parts for length in part] * num_ranks
    ranks = balance(pack(lengths, BUDGET), lengths, num_ranks, BUDGET)
    assert len(ranks) == num_ranks
    assert len({len(micro_batches) for micro_batches in ranks}) == 1
    rows = [row for micro_batches in ranks for rows in micro_batches for row in rows]
    assert sorted(rows) == list(range(len(lengths)))
    assert all(0 < total <= BUDGET for batches in ranks for total in totals(batches, lengths))


@given(row_lengths, st.integers(1, 4))
def test_ranks_stay_in_step_with_each_other(lengths: list[int], num_ranks: int) -> None:
    lengths = lengths * num_ranks
    ranks = balance(pack(lengths, BUDGET), lengths, num_ranks, BUDGET)
    loads = [sum(totals(micro_batches, lengths)) for micro_batches in ranks]
    largest = max((total for batches in ranks for total in totals(batches, lengths)), default=0)
    assert max(loads) - min(loads) <= largest
    # The k-th micro-batches of all ranks are neighbours in size: no later deal is larger.
    deals = list(zip(*(totals(batches, lengths) for batches in ranks), strict=True))
    for deal, later in itertools.pairwise(deals):
        assert min(deal) >= max(later)


def test_ranks_wait_for_each_other_less_than_one_percent_of_a_real_batch() -> None:
    lengths = [300 + (row * 7919) % 900 for row in range(64)]
    ranks = balance(pack(lengths, 4096), lengths, 4, 4096)
    deals = list(zip(*(totals(batches, lengths) for batches in ranks), strict=True))
    waited = sum(max(deal) - total for deal in deals for total in deal)
    assert waited < 0.01 * sum(lengths)


def test_a_full_bin_stays_whole_where_an_even_deal_would_break_the_budget() -> None:
    # Emptiest first would put 40 + 40 + 30 together: 5 rows in 2 bins of at most 100.
    lengths = [60, 40, 40, 30, 30]
    assert balance(pack(lengths, 100), lengths, 2, 100) == [[[0, 1]], [[2, 3, 4]]]


def test_too_few_rows_for_the_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="3 rows cannot be dealt evenly to 2 ranks"):
        balance([[0], [1], [2]], [5, 5, 5], 2, 5)
    with pytest.raises(ValueError, match="num_ranks is 0"):
        balance([[0]], [5], 0, 5)
