"""Schedules by hand, and the order of rows."""

import numpy as np
import pytest
import torch

from stages.config import OptimConfig
from stages.data.store import epoch_order
from stages.model.fit import batch_rows
from stages.model.optim import count_steps, learning_rate, make_optimizer


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
