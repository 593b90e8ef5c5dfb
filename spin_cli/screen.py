"""What people see: one-line messages on stderr, tables and JSON on stdout, no control sequences."""

import json
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

# Terminal sequences (CSI, OSC), other control characters, and marks that reverse the text.
_UNSAFE = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"
    r"|\x1b\][^\x07\x1b\n]*(?:\x07|\x1b\\)"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
    r"|[\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def safe(text: object) -> str:
    """Return text that came from a model, a file or a path without what could steer a terminal.

    Lone surrogates, which no terminal can be sent, are written as escapes.
    """
    clean = _UNSAFE.sub("", str(text))
    return clean.encode("utf-8", "backslashreplace").decode()


def set_up_messages(*, quiet: bool = False, verbose: bool = False) -> None:
    """Send messages of the logger "spin" to stderr: warnings always, progress unless `quiet`.

    Of several processes that a launcher such as torchrun started, the first alone tells progress.
    """
    quiet = quiet or os.environ.get("RANK", "0") != "0"
    log = logging.getLogger("spin")
    for handler in [h for h in log.handlers if isinstance(h, _Messages)]:
        log.removeHandler(handler)
    log.addHandler(_Messages())
    log.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)


def is_verbose() -> bool:
    """Tell whether the user asked for details, tracebacks among them."""
    return logging.getLogger("spin").isEnabledFor(logging.DEBUG)


def say(text: str) -> None:
    """Write one line to stderr."""
    sys.stderr.write(" ".join(safe(text).split("\n")) + "\n")
    sys.stderr.flush()


def put(text: str) -> None:
    """Write lines of data to stdout."""
    sys.stdout.write(safe(text) + "\n")
    sys.stdout.flush()


def put_json(value: Mapping[str, Any]) -> None:
    """Write one JSON object to stdout, as ASCII, so that nothing in it can steer a terminal."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


def put_table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "") -> None:
    """Write a table to stdout; plain aligned text where that is no terminal.

    All columns but the first and the last are numbers and stand to the right.
    """
    clean = [[safe(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _put_rich_table(titles, clean, caption)
        return
    if caption:
        put(caption)
    widths = [max(len(row[i]) for row in [list(titles), *clean]) for i in range(len(titles))]
    for row in [list(titles), *clean]:
        cells = [
            cell.rjust(width) if _is_number(i, len(titles)) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        put("  ".join(cells).rstrip())


def _put_rich_table(titles: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(safe(caption)) if caption else None, title_justify="left",
                  box=box.SIMPLE_HEAD)  # fmt: skip
    for i, title in enumerate(titles):
        table.add_column(title, justify="right" if _is_number(i, len(titles)) else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: brackets in it are no markup
    Console().print(table)


def _is_number(column: int, count: int) -> bool:
    return 0 < column < count - 1


class _Messages(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is at the time, safely."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
            say(f"warning: {text}" if record.levelno >= logging.WARNING else text)
        except (OSError, ValueError):  # stderr is closed: there is no one to tell
            return
