"""Parquet as this project writes it: explicit schema, zstd, page checksums, bounded row groups."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

import pyarrow as pa
import pyarrow.parquet as pq

from stages.errors import CorruptError

ROW_GROUP_ROWS = 4096
Row = dict[str, Any]


class TableWriter:
    """Streams rows into one Parquet file; at most one row group is held in memory.

    Every row group has `group_rows` rows, but for the last one.
    """

    def __init__(self, path: Path, schema: pa.Schema, *, group_rows: int = ROW_GROUP_ROWS) -> None:
        self._schema, self._group_rows = schema, group_rows
        self._rows: list[Mapping[str, Any]] = []
        self._pending: list[pa.Table] = []
        self._num_pending = 0
        self.num_rows = 0
        self._writer = pq.ParquetWriter(
            path, schema, compression="zstd", write_page_checksum=True, version="2.6"
        )

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row; a column it lacks, or has too many, is our bug and raises."""
        assert row.keys() == set(self._schema.names), f"row has columns {sorted(row)}"
        self._rows.append(row)
        self.num_rows += 1
        if len(self._rows) >= self._group_rows:
            self._gather()

    def append_batch(self, batch: pa.RecordBatch) -> None:
        """Add a whole batch of rows of the same schema."""
        self._gather()
        self._hold(pa.Table.from_batches([batch], self._schema))
        self.num_rows += batch.num_rows

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows one by one."""
        for row in rows:
            self.append(row)

    def close(self) -> None:
        """Write what is pending, and the footer."""
        self._gather()
        self._write(self._num_pending)
        self._writer.close()

    def _gather(self) -> None:
        """Make a table of the single rows."""
        if self._rows:
            self._hold(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []

    def _hold(self, table: pa.Table) -> None:
        """Write all whole row groups; the rest waits for more."""
        self._pending.append(table)
        self._num_pending += table.num_rows
        self._write(self._num_pending - self._num_pending % self._group_rows)

    def _write(self, num_rows: int) -> None:
        """Write the first so many pending rows."""
        if not num_rows:
            return
        table = pa.concat_tables(self._pending)
        # In one piece: where pages end would depend on how many rows came at a time.
        whole = table.slice(0, num_rows).combine_chunks()
        self._writer.write_table(whole, row_group_size=self._group_rows)
        self._pending = [table.slice(num_rows)] if num_rows < table.num_rows else []
        self._num_pending = table.num_rows - num_rows

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.close()
            return
        with suppress(OSError, pa.ArrowException):  # the first error is the one to tell
            self._writer.close()


def read_batches(
    paths: Sequence[Path],
    schema: pa.Schema,
    *,
    columns: Sequence[str] | None = None,
    batch_rows: int = ROW_GROUP_ROWS,
) -> Iterator[pa.RecordBatch]:
    """Stream the rows of some Parquet files, in the order of `paths`, checksums verified.

    Raises:
        CorruptError: a file is no Parquet, damaged, or of another schema.
    """
    for path in paths:
        try:
            # Opened here: pyarrow takes no path that is not UTF-8.
            with path.open("rb") as source, _parquet(source) as file:
                if not file.schema_arrow.equals(schema):
                    raise CorruptError(
                        f"{path} has columns {file.schema_arrow.names}, expected {schema.names}; "
                        "it was written by another version: run its stage again"
                    )
                yield from file.iter_batches(batch_size=batch_rows, columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from error


def read_rows(
    paths: Sequence[Path], schema: pa.Schema, *, columns: Sequence[str] | None = None
) -> Iterator[Row]:
    """Stream rows as dicts; see `read_batches`."""
    for batch in read_batches(paths, schema, columns=columns):
        yield from batch.to_pylist()


def count_rows(paths: Iterable[Path]) -> int:
    """Return the number of rows in some Parquet files, from their footers.

    Raises:
        CorruptError: a file is no Parquet.
    """
    total = 0
    for path in paths:
        try:
            with path.open("rb") as source:
                total += pq.read_metadata(source).num_rows
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from error
    return total


def _parquet(source: BinaryIO) -> pq.ParquetFile:
    # Not buffered ahead: the reader would hold every row group it has read to the end.
    return pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False)


def _unreadable(path: Path, error: Exception) -> CorruptError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return CorruptError(
        f"{path} cannot be read as Parquet ({reason}); delete {path.parent} and run its stage again"
    )
