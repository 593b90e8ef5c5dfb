"""The process that renders chat templates; run as a program by `stages.data.templates`.

A template is a program from a model folder: it may loop for ever or build gigabytes. So this one
process has limits on memory and on processor time that the kernel keeps, holds nothing of ours, and
imports nothing but jinja2. It reads batches from its standard input until that is closed.

A message in either direction is its length (8 bytes, big-endian) and JSON in UTF-8.
In:  {"template", "constants", "ask", "careful", "conversations": [[{"role", "content"}, ...], ...]}
Out: lists of results, in order, as many lists as it likes: a text, or [is_spent, why] where there
     is none; `is_spent` tells a limit from an error.
"""

import json
import math
import resource
import signal
import sys
import time
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MEMORY_BYTES = 1 << 29
ROW_CPU_S = 1.0
KILL_CPU_S = 1  # after the row's own limit, for what no signal handler can interrupt
FREE_CHARACTERS = 1 << 18
MOST_GROWTH = 8
TELL_S = 0.1
TELL_CHARACTERS = 1 << 20
NOW = datetime(2024, 7, 26)  # what Llama's templates take where there is no clock

Result = str | tuple[bool, str]

_HEADER = 8


class OutOfTimeError(BaseException):
    """A row used up its processor time; no `except Exception` of a library may stop it."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` of transformers, around what an assistant says."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_say", [])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _say(self, caller: Any) -> Any:
        return caller()


def environment() -> jinja2.Environment:
    """Return the environment of transformers, but for the clock: no prompt may change overnight.

    The test that compares the two knows of any difference.
    """
    found = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    found.filters["tojson"] = _tojson
    found.globals["raise_exception"] = _raise_exception
    found.globals["strftime_now"] = NOW.strftime
    return found


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class Rows:
    """Renders rows, each within its limits."""

    def __init__(self) -> None:
        self._is_rendering = False
        self._compiled = lru_cache(maxsize=16)(self._compile)
        signal.signal(signal.SIGPROF, self._stop)

    def render(
        self, template: str, constants: dict[str, str], ask: bool, messages: list[dict[str, str]]
    ) -> Result:
        """Return the text of one conversation, or why there is none."""
        size = sum([len(message["content"]) for message in messages])
        most = FREE_CHARACTERS + MOST_GROWTH * size
        signal.setitimer(signal.ITIMER_PROF, ROW_CPU_S)
        self._is_rendering = True
        try:
            text = self._text(template, constants, ask, messages)
            self._is_rendering = False
        except OutOfTimeError:
            return (True, f"it takes more than {ROW_CPU_S:g} s")
        except MemoryError:
            self._is_rendering = False
            return (True, f"it takes more than {MEMORY_BYTES >> 20} MiB of memory")
        except Exception as error:  # noqa: BLE001 - a template raises what its author chose
            self._is_rendering = False
            return (False, _words(error))
        if len(text) > most:
            return (True, f"it writes {len(text)} characters for messages of {size}")
        return text

    def _text(
        self, template: str, constants: dict[str, str], ask: bool, messages: list[dict[str, str]]
    ) -> str:
        compiled, names, problem = self._compiled(template)
        if problem is not None:
            raise problem.with_traceback(None)
        values = {
            **names,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": ask,
            **constants,
        }
        # What `compiled.render(values)` does, without merging the globals anew for every row.
        context = compiled.new_context(values, shared=True)
        return "".join(compiled.root_render_func(context))

    def _compile(self, template: str) -> tuple[Any, dict[str, Any], BaseException | None]:
        """Return the template and its globals, or why it cannot be compiled."""
        try:
            compiled = environment().from_string(template)
        except (OutOfTimeError, Exception) as error:  # noqa: BLE001
            self._is_rendering = False
            return None, {}, error.with_traceback(None)
        return compiled, dict(compiled.globals), None

    def _stop(self, *_: object) -> None:
        if self._is_rendering:
            self._is_rendering = False
            raise OutOfTimeError


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer batches until there are no more."""
    rows = Rows()
    while header := source.read(_HEADER):
        request = json.loads(source.read(int.from_bytes(header, "big")))
        told, characters, ready = time.monotonic(), 0, list[Result]()
        _allow_time()
        template, constants = request["template"], request["constants"]
        for messages in request["conversations"]:
            result = rows.render(template, constants, request["ask"], messages)
            ready.append(result)
            characters += len(result) if isinstance(result, str) else 0
            now = time.monotonic()
            if request["careful"] or now - told > TELL_S or characters > TELL_CHARACTERS:
                _tell(sink, ready)
                _allow_time()
                told, characters, ready = now, 0, []
        signal.setitimer(signal.ITIMER_PROF, 0)
        if ready:
            _tell(sink, ready)


def _tell(sink: BinaryIO, results: list[Result]) -> None:
    data = json.dumps(results, ensure_ascii=False).encode("utf-8", "surrogatepass")
    sink.write(len(data).to_bytes(_HEADER, "big") + data)
    sink.flush()


def _allow_time() -> None:
    """Let the kernel end this process if the next row outlives its own time limit."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(used.ru_utime + used.ru_stime + ROW_CPU_S + TELL_S) + KILL_CPU_S
    _set_limit(resource.RLIMIT_CPU, limit)


def _set_limit(which: int, value: int) -> None:
    """Set a soft limit, as far as the hard one that was inherited allows."""
    _, hard = resource.getrlimit(which)
    soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (soft, hard))


def main() -> None:
    """Take the limits on, say so with an empty list, and serve."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # we end with our parent: its pipe closes
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _set_limit(resource.RLIMIT_AS, MEMORY_BYTES)
    _tell(sys.stdout.buffer, [])
    try:
        serve(sys.stdin.buffer, sys.stdout.buffer)
    except BrokenPipeError:
        sys.stdout = None  # nothing to flush to when Python ends


if __name__ == "__main__":
    main()
