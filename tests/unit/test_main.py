"""How the process of a command ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import atexit, sys
from spin_cli.__main__ import main
import stages.model.group
class Late:
    def __del__(self):
        print("taken apart", flush=True)
keep = Late()
atexit.register(print, "told at exit", flush=True)
sys.argv = ["spin", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize(("words", "code"), [(["version"], 0), (["status", "nowhere"], 3)])
@pytest.mark.parametrize("processes", [1, 2])
def test_one_process_of_several_ends_without_taking_the_interpreter_apart(
    words: list[str], code: int, processes: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words],
        cwd=Path(__file__).parents[2], env=os.environ | {"WORLD_SIZE": str(processes)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert ("taken apart" in done.stdout) == (processes == 1)
    assert "told at exit" in done.stdout
    if words == ["version"]:
        assert "spin" in done.stdout
    else:
        assert "nowhere" in done.stderr
