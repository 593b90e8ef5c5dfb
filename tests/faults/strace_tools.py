"""Killing a program at a chosen system call, or failing that call, by strace."""

import functools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What a commit is made of. Killed on entry, the call does not happen.
COMMIT_CALLS = (
    "rename", "renameat", "renameat2", "fsync", "fdatasync", "mkdir", "rmdir", "unlink",
    "unlinkat", "flock", "ftruncate", "pwrite64", "chmod", "fchmodat", "fchmod",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """The `number`th call of `call`."""

    call: str
    number: int


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script of tests/faults, not traced."""
    return run_command([], script, *arguments)


def run_command(
    wrapper: list[str], script: str, *arguments: object
) -> subprocess.CompletedProcess[str]:
    """Run a script of tests/faults by a command that takes another command as its arguments."""
    return _run([*wrapper, *_python(script), *map(str, arguments)])


def run_killed(point: Point, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script of tests/faults that is killed (SIGKILL) as it enters a system call."""
    return _run_injected(point, "signal=KILL", script, *arguments)


def run_failing(
    point: Point, error: str, script: str, *arguments: object
) -> subprocess.CompletedProcess[str]:
    """Run a script one of whose system calls fails with `error`, such as EIO."""
    return _run_injected(point, f"error={error}", script, *arguments)


def _run_injected(
    point: Point, what: str, script: str, *arguments: object
) -> subprocess.CompletedProcess[str]:
    inject = f"inject={point.call}:{what}:when={point.number}"
    return run_command([*_strace(point.call), "-e", inject], script, *arguments)


def traced_calls(log: Path, script: str, *arguments: object) -> list[tuple[str, str]]:
    """Run a script unhindered; return its commit calls in order, as (name, arguments)."""
    done = run_command([*_strace(",".join(COMMIT_CALLS), log), "-y"], script, *arguments)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^\d+\s+(\w+)\((.*)\)", log.read_text(errors="replace"), re.MULTILINE)
    return [(call, text) for call, text in found if call in COMMIT_CALLS]


def commit_points(log: Path, script: str, *arguments: object) -> list[Point]:
    """Run a script unhindered and return all its commit calls."""
    counts = Counter(call for call, _ in traced_calls(log, script, *arguments))
    return [Point(call, n) for call in sorted(counts) for n in range(1, counts[call] + 1)]


def spread(points: list[Point], most: int) -> list[Point]:
    """At most `most` of the points, at even distances."""
    if len(points) <= most:
        return points
    step = len(points) / most
    return [points[int(i * step)] for i in range(most)]


def needs_strace() -> None:
    """Skip the test, with a reason, where processes cannot be traced."""
    reason = _why_no_strace()
    if reason:
        pytest.skip(reason)


@functools.cache
def _why_no_strace() -> str | None:
    if shutil.which("strace") is None:
        return "needs strace, which is not installed"
    done = _run([*_strace("fsync"), "true"])
    return None if done.returncode == 0 else "needs ptrace, which is not permitted here"


def _strace(calls: str, log: Path = Path(os.devnull)) -> list[str]:
    # No --seccomp-bpf, though it is faster: with it strace 6.1 injects no signals.
    # Calls that this kernel or processor lacks are marked by `?`: no error.
    traced = ",".join(f"?{call}" for call in calls.split(","))
    return ["strace", "-f", "-qq", "-o", str(log), "-e", f"trace={traced}"]


def _python(script: str) -> list[str]:
    return [sys.executable, "-B", str(Path(__file__).parent / script)]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
