"""Reading several tables side by side, in runs of whole prompts: all are sorted by `prompt_id`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from stages.errors import CorruptError


class SortedTable:
    """Rows of one table as a stream of batches; what was read and not taken is held."""

    def __init__(self, batches: Iterator[pa.RecordBatch], schema: pa.Schema, where: Path) -> None:
        self._batches, self._where = batches, where
        self._held = schema.empty_table()
        self.last_id = ""
        self.is_read = False

    def read_on(self) -> None:
        """Hold one more batch; or none, at the end.

        Raises:
            CorruptError: the ids do not rise, so a join would lose rows.
        """
        batch = next(self._batches, None)
        while batch is not None and not batch.num_rows:
            batch = next(self._batches, None)
        if batch is None:
            self.is_read = True
            return
        ids = batch.column("prompt_id")
        falls = pc.less(ids.slice(1), ids.slice(0, len(ids) - 1))
        if pc.any(falls).as_py() or ids[0].as_py() < self.last_id:
            raise CorruptError(
                f"{self._where} is not sorted by prompt_id; delete {self._where} and run its stage "
                "again"
            )
        self.last_id = ids[-1].as_py()
        self._held = pa.concat_tables([self._held, pa.Table.from_batches([batch])])

    def take_below(self, bound: str | None) -> pa.Table:
        """Give away the rows held whose id is below the bound, or all."""
        number = self._held.num_rows
        if bound is not None and number:
            number = pc.sum(pc.less(self._held["prompt_id"], bound)).as_py()
        taken, self._held = self._held.slice(0, number), self._held.slice(number)
        return taken.combine_chunks()


def aligned(tables: Sequence[SortedTable]) -> Iterator[list[pa.Table]]:
    """Yield the rows of all tables, some thousand at a time, in rising order of their ids.

    All rows of one id, of every table, are in the same yield. At most two batches of each table
    are held, and the rows of one id.

    Raises:
        CorruptError: a table is not sorted.
    """
    for table in tables:
        table.read_on()
    while True:
        unread = [table for table in tables if not table.is_read]
        bound = min((table.last_id for table in unread), default=None)
        taken = [table.take_below(bound) for table in tables]
        if any(part.num_rows for part in taken):
            yield taken
        if bound is None:
            return
        for table in unread:
            if table.last_id == bound:
                table.read_on()
