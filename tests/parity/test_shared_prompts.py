"""Packed rows with shared prompts against one sequence at a time: values and gradients.

Shape legend: B = pairs, T = tokens of a row, H/G = query and key/value heads, E = head width.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from stages.data.tokens import PairTokens
from stages.model import attention
from stages.model.attention import (
    ATTENTION_NAME,
    SUPPORTED_FAMILIES,
    attention_implementation,
    build_layout,
    dense_attention,
    supports_shared,
)
from stages.model.pair_forward import (
    pad_pairs,
    pair_logprobs_one_at_a_time,
    pair_logprobs_padded,
    pair_logprobs_shared,
    supports_chunked_head,
)
from stages.model.pairs import PairForward
from stages.objective.losses import PairLogprobs
from tests.families import PAD, VOCABULARY, tiny_config, tiny_model

FP32_TOLERANCE = 1e-5  # numerics.md, "Parity"

Logprobs = Callable[[PreTrainedModel], PairLogprobs]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks so small that tiny rows are cut like long ones."""
    monkeypatch.setattr(attention, "CAUSAL_BLOCK", 7)
    yield


def make_pairs(lengths: list[tuple[int, int, int]]) -> list[PairTokens]:
    generator = torch.Generator().manual_seed(1)
    return [
        PairTokens(*(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in row))
        for row in lengths
    ]


PAIRS = make_pairs([(5, 9, 4), (1, 1, 1), (18, 2, 25), (3, 21, 16), (12, 8, 8)])


