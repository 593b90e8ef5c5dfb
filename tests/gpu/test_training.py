"""Training on a GPU: the same numbers as on the CPU, and no waiting inside a step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.artifacts.shards import ShardStore
from stages.config import TrainConfig
from stages.model import fit as fit_module
from stages.model.checkpoints import Checkpoints
from stages.model.fit import Step, fit
from stages.model.group import open_group
from stages.model.memory import apply_activation_checkpointing, compile_layers
from stages.model.objectives import PairObjective
from stages.model.pairs import COMPILED_LENGTH, PairForward
from stages.objective.losses import PairLossOptions
from tests.families import tiny_model
from tests.scored_pairs import random_rows, scored_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

ROWS = [
    {name: [t % 90 + 3 for t in v] if "ids" in name else v for name, v in row.items()}
    for row in random_rows(16, longest=30)
]


def steps_on(device: Any, tmp_path: Path, keep: ShardStore | None = None, **settings: Any) -> Any:
    values = {"learning_rate": 5e-5, "batch_size": 8, "epochs": 5, "log_every": 4, **settings}
    config = TrainConfig.model_validate({**values, "device": device})
    group = open_group(config)
    model = tiny_model("llama", hidden_size=128, head_dim=64, num_attention_heads=2).to(
        group.device
    )
    apply_activation_checkpointing(model, config.activation_checkpointing)
    multiple = COMPILED_LENGTH if config.compile else 1
    forward = PairForward(model, config.attention, 0, 64, pad_to_multiple=multiple)
    store = scored_store(ROWS, forward.eval(), tmp_path, config.precision)
    if config.compile:
        compile_layers(model)
    objective = PairObjective(
        store, forward, config, PairLossOptions("sigmoid", 0.1, 0.0, False, False, 0.0)
    )
    steps: list[Step] = []
    fit(forward, objective, config, 0, group, steps.append, keep and Checkpoints(keep, 2))
    return steps


def assert_near(ours: list[Step], theirs: list[Step], tolerance: float) -> None:
    assert len(ours) == len(theirs) == 10
    for a, b in zip(ours, theirs, strict=True):
        assert a.loss == pytest.approx(b.loss, abs=tolerance)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=10 * tolerance)


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"precision": "fp32"}, 1e-3),
        ({"precision": "bf16"}, 2e-2),
        ({"precision": "bf16", "attention": "packed"}, 2e-2),
        ({"precision": "bf16", "attention": "padded"}, 2e-2),
        ({"precision": "bf16", "activation_checkpointing": "selective"}, 2e-2),
        ({"precision": "bf16", "compile": True}, 2e-2),
        ({"precision": "bf16", "optimizer": "rmsprop", "betas": (0.9, 0.99)}, 2e-2),
    ],
)
def test_a_gpu_takes_the_same_steps_as_the_cpu(
    tmp_path: Path, settings: dict[str, Any], tolerance: float
) -> None:
    theirs = steps_on("cpu", tmp_path, **settings | {"precision": "fp32", "compile": False})
    assert_near(steps_on("cuda", tmp_path, **settings), theirs, tolerance)


def test_nothing_waits_for_the_gpu_inside_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., bool] = fit_module._Loop._take

    def take(self: Any, step: int, batch: Any, interruption: Any) -> bool:
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first one allocates
        try:
            return real(self, step, batch, interruption)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(fit_module._Loop, "_take", take)
    assert len(steps_on("cuda", tmp_path, precision="bf16")) == 10


def test_a_checkpoint_from_a_gpu_goes_on_there_and_on_a_cpu(tmp_path: Path) -> None:
    settings = {"precision": "fp32", "checkpoint": {"every_steps": 6}}
    for name in ("rows-a", "rows-b", "rows-c", "kept"):
        (tmp_path / name).mkdir()
    whole = steps_on("cuda", tmp_path / "rows-a", **settings)
    keep = ShardStore(tmp_path / "kept", "key")
    steps_on("cuda", tmp_path / "rows-b", keep, **settings)
    for device in ("cuda", "cpu"):
        resumed = steps_on(device, tmp_path / "rows-c", keep, **settings)
        assert [step.is_new for step in resumed] == [False] * 6 + [True] * 4
        assert_near(resumed, whole, 1e-3)
