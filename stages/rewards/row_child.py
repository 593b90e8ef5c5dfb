r"""The process that scores rows whose texts or code may do harm; started by `stages.rewards.rows`.

An expression such as `9^9^9^9` computes for ever, a regular expression may backtrack for years,
and a user's function may do anything. So rows are scored here, each within a time limit, and the
kernel ends this process where nothing else can. It holds nothing of ours and imports none of it.

A message in either direction is its length (8 bytes, big-endian) and JSON in ASCII.
In:  first {"kind", "limit_s", "clock", "memory_bytes", ...settings of the kind}, then rows as
     [number, row]: a row is a list of texts, of the kind's own.
Out: first null, or a text that says why there is nothing to be had here; then [number, result] a
     row, in order: a result is a number, or [reason, why] where there is none.
"""

import json
import math
import numbers
import os
import re
import resource
import signal
import socket
import sys
import traceback
import types
from collections.abc import Callable
from fractions import Fraction
from typing import Any, BinaryIO

Row = list[Any]
Result = float | tuple[str, str]
Rule = Callable[[Row], Any]

GRACE_S = 2.0
"""After a row's own limit, for what no signal handler can interrupt."""
MOST_ANSWER_CHARACTERS = 1000
"""Of a mathematical answer: longer ones are compared as text."""

_HEADER = 8
_SHORT = 40  # characters of a number that is compared without a library
_BOXED = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is none
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:/\d+)?")


class NoScoreError(Exception):
    """There is nothing to compare a response with."""


class OutOfTimeError(BaseException):
    """A row used up its time; no `except Exception` of a library may stop it."""


def math_rule(settings: dict[str, Any]) -> Rule:
    """Return the rule of `reward.name=math`; its row is the response and the human response."""
    import logging

    import math_verify  # noqa: F401 - to fail now

    logging.disable(logging.CRITICAL)
    is_boxed = settings["human"] == "boxed"

    def rule(row: Row) -> float:
        response, human = row
        gold = last_boxed(human) if is_boxed else human
        if gold is None or not gold.strip():
            raise NoScoreError("the human response has no \\boxed{}" if is_boxed else "it is empty")
        answer = last_boxed(response)
        return 0.0 if answer is None else float(same_value(answer, gold))

    return rule


def boxed_answer(text: str) -> str | None:
    r"""Return what stands in the last `\boxed{}`, tidied, a plain number by its value; or None."""
    found = last_boxed(text)
    if found is None:
        return None
    number = _as_number(_tidy(found))
    return _tidy(found) if number is None else str(number)


def last_boxed(text: str) -> str | None:
    r"""Return what stands in the last closed `\boxed{}` of a text, or None.

    One pass over the text: votes are counted in the run's own process, with no limit on time.
    What is longer than 100 times an answer's most is left out.
    """
    boxes = {box.end() - 1 for box in _BOXED.finditer(text)}
    waiting: list[int] = []  # places of braces that are open
    last: tuple[int, int] | None = None
    for mark in _BRACE.finditer(text, min(boxes, default=len(text))):
        at = mark.start()
        if text[at] == "{":
            waiting.append(at)
        elif text[at] == "}" and waiting:
            start = waiting.pop()
            is_box = start in boxes and at - start < 100 * MOST_ANSWER_CHARACTERS
            if is_box and (last is None or start > last[0]):
                last = start, at
    return None if last is None else text[last[0] + 1 : last[1]]


def same_value(answer: str, gold: str) -> bool:
    """Tell whether two answers are the same text, or expressions of the same value."""
    answer, gold = _tidy(answer), _tidy(gold)
    if answer == gold:
        return True
    numbers_ = _as_number(answer), _as_number(gold)
    if None not in numbers_:
        return numbers_[0] == numbers_[1]
    if max(len(answer), len(gold)) > MOST_ANSWER_CHARACTERS:
        return False
    from math_verify import LatexExtractionConfig, parse, verify

    # Nothing but LaTeX is looked for: other texts would go to sympy's parse_expr, which is eval.
    wanted = [LatexExtractionConfig(boxed_match_priority=0)]
    parsed = [
        parse(f"$\\boxed{{{text}}}$", wanted, parsing_timeout=None) for text in (gold, answer)
    ]
    return bool(verify(*parsed, timeout_seconds=None))


def _tidy(text: str) -> str:
    text = " ".join(text.split())
    return text[:-1].rstrip() if text.endswith(".") else text


def _as_number(text: str) -> Fraction | None:
    plain = text.replace(",", "") if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?", text) else text
    if len(plain) > _SHORT or not _NUMBER.fullmatch(plain):
        return None
    top, _, bottom = plain.partition("/")
    if bottom and ("." in top or int(bottom) == 0):
        return None
    return Fraction(top.rstrip(".")) / int(bottom or 1)


def regex_rule(settings: dict[str, Any]) -> Rule:
    """Return the rule of `reward.name=regex`; its row is the response and the human response."""
    pattern = re.compile(settings["pattern"])
    if settings["compare"] == "found":
        return lambda row: float(pattern.search(row[0]) is not None)

    def rule(row: Row) -> float:
        gold = last_match(pattern, row[1])
        if gold is None:
            raise NoScoreError("the pattern is not found in the human response")
        found = last_match(pattern, row[0])
        return float(found is not None and found == gold)

    return rule


