"""Schedules by hand, the order of rows, and optimizers that stop, stand still and go on."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from stages.config import OptimConfig
from stages.data.store import epoch_order
from stages.errors import ConfigError
from stages.model.fit import batch_rows
from stages.model.optim import (
    count_steps,
    export_state,
    import_state,
    learning_rate,
    make_optimizer,
    set_learning_rate,
    step_unless,
)

LIBRARIES = {"adamw_8bit_torchao": "torchao", "adamw_8bit_bnb": "bitsandbytes"}
OPTIMIZERS = ["adamw", "rmsprop", *LIBRARIES]
WIDTH = 64  # a weight of 4,096 values is the smallest that is kept in 8 bits


def _rates(total: int, **settings: object) -> list[float]:
    config = OptimConfig.model_validate({"learning_rate": 1.0, **settings})
    return [learning_rate(step, total, config) for step in range(total)]


def test_linear_schedule_by_hand() -> None:
    rates = _rates(10, schedule="linear", warmup_steps=2)
    assert rates == pytest.approx([0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_cosine_schedule_by_hand() -> None:
    rates = _rates(4, schedule="cosine", warmup_ratio=0.0)
    assert rates == pytest.approx([1, 0.5 + 2**0.5 / 4, 0.5, 0.5 - 2**0.5 / 4])


def test_constant_schedule_after_warmup() -> None:
    assert _rates(5, schedule="constant", warmup_ratio=0.4) == pytest.approx([0, 0.5, 1, 1, 1])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_equal_those_of_transformers(schedule: str) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=3, num_training_steps=12)
    expected = []
    for _ in range(12):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert _rates(12, schedule=schedule, warmup_steps=3) == pytest.approx(expected)


def test_steps_count_the_last_partial_batch() -> None:
    config = OptimConfig(batch_size=64, epochs=2)
    assert count_steps(49_792, config) == 2 * 778
    assert count_steps(65, config) == 4
    assert count_steps(1, OptimConfig(max_steps=7)) == 7


def test_every_row_is_seen_once_an_epoch_in_another_order_each_time() -> None:
    config = OptimConfig(batch_size=8)
    first = [row for step in range(4) for row in batch_rows(step, 30, config, seed=1)]
    second = [row for step in range(4, 8) for row in batch_rows(step, 30, config, seed=1)]
    assert sorted(first) == sorted(second) == list(range(30))
    assert first != second
    assert np.array_equal(epoch_order(30, 1, 0), first)


def test_rmsprop_is_named_and_takes_its_smoothing_constant() -> None:
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = make_optimizer([parameter], OptimConfig(optimizer="rmsprop", betas=(0.9, 0.99)))
    assert isinstance(optimizer, torch.optim.RMSprop)
    assert optimizer.defaults["alpha"] == 0.99


class Training:
    """A tiny model with its optimizer; every step has gradients of its own."""

    def __init__(self, optimizer: str, sharded: bool = False) -> None:
        if optimizer in LIBRARIES:
            pytest.importorskip(LIBRARIES[optimizer])
        if optimizer == "adamw_8bit_bnb" and sharded:
            pytest.skip("bitsandbytes does not shard")
        self.model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 3))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        if sharded:
            mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
            fully_shard(self.model[0], mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.config = OptimConfig.model_validate(
            {"optimizer": optimizer, "learning_rate": 1e-2, "weight_decay": 0.1}
        )
        self.optimizer = make_optimizer(self.model.parameters(), self.config)

    def backward(self, step: int) -> float:
        inputs = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))
        loss = (self.model(inputs) - inputs[:, :3].sin()).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        return float(loss.detach())

    def take(self, *steps: int) -> None:
        for step in steps:
            self.backward(step)
            set_learning_rate(self.optimizer, 1e-2 / (1 + step))
            step_unless(self.optimizer, torch.tensor(0.0))

    def everything(self) -> dict[str, Tensor]:
        """Copies of weights and state."""
        found = {name: _local(p).clone() for name, p in self.model.named_parameters()}
        for index, state in export_state(self.optimizer).items():
            found |= {f"{index}.{name}": tensor.clone() for name, tensor in state.items()}
        return found


def _local(tensor: Tensor) -> Tensor:
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture
def eager() -> Iterator[None]:
    """torchao's step uncompiled: the same arithmetic without ten seconds of compilation."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(params=[False, True], ids=["whole", "sharded"])
