"""Draws by hash: whole epochs, no state, the same whatever the order of rows."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stages.data.draw import (
    circular_slice,
    parts,
    salted_hashes,
    smallest,
    smallest_by_hash,
    wanted,
)

totals = st.integers(1, 60)


def ids_of(total: int) -> list[str]:
    return [f"{number:032x}" for number in range(total)]


def turn(ids: list[str], count: int, number: int, salt: str = "s/0") -> set[str]:
    """The ids of one slice."""
    mask = circular_slice(salted_hashes(ids, salt), count, number)
    return {ids[place] for place in np.flatnonzero(mask)}


@given(totals, st.data(), st.integers(0, 200))
def test_any_turns_in_a_row_take_every_id_before_one_twice(
    total: int, data: st.DataObject, first: int
) -> None:
    count = data.draw(st.integers(1, total))
    ids = ids_of(total)
    slices = [turn(ids, count, first + k) for k in range(-(-total // count))]
    assert all(len(taken) == count for taken in slices)
    assert set().union(*slices) == set(ids)
    whole = slices[: total // count]
    assert sum(map(len, whole)) == len(set().union(*whole)), "no id twice before all have come"


@given(totals, st.data(), st.integers(1, 5))
def test_an_epoch_has_every_id_exactly_once(total: int, data: st.DataObject, epochs: int) -> None:
    """After E·N/n turns every id has come E times; in between no two differ by more than one."""
    count = data.draw(st.integers(1, total))
    ids = ids_of(total)
    times = dict.fromkeys(ids, 0)
    for number in range(-(-epochs * total // count)):
        for one in turn(ids, count, number):
            times[one] += 1
        assert max(times.values()) - min(times.values()) <= 1
        done = (number + 1) * count
        assert min(times.values()) == done // total


@given(st.permutations(ids_of(12)), st.integers(1, 12), st.integers(0, 20), st.integers(1, 4))
def test_the_order_of_rows_changes_nothing(
    order: list[str], count: int, number: int, members: int
) -> None:
    ids = ids_of(12)
    assert turn(order, count, number) == turn(ids, count, number)
    found = [
        dict(zip(given, parts(salted_hashes(given, "p"), 0.5, members), strict=True))
        for given in (order, ids)
    ]
    assert found[0] == found[1]


def test_a_seed_changes_the_order() -> None:
    ids = ids_of(60)
    first = [turn(ids, 7, number, "slices/0") for number in range(9)]
    assert first == [turn(ids, 7, number, "slices/0") for number in range(9)]
    assert first != [turn(ids, 7, number, "slices/1") for number in range(9)]


@given(st.sets(st.text(max_size=5), max_size=40), st.integers(0, 50), st.text(max_size=4))
def test_the_quick_draw_equals_the_slow_one(ids: set[str], count: int, salt: str) -> None:
    given_ids = sorted(ids)
    mask = smallest(salted_hashes(given_ids, salt), count)
    quick = {given_ids[place] for place in np.flatnonzero(mask)}
    assert quick == smallest_by_hash(given_ids, count, salt)


@given(totals, st.integers(1, 6), st.floats(1e-9, 1, exclude_max=True))
def test_every_id_has_one_part_of_the_pool(total: int, members: int, share: float) -> None:
    found = parts(salted_hashes(ids_of(total), "p"), share, members)
    assert ((found >= 0) & (found <= members)).all()
    # The ends of the hashes' range too.
    ends = parts(np.array([0, 2**64 - 1], np.uint64), share, members)
    assert ends.tolist() == [1, 0]


def test_parts_have_their_shares() -> None:
    found = parts(salted_hashes(ids_of(20_000), "p"), 0.3, 3)
    assert np.allclose(np.bincount(found) / 20_000, [0.7, 0.1, 0.1, 0.1], atol=0.01)


def test_how_many_are_wanted() -> None:
    assert [wanted(10, None, None), wanted(10, 4, None), wanted(10, 40, None)] == [10, 4, 10]
    assert [wanted(10, None, s) for s in (1.0, 0.33, 0.001)] == [10, 3, 1]
    assert [wanted(0, 4, None), wanted(0, None, 0.5), wanted(0, None, None)] == [0, 0, 0]
