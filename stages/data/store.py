"""Random access to rows on disk in flat memory, for training that shuffles."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.artifacts import read_batches
from stages.data.tokens import TOKEN_COLUMNS


@dataclass
class RowStore:
    """Rows in an uncompressed, memory-mapped scratch file; a row is read by its number.

    Memory grows by four bytes a row (`lengths_N`); the rows themselves are pages of the file.
    """

    lengths_N: npt.NDArray[np.int32]
    """Tokens of each row."""
    longest: int
    """Tokens of the longest prompt with one response."""
    chosen_tokens: int
    """Tokens of all chosen responses."""
    _batches: list[pa.RecordBatch]
    _starts: npt.NDArray[np.int64]
    _map: Any = field(repr=False)

    def __len__(self) -> int:
        return len(self.lengths_N)

    def row(self, number: int) -> dict[str, Any]:
        """Return one row; list columns come as numpy arrays."""
        batch_number = int(np.searchsorted(self._starts, number, side="right")) - 1
        batch = self._batches[batch_number]
        inside = number - int(self._starts[batch_number])
        row: dict[str, Any] = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            scalar = column[inside]
            is_list = isinstance(scalar, pa.ListScalar)
            row[name] = scalar.values.to_numpy() if is_list else scalar.as_py()
        return row


def build_store(
    paths: Sequence[Path],
    schema: pa.Schema,
    columns: Sequence[str],
    scratch: Path,
    keep: Callable[[tuple[int, ...]], bool],
) -> tuple[RowStore, int]:
    """Copy some columns of Parquet files, with `TOKEN_COLUMNS` among them, and open the copy.

    Args:
        keep: whether a row is kept, from its lengths in the order of `TOKEN_COLUMNS`.

    Returns:
        The store, and the number of rows that `keep` left out.
    """
    dropped = 0
    narrow = pa.schema([schema.field(name) for name in columns])
    with pa.OSFile(str(scratch), "wb") as sink, pa.ipc.new_file(sink, narrow) as writer:
        for batch in read_batches(paths, schema, columns=columns, batch_rows=1024):
            batch = batch.select(columns)
            kept_B = np.array([keep(tuple(r)) for r in _list_lengths(batch).tolist()], dtype=bool)
            dropped += int((~kept_B).sum())
            if kept_B.any():
                writer.write_batch(batch.filter(pa.array(kept_B)))
    return open_store(scratch), dropped


def open_store(scratch: Path) -> RowStore:
    """Open a file that `build_store` wrote; many processes may."""
    mapped = pa.memory_map(str(scratch), "r")
    batches = list(_read_mapped(mapped))
    starts = np.cumsum([0, *(b.num_rows for b in batches[:-1])], dtype=np.int64)
    lengths = [_list_lengths(batch) for batch in batches]
    lengths_NC = np.concatenate(lengths) if lengths else np.zeros((0, 3), np.int32)
    longest = int((lengths_NC[:, 0] + lengths_NC[:, 1:].max(axis=1)).max(initial=0))
    chosen = int(lengths_NC[:, 1].sum(dtype=np.int64))
    lengths_N = lengths_NC.sum(axis=1, dtype=np.int32)
    return RowStore(lengths_N, longest, chosen, batches, starts, mapped)


@functools.lru_cache(maxsize=2)
def epoch_order(num_rows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the order of the rows in one epoch: a permutation that (seed, epoch) decides."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_rows)


def _list_lengths(batch: pa.RecordBatch) -> npt.NDArray[np.int32]:
    parts = [np.diff(batch.column(name).offsets.to_numpy()) for name in TOKEN_COLUMNS]
    return np.stack(parts, axis=1).astype(np.int32)


def _read_mapped(mapped: Any) -> Iterator[pa.RecordBatch]:
    reader = pa.ipc.open_file(mapped)
    for number in range(reader.num_record_batches):
        yield reader.get_batch(number)
