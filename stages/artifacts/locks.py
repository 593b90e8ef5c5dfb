"""Kernel locks: one owner a place, none left behind by a killed process.

A lock is `flock` on a file that is never deleted: the kernel drops it with its last holder,
however that one ends, so nothing can go stale and no process id has to be guessed at.
"""

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stages.artifacts.files import make_folder, writing
from stages.errors import BusyError, ConfigError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
_PATIENCE_S = 0.2

# Descriptors of the locks held here. A forked worker inherits them and, outliving a killed owner,
# would keep its locks: so each child closes them first thing, which does not unlock the parent's.
_held: set[int] = set()


def _let_go_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


def lock_path(place: Path) -> Path:
    """Return the lock file that guards `place`: its hidden sibling."""
    return place.parent / f".{place.name}.lock"


@contextmanager
def hold(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; never waits for another holder.

    Raises:
        BusyError: another process holds it; the message names host, process and command.
        ConfigError: the lock file cannot be made, or its file system has no locks.
    """
    with writing(path):
        make_folder(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    _held.add(descriptor)
    try:
        _lock(descriptor, path, what)
        _write_note(descriptor, _this_process())
        try:
            yield
        finally:
            if descriptor in _held:
                _write_note(descriptor, b"")  # or the next owner would first bear this one's name
    finally:
        if descriptor in _held:  # not in a forked child, which has let go of it
            _held.discard(descriptor)
            os.close(descriptor)


def _lock(descriptor: int, path: Path, what: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BusyError(
            f"{what} is in use by {_holder(path)}; wait for it to end, or stop it"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise ConfigError(
            f"{path.parent} is on a file system without locks ({error.strerror}); "
            "put the run on another"
        ) from error


def _this_process() -> bytes:
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "command": shlex.join(sys.argv)}
    return json.dumps(holder).encode()


def _write_note(descriptor: int, note: bytes) -> None:
    with suppress(OSError):  # a courtesy to others, which a full disk must not turn into a failure
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, note, 0)


def _holder(path: Path) -> str:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            holder = json.loads(path.read_text(encoding="utf-8"))
            return f"process {holder['pid']} on {holder['host']} ({holder['command']})"
        except (OSError, ValueError, KeyError, TypeError):  # the winner is writing its note
            if time.monotonic() > deadline:
                return "another process"
            time.sleep(0.01)
