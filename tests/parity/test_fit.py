"""The training loop: what must not change the numbers, and what may only change them a little."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stages.config import ScoreConfig, TrainConfig
from stages.data.tokens import pair_tokens
from stages.errors import DivergedError, InputError
from stages.model import fit as fit_module
from stages.model.fit import Step, fit
from stages.model.group import open_group
from stages.model.load import load_model
from stages.model.memory import apply_activation_checkpointing
from stages.model.objectives import PairObjective
from stages.model.pairs import PairForward
from stages.model.scoring import score_pairs
from stages.objective.losses import PairLossOptions
from tests.scored_pairs import random_rows, scored_store

LN_2 = 0.693147
NUM_PAIRS = 12


def train(
    model_dir: Path,
    tmp_path: Path,
    mode: Any = "shared",
    scale: float = 1.0,
    checkpoints: Any = None,
    rows: list[dict[str, Any]] | None = None,
    **settings: Any,
) -> tuple[list[Step], dict[str, torch.Tensor]]:
    """Train on random pairs; return the steps and the weights after them."""
    defaults = {"learning_rate": 1e-3, "batch_size": NUM_PAIRS, "precision": "fp32", "epochs": 3}
    config = TrainConfig.model_validate({**defaults, **settings})
    forward = PairForward(load_model(model_dir), mode, pad_token_id=2)
    apply_activation_checkpointing(forward.model, config.activation_checkpointing)
    rows = random_rows(NUM_PAIRS) if rows is None else rows
    store = scored_store(rows, forward, tmp_path, config.precision, scale)
    options = PairLossOptions(config.loss, config.beta, 0.0, False, False, config.nll_weight)
    objective = PairObjective(store, forward, config, options, config.control)
    steps: list[Step] = []
    fit(forward, objective, config, 0, open_group(config), steps.append, checkpoints)
    return steps, {name: p.detach().clone() for name, p in forward.model.named_parameters()}


def assert_same(
    one: tuple[list[Step], dict[str, torch.Tensor]],
    other: tuple[list[Step], dict[str, torch.Tensor]],
) -> None:
    for a, b in zip(one[0], other[0], strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-3)
        for name in a.metrics.keys() - {"accuracy"}:  # before any update all are ties
            assert a.metrics[name] == pytest.approx(b.metrics[name], rel=1e-3, abs=1e-4)
    assert one[0][-1].metrics["accuracy"] == other[0][-1].metrics["accuracy"]
    for name, weights in one[1].items():
        torch.testing.assert_close(weights, other[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("shared", {"token_budget": 40}),
        ("packed", {"token_budget": 64}),
        ("padded", {"micro_batch_size": 1}),
        ("padded", {"micro_batch_size": 5}),
        ("single", {"micro_batch_size": 4}),
    ],
)
def test_the_update_does_not_depend_on_how_a_batch_is_split(
    tiny_model_dir: Path, tmp_path: Path, mode: Any, settings: Any
) -> None:
    whole = train(tiny_model_dir, tmp_path, "shared", token_budget=100_000)
    assert_same(train(tiny_model_dir, tmp_path, mode, **settings), whole)


@pytest.mark.parametrize("mode", ["shared", "padded"])
def test_gradient_checkpointing_changes_nothing(
    tiny_model_dir: Path, tmp_path: Path, mode: Any
) -> None:
    plain = train(tiny_model_dir, tmp_path, mode)
    assert_same(train(tiny_model_dir, tmp_path, mode, activation_checkpointing="full"), plain)


@pytest.mark.parametrize("mode", ["shared", "padded"])
def test_bf16_begins_at_ln_2_and_learns_as_fp32_does(
    tiny_model_dir: Path, tmp_path: Path, mode: Any
) -> None:
    full, _ = train(tiny_model_dir, tmp_path, mode)
    half, weights = train(tiny_model_dir, tmp_path, mode, precision="bf16")
    assert half[0].loss == pytest.approx(LN_2, abs=2e-2)
    assert half[-1].loss == pytest.approx(full[-1].loss, abs=2e-2)
    assert all(w.dtype == torch.float32 for w in weights.values())


def test_twice_the_same_is_bit_for_bit_the_same(tiny_model_dir: Path, tmp_path: Path) -> None:
    one, two = (train(tiny_model_dir, tmp_path) for _ in range(2))
    assert [s.loss for s in one[0]] == [s.loss for s in two[0]]
    assert all(torch.equal(w, two[1][name]) for name, w in one[1].items())


def test_rmsprop_learns(tiny_model_dir: Path, tmp_path: Path) -> None:
    steps, _ = train(
        tiny_model_dir, tmp_path, optimizer="rmsprop", betas=(0.9, 0.99), warmup_ratio=0
    )
    assert steps[0].loss == pytest.approx(LN_2, abs=1e-5)
    assert steps[-1].loss < steps[0].loss


def test_the_first_step_of_a_warmup_changes_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    steps, _ = train(tiny_model_dir, tmp_path, warmup_steps=1, max_steps=2)
    assert steps[0].learning_rate == 0
    assert steps[1].loss == steps[0].loss


def test_clipping_bounds_the_update_not_the_report(tiny_model_dir: Path, tmp_path: Path) -> None:
    free, _ = train(tiny_model_dir, tmp_path, max_grad_norm=1e9)
    clipped, _ = train(tiny_model_dir, tmp_path, max_grad_norm=1e-3)
    assert free[0].grad_norm == clipped[0].grad_norm > 1e-3


def test_a_nan_in_the_reference_stops_before_the_update(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(DivergedError, match="step 0: the loss is nan; stopped before the update"):
        train(tiny_model_dir, tmp_path, scale=float("nan"))


def test_batches_are_prepared_beside_training_and_ahead_of_it(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[tuple[str, int]] = []
    lead: list[int] = []
    real_prepare, real_loss = PairObjective.prepare, PairObjective.loss

    def prepare(self: PairObjective, rows: Any, rank: int, num_ranks: int) -> Any:
        prepared.append((threading.current_thread().name, len(rows)))
        return real_prepare(self, rows, rank, num_ranks)

    def loss(self: PairObjective, batch: Any) -> Any:
        lead.append(len(prepared) - len(lead))
        return real_loss(self, batch)

    monkeypatch.setattr(PairObjective, "prepare", prepare)
    monkeypatch.setattr(PairObjective, "loss", loss)
    train(tiny_model_dir, tmp_path, epochs=8)
    assert len(prepared) == len(lead) == 8
    assert all(name.startswith("batches") for name, _ in prepared)
    assert max(lead) > 1, "a batch was ready before it was needed"


def test_metrics_that_are_read_late_are_the_same(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where they stay until `log_every` steps are done."""
    at_once, weights = train(tiny_model_dir, tmp_path, epochs=7)
    monkeypatch.setattr(fit_module, "_steps_unread", lambda group, config: 3)
    late, others = train(tiny_model_dir, tmp_path, epochs=7)
    assert [(s.step, s.loss, s.grad_norm, s.metrics) for s in late] == [
        (s.step, s.loss, s.grad_norm, s.metrics) for s in at_once
    ]
    assert all(torch.equal(w, others[name]) for name, w in weights.items())


