"""Training started by torchrun and by accelerate's launcher: every process runs the command."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from stages import train
from stages.artifacts import read_manifest
from stages.config import RunConfig
from tests.scored_pairs import random_rows, scored_artifact, train_inputs

SETTINGS = {"learning_rate": 1e-3, "batch_size": 6, "epochs": 1, "precision": "fp32"}
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                   "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"],
}  # fmt: skip


@pytest.fixture(scope="module")
def scored(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = RunConfig.model_validate({"score": {"precision": "fp32"}})
    folder = tmp_path_factory.mktemp("scored")
    return scored_artifact(random_rows(20), tiny_model_dir, folder, config)


def launch(launcher: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "spin_cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )


def arguments(scored: Path, model_dir: Path, out: Path) -> list[Any]:
    settings = [f"train.{name}={value}" for name, value in SETTINGS.items()]
    return ["train", "--pairs", scored, "--model", model_dir, "--out", out, *settings]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_makes_the_same_artifact(
    scored: Path, tiny_model_dir: Path, tmp_path: Path, launcher: str
) -> None:
    alone, out = tmp_path / "alone", tmp_path / "launched"
    train.run(
        RunConfig.model_validate({"train": SETTINGS}), train_inputs(scored, tiny_model_dir), alone
    )
    done = launch(launcher, *arguments(scored, tiny_model_dir, out))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("train: ") == 1, "the first process alone tells of it"
    manifest = read_manifest(out)
    assert manifest.info["processes"] == 2
    assert manifest.key == read_manifest(alone).key
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, alone))
    assert all((ours[name] - theirs[name]).abs().max() < 1e-5 for name in ours)

    again = launch(launcher, *arguments(scored, tiny_model_dir, out))
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("already done") == 1


def test_what_fails_in_one_process_ends_all(tiny_model_dir: Path, tmp_path: Path) -> None:
    done = launch("torchrun", *arguments(tmp_path / "none", tiny_model_dir, tmp_path / "out"))
    assert done.returncode != 0
    assert f"{tmp_path / 'none'} " in done.stderr, done.stderr


def test_stages_of_one_process_refuse_a_launcher(tiny_model_dir: Path, tmp_path: Path) -> None:
    command = ["generate", "--model", tiny_model_dir, "--data", tmp_path, "--out", tmp_path / "g"]
    done = launch("torchrun", *command)
    assert done.returncode != 0
    assert "generate runs in one process, and a launcher started 2" in done.stderr


def test_a_recipe_and_a_launcher_must_agree(
    scored: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    command = [*arguments(scored, tiny_model_dir, tmp_path / "out"), "train.processes=3"]
    done = launch("torchrun", *command)
    assert done.returncode != 0
    assert "processes=3, but the launcher started 2" in done.stderr
