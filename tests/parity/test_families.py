"""The whole way of a pair through models of many families: what is chosen, said, and computed."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.config import ForwardConfig, TrainConfig
from stages.data.tokens import PairTokens, pair_tokens
from stages.errors import DivergedError
from stages.model import pair_forward, pairs
from stages.model.fit import Step, fit
from stages.model.group import open_group
from stages.model.load import load_model
from stages.model.objectives import PairObjective
from stages.model.pair_forward import pair_logprobs_one_at_a_time
from stages.model.pairs import PairForward, check_exact
from stages.model.scoring import score_pairs
from stages.objective.losses import PairLossOptions
from tests.families import PAD, VOCABULARY, tiny_model
from tests.scored_pairs import random_rows, scored_store

ROWS = [
    {name: [t % (VOCABULARY - 3) + 3 for t in v] if "ids" in name else v for name, v in row.items()}
    for row in random_rows(8, longest=16)
]
PAIRS = [pair_tokens(row) for row in ROWS]
LONGEST = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in PAIRS)
FP32 = ForwardConfig(precision="fp32")

# family, changes to its configuration, how it is computed, the reason that is told
CASES: list[tuple[str, dict[str, Any], str, str | None]] = [
    ("llama", {}, "shared", None),
    ("qwen2", {}, "shared", None),
    ("qwen3", {}, "shared", None),
    ("gemma", {}, "shared", None),
    ("gpt2", {}, "shared", None),
    ("mistral", {}, "shared", None),
    ("mistral", {"sliding_window": LONGEST}, "shared", None),
    ("mistral", {"sliding_window": 8}, "packed", "sliding window of 8"),
    ("gemma3_text", {"sliding_window": 8}, "packed", "sliding window of 8"),
    ("gemma2", {"attn_logit_softcapping": 1.0, "sliding_window": 8}, "padded", "soft"),
    ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "padded", "attention sinks"),
    ("bloom", {}, "padded", "ALiBi"),
    ("mamba", {}, "padded", "mamba"),
    ("cohere", {}, "padded", "logit_scale"),
    ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "padded", "not among the families tested"),
]


def saved(family: str, changes: dict[str, Any], folder: Path) -> Path:
    tiny_model(family, attention="eager", **changes).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("family", "changes", "mode", "reason"), CASES)
def test_each_family_goes_the_fastest_way_that_is_exact_and_says_why_not(
    family: str,
    changes: dict[str, Any],
    mode: str,
    reason: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The twin is the plain attention of transformers, every sequence alone."""
    folder = saved(family, changes, tmp_path / "model")
    twin_model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    twin = pair_logprobs_one_at_a_time(twin_model, PAIRS)
    with caplog.at_level(logging.INFO, logger="spin"):
        forward = PairForward(load_model(folder), "auto", PAD, max_tokens=LONGEST)
        check_exact(forward, PAIRS, FP32)
    assert forward.mode == mode
    said = [record.message for record in caplog.records if record.name == "spin"]
    assert len(said) == (reason is not None), said
    assert reason is None or reason in said[0], said
    ours = score_pairs(forward, PAIRS, FP32)
    for (chosen, rejected), their_chosen, their_rejected in zip(
        ours, twin.chosen_B.tolist(), twin.rejected_B.tolist(), strict=True
    ):
        assert chosen == pytest.approx(their_chosen, rel=2e-5)
        assert rejected == pytest.approx(their_rejected, rel=2e-5)


@pytest.mark.parametrize(("family", "changes", "mode", "reason"), CASES)
def test_training_learns_the_same_however_it_is_computed(
    family: str, changes: dict[str, Any], mode: str, reason: str | None, tmp_path: Path
) -> None:
    folder = saved(family, changes, tmp_path / "model")
    ours, twin = (steps_of(folder, tmp_path, attention) for attention in ("auto", "single"))
    assert ours[0].loss == pytest.approx(0.693147, abs=1e-4)
    for a, b in zip(ours, twin, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-3)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-2)
    assert ours[-1].loss < ours[0].loss


def steps_of(folder: Path, tmp_path: Path, attention: Any) -> list[Step]:
    config = TrainConfig(
        learning_rate=1e-3,
        warmup_ratio=0,
        batch_size=len(ROWS),
        epochs=3,
        precision="fp32",
        attention=attention,
    )
    forward = PairForward(load_model(folder), attention, PAD, max_tokens=LONGEST)
    store = scored_store(ROWS, forward, tmp_path)
    options = PairLossOptions("sigmoid", 0.1, 0.0, False, False, 0.0)
    steps: list[Step] = []
    fit(
        forward,
        PairObjective(store, forward, config, options),
        config,
        0,
        open_group(config),
        steps.append,
    )
    return steps


def test_a_wish_that_a_family_cannot_serve_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    PairForward(tiny_model("mistral", sliding_window=8), "shared", PAD, max_tokens=LONGEST)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith("attention: packed without sharing, since mistral has")


def broken(model: Any, layout: Any, chunk_size: int | None = None) -> Any:
    """What a lost prompt would look like: every response a little likelier than it is."""
    out = pair_forward.pair_logprobs_shared(model, layout, chunk_size)
    return pair_forward.PairLogprobs(
        out.chosen_B * 0.98, out.rejected_B, out.chosen_tokens_B, out.rejected_tokens_B
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_start_check_falls_back_where_the_fast_way_is_wrong(
    precision: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forward = PairForward(tiny_model("llama"), "auto", PAD, max_tokens=LONGEST)
    check_exact(forward, PAIRS, ForwardConfig(precision=precision))
    assert forward.mode == "shared"
    monkeypatch.setattr(pairs, "pair_logprobs_shared", broken)
    check_exact(forward, PAIRS, ForwardConfig(precision=precision))
    assert forward.mode == "padded"
    assert "shared differs from one sequence at a time by" in caplog.text
    check_exact(forward, PAIRS, ForwardConfig(precision=precision))


def test_the_start_check_refuses_where_the_recipe_insists(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = PairForward(tiny_model("llama"), "shared", PAD, max_tokens=LONGEST)
    monkeypatch.setattr(pairs, "pair_logprobs_shared", broken)
    with pytest.raises(DivergedError, match="shared differs .* take attention=auto"):
        check_exact(forward, PAIRS, ForwardConfig(attention="shared", precision="fp32"))


def test_the_start_check_looks_at_rows_of_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        pairs,
        "twin_error",
        lambda forward, rows, _: seen.extend(sum(map(len, r)) for r in rows) or 0,
    )
    lengths = [PairTokens([1] * n, [1], [1]) for n in range(1, 65)]
    check_exact(PairForward(tiny_model("llama"), "auto", PAD, 64), lengths[::-1], FP32)
    assert seen[0] == 3
    assert seen[-1] == 66
    assert len(seen) == pairs.CHECKED_ROWS + 1
    assert torch.tensor(seen).diff().min() > 0
