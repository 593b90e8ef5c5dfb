"""Sorting more lines than fit in memory: an external merge sort."""

import heapq
from contextlib import ExitStack
from pathlib import Path

MEMORY_BYTES = 64 * 2**20
FAN_IN = 64  # runs merged at once: as many open files
_OBJECT_BYTES = 56  # what CPython adds to each bytes object, list slot included


class LineSorter:
    """Takes lines of bytes in any order and leaves one file with all of them, sorted.

    Lines are compared as bytes, line feed included. Memory stays near `memory_bytes` whatever
    their number; the disk holds them twice while runs are merged.
    """

    def __init__(self, folder: Path, memory_bytes: int = MEMORY_BYTES) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._memory_bytes = memory_bytes
        self._lines: list[bytes] = []
        self._held_bytes = 0
        self._runs: list[Path] = []
        self._num_runs = 0

    def add(self, line: bytes) -> None:
        """Take one line; it ends in its only line feed."""
        self._lines.append(line)
        self._held_bytes += len(line) + _OBJECT_BYTES
        if self._held_bytes >= self._memory_bytes:
            self._spill()

    def finish(self) -> Path:
        """Return the file of all lines, sorted; the sorter is of no use afterwards."""
        self._spill()
        while len(self._runs) > 1:
            first, self._runs = self._runs[:FAN_IN], self._runs[FAN_IN:]
            self._runs.append(self._merge(first))
        return self._runs[0]

    def _spill(self) -> None:
        self._lines.sort()
        run = self._next_run()
        with run.open("wb") as file:
            file.writelines(self._lines)
        self._runs.append(run)
        self._lines, self._held_bytes = [], 0

    def _merge(self, runs: list[Path]) -> Path:
        merged = self._next_run()
        with ExitStack() as stack:
            files = [stack.enter_context(run.open("rb")) for run in runs]
            stack.enter_context(merged.open("wb")).writelines(heapq.merge(*files))
        for run in runs:
            run.unlink()
        return merged

    def _next_run(self) -> Path:
        self._num_runs += 1
        return self._folder / f"run-{self._num_runs:06d}"
