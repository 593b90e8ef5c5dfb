"""kill -9 while an equal artifact of the run is copied."""

from pathlib import Path

import pytest

from stages.artifacts import open_artifact
from stages.artifacts.manifest import MANIFEST_NAME
from tests.faults.script_copy import make
from tests.faults.strace_tools import commit_points, needs_strace, run_killed, spread

SCRIPT = "script_copy.py"


def a_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    make(folder, "source", [])
    return folder


@pytest.mark.parametrize("most", [8, pytest.param(1000, marks=pytest.mark.long)])
def test_kill_while_copying_then_rerun_equals_the_source(tmp_path: Path, most: int) -> None:
    needs_strace()
    points = commit_points(tmp_path / "log", SCRIPT, a_run(tmp_path / "unbroken"))
    assert {"rename", "fsync"} <= {point.call for point in points}
    for point in spread(points, most):
        run = a_run(tmp_path / f"{point.call}-{point.number}")
        done = run_killed(point, SCRIPT, run)
        assert done.returncode == -9, f"{point}: {done.returncode} {done.stderr}"
        made: list[str] = []
        assert make(run, "copy", made) == open_artifact(run / "source").manifest, point
        assert made == [], f"{point}: it was made anew"
        open_artifact(run / "copy").files()
        names = {path.name for path in run.iterdir()}
        assert names == {"run.json", "source", "copy", ".source.lock", ".copy.lock"}, point
        assert (run / "copy" / MANIFEST_NAME).read_bytes() == (
            run / "source" / MANIFEST_NAME
        ).read_bytes()
