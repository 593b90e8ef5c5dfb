"""What people see: one-line messages on stderr, tables and JSON on stdout, no control sequences."""

import json
import logging
import os
import re
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, TextIO

# Terminal sequences (CSI, OSC), other control characters, and marks that reverse the text.
_UNSAFE = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"
    r"|\x1b\][^\x07\x1b\n]*(?:\x07|\x1b\\)"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
    r"|[\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)

_PART = re.compile(r"[^ _./,-]*[ _./,-]*")
"""What a title or a name may break behind."""
_GAP = "  "
_Row = Sequence[Sequence[str]]
"""Cells, each as lines."""


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


def put_wrapped(text: str) -> None:
    """Write one line to stdout; on a terminal, several that break between words."""
    width = terminal_width()
    line = " ".join(safe(text).split("\n"))
    put(line if width is None else fill(line, width))


def fill(text: str, width: int) -> str:
    """Return a text in lines that break between words, those after the first further right."""
    indent = " " * (len(text) - len(text.lstrip()))
    return textwrap.fill(
        text, width, subsequent_indent=f"{indent}  ", break_on_hyphens=False, break_long_words=False
    )


def counted(number: int, one: str, many: str) -> str:
    """Return a number with the word that follows it."""
    return f"{number:,} {one if number == 1 else many}"


def terminal_width() -> int | None:
    """Return the columns of the terminal that reads stdout; None where none does."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def has_styles() -> bool:
    """Tell whether stdout may be sent colours: it is a terminal, and NO_COLOR is not set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def put_table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "") -> None:
    """Write a table to stdout, one line a row.

    All columns but the first and the last are numbers and stand to the right. On a terminal that
    is too narrow titles and names break, and where that is not enough each row is a block of lines
    `title value`: nothing is ever cut.
    """
    titles, rows = list(map(_flat, titles)), [list(map(_flat, row)) for row in rows]
    heads = [[title] for title in titles]
    body = [[[cell] for cell in row] for row in rows]
    width = terminal_width()
    if width is not None and _width(_columns(heads, body)) > width:
        heads = [
            _pieces(title[0], _widest(row[i] for row in body)) for i, title in enumerate(heads)
        ]
        room = width - _width(_columns(heads, body)[1:]) - len(_GAP)
        body = [[_pieces(row[0][0], max(room, _widest(heads[:1]))), *row[1:]] for row in body]
        if _width(_columns(heads, body)) > width:
            _put_blocks(titles, rows, caption, width)
            return
    if caption:
        put_wrapped(caption)
    depth = max(map(len, heads), default=0)
    heads = [[*[""] * (depth - len(lines)), *lines] for lines in heads]  # the last ones level
    widths = [_widest(column) for column in _columns(heads, body)]
    for row in [heads, *body]:
        for line in zip_longest(*row, fillvalue=""):
            put(_GAP.join(_aligned(cell, i, widths) for i, cell in enumerate(line)).rstrip())


def _flat(text: str) -> str:
    """Return a text that stays in its cell: a line break in it would pass for a row."""
    return re.sub(r"[\n\t]", " ", safe(text))


def _put_blocks(
    titles: Sequence[str], rows: Sequence[Sequence[str]], caption: str, width: int
) -> None:
    """Write each row as its first cell and, below it, a line a column."""
    if caption:
        put_wrapped(caption)
    longest = max(map(len, titles[1:]), default=0)
    for row in rows:
        put(fill(f"{titles[0]} {row[0]}", width))
        for title, cell in zip(titles[1:], row[1:], strict=True):
            if title:
                beside = f"  {title.ljust(longest)}  {cell}"
                put(beside if _cells(beside) <= width else f"  {title}\n    {cell}")


def _columns(heads: _Row, body: Sequence[_Row]) -> list[list[list[str]]]:
    return [list(column) for column in zip(heads, *body, strict=True)]


def _width(columns: Sequence[Iterable[Sequence[str]]]) -> int:
    return sum(_widest(column) for column in columns) + len(_GAP) * (len(columns) - 1)


def _widest(cells: Iterable[Sequence[str]]) -> int:
    return max((_cells(line) for lines in cells for line in lines), default=0)


def _cells(text: str) -> int:
    """Return the columns that a text takes; letters of some scripts take two."""
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text)


def _pieces(text: str, width: int) -> list[str]:
    """Return a title or a name in lines of `width`, or as near to it as its parts allow."""
    parts, lines = _PART.findall(text), [""]
    width = max(width, *(_cells(part.rstrip()) for part in parts))
    for part in parts:
        if lines[-1] and _cells((lines[-1] + part).rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return [line.rstrip() for line in lines]


def _aligned(cell: str, column: int, widths: Sequence[int]) -> str:
    space = " " * (widths[column] - _cells(cell))
    return space + cell if 0 < column < len(widths) - 1 else cell + space


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
