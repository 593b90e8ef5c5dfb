"""The one training loop: rows in a fixed order, gradient accumulation, clipping, metrics.

It knows nothing of pairs: an `Objective` says how rows become a loss. `sft` and `train` share it.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from stages.config import OptimConfig
from stages.data.store import epoch_order
from stages.errors import ConfigError, DivergedError
from stages.model.optim import count_steps, learning_rate, make_optimizer, steps_an_epoch
from stages.model.pairs import autocast


class Objective(Protocol):
    """How rows become a loss. Row numbers are those of the training set."""

    metric_names: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Number of rows in the training set."""
        ...

    def micro_batches(self, rows: Sequence[int]) -> list[list[int]]:
        """Split a global batch into what one forward pass holds."""
        ...

    def tokens(self, rows: Sequence[int]) -> int:
        """Number of distinct tokens in some rows, for rates."""
        ...

    def loss(self, rows: Sequence[int], batch: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the part of a batch's mean loss that `rows` are, and sums of the metrics.

        The parts of a batch's micro-batches add up to its loss, however it was split.
        """
        ...


@dataclass(frozen=True)
class Step:
    """What one optimizer step was."""

    step: int
    epoch: float
    learning_rate: float
    loss: float
    grad_norm: float
    """Before clipping."""
    metrics: dict[str, float]
    """Means over the rows of the batch."""
    rows: int
    tokens: int
    seconds: float


def make_accelerator() -> Accelerator:
    """Return accelerate's process group and device.

    Precision stays ours (`pairs.autocast`): accelerate's is one for the whole process, while the
    stages of a run may differ.
    """
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"{accelerator.num_processes} processes: training runs in one process as yet; "
            "start spin train without a launcher"
        )
    return accelerator


def fit(
    model: Any,
    objective: Objective,
    config: OptimConfig,
    seed: int,
    accelerator: Accelerator,
    on_step: Callable[[Step], None],
) -> None:
    """Train `model` in place.

    Args:
        on_step: is told every step, after its update.

    Raises:
        DivergedError: a loss or gradient is NaN or infinite; the update was not made.
    """
    model.train()
    _disable_dropout(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = make_optimizer(model.parameters(), config)
    total_steps = count_steps(objective.num_rows, config)
    for step in range(total_steps):
        started = time.monotonic()
        rows = batch_rows(step, objective.num_rows, config, seed)
        rate = learning_rate(step, total_steps, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, sums = _accumulate(objective, rows, accelerator, config.precision)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        _refuse_non_finite(step, loss, float(norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        names = objective.metric_names
        on_step(
            Step(
                step=step,
                epoch=(step + 1) / steps_an_epoch(objective.num_rows, config),
                learning_rate=rate,
                loss=loss,
                grad_norm=float(norm),
                metrics=dict(zip(names, (sums / len(rows)).tolist(), strict=True)),
                rows=len(rows),
                tokens=objective.tokens(rows),
                seconds=time.monotonic() - started,
            )
        )
    model.eval()


def batch_rows(step: int, num_rows: int, config: OptimConfig, seed: int) -> list[int]:
    """Return the row numbers of one global batch; (seed, step) decide them and nothing else."""
    epoch, inside = divmod(step, steps_an_epoch(num_rows, config))
    start = inside * config.batch_size
    order_N = epoch_order(num_rows, seed, epoch)
    return [int(row) for row in order_N[start : start + config.batch_size]]


def _accumulate(
    objective: Objective, rows: Sequence[int], accelerator: Accelerator, precision: str
) -> tuple[float, Tensor]:
    loss = torch.zeros((), dtype=torch.float64)
    sums = torch.zeros(len(objective.metric_names), dtype=torch.float64)
    for micro in objective.micro_batches(rows):
        with autocast(accelerator.device, precision):
            part, metric_sums = objective.loss([rows[i] for i in micro], rows)
        accelerator.backward(part)
        loss += part.detach().double().cpu()
        sums += metric_sums.double().cpu()
    return float(loss), sums


def _refuse_non_finite(step: int, loss: float, norm: float) -> None:
    for name, value in (("loss", loss), ("gradient norm", norm)):
        if not math.isfinite(value):
            raise DivergedError(
                f"step {step}: the {name} is {value}; stopped before the update. Lower the "
                "learning rate, or try precision=fp32"
            )


def _disable_dropout(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
