"""Fills the small file system argv[1] while an artifact is made there; see test_disk_full.py.

argv[2] is what meets the end of the room: parquet, text, safetensors, or the manifest.
"""

import os
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from stages.artifacts import Outcome, Workspace, produce
from stages.errors import NoSpaceError
from tests.artifact_tools import fill_shards, hashes, make, plan, write_table

BIG = 400_000  # bytes, more than what is left of the room


def fill_room(folder: Path, leave: int) -> Path:
    """Write a file that leaves `leave` bytes of room, or none when that is 0."""
    ballast = folder / "ballast"
    room = os.statvfs(folder)
    ballast.write_bytes(bytes(max(0, room.f_bavail * room.f_frsize - leave)))
    return ballast


def write_big(kind: str, path: Path) -> None:
    if kind == "parquet":
        write_table(path, num_rows=BIG // 10)
    elif kind == "safetensors":
        save_file({"w": np.random.default_rng(0).normal(size=BIG // 8)}, path)
    else:
        path.write_bytes(os.urandom(0) + bytes(range(256)) * (BIG // 256))


def main() -> None:
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    make(folder / "earlier")
    before = hashes(folder / "earlier")
    begun: list[int] = []
    ballast: list[Path] = []
    settings = plan(config={"kind": kind})

    def fill(workspace: Workspace) -> Outcome:
        outcome = fill_shards(begun=begun.append)(workspace)
        if not ballast:
            ballast.append(fill_room(folder, 0 if kind == "manifest" else BIG // 4))
        if kind != "manifest":
            write_big(kind, workspace.file("big"))
        return outcome

    try:
        produce(folder / "out", settings, fill, resumable=True)
    except NoSpaceError as error:
        assert error.exit_code == 7
        assert str(error).startswith(f"{folder / 'out'}"), error
        assert "no room to write (" in str(error), error
        assert "then run the same command again: what was finished is kept" in str(error), error
    else:
        raise AssertionError("there was room")
    assert not (folder / "out").exists()
    assert hashes(folder / "earlier") == before
    make(folder / "earlier")  # found, though there is no room
    (partial,) = folder.glob(".out.*.partial")
    assert not (partial / "big").exists(), "what cannot be kept gives its room back"
    ballast[0].unlink()
    produce(folder / "out", settings, fill, resumable=True)
    assert begun == [0, 1, 2], f"finished shards are kept, but these were begun: {begun}"
    produce(folder / "unbroken", settings, fill, resumable=True)
    assert hashes(folder / "out") == hashes(folder / "unbroken")


if __name__ == "__main__":
    main()
