"""Chat templates, rendered in a process of their own that they cannot harm us from.

See `stages.data.template_child` for its limits. There is one such process for the life of the
interpreter; it costs some 50 ms to start, is started anew where a template ends it, and ends with
us, however we end.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stages.errors import ConfigError

PROGRAM = Path(__file__).with_name("template_child.py")
SILENCE_S = 120.0  # its processor time is limited by the kernel; this is for a stopped process
MOST_SPENT = 20  # each may take some seconds
_HEADER = 8
_PIPE_BYTES = 1 << 20
_READ_BYTES = 1 << 18
_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Failed:
    """Why a template gave no text for a conversation."""

    why: str
    is_spent: bool = False
    """It went past a limit on time, memory or size."""


Rendered = str | Failed


@dataclass
class Template:
    """A template, and the names that it may use beside the messages."""

    text: str
    constants: Mapping[str, str]
    num_spent: int = 0
    """How often it went past a limit."""

    def render(self, conversations: Sequence[Messages], *, ask: bool = True) -> list[Rendered]:
        """Return the text of each conversation, or why there is none.

        Args:
            ask: end with the words that open the assistant's answer.
        """
        return [text for part in self.render_parts([conversations], ask=ask) for text in part]

    def render_parts(
        self, parts: Iterable[Sequence[Messages]], *, ask: bool = True
    ) -> Generator[list[Rendered], None, None]:
        """Yield the texts of each part; the next one is rendered while the caller works on it.

        Close it when it is not read to the end.

        Raises:
            ConfigError: too many conversations ran into the limits of time, memory and size.
            RuntimeError: the process that renders cannot be started.
        """
        yield from _process.render(_Part(self, part, ask) for part in parts)

    def count_spent(self, results: Sequence[Rendered]) -> None:
        """Count what went past a limit.

        Raises:
            ConfigError: it happened too often; the rest of a part is not waited for.
        """
        spent = [result.why for result in results if isinstance(result, Failed) and result.is_spent]
        self.num_spent += len(spent)
        if self.num_spent > MOST_SPENT:
            raise ConfigError(
                f"chat template goes past its limits on {self.num_spent} prompts ({spent[-1]}); "
                "mend it, or set chat.template to another"
            )


class _Ended(Exception):
    """The process has ended, or says nothing any more."""


@dataclass
class _Part:
    """Conversations, and what was heard of them, in order."""

    template: Template
    conversations: Sequence[Messages]
    ask: bool
    results: list[Rendered] = field(default_factory=list)
    careful: bool = False
    """Each row is told of at once, so that it is known which one ends the process."""

    def request(self) -> bytes:
        """Return the message that asks for what is missing."""
        body = {
            "template": self.template.text,
            "constants": self.template.constants,
            "careful": self.careful,
            "ask": self.ask,
            "conversations": self.conversations[len(self.results) :],
        }
        return json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")

    @property
    def is_done(self) -> bool:
        return len(self.results) == len(self.conversations)

    def take(self, results: list[Rendered]) -> None:
        """Add what was heard of the next jobs."""
        self.results += results
        self.template.count_spent(results)

    def survive(self) -> None:
        """Go on after the process has ended: the row that ended it twice is given up."""
        if self.careful:
            self.take([Failed("it takes too long or too much memory, and was stopped", True)])
        self.careful = not self.careful


class _Process:
    """The one process, seen from ours. Used by one thread at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._popen: subprocess.Popen[bytes] | None = None
        self._unsent = bytearray()
        self._unread = bytearray()

    def render(self, parts: Iterable[_Part]) -> Generator[list[Rendered], None, None]:
        """Yield the results of each part, one part ahead of the reader."""
        source = iter(parts)
        waiting: deque[_Part] = deque()
        with self._lock:
            try:
                while True:
                    while len(waiting) < 2 and (part := next(source, None)) is not None:
                        waiting.append(part)
                        self._ask(part)
                    if not waiting:
                        return
                    self._hear_all(waiting)
                    yield waiting.popleft().results
            finally:
                if waiting:  # its answers would be taken for those of the next question
                    self.close()

    def _ask(self, part: _Part) -> None:
        if not part.is_done:
            data = part.request()
            self._unsent += len(data).to_bytes(_HEADER, "big") + data
            if self._popen is not None:
                self._write()

    def _hear_all(self, waiting: deque[_Part]) -> None:
        """Read until the first part is done; start anew, as often as it takes."""
        first = waiting[0]
        while not first.is_done:
            try:
                if self._popen is None:
                    self._start()
                first.take(self._hear())
            except _Ended:
                self.close()
                first.survive()
                for part in waiting:
                    self._ask(part)

    def _start(self) -> None:
        popen = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", os.fspath(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={name: os.environ[name] for name in _VARIABLES if name in os.environ},
            start_new_session=True,  # Ctrl-C is ours; it ends when its pipe does
            bufsize=0,
        )
        self._popen = popen
        atexit.register(self.close)
        assert popen.stdin is not None
        assert popen.stdout is not None
        for pipe in (popen.stdin, popen.stdout):
            os.set_blocking(pipe.fileno(), False)
        unsent, self._unsent = self._unsent, bytearray()
        try:
            self._hear()
        except _Ended:
            raise RuntimeError(
                f"the process that renders chat templates did not start: {self._last_words()}"
            ) from None
        self._unsent = unsent

    def _last_words(self) -> str:
        assert self._popen is not None
        assert self._popen.stderr is not None
        self._popen.kill()
        words = self._popen.stderr.read().decode(errors="replace").split()
        return " ".join(words)[-300:] or f"it ended with {self._popen.wait()}"

    def _hear(self) -> list[Rendered]:
        """Return the results of the next message.

        Raises:
            _Ended: there is none.
        """
        deadline = time.monotonic() + SILENCE_S
        while (data := self._message()) is None:
            self._exchange(deadline)
        return [
            text if isinstance(text, str) else Failed(text[1], text[0]) for text in json.loads(data)
        ]

    def _message(self) -> bytes | None:
        if len(self._unread) < _HEADER:
            return None
        end = _HEADER + int.from_bytes(self._unread[:_HEADER], "big")
        if len(self._unread) < end:
            return None
        data = bytes(self._unread[_HEADER:end])
        del self._unread[:end]
        return data

    def _exchange(self, deadline: float) -> None:
        """Wait until something can be written or read, and do it."""
        assert self._popen is not None
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        poll = select.poll()
        poll.register(self._popen.stdout, select.POLLIN)
        if self._unsent:
            poll.register(self._popen.stdin, select.POLLOUT)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise _Ended
        self._write()
        try:
            data = os.read(self._popen.stdout.fileno(), _READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            raise _Ended
        self._unread += data

    def _write(self) -> None:
        """Write as much as the pipe takes. A closed one is noticed when reading."""
        assert self._popen is not None
        assert self._popen.stdin is not None
        try:
            while self._unsent:
                sent = os.write(self._popen.stdin.fileno(), self._unsent[:_PIPE_BYTES])
                del self._unsent[:sent]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._unsent.clear()

    def close(self) -> None:
        """End the process, if there is one."""
        popen, self._popen = self._popen, None
        self._unsent.clear()
        self._unread.clear()
        if popen is None:
            return
        popen.kill()
        popen.wait()
        for pipe in (popen.stdin, popen.stdout, popen.stderr):
            if pipe is not None:
                pipe.close()

    def forget(self) -> None:
        """In a forked child: let go of the parent's process, without ending it."""
        popen = self._popen
        self.__init__()  # type: ignore[misc] # the lock too: a thread that is gone may hold it
        if popen is None:
            return
        for pipe in (popen.stdin, popen.stdout, popen.stderr):
            if pipe is not None:
                pipe.close()
        popen.returncode = 0  # not ours to wait for


# One a interpreter: to start one costs more than a small stage's whole rendering.
_process = _Process()
os.register_at_fork(after_in_child=_process.forget)
