"""Columns of token ids, numbers and messages to and from Python lists, without an object a cell."""

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import pyarrow as pa


def list_column(lists: Sequence[Sequence[float]], kind: pa.DataType) -> pa.ListArray:
    """Return the column of some lists of numbers of the type `kind`, such as int32."""
    offsets = np.fromiter(accumulate(map(len, lists), initial=0), np.int64, len(lists) + 1)
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"{offsets[-1]} numbers do not fit a column; make the shards smaller")
    values = np.fromiter(chain.from_iterable(lists), kind.to_pandas_dtype(), int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, kind))


def lists_of(column: pa.ListArray) -> list[list[Any]]:
    """Return the lists of numbers of a column without nulls."""
    offsets = column.offsets.to_pylist()
    start = offsets[0]
    values = column.flatten().to_numpy(zero_copy_only=False).tolist()
    return [values[a - start : b - start] for a, b in pairwise(offsets)]


def conversations(column: pa.ListArray) -> list[list[dict[str, str]]]:
    """Return the messages of a column of conversations."""
    flat = column.flatten()
    roles, contents = flat.field("role").to_pylist(), flat.field("content").to_pylist()
    messages = [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=True)
    ]
    offsets = column.offsets.to_pylist()
    start = offsets[0]
    return [messages[a - start : b - start] for a, b in pairwise(offsets)]
