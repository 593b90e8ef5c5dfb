"""Claims: one worker a shard, on one machine by its locks, between machines by leases."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.artifacts.claims import Attendance, Claims

ROOT = Path(__file__).parents[2]


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def lease(path: Path, machine: str, beats: int) -> None:
    path.write_text(json.dumps({"machine": machine, "host": "h", "pid": 1, "beats": beats}))


def test_a_claim_is_one_worker_s_until_it_is_given_back(tmp_path: Path) -> None:
    with Claims(tmp_path) as first, Claims(tmp_path) as second:
        assert first.take("a")
        assert not second.take("a")
        assert second.take("b")
        first.release("a")
        assert second.take("a")


def test_claims_end_with_their_block(tmp_path: Path) -> None:
    with Claims(tmp_path) as first:
        assert first.take("a")
    with Claims(tmp_path) as second:
        assert second.take("a")


def test_a_killed_worker_s_claims_are_free_at_once(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from stages.artifacts.claims import Claims\n"
        "claims = Claims(Path(sys.argv[1])); print(claims.take('a'), flush=True); time.sleep(60)"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == "True\n"
    with Claims(tmp_path) as claims:
        assert not claims.take("a")
        worker.kill()
        worker.communicate()
        assert claims.take("a")


def test_another_machine_s_lease_holds_while_it_beats(tmp_path: Path) -> None:
    """Its lock is not seen here, as on a file system that does not carry locks."""
    clock = Clock()
    with Claims(tmp_path, lease_s=60, clock=clock) as claims:
        for beats in range(10):
            lease(tmp_path / "a.claim", "elsewhere", beats)
            assert not claims.take("a")
            clock.now_s += 50


def test_another_machine_s_lease_that_stands_still_is_void(tmp_path: Path) -> None:
    clock = Clock()
    lease(tmp_path / "a.claim", "elsewhere", 7)
    with Claims(tmp_path, lease_s=60, clock=clock) as claims:
        assert not claims.take("a")
        clock.now_s = 59.9
        assert not claims.take("a")
        clock.now_s = 60.0
        assert claims.take("a")


def test_a_dead_machine_s_lock_that_nobody_frees_is_passed_over(tmp_path: Path) -> None:
    """As a file server does that was never told that the machine is gone."""
    clock = Clock()
    with Claims(tmp_path, beat_s=1000, machine="elsewhere") as dead:
        assert dead.take("a")
        with Claims(tmp_path, lease_s=60, clock=clock) as claims:
            assert not claims.take("a")
            clock.now_s = 61
            assert claims.take("a")
            with Claims(tmp_path, machine="elsewhere") as third:
                assert not third.take("a"), "it is ours now"


def test_a_holder_that_was_passed_over_notices_and_leaves_the_lease_alone(tmp_path: Path) -> None:
    clock = Clock()
    with Claims(tmp_path, beat_s=0.01, machine="hung") as hung:
        assert hung.take("a")
        assert hung.take("b")
        with Claims(tmp_path, beat_s=1000, lease_s=60, clock=clock) as claims:
            hung._ended.set()  # its machine stands still
            time.sleep(0.05)
            assert not claims.take("a")
            clock.now_s = 61
            assert claims.take("a")
            theirs = (tmp_path / "a.claim").read_bytes()
            assert not hung.still_holds("a")
            assert hung.still_holds("b")
            hung.release("a")
            assert (tmp_path / "a.claim").read_bytes() == theirs


def test_a_lease_beats_while_it_is_held_and_not_after(tmp_path: Path) -> None:
    path = tmp_path / "a.claim"
    with Claims(tmp_path, beat_s=0.01) as claims:
        assert claims.take("a")
        deadline = time.monotonic() + 20
        while json.loads(path.read_text() or '{"beats": 0}')["beats"] < 4:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        claims.release("a")
        time.sleep(0.05)
        assert path.read_text() == ""


@pytest.mark.parametrize("text", ["", "{", '{"beats": 3}', "[]", "null"])
def test_a_lease_that_says_nothing_leaves_the_decision_to_the_lock(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "a.claim").write_text(text)
    with Claims(tmp_path) as first, Claims(tmp_path) as second:
        assert first.take("a")
        (tmp_path / "a.claim").write_text(text)
        assert not second.take("a")


def test_a_folder_that_is_gone_ends_the_claiming(tmp_path: Path) -> None:
    claims = Claims(tmp_path / "gone")
    with pytest.raises(FileNotFoundError):
        claims.take("a")


def test_nobody_clears_where_another_is_at_work(tmp_path: Path) -> None:
    attendance, other = Attendance(tmp_path / "workers"), Attendance(tmp_path / "workers")
    with attendance.present() as one, other.present() as two:
        assert one
        assert two, "any number may work"
        with Attendance(tmp_path / "workers").alone() as is_alone:
            assert not is_alone
    with attendance.alone() as is_alone:
        assert is_alone
        with other.present() as admitted:
            assert not admitted, "it is being cleared"
