"""Two and eight starters on one artifact: one owner, the others told within a second."""

from pathlib import Path

import pytest

from tests.faults.strace_tools import run_script

SCRIPT = "script_contest.py"


@pytest.mark.parametrize(("starters", "rounds"), [(2, 20), (8, 8)])
def test_one_owner_and_a_killed_one_leaves_nothing_stale(
    tmp_path: Path, starters: int, rounds: int
) -> None:
    done = run_script(SCRIPT, tmp_path, starters, rounds)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("starters", [2, 8])
def test_one_owner_200_times(tmp_path: Path, starters: int) -> None:
    done = run_script(SCRIPT, tmp_path, starters, 200)
    assert done.returncode == 0, done.stderr
