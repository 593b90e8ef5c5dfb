"""Parquet as the project writes it."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.artifacts.tables import (
    ROW_GROUP_ROWS,
    TableWriter,
    count_rows,
    read_batches,
    read_rows,
)
from stages.errors import CorruptError
from tests.artifact_tools import SCHEMA, write_table

ROWS = [{"prompt_id": f"{i:03d}", "value": i / 3} for i in range(10)]


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    with TableWriter(tmp_path / "a.parquet", SCHEMA) as table:
        table.extend(ROWS)
    assert list(read_rows([tmp_path / "a.parquet"], SCHEMA)) == ROWS
    values = read_rows([tmp_path / "a.parquet"], SCHEMA, columns=["value"])
    assert list(values) == [{"value": row["value"]} for row in ROWS]


def test_files_are_read_in_the_order_given(tmp_path: Path) -> None:
    write_table(tmp_path / "a", start=0, num_rows=2)
    write_table(tmp_path / "b", start=2, num_rows=2)
    ids = [row["prompt_id"] for row in read_rows([tmp_path / "b", tmp_path / "a"], SCHEMA)]
    assert ids == ["00000002", "00000003", "00000000", "00000001"]


@pytest.mark.parametrize("batch_rows", [1, 3, 4, 9, 30])
def test_row_groups_have_the_size_that_was_asked_for(tmp_path: Path, batch_rows: int) -> None:
    """Whatever comes in which portions: rows, batches, or both by turns."""
    rows = [{"prompt_id": f"{i:03d}", "value": i / 3} for i in range(30)]
    with TableWriter(tmp_path / "a.parquet", SCHEMA, group_rows=4) as table:
        for start in range(0, 30, batch_rows):
            part = rows[start : start + batch_rows]
            if start % 2:
                table.extend(part)
            else:
                table.append_batch(pa.RecordBatch.from_pylist(part, schema=SCHEMA))
    assert table.num_rows == 30
    metadata = pq.read_metadata(tmp_path / "a.parquet")
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert sizes == [4] * 7 + [2]
    assert list(read_rows([tmp_path / "a.parquet"], SCHEMA)) == rows


def test_the_file_is_compressed_checksummed_and_in_bounded_row_groups(tmp_path: Path) -> None:
    write_table(tmp_path / "a", num_rows=2 * ROW_GROUP_ROWS + 1)
    metadata = pq.read_metadata(tmp_path / "a")
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    assert [group.num_rows for group in groups] == [ROW_GROUP_ROWS, ROW_GROUP_ROWS, 1]
    assert groups[0].column(0).compression == "ZSTD"
    assert count_rows([tmp_path / "a"] * 2) == 2 * (2 * ROW_GROUP_ROWS + 1)


def test_a_batch_is_split_into_bounded_row_groups(tmp_path: Path) -> None:
    rows = 2 * ROW_GROUP_ROWS + 5
    batch = pa.RecordBatch.from_pydict(
        {"prompt_id": ["x"] * rows, "value": [0.0] * rows}, schema=SCHEMA
    )
    with TableWriter(tmp_path / "a", SCHEMA) as table:
        table.append(ROWS[0])
        table.append_batch(batch)
    metadata = pq.read_metadata(tmp_path / "a")
    assert metadata.num_rows == table.num_rows == rows + 1
    largest = max(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    assert largest <= ROW_GROUP_ROWS
    assert next(read_rows([tmp_path / "a"], SCHEMA)) == ROWS[0]


def test_rows_are_counted_before_they_are_flushed(tmp_path: Path) -> None:
    with TableWriter(tmp_path / "a", SCHEMA) as table:
        table.append(ROWS[0])
        assert table.num_rows == 1


def test_an_empty_table_is_a_table(tmp_path: Path) -> None:
    write_table(tmp_path / "a", num_rows=0)
    assert list(read_rows([tmp_path / "a"], SCHEMA)) == []
    assert count_rows([tmp_path / "a"]) == 0


@pytest.mark.parametrize("row", [{"prompt_id": "x"}, {"prompt_id": "x", "value": 0.0, "more": 1}])
def test_a_row_of_other_columns_is_our_bug(tmp_path: Path, row) -> None:
    with (
        pytest.raises(AssertionError, match="row has columns"),
        TableWriter(tmp_path / "a", SCHEMA) as table,
    ):
        table.append(row)


@pytest.mark.parametrize("value", [None, "text"])
def test_a_value_that_the_schema_forbids_is_refused(tmp_path: Path, value) -> None:
    with (
        pytest.raises((pa.ArrowException, ValueError)),
        TableWriter(tmp_path / "a", SCHEMA) as table,
    ):
        table.append({"prompt_id": "x", "value": value})


def test_the_first_error_is_the_one_told(tmp_path: Path) -> None:
    """Closing would try to write the bad row, and fail with an error of its own."""
    with pytest.raises(RuntimeError, match="mine"), TableWriter(tmp_path / "a", SCHEMA) as table:
        table.append({"prompt_id": "x", "value": None})
        raise RuntimeError("mine")


def test_a_file_of_another_schema_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "a")
    other = pa.schema([pa.field("prompt_id", pa.string(), False)])
    with pytest.raises(CorruptError, match=r"has columns .*'value'.*, expected \['prompt_id'\]"):
        list(read_batches([tmp_path / "a"], other))


def test_a_flipped_bit_in_a_page_is_refused_on_reading(tmp_path: Path) -> None:
    write_table(tmp_path / "a", num_rows=2000)
    data = bytearray((tmp_path / "a").read_bytes())
    data[len(data) // 3] ^= 8
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(CorruptError, match="cannot be read as Parquet .*run its stage again"):
        list(read_rows([tmp_path / "a"], SCHEMA))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all", b"PAR1" + bytes(100)])
def test_what_is_no_parquet_is_refused(tmp_path: Path, content) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(CorruptError, match="cannot be read as Parquet"):
        list(read_rows([tmp_path / "a"], SCHEMA))
    with pytest.raises(CorruptError, match="cannot be read as Parquet"):
        count_rows([tmp_path / "a"])


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="cannot be read as Parquet"):
        list(read_rows([tmp_path / "a"], SCHEMA))


def test_a_folder_whose_name_is_no_text_can_be_read(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    write_table(tmp_path / "a")
    (tmp_path / "a").rename(folder / "a")
    assert len(list(read_rows([folder / "a"], SCHEMA))) == count_rows([folder / "a"]) > 0


def test_a_reader_that_is_left_early_closes_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_table(path)

    def times_open() -> int:
        return sum(each.resolve() == path for each in Path("/proc/self/fd").iterdir())

    rows = read_rows([path], SCHEMA)
    next(rows)
    assert times_open() == 1
    rows.close()
    assert times_open() == 0


def test_errors_of_the_reader_s_user_are_not_taken_for_damage(tmp_path: Path) -> None:
    write_table(tmp_path / "a")
    with pytest.raises(OSError, match="mine"):
        for _ in read_rows([tmp_path / "a"], SCHEMA):
            raise OSError("mine")


def test_reading_holds_no_row_group_that_was_read(tmp_path: Path) -> None:
    schema = pa.schema([pa.field("value", pa.int64(), False)])
    noise = np.random.default_rng(0).integers(0, 2**62, (40, 50_000))
    with TableWriter(tmp_path / "rows.parquet", schema, group_rows=50_000) as table:
        for values in noise:
            table.append_batch(pa.record_batch([pa.array(values)], schema=schema))
    del table
    before = pa.total_allocated_bytes()
    size_bytes = (tmp_path / "rows.parquet").stat().st_size
    for batch in read_batches([tmp_path / "rows.parquet"], schema, batch_rows=50_000):
        assert batch.num_rows
        assert pa.total_allocated_bytes() - before < size_bytes / 4


def test_the_bytes_do_not_depend_on_how_many_rows_came_at_a_time(tmp_path: Path) -> None:
    schema = pa.schema([pa.field("tokens", pa.list_(pa.int32()), False)])
    values = np.random.default_rng(0).integers(0, 30_000, (4096, 300), np.int32)
    rows = pa.table({"tokens": list(values)}, schema=schema).combine_chunks()
    written = []
    for batch_rows in (4096, 1000, 37):
        with TableWriter(tmp_path / str(batch_rows), schema) as table:
            for batch in rows.to_batches(max_chunksize=batch_rows):
                table.append_batch(batch)
        written.append((tmp_path / str(batch_rows)).read_bytes())
    assert written[0] == written[1] == written[2]