def test_checkpoints_come_by_the_clock_too(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minutes = iter(range(1000))
    monkeypatch.setattr(fit_module.time, "monotonic", lambda: 60.0 * next(minutes))
    taken: list[int] = []
    keeper: Any = SimpleNamespace(
        restore=lambda trained: (0, []),
        write=lambda steps, trained, history: taken.append(steps),
        finish=lambda: None,
    )
    train(tiny_model_dir, tmp_path, epochs=9, checkpoints=keeper, checkpoint={"every_minutes": 6})
    assert 2 <= len(taken) <= 5, taken
    train(tiny_model_dir, tmp_path, epochs=3, checkpoints=keeper, checkpoint={"every_steps": 2,
          "every_minutes": None})  # fmt: skip
    assert taken[-1] == 2, "none after the last step, whose weights become the artifact"


WEIGHTED = [
    {},
    {"nll_weight": 0.5, "attention": "padded", "micro_batch_size": 2},
    {"loss": "ipo", "token_budget": 40},
    {"control": True, "token_budget": 40},
]


@pytest.mark.parametrize("settings", WEIGHTED, ids=["sigmoid", "nll", "ipo", "control"])
def test_a_pair_of_weight_2_is_that_pair_twice_and_one_of_weight_0_is_absent(
    tiny_model_dir: Path, tmp_path: Path, settings: Any
) -> None:
    settings = {"epochs": 5, "warmup_steps": 0, **settings}
    mode = settings.pop("attention", "shared")
    first, second, third, *others = random_rows(NUM_PAIRS)
    twice = {**first, "prompt_id": "f" * 32}
    repeated = [first, twice, second, *others]
    weighted = [{**first, "weight": 2.0}, second, {**third, "weight": 0.0}, *others]
    halved = [{**row, "weight": row["weight"] / 2} for row in weighted]
    plain, by_weight, by_half = (
        train(tiny_model_dir, tmp_path, mode, rows=rows, batch_size=len(rows), **settings)
        for rows in (repeated, weighted, halved)
    )
    for a, b, c in zip(plain[0], by_weight[0], by_half[0], strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
        assert b.loss == c.loss, "only the proportions of weights matter"
    for name, weight in plain[1].items():
        torch.testing.assert_close(weight, by_weight[1][name], rtol=1e-4, atol=1e-5)
    unweighted = train(tiny_model_dir, tmp_path, mode, batch_size=NUM_PAIRS, **settings)
    assert unweighted[0][-1].loss != pytest.approx(plain[0][-1].loss, rel=1e-4)


def test_weights_leave_the_metrics_plain_means(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = random_rows(NUM_PAIRS)
    weighted = [{**row, "weight": 0.1 + i % 3} for i, row in enumerate(rows)]
    plain, _ = train(tiny_model_dir, tmp_path, rows=rows)
    other, _ = train(tiny_model_dir, tmp_path, rows=weighted)
    assert plain[0].metrics == other[0].metrics
    assert other[0].loss == pytest.approx(LN_2, abs=1e-6), "ln 2 whatever the weights"
    forward = PairForward(load_model(tiny_model_dir), "single", pad_token_id=2)
    scores = score_pairs(forward, [pair_tokens(row) for row in rows], ScoreConfig(precision="fp32"))
    a_token = [
        chosen / len(row["chosen_token_ids"]) for (chosen, _), row in zip(scores, rows, strict=True)
    ]
    assert plain[0].metrics["chosen_logprob_per_token"] == pytest.approx(sum(a_token) / len(rows))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_weights_that_mean_nothing_are_refused(
    tiny_model_dir: Path, tmp_path: Path, weight: float
) -> None:
    rows = [{**row, "weight": weight} for row in random_rows(NUM_PAIRS)]
    with pytest.raises(InputError, match="they must be 0 or more, and not all 0: run pair and sc"):
        train(tiny_model_dir, tmp_path, rows=rows)
