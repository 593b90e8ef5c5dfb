"""How pairs go through a model: one choice, made from its family and the recipe's wish."""

import itertools
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from stages.config import ForwardConfig
from stages.data.packing import balance, pack
from stages.data.tokens import PairTokens
from stages.errors import DivergedError
from stages.model.attention import (
    ATTENTION_NAME,
    SUPPORTED_FAMILIES,
    PairLayout,
    attention_implementation,
    build_layout,
    supports_shared,
)
from stages.model.pair_forward import (
    PaddedPairs,
    pad_pairs,
    pair_logprobs_one_at_a_time,
    pair_logprobs_padded,
    pair_logprobs_shared,
    supports_chunked_head,
    token_logprobs_padded,
    token_logprobs_shared,
)
from stages.objective.losses import PairLogprobs

log = logging.getLogger("spin")

AttentionMode = Literal["auto", "shared", "packed", "padded", "single"]
PairInput = PairLayout | PaddedPairs | list[PairTokens]
"""What one forward pass takes; which of the three says how it is computed."""

MASKED_BUDGET = 2048
"""Tokens a packed row holds where another attention tells its documents apart by a dense mask,
whose cost grows with the square: 8% of a 7B model's matrix products at this length."""
CHECKED_ROWS = 3
"""Rows, and the longest one, that are compared with the slow twin before a model is used."""
COMPILED_LENGTH = 64
"""Compiled rows are padded to a multiple of this, which matrix kernels like; one code serves all
lengths."""
PACKED_FAMILIES = SUPPORTED_FAMILIES | {"gemma3_text"}
"""Families that tell packed documents apart by restarting positions, sliding windows too."""

_T = TypeVar("_T")


