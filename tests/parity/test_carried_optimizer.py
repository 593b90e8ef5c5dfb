"""Optimizer state from one iteration to the next: as if training had never stopped."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from stages import train
from stages.artifacts import Manifest, read_manifest
from stages.config import RunConfig, TrainConfig
from stages.errors import ConfigError, CorruptError, InputError
from stages.model import fit as fit_module
from stages.model.carried import Carried, open_carried, write_carried
from stages.model.fit import Step, batch_rows, fit
from stages.model.group import open_group
from stages.model.load import load_model
from stages.model.objectives import PairObjective
from stages.model.pairs import PairForward
from stages.model.source import resolve_model
from stages.objective.losses import PairLossOptions
from tests.scored_pairs import random_rows, scored_artifact, scored_store

ROWS = random_rows(20)
CARRIES = {
    "carry_optimizer": True,
    "schedule": "constant",
    "warmup_steps": 5,
    "learning_rate": 1e-3,
    "precision": "fp32",
    "batch_size": 4,
}
WEIGHTS = "model.safetensors"

# -- The loop -------------------------------------------------------------------------------------


def fitted(
    forward: PairForward,
    rows: list[dict[str, Any]],
    folder: Path,
    config: TrainConfig,
    carried: Carried | None = None,
) -> tuple[list[Step], Any]:
    folder.mkdir()
    reference = PairForward(load_model(folder.parent / "model"), "shared", pad_token_id=2)
    store = scored_store(rows, reference, folder, config.precision)
    options = PairLossOptions("sigmoid", 0.1, 0.0, False, False, 0.0)
    objective = PairObjective(store, forward, config, options)
    steps: list[Step] = []
    group = open_group(config)
    trained = fit(forward, objective, config, 0, group, steps.append, None, carried)
    return steps, trained


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_data_a_then_data_b_with_carried_state_are_one_fit_over_both(
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    precision: str,
) -> None:
    """Through the warm-up, which ends in the second; with the weights taken out and put back."""
    (tmp_path / "model").symlink_to(tiny_model_dir)
    a, b = ROWS[:12], ROWS[12:]
    values = {**CARRIES, "optimizer": optimizer, "precision": precision, "weight_decay": 0.1}
    config = TrainConfig.model_validate(values)

    def start() -> PairForward:
        return PairForward(load_model(tiny_model_dir), "shared", pad_token_id=2)

    first = start()
    steps, trained = fitted(first, a, tmp_path / "a", config)
    write_carried(tmp_path / "optimizer", trained, config.optimizer, steps=len(steps))
    second = start()
    second.model.load_state_dict(first.model.state_dict())
    more, _ = fitted(second, b, tmp_path / "b", config, open_carried(tmp_path / "optimizer"))

    def a_then_b(step: int, num_rows: int, config: Any, seed: int) -> list[int]:
        assert num_rows == len(ROWS)
        if step < 3:
            return batch_rows(step, len(a), config, seed)
        return [len(a) + row for row in batch_rows(step - 3, len(b), config, seed)]

    monkeypatch.setattr(fit_module, "batch_rows", a_then_b)
    whole = start()
    unbroken, _ = fitted(whole, ROWS, tmp_path / "whole", config)
    assert (len(steps), len(more), len(unbroken)) == (3, 2, 5)
    for ours, theirs in zip([*steps, *more], unbroken, strict=True):
        for name in ("learning_rate", "loss", "grad_norm", "metrics"):
            assert getattr(ours, name) == getattr(theirs, name), (theirs.step, name)
    assert [step.step for step in more] == [0, 1]
    for name, weight in whole.model.named_parameters():
        assert torch.equal(weight, second.model.get_parameter(name)), name


# -- The stage ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def scored(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs under the model that all begin with: the reference of all iterations."""
    folder = tmp_path_factory.mktemp("scored")
    return scored_artifact(ROWS, tiny_model_dir, folder, RunConfig.model_validate(FP32))


