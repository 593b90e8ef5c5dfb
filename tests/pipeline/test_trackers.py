"""Trackers: what they are told, each once, where their own readers find it; and that no artifact,
stage or secret depends on them.

Their libraries are in .venv/trackers, which only the processes of the trackers see.
"""

import getpass
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spin_cli.app import app
from stages import tracking, train
from stages.artifacts import Manifest, Outcome, Plan, open_artifact, produce, read_rows
from stages.config import RunConfig, TrackingConfig
from stages.data.rows import TRAIN_METRICS
from stages.errors import ConfigError, SpinError
from stages.journal import open_journal
from stages.layout import RunLayout
from stages.recipe import load_recipe
from stages.run_record import start_or_resume
from stages.tracking import Tracked, allowed, identity_of, open_tracking, summarize, tracked
from stages.verify import verify
from tests import artifact_tools, fake_stages
from tests.scored_pairs import random_rows, scored_artifact

ROOT = Path(__file__).parents[2]
LIBRARIES = ROOT / ".venv" / "trackers"
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
SECRETS = {
    "WANDB_API_KEY": "5ec2e7" * 7,
    "HF_TOKEN": "hf_5ec2e7ofthesetests",
    "MLFLOW_TRACKING_PASSWORD": "password-5ec2e7",
    "TRACKIO_WRITE_TOKEN": "token-5ec2e7",
    "OPENAI_API_KEY": "sk-5ec2e7",
    "LOGNAME": "someone-5ec2e7",
    "USER": "someone-5ec2e7",
}
CONFIG = {
    "name": "a recipe",
    "train": {"epochs": 2, "batch_size": 4, "precision": "fp32", "device": "cpu",
              "attention": "padded", "learning_rate": 1e-3},
    "chat": {"system": "private-words"},
    "reward": {"name": "judge", "judge": {"url": "http://private-words:8000/v1",
                                          "model": "private-words"}},
}  # fmt: skip


def config(*trackers: str, **more: Any) -> RunConfig:
    return RunConfig.model_validate(CONFIG | {"tracking": {"trackers": trackers, **more}})


@pytest.fixture(scope="module")
def _libraries() -> Iterator[None]:
    if not LIBRARIES.is_dir():
        pytest.skip("needs the trackers: make .venv/trackers")
    before = list(sys.path)
    sys.path.append(str(LIBRARIES))  # after our own: nothing here is taken from there
    with pytest.MonkeyPatch.context() as patch:
        # They are installed uncompiled, and a process spends a third of its time on compiling.
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        yield
    sys.path[:] = before


