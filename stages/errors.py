"""Errors a user can cause or must act on, each with the exit code that cron relies on.

Exit codes: 0 done or already done, 1 our bug, 2 usage or config, 3 input missing or refused,
4 corrupt artifact, 5 diverged, 6 gate refused promotion, 7 no space, 75 busy.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path

_MOST_NAMES = 10
"""More in one line are not read."""


def choices(asked: str, known: Iterable[str], who: str) -> str:
    """Return for a message which names there are, those like the one asked for first.

    Args:
        who: the words before them, such as `it has`.
    """
    names = sorted(known)
    near = difflib.get_close_matches(asked, names, n=3)
    ordered = [*near, *(name for name in names if name not in near)]
    more = len(ordered) - _MOST_NAMES
    rest = f" and {more} more" if more > 0 else ""
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}{who} {', '.join(ordered[:_MOST_NAMES])}{rest}"


class SpinError(Exception):
    """Base of every error that is shown as one line; its message names thing, value and remedy."""

    exit_code = 1


class EngineError(SpinError):
    """An engine's process died or stalled."""


class ConfigError(SpinError):
    """Wrong usage or configuration, or an output place that holds something else."""

    exit_code = 2


class FinishedError(ConfigError):
    """An output place holds what was finished with other settings."""

    def __init__(self, place: Path, difference: str, setting: str | None) -> None:
        """Take the place, and in what it differs.

        Args:
            difference: in words.
            setting: its dotted name; None where it is no setting.
        """
        super().__init__(
            f"{place} is finished with other settings: {difference}; nothing is overwritten: "
            "name another place, or delete it"
        )
        self.place, self.difference, self.setting = place, difference, setting


class InputError(SpinError):
    """An input is missing, empty, or refused."""

    exit_code = 3


class CorruptError(SpinError):
    """An artifact's bytes are not those its manifest names."""

    exit_code = 4


class DivergedError(SpinError):
    """What should agree does not.

    Training met NaN or Inf, failed its start-up check, or a collapse alarm stopped it; or an
    engine's log-probabilities are not those of the model that will be trained; or what was made
    again is not what it was.
    """

    exit_code = 5


class GateRefusedError(SpinError):
    """The gate refused to promote the player."""

    exit_code = 6


class NoSpaceError(SpinError):
    """The disk is full or a quota is spent."""

    exit_code = 7


class BusyError(SpinError):
    """Another process holds the lock on this place."""

    exit_code = 75
