"""How a global batch is dealt to forward passes and ranks."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from stages.data.tokens import PairTokens
from stages.model.pairs import MASKED_BUDGET, PairForward, placed

SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}
FORWARDS = {
    mode: PairForward(LlamaForCausalLM(LlamaConfig(**SIZES)), mode, 0)
    for mode in ("shared", "packed", "padded")
}


def pair(prompt: int, chosen: int, rejected: int) -> PairTokens:
    return PairTokens([1] * prompt, [1] * chosen, [1] * rejected)


LENGTHS = st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(0, 30))


@pytest.mark.parametrize("mode", FORWARDS)
@given(
    lengths=st.lists(LENGTHS, min_size=1, max_size=24),
    budget=st.integers(8, 200),
    size=st.integers(1, 6),
    num_ranks=st.integers(1, 5),
)
def test_all_ranks_take_equally_many_and_every_row_is_taken_once(
    mode: str, lengths: list[tuple[int, int, int]], budget: int, size: int, num_ranks: int
) -> None:
    forward, pairs = FORWARDS[mode], [pair(*row) for row in lengths]
    dealt = forward.micro_batches(pairs, budget, size, num_ranks)
    assert len(dealt) == num_ranks
    assert len({len(rank) for rank in dealt}) == 1
    assert sorted(i for rank in dealt for micro in rank for i in micro) == list(range(len(pairs)))
    for micro in (m for rank in dealt for m in rank if m):
        if mode == "padded":
            assert len(micro) <= size
        elif num_ranks == 1 and len(micro) > 1:
            assert sum(forward._cost(pairs[i]) for i in micro) <= budget


def test_rows_are_balanced_between_ranks() -> None:
    pairs = [pair(10, length, length) for length in range(1, 65)]
    dealt = FORWARDS["shared"].micro_batches(pairs, 512, 8, num_ranks=4)
    totals = [sum(FORWARDS["shared"]._cost(pairs[i]) for m in rank for i in m) for rank in dealt]
    assert max(totals) <= 1.02 * min(totals)


def test_a_dense_mask_bounds_the_packed_row() -> None:
    window = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8))
    forward = PairForward(window, "auto", 0, max_tokens=900)
    assert forward.mode == "packed"
    pairs = [pair(100, 100, 100)] * 16
    (dealt,) = forward.micro_batches(pairs, 8192, 8)
    assert max(len(micro) for micro in dealt) == MASKED_BUDGET // 400


def test_a_window_longer_than_every_row_hides_nothing() -> None:
    window = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=60))
    assert PairForward(window, "auto", 0, max_tokens=60).mode == "shared"
    assert PairForward(window, "auto", 0, max_tokens=61).mode == "packed"
    assert PairForward(window, "auto", 0).mode == "packed"


def test_what_is_on_a_cpu_already_is_not_copied() -> None:
    layout = FORWARDS["shared"].lay_out([pair(2, 2, 2)])
    assert placed(layout, torch.device("cpu")) is layout


def test_placing_reaches_tensors_inside() -> None:
    layout = FORWARDS["shared"].lay_out([pair(2, 2, 2)])
    moved: Any = placed(layout, torch.device("meta"))
    assert moved.input_ids_T.is_meta
    assert moved.segments.query_offsets_S1.is_meta
    assert moved.segments.parts == layout.segments.parts  # type: ignore[union-attr]
