"""Entry point of the console script `spin` and of `python -m spin_cli`."""

import atexit
import io
import os
import signal
import sys
from types import FrameType

from spin_cli import KEPT


def main() -> None:
    """Run the command line; the process ends with the command's exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by >&-
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    try:
        from spin_cli.app import app  # takes 0.2 s, in which Ctrl-C is told like any other
        from spin_cli.failures import UNREAD, TerminatedError, end_unread
    except KeyboardInterrupt:
        sys.stderr.write(f"spin: interrupted; {KEPT}\n")
        sys.exit(130)

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        raise TerminatedError  # unwinds like an exception, so that locks and workspaces are tidy

    signal.signal(signal.SIGTERM, on_sigterm)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals without Unicode
    code: int | None = None
    try:
        app(prog_name="spin")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end is under way, and all is said
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            end_unread()
            code = UNREAD
            sys.exit(UNREAD)
        finally:
            if code is not None:
                _leave_if_launched(code)


def _leave_if_launched(code: int) -> None:
    """End one process of several that a launcher started, without taking the interpreter apart.

    Threads of gloo may still hold tensors then, and abort the process as they let go of them: a
    launcher would call the stage failed that has just been committed.
    """
    group = sys.modules.get("stages.model.group")  # only what works together has loaded it
    if group is None or not group.is_launched():
        return
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
