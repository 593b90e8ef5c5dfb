"""How pairs go through a model: one choice, made from its family and the recipe's wish."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

from stages.data.packing import pack
from stages.data.tokens import PairTokens
from stages.model.attention import (
    ATTENTION_NAME,
    build_layout,
    supports_shared,
)
from stages.model.pair_forward import (
    pair_logprobs_one_at_a_time,
    pair_logprobs_padded,
    pair_logprobs_shared,
    supports_chunked_head,
)
from stages.objective.losses import PairLogprobs

log = logging.getLogger("spin")

AttentionMode = Literal["auto", "shared", "packed", "padded", "single"]


class PairForward:
    """Log-probabilities of pairs under one model, by the fastest way that is exact for it.

    `shared` computes a prompt once for both responses; `packed` computes it twice, without
    padding; `padded` is the usual way; `single` runs every sequence alone. All four give the
    same numbers (tests/parity/test_shared_prompts.py).
    """

    def __init__(self, model: Any, mode: AttentionMode, pad_token_id: int) -> None:
        """Choose the way; a wish that the model cannot serve falls back, and says so."""
        self.model = model
        self.pad_token_id = pad_token_id
        self.mode = _choose(model, mode)
        if self.mode in ("shared", "packed"):
            model.set_attn_implementation(ATTENTION_NAME)

    def __call__(self, pairs: Sequence[PairTokens]) -> PairLogprobs:
        """Return summed log-probabilities of both responses of every pair."""
        if self.mode == "single":
            return pair_logprobs_one_at_a_time(self.model, pairs)
        if self.mode == "padded":
            return pair_logprobs_padded(self.model, pairs, self.pad_token_id)
        layout = build_layout(pairs, share=self.mode == "shared").to(self.model.device)
        return pair_logprobs_shared(self.model, layout)

    def micro_batches(
        self, pairs: Sequence[PairTokens], token_budget: int, micro_batch_size: int
    ) -> list[list[int]]:
        """Split pairs, by number, into what one forward pass holds.

        Packed rows fill `token_budget` tokens, a longer one goes alone; padded ones go
        `micro_batch_size` at a time, sorted by length so that padding is short.
        """
        costs = [self._cost(pair) for pair in pairs]
        if self.mode in ("padded", "single"):
            by_length = sorted(range(len(pairs)), key=lambda i: (costs[i], i))
            return _cut(by_length, micro_batch_size)
        alone = [[i] for i, cost in enumerate(costs) if cost > token_budget]
        rest = [i for i, cost in enumerate(costs) if cost <= token_budget]
        packed = pack([costs[i] for i in rest], token_budget) if rest else []
        return alone + [[rest[i] for i in group] for group in packed]

    def _cost(self, pair: PairTokens) -> int:
        prompts = 1 if self.mode == "shared" or not len(pair.rejected) else 2
        return prompts * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return the context in which a forward pass runs: bf16 matrix products, or none."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def _cut(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _choose(model: Any, wish: AttentionMode) -> Literal["shared", "packed", "padded", "single"]:
    if wish in ("padded", "single"):
        return wish
    reason = supports_shared(model.config) or supports_chunked_head(model.config)
    if reason is None:
        return "packed" if wish == "packed" else "shared"
    level = logging.INFO if wish == "auto" else logging.WARNING
    log.log(level, "attention: padded, since %s", reason)
    return "padded"