class PairForward(nn.Module):
    """Log-probabilities of pairs under one model, by the fastest way that is exact for it.

    `shared` computes a prompt once for both responses; `packed` computes it twice, without
    padding; `padded` is the usual way; `single` runs every sequence alone. All four give the
    same numbers (tests/parity/test_shared_prompts.py). A module, because what shards a model
    gathers weights around a forward pass: base model and head are both used inside this one.
    """

    def __init__(
        self,
        model: Any,
        wish: AttentionMode,
        pad_token_id: int,
        max_tokens: int | None = None,
        pad_to_multiple: int = 1,
    ) -> None:
        """Choose the way; a wish that the model cannot serve falls back, and says so.

        Args:
            max_tokens: longest prompt and response together; a sliding window no shorter than
                this hides nothing. None: not known.
            pad_to_multiple: packed rows are padded to this many tokens, for compiled layers.
        """
        super().__init__()
        self.model = model
        self.pad_token_id = pad_token_id
        self.pad_to_multiple = pad_to_multiple
        self.compute_device: torch.device | None = None
        """Set where it is not where the weights are."""
        self.mode, self._attention = _choose(model.config, wish, max_tokens)
        if self._attention is not None:
            model.set_attn_implementation(self._attention)

    @property
    def device(self) -> torch.device:
        """Where the model computes; offloaded weights wait elsewhere."""
        found: torch.device = self.compute_device or self.model.device
        return found

    def lay_out(self, pairs: Sequence[PairTokens]) -> PairInput:
        """Return pairs as `forward` takes them, on the CPU."""
        if self.mode == "single":
            return list(pairs)
        if self.mode == "padded":
            return pad_pairs(pairs, self.pad_token_id)
        return build_layout(pairs, self.mode == "shared", self.pad_to_multiple)

    def forward(self, batch: PairInput) -> PairLogprobs:
        """Return summed log-probabilities of both responses of every pair."""
        if isinstance(batch, PairLayout):
            return pair_logprobs_shared(self.model, batch)
        if isinstance(batch, PaddedPairs):
            return pair_logprobs_padded(self.model, batch)
        if self._attention != ATTENTION_NAME:
            return pair_logprobs_one_at_a_time(self.model, batch, self.device)
        with attention_implementation(self.model, "sdpa"):
            return pair_logprobs_one_at_a_time(self.model, batch, self.device)

    def token_logprobs(self, batch: PairInput) -> Tensor:
        """Return logprobs_N of every response token, pair by pair, the chosen response first.

        `single` runs every pair alone, padded.
        """
        if isinstance(batch, PairLayout):
            return token_logprobs_shared(self.model, batch)
        if isinstance(batch, list):
            alone = [placed(pad_pairs([pair], self.pad_token_id), self.device) for pair in batch]
            return torch.cat([self.token_logprobs(one) for one in alone])
        return token_logprobs_padded(self.model, batch)[batch.scored_ST[:, 1:].bool()]

    def fall_back(self) -> None:
        """Go on the usual way, padded."""
        self.mode = "padded"
        if self._attention is not None:
            self._attention = None
            self.model.set_attn_implementation("sdpa")

    def micro_batches(
        self,
        pairs: Sequence[PairTokens],
        token_budget: int,
        micro_batch_size: int,
        num_ranks: int = 1,
    ) -> list[list[list[int]]]:
        """Split pairs, by number, into what one forward pass of one rank holds.

        Packed rows fill `token_budget` tokens, a longer one goes alone; padded ones go
        `micro_batch_size` at a time, sorted by length so that padding is short. All ranks get
        equally many micro-batches of nearly equal size; with fewer rows than that, some are
        empty.

        Returns:
            [rank][micro-batch] -> pair numbers.
        """
        costs = [self._cost(pair) for pair in pairs]
        if self.mode in ("padded", "single"):
            bins = _by_length(costs, micro_batch_size, num_ranks)
            return [bins[rank::num_ranks] for rank in range(num_ranks)]
        if self._attention != ATTENTION_NAME:
            token_budget = min(token_budget, MASKED_BUDGET)
        alone = [[i] for i, cost in enumerate(costs) if cost > token_budget]
        rest = [i for i, cost in enumerate(costs) if cost <= token_budget]
        packed = pack([costs[i] for i in rest], token_budget) if rest else []
        bins = alone + [[rest[i] for i in group] for group in packed]
        if num_ranks == 1:
            return [bins]
        if _rounded_up(len(bins), num_ranks) > len(pairs):
            bins = _one_each(len(pairs), num_ranks)
            return [bins[rank::num_ranks] for rank in range(num_ranks)]
        return balance(bins, costs, num_ranks, max(token_budget, *costs))

    def _cost(self, pair: PairTokens) -> int:
        prompts = 1 if self.mode == "shared" or not len(pair.rejected) else 2
        return prompts * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def twin_error(forward: PairForward, pairs: Sequence[PairTokens], precision: str) -> float:
    """Return how far the fast way is from one sequence at a time, over what rounding explains.

    The worst response of the rows counts; above 1 it is something else that is computed. In bf16
    a token's log-probability is off by about 0.01 either way: ten times that is allowed, and 1%
    of the sum.
    """
    if forward.mode == "single":
        return 0.0
    device = forward.device
    with torch.no_grad(), autocast(device, precision):
        fast = forward(placed(forward.lay_out(pairs), device))
        slow = forward(list(pairs))
    worst = 0.0
    for ours, twin, tokens_B in (
        (fast.chosen_B, slow.chosen_B, slow.chosen_tokens_B),
        (fast.rejected_B, slow.rejected_B, slow.rejected_tokens_B),
    ):
        if precision == "fp32":
            allowed_B = 1e-4 * twin.abs() + 1e-3
        else:
            allowed_B = 1e-2 * twin.abs() + 0.1 * tokens_B.sqrt() + 1e-3
        worst = max(worst, float(((ours - twin).abs() / allowed_B).max()))
    return worst


