"""The pointer: one small file that says which artifact is the chosen one, and how it came so.

It lies at the top of a run and names artifacts by paths relative to that folder. It is replaced
by one rename, so a reader sees the old target or the new one and never waits.
"""

import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from stages.artifacts import locks
from stages.artifacts.files import inner_path, write_durably
from stages.artifacts.keys import KEY_CHARS, open_sealed, sealed_text
from stages.artifacts.manifest import MANIFEST_NAME, open_artifact
from stages.artifacts.produce import RUN_MARK
from stages.errors import ConfigError, CorruptError, InputError

POINTER_NAME = "champion"
"""Of the one pointer of a run, beside its record."""
POINTER_FORMAT = 1
_HASH_NAME = "sha256"


class PointerEntry(BaseModel):
    """One move of the pointer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    """Of the artifact, relative to the pointer's folder."""
    key: str
    """The artifact's key."""
    reason: str
    """Why, in words for people."""
    decision_key: str | None
    """The key of the decision that asked for the move. Each moves the pointer once, and again only
    where people ask for it after a roll-back, see `move_again`. None marks a roll-back."""
    at: str | None = None
    """When, as ISO 8601; for people: nothing is decided by it."""


class Pointer(BaseModel):
    """Where the pointer points, and all its moves, the oldest first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    path: str
    key: str
    history: list[PointerEntry]

    def trail(self) -> list[PointerEntry]:
        """Return the targets that lead to the present one: roll-backs undone, no two in a row.

        A move that was rolled back and made again stands where it was made again.
        """
        trail: list[PointerEntry] = []
        for entry in self.history:
            if entry.decision_key is None:
                del trail[-1:]
            elif not trail or (trail[-1].path, trail[-1].key) != (entry.path, entry.key):
                trail.append(entry)
        return trail

    def to_text(self) -> str:
        """Return the canonical text that is stored, its own hash included."""
        return sealed_text(self.model_dump(mode="json"), _HASH_NAME)


def read_pointer(path: Path) -> Pointer | None:
    """Return the pointer in the file `path`, or None when there is no such file.

    Raises:
        CorruptError: it is not the text that was written, or names a place outside its folder.
        InputError: another version of spin wrote it, or it cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); mend its permissions, or move it away"
        ) from None
    remedy = f"delete {path} and run the promotions of this run again"
    pointer = parse_pointer(data, path, remedy)
    inner_path(path.parent, pointer.path, named_by=path.name)
    return pointer


def pointed_to(path: Path) -> Path:
    """Return the artifact that the file RUN/champion points to.

    Raises:
        InputError: it is another file.
        CorruptError: the pointer is damaged.
    """
    pointer = None
    if path.name == POINTER_NAME and (path.parent / RUN_MARK).is_file():
        pointer = read_pointer(path)
    if pointer is None:
        raise InputError(
            f"{path} is a file, and no artifact and no champion pointer (RUN/{POINTER_NAME}); "
            "name a folder"
        )
    return path.parent / pointer.path


def parse_pointer(data: bytes, path: object, remedy: str) -> Pointer:
    """Return the pointer that was written as `data`; the place it names is not checked.

    Args:
        path: where it was read, for the message.
        remedy: what to do if it is damaged.

    Raises:
        CorruptError, InputError: see `read_pointer`.
    """
    try:
        body: dict[str, Any] = open_sealed(data, _HASH_NAME)
    except ValueError:
        raise CorruptError(f"{path} is damaged (its hash does not match); {remedy}") from None
    if body.get("format") != POINTER_FORMAT:
        raise InputError(
            f"{path} has pointer format {body.get('format')}, this spin reads {POINTER_FORMAT}; "
            "use the version of spin that wrote it"
        )
    try:
        pointer = Pointer.model_validate(body)
    except ValidationError:
        raise CorruptError(f"{path} is damaged (fields are missing); {remedy}") from None
    last = pointer.history[-1] if pointer.history else None
    if last is None or (last.path, last.key) != (pointer.path, pointer.key):
        raise CorruptError(f"{path} is damaged (it is not where its history ends); {remedy}")
    return pointer


def move_pointer(path: Path, target: PointerEntry) -> bool:
    """Point the file `path` at `target`, unless the same decision has moved it before.

    So a promotion that is run again changes nothing, not even after a later one or a roll-back.

    Returns:
        True when the pointer moved, False when `target.decision_key` is in its history.

    Raises:
        BusyError: another process is moving it.
        CorruptError: the pointer is damaged, or `target.path` leaves its folder.
    """
    assert target.decision_key is not None, "a move needs the key of its decision"
    with locks.hold(locks.lock_path(path), str(path)):
        inner_path(path.parent, target.path, named_by=path.name)
        pointer = read_pointer(path)
        history = pointer.history if pointer else []
        if any(entry.decision_key == target.decision_key for entry in history):
            return False
        _write(path, [*history, target])
    return True