class Told:
    """A run whose training was tracked, broken off, tracked again, and summed up."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.layout = RunLayout(folder / "demo run")
        start_or_resume(self.layout, load_recipe(None))
        scored = scored_artifact(random_rows(12), model, folder / "pairs", config())
        self.inputs = train.TrainInputs(scored, str(model))
        self.plain = folder / "plain"
        before = train.run(config(), self.inputs, self.plain)
        self.rows = list(read_rows([self.plain / "metrics.parquet"], TRAIN_METRICS))
        self.out = self.layout.stage(0, "train")
        chosen = config(*TRACKERS)
        with (
            pytest.raises(SpinError, match="broken off"),
            open_tracking(tracked(chosen, self.out, identity_of(before)), "train") as tell,
        ):
            for row in self.rows[:3]:
                tell(row["step"], row)
            raise SpinError("broken off")
        self.manifest = train.run(chosen, self.inputs, self.out)
        self.made("suite-math", "suite", {"accuracy": 0.5})
        promoted = self.made("promote", "promote", {"promoted": True, "text": "no number"})
        for _ in range(2):  # told once
            summarize(chosen, self.layout.stage(0, "promote"), promoted)
        self.files = self.layout.tracking
        with ThreadPoolExecutor() as pool:
            read_one = partial(read, self.files)
            self.found = {name: of[name] for of in pool.map(read_one, TRACKERS) for name in of}

    def made(self, name: str, stage: str, metrics: dict[str, Any]) -> Manifest:
        def fill(space: Any) -> Outcome:
            space.file("notes.txt").write_text("plain\n")
            return Outcome(counts={"rows": 3}, metrics=metrics)

        out = self.layout.stage(0, "train").parent / name
        return produce(out, Plan(stage, 1, {}, inputs={}), fill)


def read(folder: Path, *trackers: str) -> dict[str, Any]:
    path = f"{LIBRARIES}{os.pathsep}{ROOT}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.tracker_files", str(folder), *trackers],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path},
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def told(
    _libraries: None, tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path
) -> Iterator[Told]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        # As under a launcher, whose other ranks a tracker must not wait for.
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", "1")
        patch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
        yield Told(tmp_path_factory.mktemp("told"), tiny_model_dir)


def only_run(told: Told, tracker: str) -> dict[str, Any]:
    runs = told.found[tracker]
    assert len(runs) == 1, f"an iteration is one run: {list(runs)}"
    return dict(next(iter(runs.values())))


@pytest.mark.parametrize("tracker", TRACKERS)
class TestEach:
    def test_has_every_step_once_though_training_was_broken_off(
        self, told: Told, tracker: str
    ) -> None:
        metrics = only_run(told, tracker)["metrics"]
        assert len(told.rows) > 4
        for name in ("loss", "margin", "accuracy", "grad_norm", "learning_rate",
                     "chosen_logratio", "rejected_logratio"):  # fmt: skip
            points = metrics[f"train/{name}"]
            assert [step for step, _ in points] == [row["step"] for row in told.rows]
            values = [row[name] for row in told.rows]
            assert [value for _, value in points] == pytest.approx(values, rel=1e-6)

    def test_has_what_came_of_the_iteration_once(self, told: Told, tracker: str) -> None:
        metrics = only_run(told, tracker)["metrics"]
        after = told.rows[-1]["step"] + 1
        last_loss = told.manifest.metrics["last_loss"]
        assert metrics["promote/promoted"] == [[after, 1]]
        assert metrics["suite-math/accuracy"] == [[after, 0.5]]
        assert metrics["train/last_loss"] == [[after, pytest.approx(last_loss, rel=1e-6)]]
        assert "promote/text" not in metrics

    def test_is_told_the_recipe_and_how_the_run_is_called(self, told: Told, tracker: str) -> None:
        run = only_run(told, tracker)
        assert float(run["config"]["train.beta"]) == 0.1
        assert run["config"]["train.loss"] == "sigmoid"
        assert run["group"] == "demo-run"
        if tracker != "tensorboard":
            assert run["project"] == "a-recipe"
        if tracker in ("wandb", "mlflow"):
            assert run["name"] == "iteration-000"
        else:
            assert next(iter(told.found[tracker])).startswith("iteration-000-")


def test_nothing_secret_or_private_is_written(told: Told) -> None:
    host, remote = socket.gethostname(), "github.com"
    private = [*SECRETS.values(), "private-words", remote, getpass.getuser()]
    private = [word for word in private if word not in ("root", "user")]  # in libraries' own words
    for file in sorted(told.files.rglob("*")):
        if not file.is_file():
            continue
        content = file.read_bytes()
        found = [word for word in private if word.encode() in content]
        assert not found, f"{file} has {found}"
        if len(host) > 4:
            assert host.encode() not in content, file


def test_mlflow_is_told_neither_the_user_nor_the_program(told: Told) -> None:
    tags = only_run(told, "mlflow")["tags"]
    assert tags["mlflow.user"] == tags["mlflow.source.name"] == "spin"
    assert only_run(told, "mlflow")["status"] == "FINISHED"


def test_artifacts_are_the_same_with_and_without(told: Told) -> None:
    assert artifact_tools.hashes(told.out) == artifact_tools.hashes(told.plain)
    plain = open_artifact(told.plain).manifest
    assert (told.manifest.key, told.manifest.config) == (plain.key, plain.config)


def test_a_run_with_trackers_is_still_sound(told: Told) -> None:
    assert (told.layout.tracking / "tracking.log").is_file()
    assert verify(told.layout.root).problems == []


def test_another_attempt_of_the_same_name_is_another_run(_libraries: None, tmp_path: Path) -> None:
    chosen = config(
        "tensorboard", every_steps=2, dir=str(tmp_path / "there"), group="g", project="p"
    )
    for identity in ("one", "two"):
        run = tracked(chosen, tmp_path / "player", identity)
        with open_tracking(run, "train") as tell:
            for step in range(4):
                tell(step, {"loss": 1.0 + step, "bad": float("nan"), "step": step})
    found = read(tmp_path / "there", "tensorboard")["tensorboard"]
    assert len(found) == 2
    for name, run in found.items():
        assert name.startswith("player-")
        assert run["group"] == "g"
        assert run["metrics"] == {"train/loss": [[0, 1.0], [2, 3.0]]}


def test_a_run_tells_of_its_start_and_of_every_iteration_in_one_group(
    _libraries: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: p\nsft: {init: random}\nreward: {name: gsm8k}\n"
        "promote: {metric: sampled_accuracy, min_gain: 0.05, on_refusal: champion}\n"
    )
    monkeypatch.setitem(fake_stages.accuracy_by_model, "iterations/001/train", 0.65)
    words = ["run", str(recipe), "--run", str(tmp_path / "a run"), "--iterations", "2",
             "tracking.trackers=[tensorboard]"]  # fmt: skip
    for _ in range(2):  # told once
        with fake_stages.installed():
            done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    found = read(tmp_path / "a run" / "tracking", "tensorboard")["tensorboard"]
    assert {run["group"] for run in found.values()} == {"a-run"}
    told = {name.rpartition("-")[0]: run["metrics"] for name, run in found.items()}
    assert len(told) == len(found)
    figures = ("evaluate/sampled_accuracy", "promote/promoted")
    assert {
        name: [point for figure in figures for point in metrics.get(figure, [])]
        for name, metrics in told.items()
    } == {
        "start": [[0, pytest.approx(0.6)]],
        "iteration-000": [[0, pytest.approx(0.7)], [0, 1]],
        "iteration-001": [[0, pytest.approx(0.65)], [0, 0]],
    }


class TestTrouble:
    def library(self, folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put a library of that name where the worker finds it first."""
        (folder / "wandb").mkdir(parents=True)
        (folder / "wandb" / "__init__.py").write_text(text)
        monkeypatch.setattr(sys, "path", [str(folder), *sys.path, str(LIBRARIES)])

    def test_a_tracker_that_fails_is_told_once_and_the_others_go_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.library(tmp_path / "broken", "raise OSError('no network')", monkeypatch)
        out = tmp_path / "player"
        with open_tracking(tracked(config("wandb", "tensorboard"), out, "x"), "train") as tell:
            for step in range(3):
                tell(step, {"loss": 1.0})
        assert [r.getMessage() for r in caplog.records] == [
            "tracking: wandb failed (OSError: no network); the rest went on without; see "
            f"{tmp_path / 'tracking' / 'tracking.log'}"
        ]
        found = read(tmp_path / "tracking", "tensorboard")["tensorboard"]
        assert len(next(iter(found.values()))["metrics"]["train/loss"]) == 3

    def test_one_that_hangs_delays_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.library(tmp_path / "slow", "import time; time.sleep(20)", monkeypatch)
        monkeypatch.setattr(tracking, "FINISH_S", 0.2)
        monkeypatch.setattr(tracking, "MAX_WAITING", 100)
        start = time.monotonic()
        with open_tracking(tracked(config("wandb"), tmp_path / "player", "x"), "train") as tell:
            for step in range(50_000):  # more than a pipe holds, and than may wait
                tell(step, {"loss": 1.0})
        assert time.monotonic() - start < 5
        assert "has not finished after 0.2 s and is left to itself" in caplog.text

    def test_a_place_that_cannot_be_written_is_a_warning(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "file").write_text("")
        run = tracked(config("wandb", dir=str(tmp_path / "file")), tmp_path / "player", "x")
        with open_tracking(run, "train") as tell:
            tell(0, {"loss": 1.0})
        assert "tracking: wandb failed" in caplog.text

    @pytest.mark.parametrize("tracker", TRACKERS)
    def test_a_missing_library_is_refused_before_any_work(
        self, tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        words = ["prepare", "--out", str(tmp_path / "data"), f"tracking.trackers=[{tracker}]"]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2
        assert f"tracking.trackers has {tracker}, but" in result.stderr
        assert "pip install 'spin-selfplay[trackers]'" in result.stderr
        assert not (tmp_path / "data").exists()

    def test_mlflow_of_its_own_needs_a_database(self, monkeypatch: pytest.MonkeyPatch) -> None:
        there = {"mlflow": True}
        monkeypatch.setattr("importlib.util.find_spec", there.get)
        with pytest.raises(ConfigError, match="sqlalchemy and alembic is not installed"):
            tracking.check(TrackingConfig(trackers=("mlflow",)))
        tracking.check(TrackingConfig(trackers=("mlflow",), mode="online"))


class TestWhatIsTold:
    def test_no_text_that_a_user_wrote(self) -> None:
        chosen = config(*TRACKERS)
        values = allowed(chosen, tuple(RunConfig.model_fields))
        assert values["train.beta"] == 0.1
        assert values["train.loss"] == "sigmoid"
        assert values["reward.name"] == "judge"
        texts = {name: value for name, value in values.items() if isinstance(value, str)}
        assert not [name for name, value in texts.items() if "private" in value or "/" in value]
        assert "name" not in values
        assert "chat.system" not in values

    def test_a_run_is_called_by_its_place(self, tmp_path: Path) -> None:
        layout = RunLayout(tmp_path / "my run")
        start_or_resume(layout, load_recipe(None))
        chosen = config("wandb")

        def name(out: Path) -> str:
            run = tracked(chosen, out, "x")
            assert run is not None
            assert (run.group, run.folder) == ("my-run", layout.tracking)
            return run.name

        assert name(layout.stage(12, "train")) == "iteration-012"
        assert name(layout.sft) == "sft"
        assert name(layout.start_evaluation) == "start"
        assert tracked(config(), layout.sft, "x") is None

    def test_online_takes_the_users_environment_and_offline_does_not(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
        monkeypatch.setenv("TRACKIO_SPACE_ID", "a/space")
        monkeypatch.setenv("RANK", "0")
        run = tracked(config("mlflow", mode="online"), tmp_path / "player", "x")
        assert run is not None
        online = tracking._environment(run)
        assert online["MLFLOW_TRACKING_URI"] == "http://server"
        assert online["TRACKIO_SPACE_ID"] == "a/space"
        offline = tracking._environment(replace(run, online=False))
        assert offline["MLFLOW_TRACKING_URI"] == f"sqlite:///{run.folder}/mlflow.db"
        assert "TRACKIO_SPACE_ID" not in offline
        assert offline["WANDB_MODE"] == "offline"
        assert not {"RANK"} & (online.keys() | offline.keys())

    def test_only_the_first_process_of_several_tells(self, tmp_path: Path) -> None:
        run = tracked(config("wandb"), tmp_path / "player", "x")
        with open_journal(1, tmp_path, "train", TRAIN_METRICS, 3, dict, str, run) as journal:  # type: ignore[arg-type]
            journal.add(None)  # type: ignore[arg-type]
        assert not (tmp_path / "tracking").exists()

    def test_it_is_in_no_key_and_changes_no_recorded_recipe(self) -> None:
        assert "tracking" not in config("wandb").identity()
        plain, told = load_recipe(None), load_recipe(None, ["tracking.trackers=[wandb]"])
        assert plain.settings() == told.settings()
        assert isinstance(tracked(config("wandb"), Path("x"), "x"), Tracked)