def check_exact(
    forward: PairForward,
    pairs: Sequence[PairTokens],
    config: ForwardConfig,
    agree: Callable[[int], int] = int,
) -> None:
    """Compare the fast way with its slow twin on a few rows of all lengths, before it is used.

    Where they differ, `attention: auto` goes on padded, and says so.

    Args:
        agree: the highest value of all ranks, so that they decide alike.

    Raises:
        DivergedError: they differ, and the recipe insists on this way.
    """
    by_length = sorted(pairs, key=lambda pair: sum(map(len, pair)))
    chosen = sorted(
        {len(pairs) * i // CHECKED_ROWS for i in range(CHECKED_ROWS)} | {len(pairs) - 1}
    )
    error = twin_error(forward, [by_length[i] for i in chosen], config.precision)
    if not agree(int(not error <= 1)):
        return
    found = (
        f"attention: {forward.mode} differs from one sequence at a time by {error:.3g} times what "
        f"rounding explains, on this {forward.model.config.model_type} model"
    )
    if config.attention != "auto" or forward.mode == "padded":
        raise DivergedError(f"{found}; take attention=auto, and please report it")
    log.warning("%s; going on padded, which is slower", found)
    forward.fall_back()


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return the context in which a forward pass runs: bf16 matrix products, or none."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def placed(value: _T, device: torch.device) -> _T:
    """Return a dataclass with all its tensors, also those of dataclasses inside, on `device`.

    Copies to a GPU do not wait, where the tensors are `pinned`.
    """
    if device.type == "cpu":
        return value
    moved: _T = _mapped(value, lambda tensor: tensor.to(device, non_blocking=True))
    return moved


def pinned(value: _T) -> _T:
    """Return a dataclass with all its tensors in page-locked memory, which a GPU copies from."""
    moved: _T = _mapped(value, lambda tensor: tensor.pin_memory())
    return moved


def _mapped(value: Any, move: Any) -> Any:
    if isinstance(value, Tensor):
        return move(value)
    if is_dataclass(value) and not isinstance(value, type):
        inner = {f.name: getattr(value, f.name) for f in fields(value)}
        changed = {n: _mapped(v, move) for n, v in inner.items() if _holds_tensors(v)}
        return replace(value, **changed)
    return value


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or is_dataclass(value)


def _by_length(costs: Sequence[int], size: int, num_ranks: int) -> list[list[int]]:
    """Return micro-batches of at most `size` rows, a multiple of `num_ranks`, by falling length."""
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    count = _rounded_up(-(-len(order) // size), num_ranks)
    if count > len(order):
        return _one_each(len(order), num_ranks)
    if num_ranks == 1:
        return [order[start : start + size] for start in range(0, len(order), size)]
    cuts = [len(order) * i // count for i in range(count + 1)]
    return [order[start:stop] for start, stop in itertools.pairwise(cuts)]


def _one_each(num_rows: int, num_ranks: int) -> list[list[int]]:
    count = _rounded_up(num_rows, num_ranks)
    return [[i] for i in range(num_rows)] + [[]] * (count - num_rows)


def _rounded_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _choose(
    config: Any, wish: AttentionMode, max_tokens: int | None
) -> tuple[Literal["shared", "packed", "padded", "single"], str | None]:
    """Return the way, and the attention that it needs where it is not the model's own."""
    if wish in ("padded", "single"):
        return wish, None
    head = supports_chunked_head(config)
    reason = head or supports_shared(config, max_tokens)
    if reason is None:
        return ("packed" if wish == "packed" else "shared"), ATTENTION_NAME
    level = logging.INFO if wish == "auto" else logging.WARNING
    if head is None and _packs_by_position(config):
        if wish != "packed":
            log.log(level, "attention: packed without sharing, since %s", reason)
        return "packed", "sdpa"
    log.log(level, "attention: padded, since %s", reason)
    return "padded", None


def _packs_by_position(config: Any) -> bool:
    """Tell whether the model's own attention keeps packed documents apart, sliding windows too.

    Rotary embeddings that depend on the row's length and scores that are soft-capped, which
    torch's kernel cannot do, are left to padded rows.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in PACKED_FAMILIES
        and rope.get("rope_type", "default") not in ("dynamic", "longrope")
        and getattr(config, "attn_logit_softcapping", None) is None
        and not getattr(config, "use_bidirectional_attention", None)
    )
