"""kill -9 at every system call of a commit, and what a rerun makes of it."""

import random
import re
from pathlib import Path

import pytest

from stages.artifacts import read_manifest
from stages.errors import InputError
from tests.artifact_tools import NUM_SHARDS, hashes, make, plan
from tests.faults.strace_tools import (
    Point,
    commit_points,
    needs_strace,
    run_failing,
    run_killed,
    spread,
    traced_calls,
)

SCRIPT = "script_produce.py"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Point], dict[str, str]]:
    """The commit calls of an unbroken run, and the hashes of what it made."""
    needs_strace()
    folder = tmp_path_factory.mktemp("unbroken")
    points = commit_points(folder / "strace.log", SCRIPT, folder / "out", folder / "begun")
    assert (folder / "begun").read_text() == "0\n1\n2\n"
    return points, hashes(folder / "out")


def test_bytes_are_flushed_before_a_name_and_names_before_the_artifact(tmp_path: Path) -> None:
    """What a power cut must not undo, and a kill cannot show."""
    needs_strace()
    place = tmp_path / "new" / "folders" / "out"
    stem = f".out.{plan().attempt_key[:16]}"
    partial, closed = (place.parent / f"{stem}{name}.partial" for name in ("", ".closed"))
    calls = traced_calls(tmp_path / "log", SCRIPT, place, tmp_path / "begun")
    flushed: list[str] = []
    manifest_at = 0
    for call, text in calls:
        if call == "fsync":
            flushed.append(text.partition("<")[2].removesuffix(">"))
        elif call.startswith("rename"):
            old, new = re.findall(r'"([^"]*)"', text)
            if new == str(place):
                break
            if old in (str(partial), str(closed / ".shards")):
                continue  # shuts other workers out; whatever a power cut makes of it is mended
            assert flushed[-1] == old, f"{old} is renamed before its bytes are on the disk"
            if new == str(closed / "manifest.json"):
                manifest_at = len(flushed)
    before_manifest, after = flushed[:manifest_at], flushed[manifest_at:]
    for name in hashes(place):
        assert str(closed / name) in before_manifest, f"{name} is not flushed"
    assert str(closed / "notes") in before_manifest, "an inner folder is not flushed"
    # The manifest's own entry, and once more when the notes of the shards are gone.
    assert after == [str(closed), str(closed)]
    assert [text for call, text in calls if call == "fsync"][-1].endswith(f"<{place.parent}>")
    for folder in (tmp_path, tmp_path / "new"):
        assert str(folder) in before_manifest, f"the entry of a new folder in {folder} is not"


def check_rerun(folder: Path, expected: dict[str, str], kills: int = 1) -> None:
    """What was cut off is no artifact or a whole one; a rerun ends as an unbroken run does."""
    out, log = folder / "out", folder / "begun"
    try:
        read_manifest(out)
        assert hashes(out) == expected
    except InputError:
        assert not out.exists()
    begun = log.read_text().split() if log.exists() else []
    make(out, begun=lambda shard: begun.append(str(shard)))
    assert hashes(out) == expected
    assert sorted(p.name for p in folder.iterdir() if p != log) == [".out.lock", "out"]
    assert set(begun) == {"0", "1", "2"}
    assert len(begun) <= NUM_SHARDS + kills, "at most one shard is redone for a kill"


def check_kill(folder: Path, point: Point, expected: dict[str, str]) -> None:
    folder.mkdir()
    done = run_killed(point, SCRIPT, folder / "out", folder / "begun")
    assert done.returncode == -9, f"{point}: {done.returncode} {done.stderr}"
    check_rerun(folder, expected)


def test_kill_at_commit_calls_then_rerun_equals_unbroken(unbroken, tmp_path: Path) -> None:
    points, expected = unbroken
    renames = [p for p in points if p.call.startswith("rename")]
    assert len(renames) >= 2 * NUM_SHARDS + 2  # shards and their notes, the manifest, the artifact
    others = [p for p in points if p not in renames]
    chosen = [*renames[-2:], renames[1], *spread(others, 5)]
    for index, point in enumerate(chosen):
        check_kill(tmp_path / str(index), point, expected)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_kill_at_every_commit_call_then_rerun_equals_unbroken(unbroken, tmp_path: Path) -> None:
    points, expected = unbroken
    for index, point in enumerate(points):
        check_kill(tmp_path / str(index), point, expected)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_kill_while_recovering(unbroken, tmp_path: Path) -> None:
    points, expected = unbroken
    rng = random.Random(0)
    for index in range(50):
        folder = tmp_path / str(index)
        folder.mkdir()
        for point in rng.sample(points, 2):
            run_killed(point, SCRIPT, folder / "out", folder / "begun")
        check_rerun(folder, expected, kills=2)


def check_failing_fsync(folder: Path, point: Point, expected: dict[str, str]) -> None:
    folder.mkdir()
    done = run_failing(point, "EIO", SCRIPT, folder / "out", folder / "begun")
    assert done.returncode == 1, f"{point}: {done.returncode} {done.stderr}"
    assert "the disk failed (Input/output error" in done.stderr
    assert "Traceback" not in done.stderr
    check_rerun(folder, expected)


def fsyncs(points: list[Point]) -> list[Point]:
    return [p for p in points if p.call == "fsync"]


def test_a_disk_that_fails_to_flush_is_told_and_a_rerun_mends_it(unbroken, tmp_path: Path) -> None:
    points, expected = unbroken
    for index, point in enumerate(spread(fsyncs(points), 2)):
        check_failing_fsync(tmp_path / str(index), point, expected)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_disk_that_fails_at_any_flush(unbroken, tmp_path: Path) -> None:
    points, expected = unbroken
    for index, point in enumerate(fsyncs(points)):
        check_failing_fsync(tmp_path / str(index), point, expected)
