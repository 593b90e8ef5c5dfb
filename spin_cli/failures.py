"""How a command ends: one line on stderr and the exit code that cron relies on."""

import errno
import os
import select
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

import typer

from spin_cli import KEPT
from spin_cli.screen import is_verbose, say
from stages.errors import ConfigError, NoSpaceError, SpinError

BUG = 1
INTERRUPTED = 130
UNREAD = 141
"""Whoever read our output has ended, as `head` does; a shell's code for SIGPIPE."""
TERMINATED = 143


class TerminatedError(SystemExit):
    """SIGTERM, as an exception that unwinds what is going on."""

    def __init__(self) -> None:
        super().__init__(TERMINATED)


@contextmanager
def reported() -> Iterator[None]:
    """End the command on an error: tell it in one line, and exit with its code.

    A traceback is for our own bugs, or for `--verbose`. Where nobody reads on, as after `| head`,
    it ends without a word.
    """
    try:
        with _told():
            yield
    except BrokenPipeError:
        end_unread()
        raise typer.Exit(UNREAD) from None


def end_unread() -> None:
    """Let what is still to be written go nowhere, so that the interpreter ends quietly."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if _is_unread(stream):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _is_unread(stream: TextIO) -> bool:
    """Tell whether the other end of a pipe is closed."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # errors are told unasked
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # no file at all
        return False


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except SpinError as error:
        if is_verbose():
            traceback.print_exc()
        say(f"spin: {error}")
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        say(f"spin: interrupted; {KEPT}")
        raise typer.Exit(INTERRUPTED) from None
    except TerminatedError:
        say(f"spin: terminated; {KEPT}")
        raise
    except Exception as error:
        if _is_typers(error, "NoArgsIsHelpError"):
            _put_help(error)
        if _is_typers(error, "UsageError"):
            say(_usage_line(error))
            raise typer.Exit(ConfigError.exit_code) from None
        if _is_typers(error, "ClickException", "Exit", "Abort"):
            raise
        if isinstance(error, BrokenPipeError) and any(map(_is_unread, (sys.stdout, sys.stderr))):
            raise
        _end_unexpected(error)


def _end_unexpected(error: Exception) -> None:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        say(f"spin: no room to write ({error}); free some space, then {KEPT}")
        raise typer.Exit(NoSpaceError.exit_code) from None
    if _is_out_of_memory(error):
        if is_verbose():
            traceback.print_exc()
        say(
            f"spin: out of memory ({error}); lower the stage's token_budget or micro_batch_size, "
            f"or generate.engine.batch_size, then {KEPT}"
        )
        raise typer.Exit(BUG) from None
    traceback.print_exc(file=sys.stderr)
    say(
        f"spin: a bug: {type(error).__name__}: {error}; please report it with the lines above "
        "and the output of `spin version`"
    )
    raise typer.Exit(BUG) from None


def _is_typers(error: Exception, *names: str) -> bool:
    """Tell whether an exception is one of Typer's own, which it does not name in public."""
    return any(kind.__name__ in names for kind in type(error).__mro__)


def _put_help(error: Any) -> NoReturn:
    """End a command that was called without a word with its help."""
    error.show()
    raise typer.Exit(error.exit_code) from None


def _usage_line(error: Any) -> str:
    """Return what is wrong with a command line, and where to read on."""
    command = error.ctx.command_path if error.ctx is not None else "spin"
    message = error.format_message().rstrip(".").removeprefix("Invalid value: ")
    return f"{command}: {message[:1].lower()}{message[1:]}; see {command} --help"


def _is_out_of_memory(error: Exception) -> bool:
    """Tell whether memory ran out; torch has exceptions of its own, which we must not import."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )
