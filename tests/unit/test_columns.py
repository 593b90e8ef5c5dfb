"""Columns of lists and messages come back as the lists that they were made of."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data.columns import conversations, list_column, lists_of
from stages.data.rows import PROMPTS, RENDERED

TOKENS = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5), max_size=8)
MESSAGES = st.lists(
    st.lists(st.fixed_dictionaries({"role": st.text(max_size=3), "content": st.text(max_size=5)}),
             max_size=3),
    max_size=6,
)  # fmt: skip


@given(TOKENS, st.integers(0, 3))
def test_lists_survive_and_so_do_slices(lists: list[list[int]], start: int) -> None:
    column = list_column(lists, pa.int32())
    assert column.to_pylist() == lists
    assert lists_of(column) == lists
    assert lists_of(column.slice(start)) == lists[start:]


def test_the_columns_fit_the_schema() -> None:
    column = list_column([[1, 2], []], pa.int32())
    ids, lengths = pa.array(["a", "b"]), pa.array([2, 0], pa.int32())
    batch = pa.record_batch([ids, lengths, column], schema=RENDERED)
    batch.validate(full=True)


@given(MESSAGES, st.integers(0, 3))
def test_messages_survive_and_so_do_slices(
    given_messages: list[list[dict[str, str]]], start: int
) -> None:
    column = pa.array(given_messages, PROMPTS.field("messages").type)
    assert conversations(column) == given_messages
    assert conversations(column.slice(start)) == given_messages[start:]


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(OverflowError):
        list_column([[2**31]], pa.int32())
