"""`spin run` killed at random times, and taken up again: the same bytes as an unbroken run."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_loop import RECIPE, hashes

ROOT = Path(__file__).parents[2]
ITERATIONS = 2


def start(folder: Path, run: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "spin_cli", "run", str(folder / "tiny.yaml")]
    command += ["--run", str(folder / run), "--iterations", str(ITERATIONS), "--quiet"]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def kill_and_resume(folder: Path, kills: int, longest_s: float, rng: random.Random) -> int:
    """Kill one run `kills` times, then let it end; return how often it was hit before its end."""
    hit = 0
    for _ in range(kills):
        process = start(folder, "broken")
        try:
            code = process.wait(rng.uniform(0.2, longest_s))
            assert code == 0, process.stderr.read().decode() if process.stderr else ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            hit += 1
        process.communicate()
    last = start(folder, "broken")
    _, messages = last.communicate(timeout=240)
    assert last.returncode == 0, messages.decode()
    return hit


def unbroken(folder: Path) -> dict[str, dict[str, str]]:
    (folder / "tiny.yaml").write_text(RECIPE)
    process = start(folder, "unbroken")
    _, messages = process.communicate(timeout=240)
    assert process.returncode == 0, messages.decode()
    return hashes(folder / "unbroken")


@pytest.mark.timeout(600)
def test_a_run_killed_again_and_again_ends_in_the_same_bytes(tmp_path: Path) -> None:
    expected = unbroken(tmp_path)
    assert kill_and_resume(tmp_path, 20, 9.0, random.Random(0)) > 5
    assert hashes(tmp_path / "broken") == expected
    assert not list((tmp_path / "broken").rglob("*.partial"))


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_200_kills_over_many_runs(tmp_path: Path) -> None:
    hit = 0
    for number in range(10):
        folder = tmp_path / str(number)
        folder.mkdir()
        expected = unbroken(folder)
        hit += kill_and_resume(folder, 20, 9.0, random.Random(number + 1))
        assert hashes(folder / "broken") == expected
    assert hit > 50
