"""Shards: the unit in which a long stage's work survives a kill."""

import errno
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from stages.artifacts.files import fsync_path, make_folder, replace_text, temporary_path
from stages.artifacts.keys import canonical_json, sha256_file

SHARD_NOTES = ".shards"
ASIDE = f"{SHARD_NOTES}/aside"
"""Where shards lie that only serve to resume: they never become part of the artifact."""
WORKERS = f"{SHARD_NOTES}/workers"
"""The lock that workers who assist share while they are at work."""
CLAIMS = f"{SHARD_NOTES}/claims"
"""Where workers claim shards."""


@dataclass(frozen=True)
class ShardStore:
    """The finished shards of a workspace.

    Each has a note beside it with the key of its plan, a hash of the row ids it holds and of
    its bytes; a shard without a true note is work not done.
    """

    root: Path
    key: str
    named: set[str] = field(default_factory=set)
    """The shards that this attempt asked for or wrote; all others are left-overs of a cut-off
    attempt with another division into shards."""

    def done(self, relative: str, ids_hash: str) -> bool:
        """Tell whether this very shard, for these very rows, is finished."""
        self.named.add(relative)
        note = self._read_note(relative)
        return (
            note is not None and note["ids_hash"] == ids_hash and (self.root / relative).is_file()
        )

    def write(self, relative: str, ids_hash: str, write: Callable[[Path], None]) -> None:
        """Commit one shard: write aside, flush, rename, then the note.

        Raises:
            FileNotFoundError: the workspace is gone: another worker's attempt became the artifact.
        """
        self.named.add(relative)
        path = self.root / relative
        self._make_folder(path.parent)
        temporary = temporary_path(path)
        try:
            write(temporary)
            fsync_path(temporary)
            digest = sha256_file(temporary)
            temporary.rename(path)
        except BaseException:
            with suppress(OSError):  # the first error is the one to tell
                temporary.unlink()
            raise
        fsync_path(path.parent)
        note = self._note_path(relative)
        self._make_folder(note.parent)
        replace_text(
            note, canonical_json({"key": self.key, "ids_hash": ids_hash, "sha256": digest})
        )

    def discard(self, relative: str) -> None:
        """Delete a shard; its note goes first, so that a kill in between leaves no false one."""
        self._note_path(relative).unlink(missing_ok=True)
        (self.root / relative).unlink(missing_ok=True)

    def noted(self) -> set[str]:
        """Return the relative paths of shards that have a note; their bytes are not read."""
        notes = self.root / SHARD_NOTES
        # os.walk passes over folders that vanish, such as other workers' scratch.
        names = {
            (Path(folder, name).relative_to(notes)).as_posix().removesuffix(".json")
            for folder, _, files in os.walk(notes)
            for name in files
            if name.endswith(".json")
        }
        return {n for n in names if self._read_note(n) is not None and (self.root / n).is_file()}

    def digest(self, relative: str) -> str:
        """Return the SHA-256 that a finished shard had when it was written."""
        note = self._read_note(relative)
        assert note is not None, f"{relative} is finished"
        return note["sha256"]

    def valid(self) -> set[str]:
        """Return the relative paths of shards whose bytes match their note."""
        return {name for name in self.noted() if self._matches_note(name)}

    def with_notes(self, names: set[str]) -> set[str]:
        """Return the relative paths of these shards and of their notes."""
        return names | {self._note_path(n).relative_to(self.root).as_posix() for n in names}

    def _make_folder(self, folder: Path) -> None:
        if not self.root.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.root))
        make_folder(folder)

    def _matches_note(self, relative: str) -> bool:
        note = self._read_note(relative)
        return note is not None and sha256_file(self.root / relative) == note["sha256"]

    def _note_path(self, relative: str) -> Path:
        return self.root / SHARD_NOTES / f"{relative}.json"

    def _read_note(self, relative: str) -> dict[str, str] | None:
        """Return the note of a shard of this plan, or None."""
        try:
            note = json.loads(self._note_path(relative).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        complete = isinstance(note, dict) and {"key", "ids_hash", "sha256"} <= note.keys()
        return note if complete and note["key"] == self.key else None