def move_again(path: Path, decision_key: str) -> Pointer:
    """Point the file `path` again at what a decision moved it to, after a roll-back from there.

    The next roll-back goes to where the pointer is now.

    Raises:
        ConfigError: the decision never moved the pointer, or nobody rolled back from its target.
        InputError: its target is gone.
        CorruptError: its target or the pointer is damaged.
        BusyError: another process is moving the pointer.
    """
    with locks.hold(locks.lock_path(path), str(path)):
        pointer = read_pointer(path)
        history = pointer.history if pointer else []
        first = next((entry for entry in history if entry.decision_key == decision_key), None)
        if pointer is None or first is None:
            raise ConfigError(
                f"{path} was never moved by this decision, so nothing was rolled back; "
                "leave --again out"
            )
        target = (first.path, first.key)
        if (pointer.path, pointer.key) == target:
            raise ConfigError(f"{path} points to {first.path} already; there is nothing to do")
        if target in [(entry.path, entry.key) for entry in pointer.trail()]:
            raise ConfigError(
                f"{path} went on from {first.path} to {pointer.path}, and was never rolled back "
                "from it; to go back to the champion before, use --rollback"
            )
        _check_target(path, first)
        return _move_by_hand(path, pointer, first, f"promoted again: {first.reason}", decision_key)


def put_pointer(path: Path, pointer: Pointer) -> None:
    """Write a pointer that came from another copy of the run, in the place of what is there.

    The caller has compared the two.

    Raises:
        BusyError: another process is moving it.
        CorruptError: it names a place outside its folder.
    """
    with locks.hold(locks.lock_path(path), str(path)):
        inner_path(path.parent, pointer.path, named_by=path.name)
        write_durably(path, pointer.to_text())


def roll_back(path: Path) -> Pointer:
    """Point back to the target before the present one, which the history keeps.

    Like undo: a second roll-back goes one target further back.

    Raises:
        InputError: there is no earlier target, or its artifact is gone.
        BusyError: another process is moving the pointer.
        CorruptError: the pointer is damaged, or that artifact is, or it was made anew.
    """
    with locks.hold(locks.lock_path(path), str(path)):
        pointer = read_pointer(path)
        if pointer is None:
            raise InputError(f"{path} does not exist, so nothing was promoted; nothing to undo")
        trail = pointer.trail()
        if len(trail) < 2:
            raise InputError(
                f"{path} points to {pointer.path}, and no other was promoted before it; "
                f"to start over without a champion, delete {path}"
            )
        previous = trail[-2]
        _check_target(path, previous)
        return _move_by_hand(path, pointer, previous, f"rolled back from {pointer.path}", None)


def _move_by_hand(
    path: Path, pointer: Pointer, target: PointerEntry, reason: str, decision_key: str | None
) -> Pointer:
    """Move the pointer to where it was before; the caller holds its lock."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    entry = target.model_copy(update={"reason": reason, "decision_key": decision_key, "at": now})
    return _write(path, [*pointer.history, entry])


def _check_target(path: Path, target: PointerEntry) -> None:
    """Check that what the pointer shall go back to is whole, and the one that was promoted.

    Names and sizes of its files are checked, not their hashes: who loads it does that.

    Raises:
        InputError: it is gone.
        CorruptError: it is damaged, or was made anew.
    """
    place = inner_path(path.parent, target.path, named_by=path.name)
    where = f"{path} cannot go back to {target.path}"
    if not place.exists():
        raise InputError(
            f"{where}, which does not exist any more; make it again with `spin run`, or promote "
            "another"
        )
    if not (place / MANIFEST_NAME).exists():
        raise CorruptError(
            f"{where}: it has no {MANIFEST_NAME}; delete {place} and run its stage again"
        )
    try:
        key = open_artifact(place).manifest.key
    except CorruptError as error:
        raise CorruptError(f"{where}: {error}") from None
    if key != target.key:
        raise CorruptError(
            f"{where}: {target.key[:KEY_CHARS]} was promoted, {key[:KEY_CHARS]} is there now; "
            "evaluate that one and promote it, or make the old one again in its place"
        )


def _write(path: Path, history: list[PointerEntry]) -> Pointer:
    last = history[-1]
    pointer = Pointer(format=POINTER_FORMAT, path=last.path, key=last.key, history=history)
    write_durably(path, pointer.to_text())
    return pointer
