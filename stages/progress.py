"""Progress of long stages, on stderr: a bar on a terminal, a plain line now and then elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("spin")

PLAIN_EVERY_S = 10.0
BAR_EVERY_S = 0.1


class Progress:
    """What a stage tells of its work; made by `progress`. Here it becomes lines of the log."""

    def __init__(
        self,
        stage: str,
        total: int,
        unit: str,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start counting at `done`, the part that an earlier attempt did."""
        self.stage, self.total, self.unit = stage, total, unit
        self.done = self._done_before = done
        self.tokens = 0
        self._remark: Callable[[], str] = str
        self._clock = clock
        self._started = self._said = clock()

    def advance(self, done: int, tokens: int = 0) -> None:
        """Tell that `done` more units, worth `tokens` tokens, are finished."""
        self.done += done
        self.tokens += tokens
        self.show()

    def skip(self, done: int) -> None:
        """Tell that an earlier attempt finished `done` more units; they do not count as speed."""
        self.done += done
        self._done_before += done

    def note(self, remark: str | Callable[[], str]) -> None:
        """Set the remark shown beside the numbers, or what makes it when it is shown."""
        self._remark = remark if callable(remark) else lambda: remark

    @property
    def remark(self) -> str:
        """The remark shown beside the numbers."""
        return self._remark()

    def show(self) -> None:
        """Show where things stand, if it is time to."""
        if self._clock() - self._said >= PLAIN_EVERY_S:
            self._said = self._clock()
            log.info("%s", self.line())

    def finish(self) -> None:
        """Say how it ended, where lines were shown before; a quick stage leaves none."""
        if self._said > self._started and self.done == self.total:
            log.info("%s", self.line())

    def line(self) -> str:
        """Return the state as one line of text."""
        share = self.done / self.total if self.total else 1.0
        done = f"{self.stage}: {self.done:,}/{self.total:,} {self.unit} ({share:.0%})"
        return ", ".join(filter(None, [done, self.rate, self.time, self.remark]))

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start of this attempt."""
        return max(self._clock() - self._started, 1e-9)

    @property
    def rate(self) -> str:
        """Tokens a second in this attempt, as text; empty when no tokens are counted."""
        return f"{self.tokens / self.elapsed_s:,.0f} tokens/s" if self.tokens else ""

    @property
    def time(self) -> str:
        """The time left, or in all when nothing is; empty before the first unit is done."""
        left_s = self.seconds_left
        if left_s is None:
            return ""
        if self.done < self.total:
            return f"{duration(left_s)} left"
        return f"{duration(self.elapsed_s)} in all"

    @property
    def seconds_left(self) -> float | None:
        """Estimate of the time left, None before the first unit of this attempt is done."""
        done_now = self.done - self._done_before
        return self.elapsed_s * (self.total - self.done) / done_now if done_now else None


class _BarProgress(Progress):
    """Draws a rich bar; only used on a terminal."""

    def __init__(self, stage: str, total: int, unit: str, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        super().__init__(stage, total, unit, done)
        self.bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self.bar.add_task(stage, total=total, completed=done, unit=unit, numbers="")
        self._said = -BAR_EVERY_S

    def show(self) -> None:
        if self._clock() - self._said < BAR_EVERY_S:
            return  # drawing takes longer than most units of work
        self._said = self._clock()
        numbers = "  ".join(filter(None, [self.rate, self.time, self.remark]))
        self.bar.update(self._task, completed=self.done, numbers=numbers)

    def finish(self) -> None:
        """Leave the screen to what comes next: the bar is taken away."""


@contextmanager
def progress(stage: str, *, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
    """Show the progress of `stage` while the block runs.

    Args:
        total: how many units there are in all.
        unit: what is counted, in the plural.
        done: how many of them an earlier attempt finished; they do not count as speed.
    """
    if sys.stderr.isatty() and log.isEnabledFor(logging.INFO):
        shown = _BarProgress(stage, total, unit, done)
        with shown.bar:
            yield shown
    else:
        plain = Progress(stage, total, unit, done)
        yield plain
        plain.finish()


def duration(seconds: float) -> str:
    """Return a length of time for people: `8 s`, `4:05`, `2:07:30`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
