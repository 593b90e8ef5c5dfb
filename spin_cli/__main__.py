"""Entry point of the console script `spin` and of `python -m spin_cli`."""

import io
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line; the process ends with the command's exit code."""
    try:
        from spin_cli.app import app  # takes 0.2 s, in which Ctrl-C must be quiet, too
        from spin_cli.failures import TerminatedError
    except KeyboardInterrupt:
        sys.exit(130)

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        raise TerminatedError  # unwinds like an exception, so that locks and workspaces are tidy

    signal.signal(signal.SIGTERM, on_sigterm)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals without Unicode
    try:
        app(prog_name="spin")
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end is under way, and all is said


if __name__ == "__main__":
    main()
