"""The process of the trackers: what each is told, and what is done where one is slow."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState

from stages import tracking
from stages.config import RunConfig
from stages.tracking import open_tracking, tracked, worker

ROOT = Path(__file__).parents[2]
SENT = 1000


@pytest.fixture(autouse=True)
def _no_state_is_left() -> Iterator[None]:
    """The worker, which is to have a process of its own, makes accelerate's state."""
    before = dict(PartialState._shared_state)
    yield
    PartialState._shared_state.clear()
    PartialState._shared_state.update(before)


class Stub:
    """A tracker that keeps what it is told."""

    def __init__(self, *, broken: bool = False) -> None:
        self.broken = broken
        self.settings: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []

    def start(self) -> None:
        if self.broken:
            raise OSError("no network")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings.append(values)

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        pass


def told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, steps: int, of: str | None, **stubs: Stub
) -> list[str]:
    """Tell trackers of steps and of what came of an artifact; return what went wrong."""
    monkeypatch.setattr(worker, "_MAKERS", {n: lambda *_, s=s: s for n, s in stubs.items()})
    run = {
        "trackers": list(stubs), "state": str(folder / "state.json"), "identity": "x",
        "settings": {"train.beta": 0.1},
    }  # fmt: skip
    messages: list[dict[str, Any]] = [{"step": k, "values": {"loss": k}} for k in range(steps)]
    if of is not None:
        messages.append({"summary": {"accuracy": 1.0}, "of": of})
    return worker._work(run, iter(messages))


def test_each_tracker_is_told_all_once_whenever_it_was_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, later = Stub(), Stub()
    told(tmp_path, monkeypatch, 2, None, first=first)
    told(tmp_path, monkeypatch, 4, "a", first=first, later=later)
    told(tmp_path, monkeypatch, 4, "a", first=first, later=later)
    wanted = [(k, {"loss": k}) for k in range(4)] + [(4, {"accuracy": 1.0})]
    for stub in (first, later):
        assert stub.settings == [{"train.beta": 0.1}]
        assert stub.logged == wanted


def test_one_that_could_not_start_is_told_when_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    well, mended = Stub(), Stub()
    problems = told(tmp_path, monkeypatch, 2, None, well=well, ill=Stub(broken=True))
    assert problems == ["ill failed (OSError: no network)"]
    assert told(tmp_path, monkeypatch, 2, None, well=well, ill=mended) == []
    assert mended.settings == well.settings == [{"train.beta": 0.1}]
    assert mended.logged == well.logged


SLOW = """
import pathlib, time
FOLDER = pathlib.Path(__file__).parents[1]

class Settings:
    def __init__(self, **values): pass

class Run:
    config = None
    told = 0
    def log(self, values, step=None):
        while not (FOLDER / "go").exists():
            time.sleep(0.01)
        self.told += 1
    def finish(self):
        (FOLDER / "told").write_text(str(self.told))

def init(**values):
    (FOLDER / "ready").touch()
    return Run()

class config:
    update = staticmethod(lambda values, **more: None)
"""


def test_what_a_slow_tracker_does_not_get_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text(SLOW)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(tracking, "MAX_WAITING", 50)
    config = RunConfig.model_validate({"tracking": {"trackers": ["wandb"]}})
    values = {f"metric_{k}": 1 / 3 for k in range(30)}  # a pipe holds some dozens of messages
    with open_tracking(tracked(config, tmp_path / "player", "x"), "train") as tell:
        end_s = time.monotonic() + 60
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < end_s, "the worker did not start"
            time.sleep(0.02)
        for step in range(SENT):
            tell(step, values)
            time.sleep(0.001)  # slow enough for what passes messages on
        (tmp_path / "go").touch()
    [message] = [record.getMessage() for record in caplog.records]
    lost = int(message.removeprefix("tracking: wandb was too slow: ").split()[0])
    assert lost > SENT // 2
    assert lost + int((tmp_path / "told").read_text()) == SENT
    state = json.loads(next((tmp_path / "tracking" / "state").glob("*.json")).read_text())
    assert state["told"]["wandb"]["settings"] is True


def test_a_worker_that_hangs_with_more_to_read_ends_after_its_parent(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text("import time; time.sleep(600)")
    run = {
        "trackers": ["wandb"], "state": str(tmp_path / "state.json"), "identity": "x",
        "settings": {}, "max_waiting": 1, "online": False,
    }  # fmt: skip
    code = "from stages.tracking import worker; worker.FINISH_S = 0.2; worker.main()"
    steps = [{"step": k, "values": {}} for k in range(9)]
    done = subprocess.run(
        [sys.executable, "-c", code], input="".join(json.dumps(m) + "\n" for m in [run, *steps]),
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}, text=True, cwd=tmp_path,
        timeout=60, check=False, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
