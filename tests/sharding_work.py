"""What the ranks of test_sharded_training do; in a module of its own, for processes to find it."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from stages.config import OptimConfig
from stages.data.store import open_store
from stages.errors import DivergedError
from stages.model.fit import Step, fit
from stages.model.group import open_group
from stages.model.learner import _open
from stages.model.load import empty_copy
from stages.model.objectives import PairObjective
from stages.model.pairs import PairForward
from stages.model.sharding import gathered, open_sharded
from stages.objective.losses import PairLossOptions


@dataclass(frozen=True)
class FamilyJob:
    folder: Path
    out: Path


def gather_family(jobs: list[FamilyJob]) -> None:
    """Open each model in parts, gather it, and save what was gathered."""
    config = OptimConfig()
    group = open_group(config)
    for job in jobs:
        forward = open_sharded(
            job.folder, lambda m: PairForward(m, "auto", 0, 64), group, config.sharding, "fp32"
        )
        rows = next(iter(forward.model.parameters())).to_local().shape[0]
        assert 0 < rows < 50, "each rank has a part of the embeddings"
        state = gathered(forward.model, group, torch.float32)
        if state is not None:
            plain = empty_copy(forward.model)
            plain.load_state_dict(state, strict=False, assign=True)
            plain.tie_weights()
            plain.save_pretrained(job.out)


@dataclass(frozen=True)
class StepsJob:
    folder: Path
    rows: Path
    """A scratch file of scored pairs."""
    config: OptimConfig


def family_steps(jobs: list[StepsJob]) -> list[list[tuple[float, float]]]:
    """Train each model, and return every step's loss and gradient norm."""
    taken = []
    for job in jobs:
        group, store = open_group(job.config), open_store(job.rows)
        renderer: Any = SimpleNamespace(pad_token_id=0)
        forward = _open(job.folder, store, job.config, renderer, group)
        options = PairLossOptions("sigmoid", 0.1, 0.0, False, False, 0.0)
        objective = PairObjective(store, forward, job.config, options)
        steps: list[Step] = []
        fit(forward, objective, job.config, 0, group, steps.append)
        taken.append([(step.loss, step.grad_norm) for step in steps])
    return taken


def fail_on_rank_1(job: None) -> None:
    if os.environ["RANK"] == "1":
        raise DivergedError("rank 1 says no")
    time.sleep(60)


def end_by_signal(job: None) -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
