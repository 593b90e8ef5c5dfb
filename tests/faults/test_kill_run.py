"""`spin run` killed at random times, and taken up again: the same bytes as an unbroken run."""

import os
import random
import signal
import subprocess
import sys
import time
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


def kill_and_resume(folder: Path, kills: int, seed: int) -> None:
    """Kill runs at random times until `kills` of them were hit; each ends in the expected bytes."""
    (folder / "tiny.yaml").write_text(RECIPE)
    started = time.monotonic()
    finish(folder, "unbroken")
    longest_s = time.monotonic() - started
    expected = hashes(folder / "unbroken")
    rng, hit, run = random.Random(seed), 0, 0
    while hit < kills:
        process = start(folder, f"broken-{run}")
        try:
            process.communicate(timeout=rng.uniform(0.2, longest_s))
            assert process.returncode == 0
            assert hashes(folder / f"broken-{run}") == expected
            run += 1
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            hit += 1
    finish(folder, f"broken-{run}")
    assert hashes(folder / f"broken-{run}") == expected
    assert not list(folder.rglob("*.partial"))


def finish(folder: Path, run: str) -> None:
    """Let a run end."""
    process = start(folder, run)
    _, messages = process.communicate(timeout=240)
    assert process.returncode == 0, messages.decode()


@pytest.mark.timeout(900)
def test_six_kills_at_random_times_change_no_byte(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, 6, seed=0)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_200_kills_at_random_times_change_no_byte(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, 200, seed=1)
