"""Adapters all along the loop: trained, written alone or merged, and taken for a model again."""

import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from spin_cli.app import app
from stages import engines, train
from stages.artifacts import Manifest, read_manifest
from stages.artifacts.keys import stage_key
from stages.config import EngineConfig, RunConfig, ScoreConfig
from stages.data.tokens import pair_tokens
from stages.errors import ConfigError, DivergedError
from stages.model.base import ADAPTER_WEIGHTS
from stages.model.load import load_model
from stages.model.pairs import PairForward
from stages.model.scoring import score_pairs
from stages.model.source import model_chain, resolve_model
from stages.verify import verify
from tests.faults import test_resume_training as resuming
from tests.lora_tools import make_adapter
from tests.scored_pairs import random_rows, scored_artifact, train_inputs
from tests.tiny_loop import RECIPE

ROWS = random_rows(20)
SETTINGS = {"learning_rate": 1e-2, "batch_size": 6, "epochs": 3, "precision": "fp32"}
LORA = {"rank": 3, "alpha": 5}
WHOLE_WEIGHTS = "model.safetensors"


def spin(*words: Any) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output + result.stderr
    return result


# -- The loop -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "output", "bases"),
    [("merged", "merged", 0), ("merged", "adapter", 2), ("adapter", "adapter", 1)],
)
def test_two_iterations(tmp_path: Path, start: str, output: str, bases: int) -> None:
    recipe, run = tmp_path / "tiny.yaml", tmp_path / "run"
    first = "iterations: {0: {train: {lora: {start: merged}}}}\n"
    recipe.write_text(
        RECIPE.replace(
            "train: {", f"train: {{lora: {{rank: 4, start: {start}, output: {output}}}, "
        )
        + first
    )
    spin("run", recipe, "--run", run, "--iterations", "2")
    for iteration in ("000", "001"):
        manifest = read_manifest(run / "iterations" / iteration / "train")
        assert manifest.metrics["first_loss"] == pytest.approx(0.693147, abs=1e-5)
        assert manifest.metrics["last_loss"] < 0.693
        assert manifest.info["reference_is_opponent"] is True
        assert manifest.info["trained_parameters"] == 4352
        stored = {Path(file.path).name for file in manifest.files}
        assert (WHOLE_WEIGHTS in stored) == (output == "merged")
        assert (ADAPTER_WEIGHTS in stored) == (output == "adapter")
    player = run / "iterations/001/train"
    assert len(model_chain(player)) == bases + 1
    champion = resolve_model(str(run / "champion"))
    assert champion.path == player
    assert [source.path for source in champion.chain()] == model_chain(player)
    spin("verify", run)
    again = spin("run", recipe, "--run", run, "--iterations", "2")
    assert "already done" in again.stderr


def test_verify_misses_a_base_that_is_gone(
    tiny_model_dir: Path, scored: Path, tmp_path: Path
) -> None:
    """Also one that is no input of its own: the base of the adapter that is trained on."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    shutil.copytree(scored.parent, run / "first")
    trained(scored, tiny_model_dir, run / "start")
    first, second = run / "first-player", run / "second-player"
    again = scored_artifact(ROWS, run / "start", run / "data", config())
    trained(again, run / "start", first, output="adapter")
    again = scored_artifact(ROWS, first, run / "more", config())
    manifest = trained(again, first, second, start="adapter", output="adapter")
    assert manifest.inputs["base"].path == "start"
    shutil.rmtree(run / "start")
    problems = [p for p in verify(run).problems if "its input base (start)" in p]
    assert problems == [
        f"{second}: its input base (start) is not in the run any more; run its stage again"
    ]


# -- One training ---------------------------------------------------------------------------------


def config(settings: dict[str, Any] | None = None, **lora: Any) -> RunConfig:
    values = {**SETTINGS, **(settings or {}), "lora": {**LORA, **lora}}
    return RunConfig.model_validate({"train": values, "score": {"precision": "fp32"}})


def trained(
    scored: Path, model: Path, out: Path, settings: dict[str, Any] | None = None, **lora: Any
) -> Manifest:
    return train.run(config(settings, **lora), train_inputs(scored, model), out)


@pytest.fixture(scope="module")
def scored(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs with the log-probabilities of a whole model."""
    return scored_artifact(ROWS, tiny_model_dir, tmp_path_factory.mktemp("scored"), config())


