"""Optimizers and learning-rate schedules, as a recipe names them."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from stages.config import OptimConfig


def make_optimizer(parameters: Iterable[Tensor], config: OptimConfig) -> torch.optim.Optimizer:
    """Return AdamW or RMSprop over `parameters`, with weight decay on all of them."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
    return torch.optim.RMSprop(
        parameters,
        lr=config.learning_rate,
        alpha=config.betas[1],
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def count_steps(num_rows: int, config: OptimConfig) -> int:
    """Return the number of optimizer steps; the last batch of an epoch may be smaller."""
    if config.max_steps is not None:
        return config.max_steps
    return max(1, math.ceil(config.epochs * steps_an_epoch(num_rows, config)))


def steps_an_epoch(num_rows: int, config: OptimConfig) -> int:
    """Return how many optimizer steps see every row once."""
    return math.ceil(num_rows / config.batch_size)


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Return the learning rate of step `step`, counted from 0.

    Warm-up rises linearly from 0 (which the first step gets), as in transformers' schedules;
    then linear and cosine fall to 0 after the last step.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.schedule == "linear":
        return config.learning_rate * max(0.0, 1 - progress)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate
