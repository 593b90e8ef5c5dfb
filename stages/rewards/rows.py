"""Rewards that score rows one by one in processes of their own; see `row_child` for their limits.

A row that takes too long, or ends its process, costs that row alone: it is named and has no score.
The processes end with us, however we end.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.errors import ConfigError, EngineError
from stages.rewards.base import Question, Score, Scored, Unscored
from stages.rewards.row_child import GRACE_S

PROGRAM = Path(__file__).with_name("row_child.py")
MEMORY_BYTES = 1 << 30
START_S = 600.0  # a user's file may import torch from a slow disk
SILENCE_S = 120.0  # the kernel limits processor time; this is for a stopped process
WINDOW = 16  # rows that a process has at a time
AHEAD = 256  # rows that are read ahead of the first without a score, for each process
MOST_ENDS = 20  # of processes, one row after the other
_HEADER = 8
_READ_BYTES = 1 << 18
_MOST_WORDS = 2000  # bytes of what a process printed that are kept
_MOST_SAID = 800  # characters of it in a reason
_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")

Row = list[Any]


@dataclass(frozen=True)
class Job:
    """What the processes do, and within which limits."""

    kind: str
    settings: Mapping[str, Any]
    limit_s: float
    is_users_code: bool = False
    """Which may wait, so that passing time is limited, and has our environment and memory."""

    def message(self) -> dict[str, Any]:
        """Return what a process is told first."""
        return {
            **self.settings,
            "kind": self.kind,
            "limit_s": self.limit_s,
            "clock": "wall" if self.is_users_code else "cpu",
            "memory_bytes": 0 if self.is_users_code else MEMORY_BYTES,
        }

    @property
    def silence_s(self) -> float:
        """How long a process may work at a row, by our clock."""
        return self.limit_s + GRACE_S + (0 if self.is_users_code else SILENCE_S)

    def environment(self) -> dict[str, str]:
        """Return the variables of a process."""
        if self.is_users_code:
            return dict(os.environ)
        return {name: os.environ[name] for name in _VARIABLES if name in os.environ}


@dataclass(frozen=True)
class RowReward:
    """A reward whose rows are scored by processes."""

    pool: "RowPool"
    row_of: Callable[[Question, str], Row]
    """Makes of a question and a response what a process is given."""

    def score(self, questions: Iterable[Question]) -> Iterator[Scored]:
        """See `Reward.score`."""
        sizes: deque[int] = deque()

        def rows() -> Iterator[Row]:
            for question in questions:
                sizes.append(len(question.responses))
                for response in question.responses:
                    yield self.row_of(question, response)

        found: list[Score] = []
        for score in self.pool.scores(rows()):
            found.append(score)
            if len(found) == sizes[0]:
                sizes.popleft()
                yield Scored(tuple(found))
                found = []

    def close(self) -> None:
        """See `Reward.close`."""
        self.pool.close()


class _EndedError(Exception):
    """A process has ended, or says nothing any more."""

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(why)
        self.reason = reason


@dataclass
class _Child:
    """One process, seen from ours."""

    popen: subprocess.Popen[bytes]
    socket: socket.socket
    pending: deque[tuple[int, Row]] = field(default_factory=deque)
    """Rows that it has, by their number."""
    unsent: bytearray = field(default_factory=bytearray)
    unread: bytearray = field(default_factory=bytearray)
    printed: bytearray = field(default_factory=bytearray)
    """The last that was written to its output."""
    is_mute: bool = False
    """Its output is closed."""
    heard_at: float = field(default_factory=time.monotonic)
    has_taken: bool = False
    """It took some of what it was given since it was idle."""

    def send(self, message: Any) -> None:
        """Send a message, now or in `write`."""
        data = json.dumps(message).encode()
        self.unsent += len(data).to_bytes(_HEADER, "big") + data
        self.write()

    def write(self) -> None:
        """Write as much as it takes. A closed socket is noticed when reading."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while self.unsent:
                sent = self.socket.send(self.unsent)
                self.has_taken = True
                del self.unsent[:sent]

    def read(self) -> list[Any]:
        """Return the messages that came.

        Raises:
            _EndedError: there is none, and will be none.
        """
        self.read_output()
        try:
            data = self.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            data = b""
        if not data:
            raise self._ended()
        self.unread += data
        self.heard_at = time.monotonic()
        messages = []
        while len(self.unread) >= _HEADER:
            end = _HEADER + int.from_bytes(self.unread[:_HEADER], "big")
            if len(self.unread) < end:
                break
            messages.append(json.loads(self.unread[_HEADER:end]))
            del self.unread[:end]
        return messages

    def register(self, poll: select.poll) -> None:
        """Have `poll` return where there is something to do."""
        assert self.popen.stdout is not None
        poll.register(self.socket, select.POLLIN | (select.POLLOUT if self.unsent else 0))
        if not self.is_mute:
            poll.register(self.popen.stdout, select.POLLIN)

    def read_output(self) -> None:
        """Keep the last of what was printed."""
        assert self.popen.stdout is not None
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.popen.stdout.fileno(), _READ_BYTES):
                self.printed += data
                del self.printed[:-_MOST_WORDS]
            self.is_mute = True

    def _ended(self) -> _EndedError:
        is_over = self._is_over()
        self.read_output()
        if not is_over:
            return _EndedError("failed", "it closed the connection to us")
        self._kill()
        status = self.popen.wait()
        if status == -signal.SIGXCPU:
            return _EndedError("too_costly", "it takes too long, and was stopped")
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        printed = " ".join(self.printed.decode(errors="replace").split())[-_MOST_SAID:]
        said = f"; its last words: {printed}" if printed else ""
        return _EndedError("failed", f"its process ended with {name}{said}")

    def _is_over(self) -> bool:
        """Tell whether the process ends within the grace, and leave its number taken if so."""
        deadline = time.monotonic() + GRACE_S
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while os.waitid(os.P_PID, self.popen.pid, options) is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    def _kill(self) -> None:
        """End the process's group, which outlives it; not once its number may be another's."""
        if self.popen.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.popen.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process, and those that it started."""
        self._kill()
        self.popen.wait()
        assert self.popen.stdout is not None
        self.popen.stdout.close()
        self.socket.close()


class RowPool:
    """Processes that score rows. Used by one thread."""

    def __init__(self, job: Job, processes: int) -> None:
        """Start the processes, and wait until they are ready.

        Raises:
            ConfigError: they cannot do the job; the message says why.
        """
        self._job = job
        self._children: list[_Child] = []
        self._slow = 0
        """Rows in a row that took too long."""
        self._ends = 0
        """Of processes since the last score."""
        try:
            for _ in range(processes):
                self._children.append(self._start())
            for child in self._children:
                self._wait_until_ready(child)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """The numbers of the processes."""
        return [child.popen.pid for child in self._children]

    def scores(self, rows: Iterable[Row]) -> Iterator[Score]:
        """Yield the score of each row, in order.

        Raises:
            ConfigError, EngineError: no row can be scored any more.
        """
        source = enumerate(rows)
        done: dict[int, Score] = {}
        first = given = 0
        is_over = False
        while True:
            while first in done:
                yield done.pop(first)
                first += 1
            while not is_over and given - first < AHEAD * len(self._children):
                child = min(self._children, key=lambda child: len(child.pending))
                if len(child.pending) >= WINDOW:
                    break
                item = next(source, None)
                if item is None:
                    is_over = True
                    break
                self._give(child, item)
                given += 1
            if is_over and first == given:
                return
            done |= self._exchange()

    def close(self) -> None:
        """End the processes."""
        for child in self._children:
            child.close()
        self._children.clear()

    def _give(self, child: _Child, item: tuple[int, Row]) -> None:
        if not child.pending:
            child.heard_at = time.monotonic()  # it owed nothing until now
            child.has_taken = False
        child.pending.append(item)
        child.send(item)

    def _exchange(self) -> dict[int, Score]:
        """Wait until something can be read or written, and do it; return what was scored."""
        poll = select.poll()
        for child in self._children:
            child.register(poll)
        working = [child for child in self._children if child.pending]
        deadline = min(child.heard_at for child in working) + self._job.silence_s
        poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        done: dict[int, Score] = {}
        for number, child in enumerate(self._children):
            if child.unsent:
                child.write()
                if not child.unsent:
                    child.heard_at = time.monotonic()  # it had not all of a row until now
            try:
                self._hear(child, done)
            except _EndedError as error:
                done |= self._replace(number, error)
        return done

    def _hear(self, child: _Child, done: dict[int, Score]) -> None:
        """Put what it says into `done`, up to where it raises an `_EndedError`."""
        messages = child.read()
        for message in messages:
            index, result = message
            if not child.pending or child.pending[0][0] != index:
                raise _EndedError("failed", "its process answered for another row")
            child.pending.popleft()
            done[index] = Unscored(*result) if isinstance(result, list) else float(result)
            self._note_time(done[index])
        silence_s = time.monotonic() - child.heard_at
        if not messages and child.pending and silence_s > self._job.silence_s:
            raise _EndedError("too_costly", f"it takes more than {self._job.limit_s:g} s")

    def _note_time(self, score: Score) -> None:
        """Count rows that took too long, one after the other: each has cost its whole limit.

        Raises:
            EngineError: it were better to mend what runs.
        """
        self._ends = 0
        is_slow = isinstance(score, Unscored) and score.reason == "too_costly"
        self._slow = self._slow + 1 if is_slow else 0
        if self._slow >= MOST_ENDS * len(self._children):
            raise EngineError(
                f"reward {self._job.kind}: {self._slow} rows one after the other took more than "
                f"{self._job.limit_s:g} s each; mend what it runs, or raise its timeout_s"
            )

    def _replace(self, number: int, error: _EndedError) -> dict[int, Score]:
        """Start a process anew; the row that it was at has no score, the others are given again.

        One that ended while it was idle was at no row.


        Raises:
            EngineError: this has happened too often.
        """
        child = self._children[number]
        self._ends += 1
        child.close()
        if self._ends >= MOST_ENDS:
            raise EngineError(
                f"reward {self._job.kind}: its process ended {self._ends} times without a score in "
                f"between ({error}); mend what it runs"
            )
        done: dict[int, Score] = {}
        if child.pending and child.has_taken:
            index, _ = child.pending.popleft()
            done[index] = Unscored(error.reason, str(error))  # type: ignore[arg-type]
        new = self._children[number] = self._start()
        self._wait_until_ready(new)
        for item in child.pending:
            self._give(new, item)
        return done

    def _start(self) -> _Child:
        ours, theirs = socket.socketpair()
        with theirs:
            popen = subprocess.Popen(
                [sys.executable, "-P", "-u", "-W", "ignore", "-X", "faulthandler",
                 os.fspath(PROGRAM), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self._job.environment(),
                start_new_session=True,  # Ctrl-C is ours; it ends when its socket does
                bufsize=0,
            )  # fmt: skip
        assert popen.stdout is not None
        os.set_blocking(popen.stdout.fileno(), False)
        ours.setblocking(False)
        child = _Child(popen, ours)
        child.send(self._job.message())
        return child

    def _wait_until_ready(self, child: _Child) -> None:
        """Raise a `ConfigError` unless the process can do its job."""
        deadline = time.monotonic() + START_S
        why = f"its process was not ready after {START_S:g} s"
        try:
            while (left := deadline - time.monotonic()) > 0:
                poll = select.poll()
                child.register(poll)
                poll.poll(left * 1000)
                child.write()
                for message in child.read():
                    if message is None:
                        return
                    why = message
                    deadline = 0
        except _EndedError as error:
            why = str(error)
        place = self._job.settings.get("file") or f"reward.{self._job.kind}"
        raise ConfigError(f"reward {self._job.kind}: {place}: {' '.join(why.split())}; correct it")
