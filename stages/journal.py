"""What training leaves behind, step by step: its metrics, its timings, and a line for people."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from stages.artifacts import TableWriter
from stages.artifacts.tables import Row
from stages.data.timings import TimingsWriter
from stages.progress import progress
from stages.tracking import Tracked, open_tracking

if TYPE_CHECKING:  # torch is loaded only when there is something to train
    from stages.model.fit import Step


class Journal:
    """Is told every step of a training."""

    def __init__(self, total_steps: int, write: Callable[["Step"], None] | None = None) -> None:
        """Write down each step by `write`, if there is one."""
        self._write = write
        self._tail: deque[Step] = deque(maxlen=max(1, total_steps // 10))

    def add(self, step: "Step") -> None:
        """Take note of one step."""
        if self._write is not None:
            self._write(step)
        self._tail.append(step)

    def tail_mean(self, figure: Callable[["Step"], float]) -> float:
        """Return the mean of a figure over the last tenth of the steps, at least one."""
        return sum(figure(step) for step in self._tail) / len(self._tail)


@contextmanager
def open_journal(
    rank: int,
    folder: Path,
    stage: str,
    schema: pa.Schema,
    total_steps: int,
    row: Callable[["Step"], Row],
    remark: Callable[["Step"], str],
    run: Tracked | None = None,
) -> Iterator[Journal]:
    """Yield a journal that only on rank 0 is written down, and shown as progress.

    Args:
        folder: where metrics.parquet and timings.parquet are written.
        row: makes a row of `schema`, for metrics.parquet.
        remark: is shown of the last step.
        run: what experiment trackers call it, who are told of each step.
    """
    if rank > 0:
        yield Journal(total_steps)
        return
    with (
        TableWriter(folder / "metrics.parquet", schema) as table,
        TimingsWriter(folder / "timings.parquet") as timings,
        progress(stage, total=total_steps, unit="steps") as bar,
        open_tracking(run, stage) as tell,
    ):

        def write(step: "Step") -> None:
            values = row(step)
            table.append(values)
            timings.add(step.step, step.seconds, step.tokens)
            tell(step.step, {**values, "tokens_per_s": step.tokens / max(step.seconds, 1e-9)})
            if step.is_new:
                bar.note(remark(step))
                bar.advance(1, step.tokens)
            else:
                bar.skip(1)

        yield Journal(total_steps, write)
