"""What training leaves behind, step by step: its metrics, its timings, and a line for people."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import pyarrow as pa

from stages.artifacts import TableWriter
from stages.artifacts.tables import Row
from stages.data.timings import TimingsWriter
from stages.progress import progress

if TYPE_CHECKING:  # torch is loaded only when there is something to train
    from stages.model.fit import Step


class Journal:
    """Writes metrics.parquet and timings.parquet while it is open, and shows the progress."""

    def __init__(
        self,
        folder: Path,
        stage: str,
        schema: pa.Schema,
        total_steps: int,
        row: Callable[["Step"], Row],
        remark: Callable[["Step"], str],
    ) -> None:
        """Write into `folder`; `row` makes a row of `schema`, `remark` is shown of the last."""
        self._files = ExitStack()
        self._open = (folder, stage, schema)
        self._total_steps = total_steps
        self._row, self._remark = row, remark
        self.tail: list[Step] = []
        """The last tenth of the steps, at least one."""

    def __enter__(self) -> "Journal":
        folder, stage, schema = self._open
        with ExitStack() as files:
            self._table = files.enter_context(TableWriter(folder / "metrics.parquet", schema))
            self._timings = files.enter_context(TimingsWriter(folder / "timings.parquet"))
            self._bar = files.enter_context(progress(stage, total=self._total_steps, unit="steps"))
            self._files = files.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.__exit__(kind, error, trace)

    def add(self, step: "Step") -> None:
        """Write one step."""
        self._table.append(self._row(step))
        self._timings.add(step.step, step.seconds, step.tokens)
        if step.is_new:
            self._bar.note(self._remark(step))
            self._bar.advance(1, step.tokens)
        else:
            self._bar.skip(1)
        self.tail.append(step)
        del self.tail[: -max(1, self._total_steps // 10)]

    def tail_mean(self, figure: Callable[["Step"], float]) -> float:
        """Return the mean of a figure over the tail."""
        return sum(figure(step) for step in self.tail) / len(self.tail)
