"""A full disk: a clear error, earlier artifacts whole, and on it goes once there is room."""

import functools
import subprocess
from pathlib import Path

import pytest

from tests.faults.strace_tools import run_command, run_script

MOUNT = "mount -t tmpfs -o size=2m tmpfs "


@functools.cache
def why_no_small_disk() -> str | None:
    """A tmpfs of our own, in a user and mount namespace of our own."""
    try:
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", f"{MOUNT} /tmp"], capture_output=True, check=False
        )
    except FileNotFoundError:
        return "needs unshare, which is not installed"
    return None if done.returncode == 0 else "needs user namespaces, which are not permitted here"


@pytest.mark.parametrize("kind", ["parquet", "text", "safetensors", "manifest"])
def test_a_full_disk_is_told_and_the_work_goes_on_after_it(tmp_path: Path, kind: str) -> None:
    reason = why_no_small_disk()
    if reason:
        pytest.skip(reason)
    done = run_command(
        ["unshare", "-rm", "sh", "-c", f'{MOUNT} "$0" && exec "$@"', str(tmp_path)],
        "script_disk_full.py", tmp_path, kind,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["file-size", "open-files"])
def test_a_limit_of_the_process_is_told(tmp_path: Path, kind: str) -> None:
    done = run_script("script_limits.py", tmp_path, kind)
    assert done.returncode == 0, done.stderr
