"""Two processes with `fully_shard` against one: the very code that GPUs run, over gloo."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from stages import score, train
from stages.artifacts import Manifest, read_manifest, read_rows
from stages.config import OptimConfig, RunConfig
from stages.data.rows import SCORED_PAIRS
from stages.errors import ConfigError, DivergedError, SpinError
from stages.model.base import is_adapter
from stages.model.group import together
from stages.model.load import load_model
from stages.model.pairs import PairForward
from tests.families import tiny_model
from tests.lora_tools import make_adapter
from tests.scored_pairs import random_rows, scored_artifact, scored_store, train_inputs
from tests.sharding_work import (
    FamilyJob,
    StepsJob,
    end_by_signal,
    fail_on_rank_1,
    family_steps,
    gather_family,
)

NUM_PAIRS = 20
SETTINGS = {"learning_rate": 1e-3, "batch_size": 6, "epochs": 3, "precision": "fp32"}


@pytest.fixture(scope="session")
def scored(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = RunConfig.model_validate({"score": {"precision": "fp32"}})
    folder = tmp_path_factory.mktemp("scored")
    rows = [{**row, "weight": 0.25 + i % 3} for i, row in enumerate(random_rows(NUM_PAIRS))]
    return scored_artifact(rows, tiny_model_dir, folder, config)


def trained(scored: Path, model_dir: Path, out: Path, **settings: Any) -> Manifest:
    values = {"train": {**SETTINGS, **settings}, "score": {"precision": "fp32"}}
    return train.run(RunConfig.model_validate(values), train_inputs(scored, model_dir), out)


@pytest.fixture(scope="session")
def alone(scored: Path, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "train"
    trained(scored, tiny_model_dir, out)
    return out


def assert_same_training(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    ours, theirs = (pq.read_table(out / "metrics.parquet").to_pylist() for out in (one, other))
    assert len(ours) == len(theirs) >= 10
    for a, b in zip(ours, theirs, strict=True):
        for name, value in a.items():
            if name == "accuracy" and abs(a["margin"]) < tolerance:  # ties, until it has learned
                continue
            assert value == pytest.approx(b[name], rel=tolerance, abs=tolerance), (a["step"], name)
    weights, others = (load_file(out / "model.safetensors") for out in (one, other))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"attention": "padded", "micro_batch_size": 2},
        {"sharding": {"group_size": 1}, "activation_checkpointing": "full", "token_budget": 40},
        {"sharding": {"reshard_after_forward": False, "cpu_offload": True}, "token_budget": 40},
    ],
    ids=["shared", "padded", "hybrid", "offload"],
)
def test_two_processes_take_the_same_steps_as_one(
    scored: Path, tiny_model_dir: Path, alone: Path, tmp_path: Path, settings: Any
) -> None:
    manifest = trained(scored, tiny_model_dir, tmp_path / "two", processes=2, **settings)
    assert manifest.info["processes"] == 2
    if settings.keys() <= {"sharding", "activation_checkpointing"}:  # they change only the speed
        assert manifest.key == read_manifest(alone).key
    assert_same_training(tmp_path / "two", alone)


def test_a_batch_smaller_than_the_number_of_processes(
    scored: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    one_row = {"batch_size": 1, "max_steps": 10, "device": "cpu"}
    for processes in (1, 2):
        trained(scored, tiny_model_dir, tmp_path / str(processes), processes=processes, **one_row)
    assert_same_training(tmp_path / "2", tmp_path / "1")


def test_bf16_on_two_processes_stays_near_one(
    scored: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    for processes in (1, 2):
        out = tmp_path / str(processes)
        trained(scored, tiny_model_dir, out, processes=processes, precision="bf16")
    assert_same_training(tmp_path / "2", tmp_path / "1", tolerance=1e-2)


def test_offloading_in_one_process_changes_nothing(
    scored: Path, tiny_model_dir: Path, alone: Path, tmp_path: Path
) -> None:
    trained(scored, tiny_model_dir, tmp_path / "out", sharding={"cpu_offload": True})
    same = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert same == (alone / "model.safetensors").read_bytes()


def test_the_result_opens_as_a_plain_model(alone: Path, tiny_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(alone)
    before = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    ours, theirs = model.config.to_dict(), before.config.to_dict()
    assert ours | {"_name_or_path": ""} == theirs | {"_name_or_path": ""}
    assert model.generation_config.eos_token_id == before.generation_config.eos_token_id
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_saved_in_the_type_they_came_in(
    scored: Path, tiny_model_dir: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=dtype)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((tiny_model_dir / name).read_bytes())
    trained(scored, folder, tmp_path / "out", max_steps=1)
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == dtype


def test_every_family_is_read_in_parts_and_gathered_whole(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    gpt2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2}
    jobs = []
    for family in ("llama", "qwen2", "qwen3", "mistral", "mixtral", "gemma", "gpt2"):
        for tied in (True, False):
            config = AutoConfig.for_model(
                family, **(gpt2 if family == "gpt2" else sizes), tie_word_embeddings=tied
            )
            folder = tmp_path / f"{family}-{tied}"
            AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="5KB")
            jobs.append(FamilyJob(folder, folder.with_suffix(".gathered")))
    for name in ("llama-True", "gpt2-False", "mixtral-False"):
        folder = make_adapter(tmp_path / name, tmp_path / f"{name}-adapter")
        jobs.append(FamilyJob(folder, folder.with_suffix(".gathered")))
    together(gather_family, jobs, OptimConfig(processes=2))
    for job in jobs:
        before = load_model(job.folder).state_dict()
        after = AutoModelForCausalLM.from_pretrained(job.out).state_dict()
        assert before.keys() == after.keys()
        tolerance = 1e-7 if is_adapter(job.folder) else 0  # rows of B·A, not the whole product
        for name, weight in before.items():
            torch.testing.assert_close(after[name], weight, rtol=0, atol=tolerance)


def test_every_family_takes_the_same_ten_steps_on_two_processes(tmp_path: Path) -> None:
    settings = {"learning_rate": 1e-3, "batch_size": 4, "epochs": 5, "precision": "fp32"}
    rows = [
        {name: [t % 90 + 3 for t in v] if "ids" in name else v for name, v in row.items()}
        for row in random_rows(8)
    ]
    jobs = []
    for family, changes in (
        ("llama", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("mistral", {"sliding_window": 6}),
        ("gemma", {}),
        ("gpt2", {}),
    ):
        folder = tmp_path / family
        tiny_model(family, **changes).save_pretrained(folder / "model")
        forward = PairForward(tiny_model(family, **changes).eval(), "auto", 0, 24)
        scored_store(rows, forward, folder)
        (scratch,) = folder.glob("*.scratch")
        jobs.append(StepsJob(folder / "model", scratch, OptimConfig.model_validate(settings)))
    one, two = (together(family_steps, jobs, OptimConfig(processes=n)) for n in (1, 2))
    for job, ours, theirs in zip(jobs, one, two, strict=True):
        assert len(ours) == len(theirs) == 10
        assert ours[0][0] == pytest.approx(0.693147, abs=1e-5)
        for a, b in zip(ours, theirs, strict=True):
            assert a == pytest.approx(b, rel=1e-4), job.folder.parent.name


def test_what_cannot_be_divided_is_refused(
    scored: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="group_size=3 does not divide 2 processes"):
        trained(scored, tiny_model_dir, tmp_path / "a", processes=2, sharding={"group_size": 3})
    with pytest.raises(ConfigError, match="attention=single is the slow way"):
        trained(scored, tiny_model_dir, tmp_path / "b", processes=2, attention="single")
    tiny_model("gpt2", n_positions=16).save_pretrained(tmp_path / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "gpt2" / name).write_bytes((tiny_model_dir / name).read_bytes())
    with pytest.raises(ConfigError, match="tokens, and the model takes 16; set max_length=16"):
        trained(scored, tmp_path / "gpt2", tmp_path / "d")
    with pytest.raises(ConfigError, match="1 processes on this machine, and torch sees 0 GPUs"):
        trained(scored, tiny_model_dir, tmp_path / "c", device="cuda")


def test_a_rank_that_fails_ends_all_with_its_error() -> None:
    with pytest.raises(DivergedError, match="rank 1 says no"):
        together(fail_on_rank_1, None, OptimConfig(processes=2))


def test_a_rank_that_is_killed_is_an_error_and_no_hang() -> None:
    with pytest.raises(SpinError, match="rank 1 of 2 ended without a word .killed by SIGKILL"):
        together(end_by_signal, None, OptimConfig(processes=2))


def test_two_processes_score_the_same_rows(
    scored: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Also where one shard is there from an attempt before: none is lost."""
    values = {"precision": "fp32", "shard_rows": 3, "processes": 2}
    config = RunConfig.model_validate({"score": values})
    inputs = score.ScoreInputs(scored.with_name("pair"), str(tiny_model_dir))
    two = score.run(config, inputs, tmp_path / "score")
    assert two.info["processes"] == 2
    assert len([f for f in two.files if f.path.startswith("part-")]) == 7
    ours = list(read_rows(sorted((tmp_path / "score").glob("part-*")), SCORED_PAIRS))
    theirs = list(read_rows(sorted(scored.glob("part-*")), SCORED_PAIRS))
    assert [row["prompt_id"] for row in ours] == [row["prompt_id"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["reference_chosen_logprob"] == pytest.approx(
            b["reference_chosen_logprob"], rel=1e-5
        )