@pytest.fixture(scope="module")
def opponent(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on an adapter on a whole model."""
    folder = tmp_path_factory.mktemp("opponent")
    first = make_adapter(tiny_model_dir, folder / "first", seed=1)
    return make_adapter(first, folder / "second", seed=2)


@pytest.fixture(scope="module")
def scored_by_adapter(opponent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scored_artifact(ROWS, opponent, tmp_path_factory.mktemp("scored"), config())


def logprobs(model_dir: Path) -> torch.Tensor:
    forward = PairForward(load_model(model_dir), "auto", 0)
    pairs = [pair_tokens(row) for row in ROWS]
    return torch.tensor(score_pairs(forward, pairs, ScoreConfig(precision="fp32")))


@pytest.mark.parametrize("start", ["merged", "adapter"])
def test_an_adapter_alone_is_the_same_model_as_merged(
    opponent: Path, scored_by_adapter: Path, tmp_path: Path, start: str
) -> None:
    merged, alone = tmp_path / "merged", tmp_path / "alone"
    trained(scored_by_adapter, opponent, merged, start=start)
    manifest = trained(scored_by_adapter, opponent, alone, start=start, output="adapter")
    assert manifest.metrics["first_loss"] == pytest.approx(0.693147, abs=1e-5)
    chain = model_chain(opponent)
    assert model_chain(alone) == [*(chain if start == "merged" else chain[:-1]), alone]
    before, after = logprobs(opponent), logprobs(alone)
    assert (before - after).abs().max() > 0.1
    torch.testing.assert_close(after, logprobs(merged), rtol=1e-5, atol=1e-5)
    for path in merged.iterdir():
        if path.name not in (WHOLE_WEIGHTS, "manifest.json", "timings.parquet"):
            assert path.read_bytes() == (alone / path.name).read_bytes(), path.name


def test_only_adapters_are_trained_and_the_base_keeps_its_bits(
    scored: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    trained(scored, tiny_model_dir, tmp_path / "out", target_modules=["q_proj", "down_proj"])
    before, after = (load_file(d / WHOLE_WEIGHTS) for d in (tiny_model_dir, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "down_proj"}
    assert len(changed) == 4


def test_an_adapter_of_its_own_is_asked_for_where_there_is_none(
    scored: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="is a whole model; set start=merged, in iteration 0 on"):
        trained(scored, tiny_model_dir, tmp_path / "out", start="adapter")


def test_scores_of_the_base_are_no_ln_2(opponent: Path, scored: Path, tmp_path: Path) -> None:
    other = tmp_path / "score"
    shutil.copytree(scored, other)
    claim_model(other, resolve_model(str(opponent)).ref.key)
    with pytest.raises(DivergedError, match="not ln 2"):
        trained(other, opponent, tmp_path / "out")


def claim_model(score: Path, key: str) -> None:
    """Let an artifact of score say that it was made with another model."""
    manifest = read_manifest(score)
    inputs = {**manifest.inputs, "model": manifest.inputs["model"].model_copy(update={"key": key})}
    claimed = manifest.model_copy(update={"inputs": inputs})
    claimed = claimed.model_copy(update={"key": stage_key(claimed.key_fields())})
    (score / "manifest.json").write_text(claimed.to_text())


@pytest.mark.parametrize(
    ("lora", "settings"),
    [
        ({}, {"activation_checkpointing": "full"}),
        ({"start": "adapter", "output": "adapter"}, {"sharding": {"cpu_offload": True}}),
    ],
    ids=["fresh", "own"],
)
def test_two_processes_take_the_same_steps_as_one(
    request: pytest.FixtureRequest,
    tiny_model_dir: Path,
    tmp_path: Path,
    lora: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    is_own = "start" in lora
    model = request.getfixturevalue("opponent") if is_own else tiny_model_dir
    pairs = request.getfixturevalue("scored_by_adapter" if is_own else "scored")
    one, two = tmp_path / "one", tmp_path / "two"
    alone = trained(pairs, model, one, **lora)
    both = trained(pairs, model, two, {**settings, "processes": 2}, **lora)
    assert both.info["processes"] == 2
    assert both.key == alone.key
    assert both.info["trained_parameters"] == alone.info["trained_parameters"]
    ours, theirs = (pq.read_table(out / "metrics.parquet").to_pylist() for out in (two, one))
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    name = ADAPTER_WEIGHTS if is_own else WHOLE_WEIGHTS
    weights, others = (load_file(out / name) for out in (two, one))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=0, atol=1e-4)


def test_killed_and_taken_up_again_it_ends_in_the_same_bytes(
    scored: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    lora = {"rank": 3, "output": "adapter"}
    train.run(
        resuming.config(lora=lora), train_inputs(scored, tiny_model_dir), tmp_path / "unbroken"
    )
    out = tmp_path / "train"
    words = [f"train.lora.{name}={value}" for name, value in lora.items()]
    process = resuming.start(scored, tiny_model_dir, out, *words)
    resuming.wait_until(lambda: len(resuming.steps_kept(out)) == 2)
    time.sleep(0.03)
    process.kill()
    process.communicate()
    files = list(tmp_path.glob(".train.*.partial/.shards/aside/*/*.safetensors"))
    assert files
    with safe_open(files[0], framework="pt") as file:
        parts = {key.split("/")[1] for key in file.keys() if "/" in key}  # noqa: SIM118
    assert parts
    assert all(".lora_A." in part or ".lora_B." in part for part in parts)
    again = resuming.start(scored, tiny_model_dir, out, *words)
    _, said = again.communicate(timeout=resuming.BARRIER_S)
    assert again.returncode == 0, said
    assert "from a checkpoint" in said
    assert resuming.bytes_of(out) == resuming.bytes_of(tmp_path / "unbroken")


# -- Engines --------------------------------------------------------------------------------------


class _Closing:
    closed = False

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("fails", [False, True])
def test_vllm_gets_the_whole_model_for_as_long_as_it_runs(
    opponent: Path, tmp_path: Path, fails: bool
) -> None:
    seen: list[Path] = []
    engine = _Closing()

    def open_engine(config: EngineConfig, folder: Path, **limits: int) -> Any:
        seen.append(folder)
        assert limits == {"max_model_len": 9, "pad_token_id": 2}
        assert {p.name for p in folder.iterdir()} >= {WHOLE_WEIGHTS, "config.json"}
        assert not list(folder.glob("adapter*"))
        merged = dict(load_model(folder).named_parameters())
        for name, weight in load_model(opponent).named_parameters():
            assert torch.equal(weight, merged[name]), name
        if fails:
            raise ConfigError("no room")
        return engine

    def use() -> None:
        with engines.running(
            open_engine,
            EngineConfig(name="vllm"),
            opponent,
            tmp_path,
            max_model_len=9,
            pad_token_id=2,
        ) as running:
            assert running is engine
            assert seen[0].parent == tmp_path

    if fails:
        with pytest.raises(ConfigError, match="no room"):
            use()
    else:
        use()
        assert engine.closed
    assert not list(tmp_path.iterdir())


def test_other_engines_and_whole_models_are_left_where_they_are(
    opponent: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    for name, model in (("transformers", opponent), ("vllm", tiny_model_dir)):
        opened: list[Path] = []

        def open_engine(config: Any, folder: Path, **limits: int) -> Any:
            opened.append(folder)  # noqa: B023
            return _Closing()

        with engines.running(
            open_engine,
            EngineConfig(name=name),
            model,
            tmp_path,
            max_model_len=9,
            pad_token_id=2,
        ):
            assert opened == [model]
            assert not list(tmp_path.iterdir())