def sharded(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[bool]:
    """Whether parameters are DTensors of `fully_shard`, over a group of one process."""
    if request.param:
        dist.init_process_group(
            "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
        )
    yield request.param
    if request.param:
        dist.destroy_process_group()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_from_exported_state_equals_uninterrupted(
    optimizer: str, sharded: bool, eager: None
) -> None:
    whole = Training(optimizer, sharded)
    whole.take(0, 1, 2)
    first = Training(optimizer, sharded)
    first.take(0, 1, 2)
    second = Training(optimizer, sharded)
    second.model.load_state_dict(first.model.state_dict())
    import_state(second.optimizer, export_state(first.optimizer))
    assert_same_bits(second.everything(), first.everything())
    first.take(9)  # what was imported is a copy
    second.take(3, 4, 5)
    whole.take(3, 4, 5)
    assert_same_bits(second.everything(), whole.everything())


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_torchaos_compiled_step_resumes_bit_for_bit() -> None:
    whole, first, second = (Training("adamw_8bit_torchao") for _ in range(3))
    for training in (whole, first):
        training.take(0, 1)
    second.model.load_state_dict(first.model.state_dict())
    import_state(second.optimizer, export_state(first.optimizer))
    for training in (whole, second):
        training.take(2, 3)
    assert_same_bits(second.everything(), whole.everything())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_exported_state_is_plain_and_live(optimizer: str, sharded: bool, eager: None) -> None:
    training = Training(optimizer, sharded)
    assert export_state(training.optimizer) == {}
    training.take(0)
    state = export_state(training.optimizer)
    large, small = (
        {name: tuple(tensor.shape) for name, tensor in state[index].items()} for index in (0, 1)
    )
    weight, bias, blocks = (WIDTH, WIDTH), (WIDTH,), (WIDTH * WIDTH // 256,)
    if optimizer == "rmsprop":
        assert large == {"step": (), "square_avg": weight}
        assert small == {"step": (), "square_avg": bias}
    elif optimizer == "adamw_8bit_bnb":
        moments = {"state1": weight, "state2": weight, "absmax1": blocks, "absmax2": blocks}
        assert large == {"step": (), **moments}
        assert small == {"step": (), "state1": bias, "state2": bias}
    else:
        assert small == {"step": (), "exp_avg": bias, "exp_avg_sq": bias}
        if optimizer == "adamw":
            assert large == {"step": (), "exp_avg": weight, "exp_avg_sq": weight}
        else:
            for moment in ("exp_avg", "exp_avg_sq"):
                assert large.pop(f"{moment}.codes") == weight
                assert large.pop(f"{moment}.scale") == blocks
            assert large == {"step": ()}
    for tensors in state.values():
        assert all(type(tensor) is Tensor for tensor in tensors.values())
    moment = max(state[0].values(), key=lambda tensor: tensor.numel())
    before = moment.clone()
    training.take(1)
    assert not torch.equal(moment, before)


def test_state_that_does_not_fit_is_refused() -> None:
    adamw, rmsprop = Training("adamw"), Training("rmsprop")
    adamw.take(0)
    with pytest.raises(ConfigError, match="exp_avg of parameter 0 is torch.float32.*needs absent"):
        import_state(rmsprop.optimizer, export_state(adamw.optimizer))
    state = export_state(adamw.optimizer)
    state[1] = state[0]
    with pytest.raises(ConfigError, match=r"parameter 1 is torch.float32 \(64, 64\).*\(64,\)"):
        import_state(Training("adamw").optimizer, state)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_stopped_step_changes_no_bit(optimizer: str, sharded: bool, eager: None) -> None:
    stopped, plain = Training(optimizer, sharded), Training(optimizer, sharded)
    for step in range(3):  # the first time before there is any state
        before = stopped.everything()
        stopped.backward(step)
        for parameter in stopped.model.parameters():
            assert parameter.grad is not None
            parameter.grad.fill_(float("nan"))
        step_unless(stopped.optimizer, torch.tensor(1.0))
        after = stopped.everything()
        if step == 0:  # fused AdamW makes its state, all zeros
            assert all(not after[name].any() for name in after.keys() - before.keys())
            after = {name: after[name] for name in before}
        assert_same_bits(after, before)

        assert stopped.backward(step) == plain.backward(step)
        step_unless(stopped.optimizer, torch.tensor(0.0))
        plain.optimizer.step()
        assert_same_bits(stopped.everything(), plain.everything())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_learning_rate_is_that_of_the_step(optimizer: str, eager: None) -> None:
    training = Training(optimizer)
    before = training.everything()
    training.backward(0)
    set_learning_rate(training.optimizer, 0.0)
    training.optimizer.step()
    assert all(torch.equal(training.everything()[name], before[name]) for name in before)
    set_learning_rate(training.optimizer, 0.5)
    training.optimizer.step()
    assert not any(torch.equal(training.everything()[name], before[name]) for name in before)


@pytest.mark.parametrize("optimizer", LIBRARIES)
def test_eight_bits_learn_as_fp32_does_in_less_memory(optimizer: str, eager: None) -> None:
    ours, twin = Training(optimizer), Training("adamw")
    for step in range(20):
        assert ours.backward(step) == pytest.approx(twin.backward(step), rel=2e-2)
        ours.optimizer.step()
        twin.optimizer.step()
    size, full = (
        sum(t.nbytes for t in export_state(training.optimizer)[0].values())
        for training in (ours, twin)
    )
    assert size < 0.27 * full


@pytest.mark.parametrize(("optimizer", "library"), LIBRARIES.items())
def test_a_missing_library_is_named_with_the_remedy(
    optimizer: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (library, f"{library}.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    config = OptimConfig.model_validate({"optimizer": optimizer})
    message = (
        rf"{optimizer}: {library} cannot be imported .*; pip install 'spin-selfplay\[optim8\]'"
    )
    with pytest.raises(ConfigError, match=message):
        make_optimizer([torch.zeros(1, requires_grad=True)], config)


@pytest.mark.parametrize("sharded", [True], indirect=True)
def test_bitsandbytes_refuses_sharded_parameters(sharded: bool) -> None:
    model = Training("adamw", sharded).model
    config = OptimConfig.model_validate({"optimizer": "adamw_8bit_bnb"})
    with pytest.raises(ConfigError, match="cannot train sharded.*adamw_8bit_torchao"):
        make_optimizer(model.parameters(), config)