@pytest.fixture(scope="session")
def one_pair(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single pair: its order is the same in every epoch."""
    folder = tmp_path_factory.mktemp("pair")
    return scored_artifact(ROWS[:1], tiny_model_dir, folder, RunConfig.model_validate(FP32))


FP32 = {"score": {"precision": "fp32"}}


def trained(
    pairs: Path, model: Path, out: Path, before: Path | None = None, **settings: Any
) -> Manifest:
    config = RunConfig.model_validate({"train": {**CARRIES, **settings}})
    return train.run(config, train.TrainInputs(pairs, str(model), optimizer_from=before), out)


def rates(out: Path) -> list[float]:
    return pq.read_table(out / "metrics.parquet")["learning_rate"].to_pylist()


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_two_iterations_of_3_steps_are_one_of_6(
    one_pair: Path, tiny_model_dir: Path, tmp_path: Path, optimizer: str
) -> None:
    once, first, second, anew = (tmp_path / name for name in ("once", "first", "second", "anew"))
    trained(one_pair, tiny_model_dir, once, max_steps=6, optimizer=optimizer)
    start = trained(one_pair, tiny_model_dir, first, max_steps=3, optimizer=optimizer)
    then = trained(one_pair, first, second, first, max_steps=3, optimizer=optimizer)
    trained(one_pair, first, anew, max_steps=3, optimizer=optimizer)
    assert (second / WEIGHTS).read_bytes() == (once / WEIGHTS).read_bytes()
    assert (anew / WEIGHTS).read_bytes() != (once / WEIGHTS).read_bytes()
    for name in ("optimizer/state.json", "optimizer/part-00000-of-00001.safetensors"):
        assert (second / name).read_bytes() == (once / name).read_bytes()
        assert name in {f.path for f in then.files}
    assert (start.info["optimizer"], start.info["steps_before"]) == ("fresh", 0)
    assert (then.info["optimizer"], then.info["steps_before"]) == ("first", 3)
    assert then.inputs["optimizer_from"].key == start.key
    assert (then.info["reference_is_opponent"], then.info["reference"]) == (False, "model")
    assert rates(first) + rates(second) == rates(once)


def test_one_step_an_iteration_warms_up_over_iterations(
    one_pair: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """verl's recipe: 15 warm-up steps, the first of which has the rate 0, as in transformers."""
    model, before, found = tiny_model_dir, None, []
    for iteration in range(3):
        out = tmp_path / str(iteration)
        trained(one_pair, model, out, before, max_steps=1, warmup_steps=15)
        found += rates(out)
        model = before = out
    assert found == pytest.approx([0, 1e-3 / 15, 2e-3 / 15])
    same = (tmp_path / "0" / WEIGHTS).read_bytes() == (tiny_model_dir / WEIGHTS).read_bytes()
    assert same, "a first step at the rate 0 changes nothing"


def test_the_state_is_no_part_of_the_model(
    one_pair: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Who only computes with the player does not read it; who goes on with it finds damage."""
    out = tmp_path / "out"
    trained(one_pair, tiny_model_dir, out, max_steps=1)
    file = out / "optimizer" / "part-00000-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    resolve_model(str(out)).verified()
    load_model(out)
    with pytest.raises(CorruptError, match=r"00001.safetensors is damaged"):
        trained(one_pair, out, tmp_path / "next", out, max_steps=1)


def test_a_reference_that_is_not_the_opponent_is_named_once(
    one_pair: Path, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "spin")
    trained(one_pair, tiny_model_dir, tmp_path / "first", max_steps=8)
    assert "is not the opponent" not in caplog.text
    manifest = trained(one_pair, tmp_path / "first", tmp_path / "out", max_steps=1)
    (said,) = [r.getMessage() for r in caplog.records if "is not the opponent" in r.getMessage()]
    assert "the reference (model) is not the opponent, so the first loss need not be ln 2" in said
    assert manifest.metrics["first_loss"] < 0.69
    assert f"{manifest.metrics['first_loss']:.4f} at β=0.1" in said


def test_a_player_saved_in_bf16_loses_what_it_learned(
    one_pair: Path, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"max_steps": 1, "warmup_steps": 0, "learning_rate": 1e-6}
    trained(one_pair, tiny_model_dir, tmp_path / "start", weights_dtype="bfloat16", **settings)
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        trained(one_pair, tmp_path / "start", out, weights_dtype=dtype, **settings)
    assert caplog.text.count("set train.weights_dtype=float32 to keep all") == 2
    before = load_file(tmp_path / "start" / WEIGHTS)
    full, half = (load_file(tmp_path / dtype / WEIGHTS) for dtype in ("float32", "bfloat16"))
    used = {name: (full[name] - weight.float()) != 0 for name, weight in before.items()}
    moved = sum(int(mask.sum()) for mask in used.values())
    kept = sum(int((half[name] != weight)[used[name]].sum()) for name, weight in before.items())
    assert 0 < kept < 0.05 * moved, "most of the step is rounded away"


# -- What cannot be carried -----------------------------------------------------------------------


@pytest.fixture(scope="session")
def carried(one_pair: Path, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("carried") / "train"
    trained(one_pair, tiny_model_dir, out, max_steps=2)
    return out


def test_a_schedule_that_ends_cannot_be_carried() -> None:
    for settings, said in (
        ({"schedule": "linear"}, "set train.schedule=constant"),
        ({"warmup_steps": None}, "set train.warmup_steps=N"),
    ):
        with pytest.raises(ValidationError, match=said):
            RunConfig.model_validate({"train": {**CARRIES, **settings}})


def test_state_of_something_else_is_refused(
    one_pair: Path, tiny_model_dir: Path, carried: Path, tmp_path: Path
) -> None:
    out, model = tmp_path / "out", tiny_model_dir
    with pytest.raises(InputError, match="optimizer=adamw there, rmsprop here"):
        trained(one_pair, model, out, carried, optimizer="rmsprop", max_steps=1)
    with pytest.raises(InputError, match="is the output of 'score', but train is needed"):
        trained(one_pair, model, out, one_pair, max_steps=1)
    with pytest.raises(ConfigError, match="but train.carry_optimizer is false; set it"):
        trained(one_pair, model, out, carried, carry_optimizer=False)
    trained(one_pair, model, tmp_path / "plain", carry_optimizer=False, max_steps=1)
    with pytest.raises(InputError, match="kept no optimizer state, since it was trained without"):
        trained(one_pair, tmp_path / "plain", out, tmp_path / "plain", max_steps=1)
    assert not (tmp_path / "plain" / "optimizer").exists()
    assert not out.exists()


def test_state_of_other_parameters_is_refused(tmp_path: Path, carried: Path) -> None:
    state = open_carried(carried / "optimizer")
    other = dict(state.shapes)
    name = next(iter(other))
    model = {n: torch.nn.Parameter(torch.zeros(shape)) for n, shape in state.shapes.items()}
    like: Any = dataclasses.make_dataclass("Like", ["parameters"])(model)
    state.check_fits("adamw", like)
    model[name] = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(InputError, match=rf"{name} is \({other[name][0]}, .*\) there, \(3,\) here"):
        state.check_fits("adamw", like)
    del model[name]
    with pytest.raises(InputError, match=rf"{name} is .* there, not trained here; give --optim"):
        state.check_fits("adamw", like)


def test_state_from_another_trajectory_is_warned_of(
    one_pair: Path,
    tiny_model_dir: Path,
    carried: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trained(one_pair, carried, tmp_path / "a", carried, max_steps=1)
    assert "on the way to them" not in caplog.text
    trained(one_pair, tiny_model_dir, tmp_path / "b", carried, max_steps=1)
    assert "and the weights are those of model: it was not made on the way to them" in caplog.text


def test_an_adapter_that_is_trained_on_carries_and_a_fresh_one_cannot(
    one_pair: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    lora = {"rank": 3, "alpha": 5, "output": "adapter"}
    once, first, second = (tmp_path / name for name in ("once", "first", "second"))
    trained(one_pair, tiny_model_dir, once, max_steps=6, lora=lora)
    trained(one_pair, tiny_model_dir, first, max_steps=3, lora=lora)
    with pytest.raises(ConfigError, match="lora.start=merged: a fresh adapter has new parameters"):
        trained(one_pair, first, second, first, max_steps=3, lora=lora)
    on = {**lora, "start": "adapter"}
    trained(one_pair, first, second, first, max_steps=3, lora=on)
    ours, theirs = (load_file(out / "adapter_model.safetensors") for out in (second, once))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_blocks_of_8_bits_are_carried_by_as_many_processes(
    one_pair: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    settings = {"optimizer": "adamw_8bit_bnb", "max_steps": 2}
    once, first, second = (tmp_path / name for name in ("once", "first", "second"))
    trained(one_pair, tiny_model_dir, once, **{**settings, "max_steps": 4})
    trained(one_pair, tiny_model_dir, first, **settings)
    trained(one_pair, first, second, first, **settings)
    assert (second / WEIGHTS).read_bytes() == (once / WEIGHTS).read_bytes()


# -- Several processes ----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def alone(scored: Path, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, with its carried second iteration beside it, and one that began anew."""
    out = tmp_path_factory.mktemp("alone") / "first"
    trained(scored, tiny_model_dir, out)
    trained(scored, out, out.with_name("then"), out)
    trained(scored, out, out.with_name("fresh"))
    assert read_manifest(out.with_name("then")).info["optimizer"] == "first"
    return out


@pytest.fixture(scope="session")
def together(scored: Path, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first iteration by two processes."""
    out = tmp_path_factory.mktemp("together") / "first"
    trained(scored, tiny_model_dir, out, processes=2)
    return out


@pytest.mark.parametrize(("first", "then"), [("together", 2), ("together", 1), ("alone", 2)])
def test_any_number_of_processes_goes_on_with_what_any_other_left(
    scored: Path, alone: Path, tmp_path: Path, request: pytest.FixtureRequest, first: str, then: int
) -> None:
    before: Path = request.getfixturevalue(first)
    out, one, fresh = tmp_path / "then", alone.with_name("then"), alone.with_name("fresh")
    manifest = trained(scored, alone, out, before, processes=then)
    assert manifest.info["steps_before"] == 5
    parts = {f.path for f in manifest.files if f.path.startswith("optimizer/part-")}
    assert len(parts) == then
    ours, theirs = (pq.read_table(p / "metrics.parquet").to_pylist() for p in (out, one))
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["learning_rate"] == b["learning_rate"]
    weights, others, anew = (load_file(p / WEIGHTS) for p in (out, one, fresh))
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=0, atol=1e-4)
    assert any(float((w - anew[name]).abs().max()) > 1e-3 for name, w in weights.items())
