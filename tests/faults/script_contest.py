"""argv[3] rounds of argv[2] processes that start on the same artifact below argv[1] at once.

In each round one must get to work and the others must end with exit code 75 within a second.
Then the owner is killed (in even rounds) or let go on; a newcomer must get to work at once after
a kill, and find the work done otherwise. Exits 0 when all rounds went so.
"""

import os
import signal
import sys
import time
from pathlib import Path

from stages.artifacts import Outcome, Workspace, produce
from stages.errors import SpinError
from tests.artifact_tools import plan

DONE, BUG, BUSY = 0, 1, 75


def starter(out: Path, start: int, told: int, go_on: int) -> int:
    """Wait for the start, then make `out`; the owner says so, and waits until it may go on."""
    os.read(start, 1)

    def fill(workspace: Workspace) -> Outcome:
        os.write(told, b"o")
        os.read(go_on, 1)
        workspace.file("a.txt").write_text("a")
        return Outcome(counts={})

    begun = time.monotonic()
    try:
        produce(out, plan(), fill)
    except SpinError as error:
        late = time.monotonic() - begun > 1
        named = f"{out} is in use by " in str(error)
        return BUG if late or not named else error.exit_code
    return DONE


def spawn(out: Path, start: int, told: int, go_on: int, ends: list[int]) -> int:
    """Fork a starter, which keeps none of the pipe ends `ends` open."""
    child = os.fork()
    if child == 0:
        code = BUG
        try:
            for end in ends:
                os.close(end)
            code = starter(out, start, told, go_on)
        finally:
            os._exit(code)
    return child


def play(out: Path, starters: int, *, kill: bool) -> None:
    start, start_all = os.pipe()
    heard, told = os.pipe()
    go_on, let_go = os.pipe()
    children = {spawn(out, start, told, go_on, [start_all, let_go]) for _ in range(starters)}
    os.close(start_all)
    assert os.read(heard, 1) == b"o"
    for _ in range(starters - 1):
        child, status = os.wait()
        children.remove(child)
        code = os.waitstatus_to_exitcode(status)
        assert code == BUSY, f"a loser ended with {code}"
    (owner,) = children
    if kill:
        os.kill(owner, signal.SIGKILL)
    else:
        os.close(let_go)
    code = os.waitstatus_to_exitcode(os.waitpid(owner, 0)[1])
    assert code == (-signal.SIGKILL if kill else DONE), f"the owner ended with {code}"
    assert (out / "manifest.json").exists() != kill
    newcomer = spawn(out, start, told, go_on, [let_go] if kill else [])
    if kill:
        assert os.read(heard, 1) == b"o"
        os.close(let_go)
    code = os.waitstatus_to_exitcode(os.waitpid(newcomer, 0)[1])
    assert code == DONE, f"a newcomer ended with {code}"
    for end in (start, heard, told, go_on):
        os.close(end)


if __name__ == "__main__":
    for number in range(int(sys.argv[3])):
        play(Path(sys.argv[1]) / str(number), int(sys.argv[2]), kill=number % 2 == 0)
