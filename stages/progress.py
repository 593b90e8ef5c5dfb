"""Progress of long stages, on stderr: a bar on a terminal, a plain line now and then elsewhere."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("spin")

PLAIN_EVERY_S = 10.0


class Progress:
    """What a stage tells of its work; made by `progress`."""

    def __init__(self, stage: str, total: int, unit: str) -> None:
        """Start counting."""
        self.stage, self.total, self.unit = stage, total, unit
        self.done = self.tokens = 0
        self.remark = ""
        self._started = self._said = time.monotonic()

    def advance(self, done: int, tokens: int = 0) -> None:
        """Tell that `done` more units, worth `tokens` tokens, are finished."""
        self.done += done
        self.tokens += tokens
        self.show()

    def note(self, text: str) -> None:
        """Set the remark shown beside the numbers."""
        self.remark = text

    def show(self) -> None:
        """Show where things stand, if it is time to."""
        if time.monotonic() - self._said >= PLAIN_EVERY_S:
            self._said = time.monotonic()
            log.info("%s", self.line())

    def line(self) -> str:
        """Return the state as one line of text."""
        share = self.done / self.total if self.total else 1.0
        parts = [f"{self.stage}: {self.done:,}/{self.total:,} {self.unit} ({share:.0%})", self.rate]
        left_s = self.seconds_left
        parts += [f"{left_s:.0f} s left"] if left_s is not None else []
        return ", ".join(filter(None, [*parts, self.remark]))

    @property
    def rate(self) -> str:
        """Tokens a second so far, as text; empty when no tokens are counted."""
        elapsed_s = max(time.monotonic() - self._started, 1e-9)
        return f"{self.tokens / elapsed_s:,.0f} tokens/s" if self.tokens else ""

    @property
    def seconds_left(self) -> float | None:
        """Estimate of the time left, None before the first unit is done."""
        if not self.done:
            return None
        elapsed_s = time.monotonic() - self._started
        return elapsed_s * (self.total - self.done) / self.done


class _BarProgress(Progress):
    """Draws a rich bar; only used on a terminal."""

    def __init__(self, stage: str, total: int, unit: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        super().__init__(stage, total, unit)
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}  {task.fields[remark]}", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self.bar.add_task(stage, total=total, unit=unit, rate="", remark="")

    def show(self) -> None:
        self.bar.update(self._task, completed=self.done, rate=self.rate, remark=self.remark)


@contextmanager
def progress(stage: str, *, total: int, unit: str) -> Iterator[Progress]:
    """Show the progress of `stage` while the block runs.

    Args:
        total: how many units there are in all.
        unit: what is counted, in the plural.
    """
    if sys.stderr.isatty():
        shown = _BarProgress(stage, total, unit)
        with shown.bar:
            yield shown
    else:
        yield Progress(stage, total, unit)
