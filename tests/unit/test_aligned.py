"""Tables read side by side: all rows of an id at once, whatever the batches are."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data.aligned import SortedTable, aligned
from stages.errors import CorruptError

SCHEMA = pa.schema([("prompt_id", pa.string()), ("row", pa.int64())])
IDS = st.lists(st.sampled_from("abcdefgh"), max_size=30).map(sorted)


def table(ids: list[str], batch_rows: int) -> SortedTable:
    whole = pa.table({"prompt_id": ids, "row": list(range(len(ids)))}, schema=SCHEMA)
    batches = whole.to_batches(max_chunksize=batch_rows)
    return SortedTable(iter(batches), SCHEMA, Path("somewhere"))


@given(several=st.lists(st.tuples(IDS, st.integers(1, 7)), min_size=1, max_size=4))
def test_all_rows_come_once_in_order_and_an_id_at_a_time(several: Any) -> None:
    parts = list(aligned([table(ids, batch_rows) for ids, batch_rows in several]))
    seen: set[str] = set()
    for part in parts:
        here = {one for rows in part for one in rows["prompt_id"].to_pylist()}
        assert here
        assert not here & seen
        assert all(one > earlier for one in here for earlier in seen)
        seen |= here
    for number, (ids, _) in enumerate(several):
        rows = [row for part in parts for row in part[number].to_pylist()]
        assert rows == [{"prompt_id": one, "row": place} for place, one in enumerate(ids)]


def test_what_is_held_is_bounded_by_batches_not_by_rows() -> None:
    ids = [f"{number:05d}" for number in range(2000)]
    parts = list(aligned([table(ids, 10), table(ids[::50], 10), table(ids[1000:], 100)]))
    assert max(rows.num_rows for part in parts for rows in part) <= 200
    assert len(parts) > 100


@pytest.mark.parametrize("batch_rows", [1, 10])
def test_falling_ids_are_refused(batch_rows: int) -> None:
    with pytest.raises(CorruptError, match="somewhere is not sorted by prompt_id; delete"):
        list(aligned([table(["a", "c", "b"], batch_rows)]))
