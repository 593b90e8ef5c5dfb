"""What the ranks of test_sharded_training do; in a module of its own, for processes to find it."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from stages.config import OptimConfig
from stages.errors import DivergedError
from stages.model.group import open_group
from stages.model.load import empty_copy
from stages.model.pairs import PairForward
from stages.model.sharding import gathered, open_sharded


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


def fail_on_rank_1(job: None) -> None:
    if os.environ["RANK"] == "1":
        raise DivergedError("rank 1 says no")
    time.sleep(60)


def end_by_signal(job: None) -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
