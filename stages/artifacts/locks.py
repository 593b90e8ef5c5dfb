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
from typing import Any

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
def hold(path: Path, what: str, purpose: str = "") -> Iterator[None]:
    """Hold the lock file `path` while the block runs; never waits for another holder.

    Args:
        what: what the lock guards, for the message.
        purpose: told to others by `purpose_of_holder`.

    Raises:
        BusyError: another process holds it; the message names host, process and command.
        ConfigError: the lock file cannot be made, or its file system has no locks.
    """
    with writing(path):
        make_folder(path.parent)
        descriptor = open_lock(path)
    try:
        if not try_lock(descriptor, path):
            raise BusyError(f"{what} is in use by {holder(path)}; wait for it to end, or stop it")
        write_note(descriptor, _this_process(purpose))
        try:
            yield
        finally:
            if descriptor in _held:
                write_note(descriptor, b"")  # or the next owner would first bear this one's name
    finally:
        close_lock(descriptor)


def open_lock(path: Path) -> int:
    """Return a descriptor of a lock file, made where there is none; forked children close it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    _held.add(descriptor)
    return descriptor


def close_lock(descriptor: int) -> None:
    """Let go of a lock; nothing in a forked child, which has done so."""
    if descriptor in _held:
        _held.discard(descriptor)
        os.close(descriptor)


def try_lock(descriptor: int, path: Path, *, shared: bool = False) -> bool:
    """Lock an open lock file, unless somebody else's lock stands against it.

    Args:
        path: of the file, for the message.
        shared: let others hold it too, who ask for the same.

    Raises:
        ConfigError: its file system has no locks.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise ConfigError(
            f"{path.parent} is on a file system without locks ({error.strerror}); "
            "put the run on another"
        ) from error
    return True


def write_note(descriptor: int, note: bytes) -> None:
    """Replace what an open lock file says of its holder."""
    with suppress(OSError):  # a courtesy to others, which a full disk must not turn into a failure
        os.pwrite(descriptor, note, 0)
        os.ftruncate(descriptor, len(note))


def holder(path: Path) -> str:
    """Return who holds a lock, in words."""
    note = _read_note(path)
    if not {"pid", "host", "command"} <= note.keys():
        return "another process"
    return f"process {note['pid']} on {note['host']} ({note['command']})"


def purpose_of_holder(path: Path) -> str | None:
    """Return the purpose that the holder of a lock gave, None where it is not known."""
    return _read_note(path).get("purpose")


def _this_process(purpose: str) -> bytes:
    note = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "command": shlex.join(sys.argv),
        "purpose": purpose,
    }
    return json.dumps(note).encode()


def _read_note(path: Path) -> dict[str, Any]:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            note = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(note, dict):
                return note
        except (OSError, ValueError):  # the winner is writing its note
            pass
        if time.monotonic() > deadline:
            return {}
        time.sleep(0.01)
