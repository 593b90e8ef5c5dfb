"""Claims: which of several workers, perhaps on several machines, works on which shard.

A claim is a kernel lock on a file, and a lease written into that file: a number that its holder
raises every few seconds while it lives. Between the processes of one machine the lock alone
decides. A file server may go on holding the locks of a machine that died; there the lease decides:
one that has stood still for `LEASE_S`, by the watcher's own monotonic clock, is void. No file's
time is looked at, and no two machines' clocks are compared.

A holder that was passed over, such as one that hung, notices when its lease is next due and drops
the shard. Should it write it before, the later file replaces the earlier one whole, as long as the
workspace is open; see `produce`.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from stages.artifacts import locks

BEAT_S = 5.0
LEASE_S = 60.0
LEASE_BYTES = 512
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def machine_id() -> str:
    """Return what tells one running kernel, whose locks its processes share, from another."""
    with suppress(OSError):
        return _BOOT_ID.read_text().strip()
    return socket.gethostname()


@dataclass
class _Held:
    descriptor: int
    token: str
    beats: int = 0
    lost: bool = False


@dataclass(frozen=True)
class _Seen:
    lease: bytes
    since_s: float


class Claims:
    """The claims of one worker, in a folder that all workers see.

    The folder is not made here: where it is gone, so is what there was to claim.
    """

    def __init__(
        self,
        folder: Path,
        *,
        beat_s: float = BEAT_S,
        lease_s: float = LEASE_S,
        machine: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Claim nothing yet.

        Args:
            machine: as `machine_id`, which it is by default.
            clock: seconds, of this machine alone.
        """
        self._folder = folder
        self._beat_s, self._lease_s = beat_s, lease_s
        self._machine = machine or machine_id()
        self._clock = clock
        self._held = dict[str, _Held]()
        self._seen = dict[str, _Seen]()
        self._guard = threading.Lock()
        self._ended = threading.Event()
        self._beater: threading.Thread | None = None

    def take(self, name: str) -> bool:
        """Claim `name`, unless another worker that lives has it.

        Raises:
            FileNotFoundError: the folder is gone.
        """
        path = self._path(name)
        descriptor = locks.open_lock(path)
        try:
            taken = self._may_take(name, descriptor, path)
        except BaseException:
            locks.close_lock(descriptor)
            raise
        if not taken:
            locks.close_lock(descriptor)
            return False
        self._seen.pop(name, None)
        with self._guard:
            # Not the process's number: a container that starts again may have the same.
            self._held[name] = _Held(descriptor, secrets.token_hex(8))
            self._beat(self._held[name])
        if self._beater is None:
            self._beater = threading.Thread(target=self._keep_beating, daemon=True)
            self._beater.start()
        return True

    def release(self, name: str) -> None:
        """Give a claim back, for others to take at once."""
        with self._guard:
            held = self._held.pop(name)
            if not held.lost:
                locks.write_note(held.descriptor, b"")
            locks.close_lock(held.descriptor)

    def still_holds(self, name: str) -> bool:
        """Tell whether a claim that was taken has not been passed over since, as far as is seen."""
        with self._guard:
            held = self._held[name]
            self._check(held)
            return not held.lost

    def holder(self, name: str) -> str:
        """Return who has a claim, in words."""
        try:
            lease = json.loads(self._path(name).read_bytes())
            return f"process {lease['pid']} on {lease['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.claim"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        for name in list(self._held):
            self.release(name)

    def _may_take(self, name: str, descriptor: int, path: Path) -> bool:
        locked = locks.try_lock(descriptor, path)
        lease = os.pread(descriptor, LEASE_BYTES, 0)
        machine = _machine_of(lease)
        if machine is None or machine == self._machine:
            return locked  # never held, given back, or its holder's lock has ended with it
        return self._stands_still(name, lease)

    def _stands_still(self, name: str, lease: bytes) -> bool:
        seen, now_s = self._seen.get(name), self._clock()
        if seen is None or seen.lease != lease:
            self._seen[name] = _Seen(lease, now_s)
            return False
        return now_s - seen.since_s >= self._lease_s

    def _keep_beating(self) -> None:
        while not self._ended.wait(self._beat_s):
            with self._guard:
                for held in self._held.values():
                    self._check(held)
                    if not held.lost:
                        self._beat(held)

    def _check(self, held: _Held) -> None:
        """Note where another machine has taken what we hold."""
        with suppress(OSError):
            lease = os.pread(held.descriptor, LEASE_BYTES, 0)
            held.lost = held.lost or _machine_of(lease) not in (None, self._machine)

    def _beat(self, held: _Held) -> None:
        held.beats += 1
        lease: dict[str, Any] = {
            "machine": self._machine,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "token": held.token,
            "beats": held.beats,
        }
        # Of one length, so that a reader never meets the end of an older one.
        locks.write_note(held.descriptor, json.dumps(lease).encode().ljust(LEASE_BYTES))
        with suppress(OSError):
            os.fdatasync(held.descriptor)  # or a file server may hear of it after half a minute


def _machine_of(lease: bytes) -> str | None:
    """Return the machine that holds a lease; None for one that was given back, or half written."""
    try:
        machine = json.loads(lease)["machine"]
    except (ValueError, KeyError, TypeError):
        return None
    return machine if isinstance(machine, str) else None


class Attendance:
    """Tells who else is at work in a folder, so that nobody clears it under another's hands."""

    def __init__(self, path: Path) -> None:
        """Use the lock file `path`, whose folder exists."""
        self._path = path

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Tell whether nobody is at work there; if so nobody can begin while the block runs."""
        with self._lock(shared=False) as is_alone:
            yield is_alone

    @contextmanager
    def present(self) -> Iterator[bool]:
        """Be at work there while the block runs; False where it is being cleared just now."""
        with self._lock(shared=True) as admitted:
            yield admitted

    @contextmanager
    def _lock(self, *, shared: bool) -> Iterator[bool]:
        descriptor = locks.open_lock(self._path)
        try:
            yield locks.try_lock(descriptor, self._path, shared=shared)
        finally:
            locks.close_lock(descriptor)
