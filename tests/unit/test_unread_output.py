"""Commands whose output nobody reads on, or has no place to go."""

import subprocess
import sys
from pathlib import Path

import pytest

from spin_cli.failures import UNREAD

ROOT = Path(__file__).parents[2]


def ran(script: str) -> subprocess.CompletedProcess[str]:
    """A line of bash, in which `spin` is ours; it ends with the code of the first in its pipe."""
    lines = f'spin() {{ "{sys.executable}" -m spin_cli "$@"; }}; {script}; exit ${{PIPESTATUS[0]}}'
    return subprocess.run(
        ["bash", "-c", lines], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "words", ["config show demo", "run --help", "2>&1", "show nowhere 2>&1", "version"]
)
def test_a_command_that_nobody_reads_on_ends_quietly_with_its_own_code(words: str) -> None:
    done = ran(f"spin {words} | true")
    assert (done.returncode, done.stderr) == (UNREAD, "")


def test_what_is_read_to_its_end_has_the_usual_code() -> None:
    assert ran("spin config show demo | cat > /dev/null").returncode == 0
    assert ran("spin show nowhere 2>&1 | cat > /dev/null").returncode == 3


def test_a_pipe_of_our_own_that_breaks_is_told() -> None:
    script = (
        "import os; from spin_cli.failures import reported\n"
        "ours, theirs = os.pipe(); os.close(ours)\n"
        "with reported(): os.write(theirs, b'.')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "spin: a bug: BrokenPipeError" in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_output_that_is_closed_is_no_bug(closed: str) -> None:
    done = ran(f"spin config show demo {closed}")
    assert (done.returncode, done.stderr) == (0, "")
