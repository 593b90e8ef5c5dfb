"""The wall time of every training step, in a file apart from all bytes that can be reproduced."""

from pathlib import Path

from stages.artifacts import TableWriter
from stages.data.rows import TIMINGS


class TimingsWriter(TableWriter):
    """Writes timings.parquet."""

    def __init__(self, path: Path) -> None:
        """Open the file for writing."""
        super().__init__(path, TIMINGS)

    def add(self, step: int, seconds: float, tokens: int) -> None:
        """Add one step."""
        self.append({"step": step, "seconds": seconds, "tokens_per_s": tokens / max(seconds, 1e-9)})