def last_match(pattern: re.Pattern[str], text: str) -> str | None:
    r"""Return the first group, or all where there is none, of a pattern's last match in a text.

    Matches of the empty text say nothing and are passed over: `\d*` finds one at every end.
    """
    last: re.Match[str] | None = None
    for match in pattern.finditer(text):
        if match.group():
            last = match
    if last is None:
        return None
    found = last.group(1) if pattern.groups else last.group()
    return (found or "").strip() or None


def python_rule(settings: dict[str, Any]) -> Rule:
    """Return the user's function; its row is what it is called with."""
    name, file = settings["function"], settings["file"]
    module = types.ModuleType("spin_reward")
    module.__file__ = file
    sys.modules["spin_reward"] = module  # where dataclasses and pickle look for it
    exec(compile(settings["program"], file, "exec"), module.__dict__)
    function = getattr(module, name, None)
    if not callable(function):
        raise NoScoreError(f"it has no function {name!r}")
    return lambda row: function(*row)


RULES: dict[str, Callable[[dict[str, Any]], Rule]] = {
    "math": math_rule,
    "regex": regex_rule,
    "python": python_rule,
}


class Rows:
    """Scores rows, each within its limits."""

    def __init__(self, rule: Rule, limit_s: float, clock: str, file: str | None) -> None:
        """Take limits on a row's processor time (`cpu`) or on the time that passes (`wall`)."""
        self._rule, self._limit_s, self._file = rule, limit_s, file
        self._timer, number, self._cores = (
            (signal.ITIMER_PROF, signal.SIGPROF, 1)
            if clock == "cpu"
            else (signal.ITIMER_REAL, signal.SIGALRM, os.cpu_count() or 1)
        )
        self._is_working = self._is_spent = False
        self._parent = os.getppid()
        signal.signal(number, self._stop)

    def score(self, row: Row) -> Result:
        """Return the score of a row, or why there is none."""
        self._is_spent = False
        self._allow_time()
        # It comes again and again, lest a handler of the user's code swallow the first.
        signal.setitimer(self._timer, self._limit_s, GRACE_S / 4)
        self._is_working = True
        try:
            result = self._checked(self._rule(row))
            self._is_working = False
        except BaseException as error:  # noqa: BLE001 - sys.exit too; it is the user's code
            self._is_working = False
            result = self._why_not(error)
        signal.setitimer(self._timer, 0)
        if self._is_spent:  # whatever its code made of that
            return ("too_costly", f"it takes more than {self._limit_s:g} s")
        return result

    def _why_not(self, error: BaseException) -> Result:
        if isinstance(error, NoScoreError):
            return ("no_score", str(error))
        if isinstance(error, MemoryError):
            return ("too_costly", "it takes too much memory")
        return ("failed", words(error, self._file))

    def _checked(self, value: Any) -> Result:
        if isinstance(value, numbers.Real) and math.isfinite(value):
            return float(value)
        shown = repr(value)[:80] if isinstance(value, numbers.Real) else type(value).__name__
        return ("failed", f"it returned {shown}; return a finite number")

    def _stop(self, *_: object) -> None:
        if os.getppid() != self._parent:
            os._exit(1)  # nobody waits for the row
        if self._is_working:
            self._is_spent = True
            raise OutOfTimeError

    def _allow_time(self) -> None:
        """Let the kernel end this process if the next row outlives its own time limit."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        allowed = self._cores * (self._limit_s + GRACE_S)
        _set_limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + allowed))


def words(error: BaseException, file: str | None) -> str:
    """Return an exception in words, with the line of the user's file that raised it."""
    try:
        text = str(error)[:500]
    except BaseException:  # noqa: BLE001 - it is the user's code
        text = ""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    where = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}"


def _set_limit(which: int, value: int) -> None:
    """Set a soft limit, as far as the hard one that was inherited allows."""
    _, hard = resource.getrlimit(which)
    soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (soft, hard))


def _read(source: BinaryIO) -> Any:
    header = source.read(_HEADER)
    return json.loads(source.read(int.from_bytes(header, "big"))) if header else None


def _tell(sink: socket.socket, message: Any) -> None:
    data = json.dumps(message).encode()
    sink.sendall(len(data).to_bytes(_HEADER, "big") + data)


def _end_copy(own: int) -> None:
    """End here if the user's code has forked: a copy would answer the rows that were read ahead."""
    if os.getpid() != own:
        os._exit(0)


def main() -> None:
    """Take the limits on, make the rule, say so, and score rows until there are no more."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # we end with our parent: its socket closes
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sink = socket.socket(fileno=int(sys.argv[1]))
    sink.set_inheritable(False)
    source = sink.makefile("rb")
    settings = _read(source)
    if settings["memory_bytes"]:
        _set_limit(resource.RLIMIT_AS, settings["memory_bytes"])
    file = settings.get("file")
    own = os.getpid()
    try:
        rule = RULES[settings["kind"]](settings)
    except BaseException as error:  # noqa: BLE001 - sys.exit too; it is the user's code
        _end_copy(own)
        _tell(sink, str(error) if isinstance(error, NoScoreError) else words(error, file))
        return
    _end_copy(own)
    rows = Rows(rule, settings["limit_s"], settings["clock"], file)
    _tell(sink, None)
    while (message := _read(source)) is not None:
        number, row = message
        result = rows.score(row)
        _end_copy(own)
        _tell(sink, [number, result])


if __name__ == "__main__":
    main()