def results(
    model: PreTrainedModel, logprobs: Logprobs, num_pairs: int = len(PAIRS)
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities, and gradients of a random weighing of them."""
    model.zero_grad()
    out = logprobs(model)
    sums = torch.stack([out.chosen_B, out.rejected_B])
    weights = torch.randn(2, num_pairs, generator=torch.Generator().manual_seed(2))
    (sums * weights).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return sums.detach(), grads


def assert_same(
    ours: tuple[Tensor, dict[str, Tensor]],
    twin: tuple[Tensor, dict[str, Tensor]],
    tolerance: float = FP32_TOLERANCE,
) -> None:
    """Relative to each sum, and to each gradient's norm (or 1e-3 of the largest one's)."""
    torch.testing.assert_close(ours[0], twin[0], rtol=tolerance, atol=0)
    assert ours[1].keys() == twin[1].keys()
    largest = max(grad.norm() for grad in twin[1].values())
    for name, grad in twin[1].items():
        difference = (ours[1][name] - grad).norm() / torch.maximum(grad.norm(), 1e-3 * largest)
        assert difference <= tolerance, f"{name}: {difference}"


def one_at_a_time(model: PreTrainedModel) -> PairLogprobs:
    with attention_implementation(model, "sdpa"):
        return pair_logprobs_one_at_a_time(model, PAIRS)


def padded(model: PreTrainedModel) -> PairLogprobs:
    with attention_implementation(model, "sdpa"):
        return pair_logprobs_padded(model, pad_pairs(PAIRS, PAD))


def packed(model: PreTrainedModel) -> PairLogprobs:
    return pair_logprobs_shared(model, build_layout(PAIRS, share=False), chunk_size=16)


def shared(model: PreTrainedModel) -> PairLogprobs:
    return pair_logprobs_shared(model, build_layout(PAIRS, share=True), chunk_size=16)


@pytest.mark.parametrize("family", sorted(SUPPORTED_FAMILIES))
def test_shared_equals_packed_equals_padded_equals_one_at_a_time(family: str) -> None:
    model = tiny_model(family)
    assert supports_shared(model.config) is None
    assert supports_chunked_head(model.config) is None
    twin = results(model, one_at_a_time)
    assert len(twin[1]) == len(list(model.parameters()))
    assert_same(results(model, padded), twin)
    assert_same(results(model, packed), twin)  # transformers tells the documents apart
    model.set_attn_implementation(ATTENTION_NAME)
    assert_same(results(model, packed), twin)
    assert_same(results(model, shared), twin)
    model.gradient_checkpointing_enable()
    assert_same(results(model, shared), twin)


def test_in_fp64_nothing_is_left_but_rounding() -> None:
    model = tiny_model("gpt2", torch.float64)  # the others' RMS norm computes in fp32
    twin = results(model, one_at_a_time)
    model.set_attn_implementation(ATTENTION_NAME)
    assert_same(results(model, shared), twin, tolerance=1e-11)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_grouped_query_attention(key_heads: int) -> None:
    model = tiny_model("llama", num_key_value_heads=key_heads)
    twin = results(model, one_at_a_time)
    model.set_attn_implementation(ATTENTION_NAME)
    assert_same(results(model, shared), twin)


def test_untied_and_tied_embeddings() -> None:
    for tied in (False, True):
        model = tiny_model("qwen2", tie_word_embeddings=tied)
        twin = results(model, one_at_a_time)
        model.set_attn_implementation(ATTENTION_NAME)
        assert_same(results(model, shared), twin)


def test_bf16_and_autocast_stay_near_fp32() -> None:
    model = tiny_model("qwen3")
    twin, _ = results(model, one_at_a_time)
    model.set_attn_implementation(ATTENTION_NAME)
    with torch.autocast("cpu", torch.bfloat16):
        autocast, _ = results(model, shared)
    half, _ = results(model.to(torch.bfloat16), shared)
    assert autocast.dtype == half.dtype == torch.float32
    torch.testing.assert_close(autocast, twin, rtol=3e-2, atol=0.5)
    torch.testing.assert_close(half, twin, rtol=3e-2, atol=0.5)


def test_rejected_sees_its_prompt_and_not_the_chosen_response() -> None:
    """The trap: restarting positions taken for a new document would lose the prompt silently."""
    model = tiny_model("llama")
    model.set_attn_implementation(ATTENTION_NAME)
    pair = PAIRS[2]

    def logprobs(changed: PairTokens) -> PairLogprobs:
        with torch.no_grad():
            return pair_logprobs_shared(model, build_layout([changed], share=True))

    before = logprobs(pair)
    other_chosen = logprobs(pair._replace(chosen=[3, 4]))
    other_prompt = logprobs(pair._replace(prompt=[*pair.prompt[:-2], 3, pair.prompt[-1]]))
    assert other_chosen.rejected_B.item() == pytest.approx(before.rejected_B.item(), rel=1e-6)
    assert other_chosen.chosen_B.item() != before.chosen_B.item()
    assert abs(other_prompt.rejected_B.item() - before.rejected_B.item()) > 1e-2


def test_transformers_builds_no_mask_for_our_attention() -> None:
    assert ATTENTION_NAME not in ALL_MASK_ATTENTION_FUNCTIONS


def test_layout_worked_by_hand() -> None:
    pairs = [PairTokens([10, 11], [20, 21], [30]), PairTokens([12], [22], [31, 32])]
    layout = build_layout(pairs, share=True)
    assert layout.input_ids_T.tolist() == [10, 11, 20, 21, 30, 12, 22, 31, 32]
    assert layout.position_ids_T.tolist() == [0, 1, 2, 3, 2, 0, 1, 1, 2]
    assert layout.predictor_N.tolist() == [1, 2, 1, 5, 5, 7]
    assert layout.label_N.tolist() == [20, 21, 30, 22, 31, 32]
    assert layout.owner_N.tolist() == [0, 0, 1, 2, 3, 3]
    assert layout.chosen_tokens_B.tolist() == [2, 1]
    assert layout.rejected_tokens_B.tolist() == [1, 2]
    segments = layout.segments
    assert segments.parts == ((0, 4, 0, 0), (4, 1, 0, 2), (5, 2, 0, 0), (7, 2, 5, 1))
    assert segments.query_offsets_S1.tolist() == [0, 4, 5, 7, 9]
    assert segments.key_offsets_S1.tolist() == [0, 4, 7, 9, 12]
    assert segments.key_index_K is not None
    assert segments.key_index_K.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 5, 7, 8]
    assert (segments.longest_query, segments.longest_key) == (4, 4)
    assert layout.is_shared and layout.num_pairs == 2 and layout.num_tokens == 9

    layout = build_layout(pairs, share=False)
    assert layout.input_ids_T.tolist() == [10, 11, 20, 21, 10, 11, 30, 12, 22, 12, 31, 32]
    assert layout.position_ids_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 1, 2]
    assert layout.predictor_N.tolist() == [1, 2, 5, 7, 9, 10]
    assert layout.owner_N.tolist() == [0, 0, 1, 2, 3, 3]
    assert layout.segments.key_offsets_S1.tolist() == [0, 4, 7, 9, 12]
    assert not layout.is_shared


@pytest.mark.parametrize("share", [False, True])
def test_pieces_equal_the_dense_mask(share: bool) -> None:
    segments = build_layout(PAIRS, share).segments
    seen_TT = torch.zeros_like(segments.mask_TT, dtype=torch.int64)
    for q, k, causal, _ in segments.pieces:
        block = torch.ones(q.stop - q.start, k.stop - k.start, dtype=torch.int64)
        seen_TT[q, k] += block.tril() if causal else block
    assert torch.equal(seen_TT, segments.mask_TT.long()), "each visible pair exactly once"


@pytest.mark.parametrize("key_heads", [1, 4])
def test_segment_attention_equals_dense_attention(key_heads: int) -> None:
    torch.manual_seed(0)
    layout = build_layout(PAIRS, share=True)
    tokens = layout.num_tokens
    heads = [
        torch.randn(1, n, tokens, 8, dtype=torch.float64, requires_grad=True)
        for n in (4, key_heads, key_heads)
    ]
    grad_1THE = torch.randn(1, tokens, 4, 8, dtype=torch.float64)
    ours = attention._segment_attention(*heads, layout.segments, 0.3)
    twin = dense_attention(*heads, layout.segments, 0.3)
    torch.testing.assert_close(ours, twin)
    for grad, twin_grad in zip(
        torch.autograd.grad(ours, heads, grad_1THE),
        torch.autograd.grad(twin, heads, grad_1THE),
        strict=True,
    ):
        torch.testing.assert_close(grad, twin_grad)


@pytest.mark.parametrize("empty", ["prompt", "chosen"])
def test_an_empty_part_is_an_error_with_its_pair(empty: str) -> None:
    with pytest.raises(ValueError, match=f"pair 1 has an empty {empty}"):
        build_layout([PAIRS[0], PAIRS[1]._replace(**{empty: []})], share=True)


@pytest.mark.parametrize("share", [False, True])
def test_a_row_without_rejected_response_is_scored_on_its_chosen_alone(share: bool) -> None:
    model = tiny_model("llama")
    rows = [pair._replace(rejected=[]) if i % 2 else pair for i, pair in enumerate(PAIRS)]
    twin = results(model, lambda model: pair_logprobs_one_at_a_time(model, rows))
    model.set_attn_implementation(ATTENTION_NAME)
    ours = results(model, lambda model: pair_logprobs_shared(model, build_layout(rows, share)))
    assert_same(ours, twin)
    assert (ours[0][1, 1::2] == 0).all()
    assert build_layout(rows, share).num_tokens == sum(
        (1 if share or not p.rejected else 2) * len(p.prompt) + len(p.chosen) + len(p.rejected)
        for p in rows
    )


def test_the_module_gives_the_same() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation(ATTENTION_NAME)
    layout = build_layout(PAIRS, share=True)
    assert torch.equal(
        PairForward(model, "shared", PAD)(layout).chosen_B,
        pair_logprobs_shared(model, layout).chosen_B,
    )


@pytest.mark.parametrize(
    ("family", "changes", "max_tokens", "reason"),
    [
        ("gemma2", {}, None, "gemma2 soft-caps its attention scores"),
        ("mistral", {"sliding_window": 32}, None, "sliding window of 32"),
        ("mistral", {"sliding_window": 32}, 33, "may hold 33 tokens"),
        ("mistral", {"sliding_window": 32}, 32, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, 32, "window of 16"),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 16}, 32, None),
        ("gpt_oss", {}, None, "attention sinks"),
        ("bloom", {}, None, "ALiBi"),
        ("qwen3_next", {}, None, "linear_attention"),
        ("mamba", {}, None, "linear_attention"),
        ("opt", {}, None, "opt is not among the families tested"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, None, "dynamic"),
        ("gemma", {"use_bidirectional_attention": True}, None, "bidirectional"),
    ],
)
def test_unsupported_models_are_reported_with_the_reason(
    family: str, changes: dict[str, Any], max_tokens: int | None, reason: str | None
) -> None:
    config = AutoConfig.for_model(family, **changes)
    answer = supports_shared(config, max_tokens)
    assert answer is None if reason is None else reason in str(answer)


def test_heads_that_change_their_logits_are_reported() -> None:
    assert "final_logit_softcapping" in str(supports_chunked_head(tiny_config("gemma2")))
    assert "logits_scaling" in str(supports_chunked_head(tiny_config("granite", logits_scaling=8)))
    assert "logit_scale" in str(supports_chunked_head(tiny_config("cohere")))


def test_a_window_no_shorter_than_every_sequence_is_exact() -> None:
    model = tiny_model("mistral", sliding_window=43)
    twin = results(model, one_at_a_time)
    model.set_attn_implementation(ATTENTION_NAME)
    assert_same(results(model, shared), twin)


def test_packed_rows_run_under_other_attention_for_models_that_cannot_share() -> None:
    model = tiny_model("mistral", sliding_window=8)
    assert_same(results(model, packed), results(model, one_at_a_time))
    with pytest.raises(ValueError, match="needs attention spin_shared, not sdpa"):
        shared(model)


def test_what_would_be_wrong_is_refused() -> None:
    short_window = tiny_model("mistral", sliding_window=8)
    short_window.set_attn_implementation(ATTENTION_NAME)
    with pytest.raises(ValueError, match="does not fit the sliding window of 8"):
        shared(short_window)
    dropout = tiny_model("llama", attention_dropout=0.1)
    dropout.set_attn_implementation(ATTENTION_NAME)
    with pytest.raises(ValueError, match="attention dropout is 0.1; set it to 0"):
        shared(dropout)
    with pytest.raises(ValueError, match="without spin_segments"):
        pair_logprobs_one_at_a_time(dropout.eval(), PAIRS)
