"""Kernel locks: one owner, named to the others, gone with its process."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from stages.artifacts.locks import hold, lock_path
from stages.errors import BusyError, ConfigError

ROOT = Path(__file__).parents[2]


def owner(lock: Path, body: str = "sys.stdin.read()") -> subprocess.Popen[str]:
    """Start a process that holds `lock` while `body` runs; it has the lock when this returns."""
    script = f"""
        import os, sys, time
        from pathlib import Path
        from stages.artifacts.locks import hold
        with hold(Path(sys.argv[1]), "it"):
            print("held", flush=True)
            {body}
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(lock)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_lock_of_a_place_is_its_hidden_sibling() -> None:
    assert lock_path(Path("run/data")) == Path("run/.data.lock")


def test_a_second_holder_is_told_who_the_first_is(tmp_path: Path) -> None:
    process = owner(tmp_path / "lock")
    with pytest.raises(BusyError) as busy, hold(tmp_path / "lock", "runs/demo"):
        raise AssertionError("two owners")
    process.communicate("")
    told = str(busy.value)
    assert told.startswith(f"runs/demo is in use by process {process.pid} on {os.uname().nodename}")
    assert str(tmp_path / "lock") in told  # the command line of the holder
    assert told.endswith("; wait for it to end, or stop it")
    assert busy.value.exit_code == 75


def test_a_lock_is_free_after_its_block_and_after_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError), hold(tmp_path / "lock", "it"):
            raise RuntimeError
    with hold(tmp_path / "lock", "it"):
        pass
    assert (tmp_path / "lock").read_text() == ""  # no note of one who has gone


def test_one_process_cannot_hold_a_lock_twice(tmp_path: Path) -> None:
    with hold(tmp_path / "lock", "it"):
        with pytest.raises(BusyError, match=f"process {os.getpid()} "), hold(tmp_path / "lock", ""):
            raise AssertionError("two owners")
        note = json.loads((tmp_path / "lock").read_text())
        assert note["pid"] == os.getpid()


def test_a_killed_owner_leaves_nothing_stale(tmp_path: Path) -> None:
    process = owner(tmp_path / "lock")
    process.kill()
    process.wait()
    with hold(tmp_path / "lock", "it"):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_forked_worker_does_not_keep_the_lock_of_a_killed_owner(tmp_path: Path) -> None:
    body = "child = os.fork()\n            " + (
        "time.sleep(60) if child else (print(os.getpid(), flush=True), time.sleep(60))"
    )
    process = owner(tmp_path / "lock", body)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    try:
        with pytest.raises(BusyError), hold(tmp_path / "lock", "it"):
            raise AssertionError("a child's start must not unlock")
        process.kill()
        process.wait()
        os.kill(worker, 0)  # it lives
        with hold(tmp_path / "lock", "it"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        process.stdout.close()


def test_a_forked_worker_that_ends_does_not_free_the_lock(tmp_path: Path) -> None:
    body = "child = os.fork()\n            (os.waitpid(child, 0), print('gone', flush=True), " + (
        "sys.stdin.read()) if child else None"
    )
    process = owner(tmp_path / "lock", body)
    assert process.stdout is not None
    assert process.stdout.readline() == "gone\n"
    with pytest.raises(BusyError), hold(tmp_path / "lock", "it"):
        raise AssertionError("a child's end must not unlock")
    process.communicate("")


def test_an_owner_without_a_note_is_another_process(tmp_path: Path) -> None:
    with hold(tmp_path / "lock", "it"):
        (tmp_path / "lock").write_text("")
        with (
            pytest.raises(BusyError, match="in use by another process"),
            hold(tmp_path / "lock", "it"),
        ):
            raise AssertionError("two owners")


def test_a_lock_that_cannot_be_made_is_an_error_of_the_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match="a file stands where a folder is needed"),
        hold(tmp_path / "file" / "lock", "it"),
    ):
        raise AssertionError("no lock")
