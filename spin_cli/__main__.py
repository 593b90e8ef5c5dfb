"""Entry point of the console script `spin` and of `python -m spin_cli`."""

import io
import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line; the process ends with the command's exit code."""
    try:
        from spin_cli.app import app  # takes 0.2 s, in which Ctrl-C must be quiet, too
        from spin_cli.failures import UNREAD, TerminatedError, end_unread
    except KeyboardInterrupt:
        sys.exit(130)

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        raise TerminatedError  # unwinds like an exception, so that locks and workspaces are tidy

    signal.signal(signal.SIGTERM, on_sigterm)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by >&-
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals without Unicode
    try:
        app(prog_name="spin")
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end is under way, and all is said
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            end_unread()
            sys.exit(UNREAD)


if __name__ == "__main__":
    main()
