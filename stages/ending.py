"""How the last `spin run` ended before its time, for whoever looks in the morning.

It is no artifact, and nothing depends on it: a run that was killed outright leaves no word.
"""

import datetime
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

from stages.artifacts.files import write_durably
from stages.artifacts.keys import canonical_json
from stages.errors import GateRefusedError, SpinError
from stages.layout import RunLayout

_BUG = 1
_INTERRUPTED = 130
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ending:
    """How a run ended before its time."""

    at: str
    """UTC, as `2026-03-01T04:05:06+00:00`."""
    exit_code: int
    message: str

    def told(self) -> str:
        """Return it in words; why a player was refused, its decision tells."""
        is_refusal = self.exit_code == GateRefusedError.exit_code
        reason = "a player was refused" if is_refusal else self.message
        return f"the last run ended at {self.at} with exit code {self.exit_code}: {reason}"


@contextmanager
def ending_noted(layout: RunLayout) -> Iterator[None]:
    """Forget how the run ended before, and note down how it ends now, unless it does so whole."""
    layout.ending.unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        code, message = _as_told(error)
        if not layout.record.exists():  # taken back, since nothing was made
            raise
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        try:
            write_durably(layout.ending, canonical_json(asdict(Ending(at, code, message))))
        except (
            OSError,
            SpinError,
        ) as unwritten:  # such as a full disk
            _log.warning("%s was not written: %s", layout.ending, unwritten)
        raise


def read_ending(layout: RunLayout) -> Ending | None:
    """Return how the run ended before its time; None where it did not, or nothing can be read."""
    with suppress(OSError, ValueError, TypeError):
        return Ending(**json.loads(layout.ending.read_bytes()))
    return None


def _as_told(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the words for an error."""
    match error:
        case SpinError():
            return error.exit_code, str(error)
        case KeyboardInterrupt():
            return _INTERRUPTED, "interrupted"
        case SystemExit(code=int(code)):
            return code, "terminated"
    return _BUG, f"{type(error).__name__}: {error}"
