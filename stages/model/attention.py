"""Attention for packed rows of pairs, in which both responses of a pair share one prompt.

A row is `[prompt | chosen | rejected] [prompt | chosen | rejected] ...` without padding. The
rejected response's positions restart at the prompt's end; it sees the prompt and itself, not the
chosen response. So the prompt is computed once: (2P + C + R) / (P + C + R) of the work is saved.
Prefix sharing for preference pairs: arXiv 2410.20305.

How it reaches the model: `PairLayout.segments` goes through the base model's forward as the keyword
`spin_segments`, which transformers hands down to the attention function of every layer. It is
bound to the layer's call, so gradient checkpointing recomputes with the same segments. The name
is deliberately absent from transformers' `AttentionMaskInterface`: with no mask function
transformers builds no mask, and does not take the restarting positions for new documents.

Shape legend: T = tokens of the row, B = pairs, N = response tokens, S = segments, K = keys after
gathering, H = query heads, G = key/value heads (H is a multiple of G), E = width of one head.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from stages.data.tokens import PairTokens

ATTENTION_NAME = "spin_shared"

CAUSAL_BLOCK = 256
"""CPU: causal squares wider than this are cut into two squares and a rectangle. PyTorch's CPU
kernel skips masked keys only in blocks of 512, so it computes a narrower triangle as a whole
square; with 256 forward and backward took 15% less than uncut (1 thread, chat and math traces)."""

SUPPORTED_FAMILIES = frozenset(
    {
        "gemma",
        "gpt2",
        "gpt_neox",
        "llama",
        "mistral",
        "olmo",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
    }
)
"""Values of `config.model_type` for which tests/parity/test_shared_prompts.py shows equality."""


class Segment(NamedTuple):
    """Consecutive queries that see a prefix and, causally, themselves.

    Queries are [start, start + length), the prefix [prefix_start, prefix_start + prefix_length).
    A segment without a prefix is a document of its own.
    """

    start: int
    length: int
    prefix_start: int
    prefix_length: int


class _Piece(NamedTuple):
    """One call of a plain kernel: queries x keys, causal only where both ranges are the same."""

    q: slice
    k: slice
    causal: bool
    first: bool
    """Whether no earlier piece covers these queries."""


@dataclass(frozen=True)
class Segments:
    """Who sees whom in one packed row: the only thing the attention function needs to know."""

    parts: tuple[Segment, ...]
    """They cover the row's queries exactly once, in order."""
    query_offsets_S1: Tensor
    """int32 cumulative query lengths, as variable-length kernels want them."""
    key_offsets_S1: Tensor
    """int32 cumulative lengths of each segment's keys, prefix first, after gathering."""
    key_index_K: Tensor | None
    """Row index of each gathered key; None where no segment has a prefix: the keys are the row."""
    longest_query: int
    longest_key: int

    @functools.cached_property
    def pieces(self) -> tuple[_Piece, ...]:
        """The CPU's plan: every segment cut into full rectangles and small causal squares."""
        pieces: list[_Piece] = []
        for part in self.parts:
            pieces += _causal_pieces(part.start, part.start + part.length)
            if part.prefix_length:
                queries = slice(part.start, part.start + part.length)
                keys = slice(part.prefix_start, part.prefix_start + part.prefix_length)
                pieces.append(_Piece(queries, keys, causal=False, first=False))
        return tuple(pieces)

    @functools.cached_property
    def mask_TT(self) -> Tensor:
        """Dense boolean mask of the row, true = sees. O(T^2): for the slow twin."""
        last = self.parts[-1]
        tokens = last.start + last.length
        mask_TT = np.zeros((tokens, tokens), dtype=bool)
        for start, length, prefix_start, prefix_length in self.parts:
            rows = slice(start, start + length)
            mask_TT[rows, rows] = np.tri(length, dtype=bool)
            mask_TT[rows, prefix_start : prefix_start + prefix_length] = True
        return torch.from_numpy(mask_TT).to(self.query_offsets_S1.device)

    def to(self, device: torch.device | str) -> "Segments":
        """Returns the same segments with their tensors on `device`, copied asynchronously."""
        index_K = self.key_index_K
        return replace(
            self,
            query_offsets_S1=self.query_offsets_S1.to(device, non_blocking=True),
            key_offsets_S1=self.key_offsets_S1.to(device, non_blocking=True),
            key_index_K=None if index_K is None else index_K.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class PairLayout:
    """One packed row: what goes into the model, and which outputs score which response."""

    input_ids_T: Tensor
    position_ids_T: Tensor
    segments: Segments
    predictor_N: Tensor
    """Row index of the hidden state that predicts each response token. The first token of either
    response is predicted by the prompt's last."""
    label_N: Tensor
    """The response token itself."""
    owner_N: Tensor
    """2i for the chosen, 2i + 1 for the rejected response of pair i: where to add it up."""
    chosen_tokens_B: Tensor
    rejected_tokens_B: Tensor
    num_padding: int = 0
    """Tokens at the end of the row that predict nothing and that no other token sees."""

    @property
    def num_pairs(self) -> int:
        """Pairs in the row."""
        return self.chosen_tokens_B.shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens of the row, its padding among them."""
        return self.input_ids_T.shape[0]

    @property
    def is_shared(self) -> bool:
        """Whether both responses of a pair use one prompt."""
        return self.segments.key_index_K is not None

    def to(self, device: torch.device | str) -> "PairLayout":
        """Returns the same layout on `device`, copied asynchronously from pinned memory."""
        return PairLayout(
            self.input_ids_T.to(device, non_blocking=True),
            self.position_ids_T.to(device, non_blocking=True),
            self.segments.to(device),
            self.predictor_N.to(device, non_blocking=True),
            self.label_N.to(device, non_blocking=True),
            self.owner_N.to(device, non_blocking=True),
            self.chosen_tokens_B.to(device, non_blocking=True),
            self.rejected_tokens_B.to(device, non_blocking=True),
            self.num_padding,
        )


def build_layout(pairs: Sequence[PairTokens], share: bool, pad_to_multiple: int = 1) -> PairLayout:
    """Lays pairs out one after another in one row; tensors on the CPU.

    With `share`, pair i takes P + C + R tokens, else [prompt | chosen] and [prompt | rejected]
    are documents of their own and it takes 2P + C + R. An empty rejected response takes nothing
    and scores 0: so supervised rows go the same way. Raises ValueError, naming the pair, for an
    empty prompt (nothing would predict the first token) or an empty chosen response.

    `pad_to_multiple` rounds the row's length up, for compiled layers: padding is documents of
    their own, none longer than the row's longest sequence, so that neither the model's table of
    positions nor a sliding window is too short for it.

    Example, one pair with P = 2, C = 2, R = 1, shared:
        input_ids   p0 p1 c0 c1 r0        positions  0 1 2 3 2
        predictor   1  2 | 1              label      c0 c1 | r0      owner  0 0 | 1
    """
    if not pairs:
        raise ValueError("build_layout needs at least one pair")
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    predictors: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    parts: list[Segment] = []
    start = 0
    for i, pair in enumerate(pairs):
        prompt, chosen, rejected = (np.asarray(tokens, dtype=np.int64) for tokens in pair)
        for name, tokens in (("prompt", prompt), ("chosen", chosen)):
            if not tokens.size:
                raise ValueError(f"pair {i} has an empty {name}; drop it in the pair stage")
        prompt_length = prompt.size
        first = Segment(start, prompt_length + chosen.size, 0, 0)
        second_start = start + first.length
        documents = [(prompt, chosen)]
        predictors.append(start + prompt_length - 1 + np.arange(chosen.size))
        parts.append(first)
        if rejected.size and share:
            documents.append((prompt[:0], rejected))
            before_rejected = np.arange(second_start - 1, second_start + rejected.size - 1)
            before_rejected[0] = start + prompt_length - 1
            predictors.append(before_rejected)
            parts.append(Segment(second_start, rejected.size, start, prompt_length))
        elif rejected.size:
            documents.append((prompt, rejected))
            predictors.append(second_start + prompt_length - 1 + np.arange(rejected.size))
            parts.append(Segment(second_start, prompt_length + rejected.size, 0, 0))
        for head, response in documents:
            ids += (head, response)
            positions.append(np.arange(prompt_length - head.size, prompt_length + response.size))
        labels += (chosen, rejected)
        start = parts[-1].start + parts[-1].length

    num_padding = -start % pad_to_multiple
    longest = max(part.prefix_length + part.length for part in parts)
    for first_pad in range(start, start + num_padding, longest):
        length = min(longest, start + num_padding - first_pad)
        ids.append(np.zeros(length, dtype=np.int64))
        positions.append(np.arange(length))
        parts.append(Segment(first_pad, length, 0, 0))

    lengths = np.array([response.size for response in labels])
    return PairLayout(
        input_ids_T=torch.from_numpy(np.concatenate(ids)),
        position_ids_T=torch.from_numpy(np.concatenate(positions)),
        segments=_build_segments(parts, share),
        predictor_N=torch.from_numpy(np.concatenate(predictors)),
        label_N=torch.from_numpy(np.concatenate(labels)),
        owner_N=torch.from_numpy(np.repeat(np.arange(lengths.size), lengths)),
        chosen_tokens_B=torch.from_numpy(lengths[0::2].copy()),
        rejected_tokens_B=torch.from_numpy(lengths[1::2].copy()),
        num_padding=num_padding,
    )


def _build_segments(parts: Sequence[Segment], share: bool) -> Segments:
    query_lengths = np.array([part.length for part in parts])
    key_lengths = np.array([part.prefix_length + part.length for part in parts])
    key_index_K = None
    if share:
        ranges = [
            np.arange(begin, begin + length)
            for part in parts
            for begin, length in ((part.prefix_start, part.prefix_length), part[:2])
        ]
        key_index_K = torch.from_numpy(np.concatenate(ranges))
    return Segments(
        parts=tuple(parts),
        query_offsets_S1=_offsets(query_lengths),
        key_offsets_S1=_offsets(key_lengths),
        key_index_K=key_index_K,
        longest_query=int(query_lengths.max()),
        longest_key=int(key_lengths.max()),
    )


def _offsets(lengths: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def _causal_pieces(start: int, stop: int) -> list[_Piece]:
    if stop - start <= CAUSAL_BLOCK:
        rows = slice(start, stop)
        return [_Piece(rows, rows, causal=True, first=True)]
    middle = start + (stop - start + 1) // 2
    return [
        *_causal_pieces(start, middle),
        *_causal_pieces(middle, stop),
        _Piece(slice(middle, stop), slice(start, middle), causal=False, first=False),
    ]


def supports_shared(config: PretrainedConfig, max_tokens: int | None = None) -> str | None:
    """None if packed rows of pairs are exact for this model, else the reason in one line.

    `max_tokens` is the longest prompt + response of the data: a sliding window that long never
    hides anything, so Mistral 7B v0.1 (window 4,096) is supported at 2,048 tokens.
    """
    family = config.model_type
    layer_types = set(getattr(config, "layer_types", None) or ())
    other_layers = layer_types - {"full_attention", "sliding_attention"}
    rope = getattr(config, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "default")
    window = getattr(config, "sliding_window", None)
    if "full_attention" in layer_types and "sliding_attention" not in layer_types:
        window = None
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"{family} soft-caps its attention scores"
    if getattr(config, "alibi", False) or family in ("bloom", "mpt"):
        return f"{family} biases attention by index (ALiBi), and rejected indices do not restart"
    if family == "gpt_oss":
        return "gpt_oss has attention sinks"
    if other_layers:
        return f"{family} has layers of another kind: {', '.join(sorted(other_layers))}"
    if window is not None and (max_tokens is None or max_tokens > window):
        return f"{family} has a sliding window of {window} and rows may hold {max_tokens} tokens"
    if rope_type in ("dynamic", "longrope"):
        return f"{family} has {rope_type} rotary embeddings, which depend on the whole row's length"
    if getattr(config, "use_bidirectional_attention", None) or not getattr(
        config, "is_causal", True
    ):
        return f"{family} is configured with bidirectional attention"
    if family not in SUPPORTED_FAMILIES:
        return f"{family} is not among the families tested: {', '.join(sorted(SUPPORTED_FAMILIES))}"
    return None


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Runs `model` with another attention for a while, such as "sdpa" for evaluation."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def shared_attention(
    module: nn.Module,
    query_1HTE: Tensor,
    key_1GTE: Tensor,
    value_1GTE: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    spin_segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; returns (output_1THE, None).

    Refuses, rather than ignores, what it would get wrong: a call without segments, a batch of
    more than one row, a mask, dropout, soft-capping, sinks, a position bias, a window shorter
    than a segment.
    """
    if spin_segments is None:
        raise ValueError(
            f"attention {ATTENTION_NAME} was called without spin_segments; call the model through "
            "pair_logprobs, or inside attention_implementation(model, 'sdpa')"
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attention {ATTENTION_NAME} cannot do {name}; see supports_shared")
    window = kwargs.get("sliding_window")
    if window is not None and window < spin_segments.longest_key:
        raise ValueError(
            f"a sequence of {spin_segments.longest_key} tokens does not fit the sliding window of "
            f"{window}; see supports_shared"
        )
    if dropout:
        raise ValueError(f"attention dropout is {dropout}; set it to 0, as for all pair training")
    assert attention_mask is None, f"{ATTENTION_NAME} takes segments, not a mask"
    assert query_1HTE.shape[0] == 1, f"one packed row at a time, not {query_1HTE.shape[0]}"
    output_dtype = dtype = value_1GTE.dtype
    if query_1HTE.device.type == "cpu":
        # PyTorch's CPU kernel takes 1.3 to 1.6 times as long in bf16 as in fp32.
        dtype = torch.promote_types(dtype, torch.float32)
    # Under autocast rotary embeddings leave fp32 queries and keys beside bf16 values.
    query_1HTE, key_1GTE, value_1GTE = (x.to(dtype) for x in (query_1HTE, key_1GTE, value_1GTE))
    scale = query_1HTE.shape[-1] ** -0.5 if scaling is None else scaling
    if query_1HTE.is_cuda and query_1HTE.dtype in (torch.float16, torch.bfloat16):
        attend = _varlen_attention
    elif query_1HTE.device.type == "cpu":
        attend = _segment_attention
    else:
        attend = dense_attention
    output_1THE = attend(query_1HTE, key_1GTE, value_1GTE, spin_segments, scale)
    return output_1THE.to(output_dtype), None


def dense_attention(
    query_1HTE: Tensor, key_1GTE: Tensor, value_1GTE: Tensor, segments: Segments, scale: float
) -> Tensor:
    """The slow twin: one dense mask over the row. Also serves fp32 on a GPU. output_1THE."""
    output_1HTE = F.scaled_dot_product_attention(
        query_1HTE,
        key_1GTE,
        value_1GTE,
        attn_mask=segments.mask_TT,
        scale=scale,
        enable_gqa=query_1HTE.shape[1] != key_1GTE.shape[1],
    )
    return output_1HTE.transpose(1, 2)


def _segment_attention(
    query_1HTE: Tensor, key_1GTE: Tensor, value_1GTE: Tensor, segments: Segments, scale: float
) -> Tensor:
    output_1THE: Tensor = _SegmentAttention.apply(  # type: ignore[no-untyped-call]
        query_1HTE, key_1GTE, value_1GTE, segments.pieces, scale
    )
    return output_1THE


class _SegmentAttention(torch.autograd.Function):
    """CPU: PyTorch's flash kernel on views of the row, one piece after another.

    Queries that see several key ranges are merged by their log-sum-exp, and the kernel's backward
    pass takes the merged output and log-sum-exp, which makes each piece's gradient exact (as in
    ring attention, arXiv 2310.01889). So nothing is gathered and no mask exists; and one autograd
    node writes the whole row's gradient, where slicing would allocate a row for every segment.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_1HTE: Tensor,
        key_1GTE: Tensor,
        value_1GTE: Tensor,
        pieces: tuple[_Piece, ...],
        scale: float,
    ) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        _, heads, tokens, width = query_1HTE.shape
        output_1THE = query_1HTE.new_empty((1, tokens, heads, width))
        output_1HTE = output_1THE.transpose(1, 2)
        lse_1HT = query_1HTE.new_empty((1, heads, tokens))
        for q, k, causal, first in pieces:
            key, value = key_1GTE[:, :, k], value_1GTE[:, :, k]
            piece_1HTE, piece_lse_1HT = flash(
                query_1HTE[:, :, q], key, value, 0.0, causal, scale=scale
            )
            if first:
                output_1HTE[:, :, q] = piece_1HTE
                lse_1HT[:, :, q] = piece_lse_1HT
                continue
            merged_1HT = torch.logaddexp(lse_1HT[:, :, q], piece_lse_1HT)
            old_1HT1 = (lse_1HT[:, :, q] - merged_1HT).exp_().unsqueeze(-1)
            new_1HT1 = (piece_lse_1HT - merged_1HT).exp_().unsqueeze(-1)
            output_1HTE[:, :, q] = output_1HTE[:, :, q] * old_1HT1 + piece_1HTE * new_1HT1
            lse_1HT[:, :, q] = merged_1HT
        ctx.save_for_backward(query_1HTE, key_1GTE, value_1GTE, output_1THE, lse_1HT)
        ctx.pieces, ctx.scale = pieces, scale
        return output_1THE

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        query_1HTE, key_1GTE, value_1GTE, output_1THE, lse_1HT = ctx.saved_tensors
        output_1HTE = output_1THE.transpose(1, 2)
        grad_1HTE = grads[0].transpose(1, 2)
        grad_query_1HTE = torch.empty_like(query_1HTE)
        grad_key_1GTE = torch.zeros_like(key_1GTE)
        grad_value_1GTE = torch.zeros_like(value_1GTE)
        for q, k, causal, first in ctx.pieces:
            piece_query, piece_key, piece_value = flash_backward(
                grad_1HTE[:, :, q],
                query_1HTE[:, :, q],
                key_1GTE[:, :, k],
                value_1GTE[:, :, k],
                output_1HTE[:, :, q],
                lse_1HT[:, :, q],
                0.0,
                causal,
                scale=ctx.scale,
            )
            if first:
                grad_query_1HTE[:, :, q] = piece_query
            else:
                grad_query_1HTE[:, :, q] += piece_query
            grad_key_1GTE[:, :, k] += piece_key
            grad_value_1GTE[:, :, k] += piece_value
        return grad_query_1HTE, grad_key_1GTE, grad_value_1GTE, None, None


def _varlen_attention(
    query_1HTE: Tensor, key_1GTE: Tensor, value_1GTE: Tensor, segments: Segments, scale: float
) -> Tensor:
    """CUDA: one variable-length call; keys are gathered so that each prefix precedes its segment.

    FlashAttention aligns its causal mask to the bottom right when a segment has more keys than
    queries (its README, since 2.1), and torch's `varlen_attn` is the same kernel: query i of R
    sees the P prefix keys and keys 0..i of itself. tests/gpu holds both to the dense twin.
    """
    query_THE = query_1HTE.squeeze(0).transpose(0, 1)
    key_KGE = key_1GTE.squeeze(0).transpose(0, 1)
    value_KGE = value_1GTE.squeeze(0).transpose(0, 1)
    if segments.key_index_K is not None:
        key_KGE = key_KGE.index_select(0, segments.key_index_K)
        value_KGE = value_KGE.index_select(0, segments.key_index_K)
    offsets = (segments.query_offsets_S1, segments.key_offsets_S1)
    longest = (segments.longest_query, segments.longest_key)
    flash = _flash_attn_varlen()
    if flash is not None:
        output = flash(
            query_THE, key_KGE, value_KGE, *offsets, *longest, softmax_scale=scale, causal=True
        )
    else:
        from torch.nn.attention.varlen import varlen_attn

        output = varlen_attn(
            query_THE,
            key_KGE,
            value_KGE,
            *offsets,
            *longest,
            scale=scale,
            window_size=(-1, 0),  # its way to say causal
            enable_gqa=query_THE.shape[1] != key_KGE.shape[1],
        )
    # Some releases of FlashAttention 3 return (output, log-sum-exp).
    output_THE: Tensor = output[0] if isinstance(output, tuple) else output
    return output_THE.unsqueeze(0)


@functools.cache
def _flash_attn_varlen() -> Callable[..., Any] | None:
    """FlashAttention 3, else 2, else None; both take the same leading arguments."""
    try:
        from flash_attn_interface import (  # type: ignore[import-not-found]
            flash_attn_varlen_func,
        )
    except ImportError:
        try:
            from flash_attn import flash_attn_varlen_func
        except ImportError:
            return None
    function: Callable[..., Any] = flash_attn_varlen_func
    return function


AttentionInterface.register(ATTENTION_NAME, shared_attention)
