"""Answers from a model that transformers runs: our own decoding loop over a cache of slots.

A slot holds one answer at a time. Its keys and values begin at position 0, so rows of any length
are decoded side by side, and the slot of a finished row takes the next request. The random
numbers of a request come from its own seed, so batching does not change what is drawn.

Shape legend: S slots in use, R rows of a prefill, P prefilled positions, K cached positions that
are looked at, N tokens of an answer, V vocabulary, H heads, G query heads a key head, D their size.
"""

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stages.engines.base import Completion, Request, Sampling, check_finite, check_length
from stages.engines.fleet import Fleet
from stages.engines.places import divide_cores, divide_gpus
from stages.engines.process import TRANSFORMERS
from stages.errors import ConfigError, InputError
from stages.model.load import best_device, load_model

ATTENTION = "spin_slots"
WINDOW_BATCHES = 8  # so many batches of requests are sorted by length together
PREFILL_TOKENS = 4096  # a forward pass; bounds the activations of long prompts
REFILL_SHARE = 16  # a prefill waits until one in so many slots is free
GROWTH = 64  # positions by which the cache grows
# Smaller matrices go to other kernels, whose last bits differ. Padded up to these sizes, a row has
# the same log-probabilities in any company: seen with MKL on x86, in fp32 and up to 190 positions,
# not promised. Beyond, the last bits can differ, and rarely a token with them.
SMALLEST_MATRIX = 16  # rows
WIDTH_STEP = 16  # cached positions come in multiples of it, and are never less than two


class TransformersEngine:
    """See `Engine`. Runs on the current CUDA device where there is one, else on the CPU."""

    def __init__(
        self,
        model_dir: Path,
        *,
        dtype: str,
        max_model_len: int,
        batch_size: int,
        pad_token_id: int,
    ) -> None:
        """Load the model.

        Args:
            dtype: `float32`, `bfloat16`, or `auto`: the former on a CPU, the latter on CUDA.
            max_model_len: longest prompt and answer together, in tokens.
            batch_size: rows decoded together.

        Raises:
            InputError: no loadable model, or one with layers other than attention over all, or
                over a window, of the positions before.
        """
        self._model: Any = None
        self._dtype = dtype
        self._batch_size = batch_size
        self._pad_token_id = pad_token_id
        self._load(model_dir, max_model_len)

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the model knows."""
        return int(self._model.get_input_embeddings().num_embeddings)

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """See `Engine.generate`. At most `WINDOW_BATCHES + 1` batches of requests are held.

        Raises:
            DivergedError: the model's log-probabilities are not finite.
            ConfigError: the GPU's memory does not hold so many rows.
        """
        decoder, source = self.decoder(sampling), iter(requests)
        while True:
            if decoder.is_hungry:
                for request in islice(source, WINDOW_BATCHES * self._batch_size):
                    check_length(request, sampling, self._max_model_len)
                    decoder.add(request)
            if not decoder.busy:
                return
            for completion in decoder.step():
                yield check_finite(completion, self._model_dir)

    def decoder(self, sampling: Sampling) -> "Decoder":
        """Return what answers requests, a step at a time; requests are not checked there."""
        assert self._model is not None, "the engine is closed"
        slots = _Slots(self._model, sampling, self._batch_size, self._pad_token_id, self._reach)
        return Decoder(slots, self._batch_size, self._max_model_len)

    @property
    def whole(self) -> bool:
        """See `KeptEngine.whole`."""
        return True

    def sleep(self) -> None:
        """See `KeptEngine.sleep`: the model is dropped."""
        self.close()

    def can_wake(self, model_dir: Path, *, max_model_len: int) -> bool:
        """See `KeptEngine.can_wake`."""
        return True

    def wake(self, model_dir: Path, *, max_model_len: int, reload: bool) -> None:
        """See `KeptEngine.wake`."""
        self._load(model_dir, max_model_len)

    def close(self) -> None:
        """Free the model's memory."""
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self, model_dir: Path, max_model_len: int) -> None:
        device, dtype = best_device(), self._dtype
        if dtype == "auto":
            dtype = "bfloat16" if device.type == "cuda" else "float32"
        model = load_model(model_dir, getattr(torch, dtype))
        self._reach = _find_reach(model, model_dir, max_model_len)
        AttentionInterface.register(ATTENTION, slot_attention)
        model.set_attn_implementation(ATTENTION)
        self._model = model.to(device)
        self._model_dir = model_dir
        self._max_model_len = max_model_len


class Decoder:
    """Requests that wait, sorted by length a window at a time, and those that are answered."""

    def __init__(self, slots: "_Slots", batch_size: int, max_model_len: int) -> None:
        self._slots, self._batch_size, self._max_model_len = slots, batch_size, max_model_len
        self._refill = max(1, batch_size // REFILL_SHARE)
        self._unsorted: list[Request] = []
        self._sorted = deque[Request]()

    @property
    def busy(self) -> bool:
        """Whether there is a request left to answer."""
        return bool(self._slots.num_live or self._sorted or self._unsorted)

    @property
    def is_hungry(self) -> bool:
        """Whether it could begin more requests than it has."""
        return self._can_admit and len(self._sorted) + len(self._unsorted) < self._slots.num_free

    @property
    def _can_admit(self) -> bool:
        return self._slots.num_live == 0 or self._slots.num_free >= self._refill

    def add(self, request: Request) -> None:
        """Take a request."""
        self._unsorted.append(request)

    def step(self) -> list[Completion]:
        """Draw the next token of every row; return the answers that it finished.

        Raises:
            ConfigError: the GPU's memory does not hold so many rows.
        """
        try:
            if self._can_admit:
                if incoming := self._take(self._slots.num_free):
                    self._slots.admit(incoming)
                else:
                    self._slots.compact()
            return self._slots.step()
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"generate: {self._batch_size} rows of up to {self._max_model_len} tokens do not "
                "fit into the GPU's memory; lower generate.engine.batch_size"
            ) from error

    def _take(self, count: int) -> list[Request]:
        """Return up to so many waiting requests, the longest of a window first."""
        taken: list[Request] = []
        while len(taken) < count and (self._sorted or self._unsorted):
            if not self._sorted:
                by_length = sorted(
                    self._unsorted, key=lambda r: len(r.prompt_token_ids), reverse=True
                )
                self._sorted, self._unsorted = deque(by_length), []
            taken.append(self._sorted.popleft())
        return taken


class _Slots:
    """The rows that are being answered. All state but the lengths lives on the device."""

    def __init__(
        self,
        model: Any,
        sampling: Sampling,
        batch_size: int,
        pad_token_id: int,
        reach: "_Reach",
    ) -> None:
        self._model, self._sampling, self._reach = model, sampling, reach
        self._batch_size, self._pad_token_id = batch_size, pad_token_id
        device = self._device = model.device
        slots, answer = max(batch_size, SMALLEST_MATRIX), sampling.max_new_tokens
        self._cache = _SlotCache(slots)
        self._requests: list[Request | None] = [None] * slots
        # Prompt and answer so far, 0 for a free slot; on the host, where no step waits for it.
        self._length = np.zeros(slots, np.int64)
        self._stops = torch.tensor(sampling.stop_token_ids, dtype=torch.long, device=device)
        self._live = torch.zeros(slots, dtype=torch.bool, device=device)
        self._token = torch.full((slots,), pad_token_id, device=device)
        self._position = torch.zeros(slots, dtype=torch.long, device=device)
        self._count = torch.zeros(slots, dtype=torch.long, device=device)
        self._uniforms = torch.zeros(slots, answer, dtype=torch.float64, device=device)
        self._tokens = torch.zeros(slots, answer, dtype=torch.long, device=device)
        self._logprobs = torch.zeros(slots, answer, device=device)

    @property
    def num_live(self) -> int:
        """Number of rows that are being answered."""
        return int(np.count_nonzero(self._length))

    @property
    def num_free(self) -> int:
        """Number of requests that `admit` may be given."""
        return self._batch_size - self.num_live

    @torch.inference_mode()
    def admit(self, requests: Sequence[Request]) -> None:
        """Put requests into free slots and run their prompts, each but its last token."""
        slots: list[int] = np.flatnonzero(self._length == 0)[: len(requests)].tolist()
        self._start(slots, requests)
        self._prefill(slots, requests)

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Draw the next token of every live row; return the answers that it finished."""
        used = max(int(np.flatnonzero(self._length)[-1]) + 1, SMALLEST_MATRIX)
        live, count = self._live[:used], self._count[:used]
        uniforms_S = self._uniforms[:used].gather(1, count[:, None]).squeeze(1)
        tokens_S, logprobs_S = draw(self._forward(used), uniforms_S, self._sampling)
        self._tokens[:used].scatter_(1, count[:, None], tokens_S[:, None])
        self._logprobs[:used].scatter_(1, count[:, None], logprobs_S[:, None])
        stopped = (tokens_S[:, None] == self._stops).any(1)
        going = live & ~stopped & (count < self._sampling.max_new_tokens - 1)
        completions = self._take((live & ~going).nonzero().squeeze(1), stopped)
        # A slot without a row stays at position 0 and computes what nobody reads.
        self._position[:used] = (self._position[:used] + 1) * going
        self._count[:used] = (count + 1) * going
        self._token[:used] = tokens_S
        self._live[:used] = going
        self._length[self._length > 0] += 1
        return completions

    @torch.inference_mode()
    def compact(self) -> None:
        """Move the last rows into the first free slots, once a quarter of the slots is free."""
        held = np.flatnonzero(self._length)
        if not held.size or held[-1] < SMALLEST_MATRIX or 4 * held.size > 3 * (held[-1] + 1):
            return
        sources: list[int] = held[held >= held.size].tolist()
        holes: list[int] = np.flatnonzero(self._length[: held.size] == 0).tolist()
        at = torch.tensor(sources, device=self._device)
        to = torch.tensor(holes, device=self._device)
        self._cache.move(at, to, int(self._length.max()))
        for state in (self._live, self._token, self._position, self._count, self._uniforms,
                      self._tokens, self._logprobs):  # fmt: skip
            state[to] = state[at]
        self._live[at] = False
        self._position[at] = self._count[at] = 0
        self._length[holes] = self._length[sources]
        self._length[sources] = 0
        for source, hole in zip(sources, holes, strict=True):
            self._requests[hole], self._requests[source] = self._requests[source], None

    def _start(self, slots: list[int], requests: Sequence[Request]) -> None:
        answer, device = self._sampling.max_new_tokens, self._device
        lengths = [len(r.prompt_token_ids) for r in requests]
        uniforms = np.stack(
            [np.random.Generator(np.random.Philox(key=r.seed)).random(answer) for r in requests]
        )
        at = torch.tensor(slots, device=device)
        self._live[at] = True
        self._count[at] = 0
        self._position[at] = torch.tensor(lengths, device=device) - 1
        self._token[at] = torch.tensor([r.prompt_token_ids[-1] for r in requests], device=device)
        self._uniforms[at] = torch.from_numpy(uniforms).to(device)
        self._length[slots] = lengths
        for slot, request in zip(slots, requests, strict=True):
            self._requests[slot] = request

    def _take(self, slots: Tensor, stopped: Tensor) -> list[Completion]:
        """Return the answers in `slots`, and free those."""
        taken: list[int] = slots.tolist()
        if not taken:
            return []
        rows = zip(
            taken,
            (self._count[slots] + 1).tolist(),
            self._tokens[slots].tolist(),
            self._logprobs[slots].tolist(),
            stopped[slots].tolist(),
            strict=True,
        )
        completions = []
        for slot, count, tokens, logprobs, by_stop in rows:
            request = self._requests[slot]
            assert request is not None, "only live slots finish"
            reason = "stop" if by_stop else "length"
            completions.append(
                Completion(request.request_id, tokens[:count], logprobs[:count], reason)
            )
            self._requests[slot] = None
            self._length[slot] = 0
        return completions

    def _prefill(self, slots: list[int], requests: Sequence[Request]) -> None:
        """Fill the cache for the prompts; equal prompts are computed once."""
        targets: dict[tuple[int, ...], list[int]] = {}
        for slot, request in zip(slots, requests, strict=True):
            if len(request.prompt_token_ids) > 1:
                targets.setdefault(tuple(request.prompt_token_ids[:-1]), []).append(slot)
        # A prompt's padding depends on its own length alone, and with it its last bits.
        by_width = groupby(sorted(targets, key=len), key=lambda prompt: self._padded(len(prompt)))
        for width, group in by_width:
            rows = max(1, PREFILL_TOKENS // width)
            while prompts := list(islice(group, rows)):
                self._prefill_group(prompts, [targets[prompt] for prompt in prompts], width)

    def _padded(self, length: int) -> int:
        """Return `length` rounded up: to `SMALLEST_MATRIX`, and to a quarter at most."""
        step = max(SMALLEST_MATRIX, 1 << max(0, (length - 1).bit_length() - 3))
        return min(_round_up(length, step), self._reach.max_model_len)

    def _prefill_group(
        self, prompts: list[tuple[int, ...]], targets: list[list[int]], width: int
    ) -> None:
        # Padded on the right, where the causal mask hides it from the prompt's own tokens.
        ids_RP = np.full((len(prompts), width), self._pad_token_id)
        for row, prompt in enumerate(prompts):
            ids_RP[row, : len(prompt)] = prompt
        source = [row for row, slots in enumerate(targets) for _ in slots]
        self._cache.begin_prefill(
            width,
            slots=torch.tensor([s for slots in targets for s in slots], device=self._device),
            source=torch.tensor(source, device=self._device),
        )
        position_P = torch.arange(width, device=self._device)
        self._model.base_model(
            input_ids=torch.from_numpy(ids_RP).to(self._device),
            position_ids=position_P[None],
            attention_mask=self._reach.prefill_mask(position_P, self._model.dtype),
            past_key_values=self._cache,
            use_cache=True,
        )

    def _forward(self, used: int) -> Tensor:
        """Return the fp32 logits [S, V] that follow the current token of each slot."""
        position_S = self._position[:used]
        width = _round_up(max(int(self._length.max()), WIDTH_STEP + 1), WIDTH_STEP)
        self._cache.begin_decode(width, position_S)
        output = self._model(
            input_ids=self._token[:used, None],
            position_ids=position_S[:, None],
            attention_mask=self._reach.decode_mask(position_S, width, self._model.dtype),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_SV: Tensor = output.logits[:, -1].float()
        return logits_SV


def draw(logits_SV: Tensor, uniforms_S: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw a token a row by inverting the cumulative distribution at a uniform number.

    Temperature comes first, then top-k, then top-p over what top-k left.

    Args:
        logits_SV: the model's own, fp32.
        uniforms_S: fp64, in [0, 1).

    Returns:
        The tokens [S], and their log-probabilities [S] under the untouched logits.
    """
    if sampling.temperature == 0:
        tokens_S = logits_SV.argmax(-1)
    else:
        scaled_SV = logits_SV / sampling.temperature
        ids_SV = None
        vocab = scaled_SV.shape[-1]
        if 0 < sampling.top_k < vocab:
            scaled_SV, ids_SV = scaled_SV.topk(sampling.top_k)
        elif sampling.top_p < 1:
            scaled_SV, ids_SV = scaled_SV.sort(descending=True, stable=True)
        weights_SV = scaled_SV.softmax(-1)
        if sampling.top_p < 1:
            before_SV = weights_SV.cumsum(-1, dtype=torch.float64) - weights_SV
            weights_SV = weights_SV.masked_fill(before_SV >= sampling.top_p, 0.0)
        tokens_S = _invert(weights_SV, uniforms_S)
        if ids_SV is not None:
            tokens_S = ids_SV.gather(1, tokens_S[:, None]).squeeze(1)
    chosen_S = logits_SV.gather(1, tokens_S[:, None]).squeeze(1)
    return tokens_S, chosen_S - logits_SV.logsumexp(-1)


def _invert(weights_SV: Tensor, uniforms_S: Tensor) -> Tensor:
    """Return the first index at which the running share of the weights exceeds the uniform."""
    # fp64: over 150,000 tokens, fp32 sums would lose the rare ones.
    running_SV = weights_SV.cumsum(-1, dtype=torch.float64)
    total_S1 = running_SV[:, -1:]
    # Below the total even after rounding, so that the index has a weight above 0.
    target_S1 = (uniforms_S[:, None] * total_S1).minimum(total_S1.nextafter(total_S1.new_zeros(1)))
    index_S = torch.searchsorted(running_SV, target_S1, right=True).squeeze(1)
    return index_S.clamp_(max=weights_SV.shape[-1] - 1)  # only NaN gets there; it is reported


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token a row, without copying keys for grouped heads; else SDPA's.

    Its slow twin is `sdpa_attention_forward`, which repeats the whole cache at every step for
    models with fewer key heads than query heads, and is slower on a CPU with them all.
    """
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if softcap is not None or sinks is not None:
        return _plain_attention(query, key, value, attention_mask, scaling, softcap, sinks), None
    if query.shape[2] > 1 or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    slots, heads, _, size = query.shape
    key_heads = key.shape[1]
    query_SHGD = query.reshape(slots, key_heads, heads // key_heads, size)
    scores = torch.matmul(query_SHGD * (scaling or size**-0.5), key.transpose(2, 3))
    if attention_mask is not None:
        scores += attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value).reshape(slots, 1, heads, -1), None


def _plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Attention with what SDPA leaves out without a word: soft-capped scores, attention sinks."""
    rows, heads, queries, size = query.shape
    groups = heads // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.matmul(query * (scaling or size**-0.5), key.transpose(2, 3)).float()
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if attention_mask is None and queries > 1:
        attention_mask = _additive(scores.new_ones(queries, queries).tril() > 0, scores.dtype)
    if attention_mask is not None:
        scores += attention_mask
    if sinks_H is not None:  # take a share of the attention, and add nothing
        sinks = sinks_H.float().view(1, heads, 1, 1).expand(rows, heads, queries, 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]].to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2)


@dataclass(frozen=True)
class _Reach:
    """Which earlier positions the layers attend to: all, or the last `window` with their own."""

    max_model_len: int
    window: int | None
    mixed: bool
    """Some layers see all and some a window; those families take a mask for each kind."""

    def prefill_mask(self, position_P: Tensor, dtype: torch.dtype) -> Any:
        """Return the mask for whole prompts; None is plain causal attention."""
        if self.window is None or len(position_P) <= self.window:
            return None
        distance = position_P[:, None] - position_P[None]
        mask = _additive((distance >= 0) & (distance < self.window), dtype)[None, None]
        return {"full_attention": None, "sliding_attention": mask} if self.mixed else mask

    def decode_mask(self, position_S: Tensor, width: int, dtype: torch.dtype) -> Any:
        """Return the mask for one token a slot over the first `width` cached positions."""
        distance = position_S[:, None] - torch.arange(width, device=position_S.device)
        everything = _additive(distance >= 0, dtype)[:, None, None]
        if self.window is None:
            return everything
        near = _additive((distance >= 0) & (distance < self.window), dtype)[:, None, None]
        return {"full_attention": everything, "sliding_attention": near} if self.mixed else near


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -math.inf)


def _find_reach(model: Any, model_dir: Path, max_model_len: int) -> _Reach:
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    default = "sliding_attention" if window else "full_attention"
    kinds = set(getattr(config, "layer_types", None) or [default])
    known = {"full_attention", "sliding_attention"}
    if not model._supports_attention_backend or not kinds <= known:
        raise InputError(
            f"model {model_dir}: the transformers engine cannot run {config.model_type} "
            f"(layers: {', '.join(sorted(kinds))}); set generate.engine.name=vllm"
        )
    if "sliding_attention" not in kinds or window is None or window >= max_model_len:
        window = None
    return _Reach(max_model_len, window, mixed=len(kinds) > 1)


class _SlotCache(Cache):
    """Keys and values, [slot, head, position, size] a layer; every pass is announced to it."""

    def __init__(self, num_slots: int) -> None:
        super().__init__(layers=[])  # none of the library's: `update` is all that models call
        self._num_slots = num_slots
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._width = 0
        self._prefill: tuple[Tensor, Tensor] | None = None
        self._decode: tuple[Tensor, Tensor] | None = None

    def begin_prefill(self, width: int, slots: Tensor, source: Tensor) -> None:
        """Announce prompts from position 0 to `width`: row `source[i]` goes to slot `slots[i]`."""
        self._width, self._prefill, self._decode = width, (slots, source), None

    def begin_decode(self, width: int, position_S: Tensor) -> None:
        """Announce one token a slot, at these positions, where live rows are below `width`."""
        slots = torch.arange(len(position_S), device=position_S.device)
        self._width, self._prefill, self._decode = width, None, (slots, position_S)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of a layer; return those to attend to."""
        keys = self._reserve(self._keys, layer_idx, key_states)
        values = self._reserve(self._values, layer_idx, value_states)
        if self._prefill is not None:
            slots, source = self._prefill
            keys[slots, :, : self._width] = key_states[source]
            values[slots, :, : self._width] = value_states[source]
            return key_states, value_states
        assert self._decode is not None, "the pass was announced"
        slots, position_S = self._decode
        keys[slots, :, position_S] = key_states[:, :, 0]
        values[slots, :, position_S] = value_states[:, :, 0]
        return keys[: len(slots), :, : self._width], values[: len(slots), :, : self._width]

    def move(self, sources: Tensor, targets: Tensor, width: int) -> None:
        """Copy the first `width` positions of some slots to other slots."""
        for state in (*self._keys.values(), *self._values.values()):
            state[targets, :, :width] = state[sources, :, :width]

    def _reserve(self, held: dict[int, Tensor], layer: int, new: Tensor) -> Tensor:
        """Return the layer's tensor, made or grown to hold `width` positions."""
        old = held.get(layer)
        if old is not None and old.shape[2] >= self._width:
            return old
        length = _round_up(self._width, GROWTH)
        # Zeros: what a mask hides must be finite, since 0 times infinity is not 0.
        grown = new.new_zeros(self._num_slots, new.shape[1], length, new.shape[3])
        if old is not None:
            grown[:, :, : old.shape[2]] = old
        held[layer] = grown
        return grown


class TransformersBackend:
    """See `serve.Backend`: the engine in a process of its own, as several side by side are."""

    def __init__(self) -> None:
        self._engine: TransformersEngine | None = None
        self._decoder: Decoder | None = None

    def load_library(self) -> None:
        """Do nothing: importing this file did it."""

    def start(self, arguments: Mapping[str, Any]) -> dict[str, int]:
        """Load the model; the arguments are those of `TransformersEngine`."""
        model_dir = Path(arguments["model_dir"])
        self._engine = TransformersEngine(**{**arguments, "model_dir": model_dir})
        window = (WINDOW_BATCHES + 1) * arguments["batch_size"]
        return {"vocab_size": self._engine.vocab_size, "window": window}

    def begin(self, sampling: Sampling) -> None:
        """Hold this for the requests to come."""
        assert self._engine is not None, "it was started"
        self._decoder = self._engine.decoder(sampling)

    def add(self, index: int, seed: int, prompt: list[int]) -> None:
        """Take a request."""
        assert self._decoder is not None, "requests follow their sampling"
        self._decoder.add(Request(str(index), prompt, seed))

    def drop_all(self) -> None:
        """Forget all requests."""
        self._decoder = None

    @property
    def busy(self) -> bool:
        """Whether there is a request left to answer."""
        return self._decoder is not None and self._decoder.busy

    def step(self) -> list[tuple[int, list[int], list[float], str]]:
        """Draw a token of every row."""
        assert self._decoder is not None, "only a busy engine works"
        return [
            (int(done.request_id), done.token_ids, done.token_logprobs, done.finish_reason)
            for done in self._decoder.step()
        ]

    def sleep(self) -> None:
        """Drop the model."""
        assert self._engine is not None, "it was started"
        self._engine.sleep()

    def wake(self, arguments: Mapping[str, Any]) -> None:
        """Load another model."""
        assert self._engine is not None, "it was started"
        model_dir, length = Path(arguments["model_dir"]), arguments["max_model_len"]
        self._engine.wake(model_dir, max_model_len=length, reload=True)

    def end(self) -> None:
        """Do nothing: it all ends with the process."""


def open_fleet(
    model_dir: Path,
    *,
    processes: int,
    dtype: str,
    max_model_len: int,
    batch_size: int,
    pad_token_id: int,
) -> Fleet:
    """Start several engines side by side, each on a GPU of its own, or sharing the cores.

    Raises:
        InputError: see `TransformersEngine`.
        ConfigError: there are too few GPUs.
        EngineError: a process died.
    """
    on_gpu = best_device().type == "cuda"
    places = divide_gpus("transformers", processes, 1) if on_gpu else divide_cores(processes)
    arguments = {
        "model_dir": os.fspath(model_dir),
        "dtype": dtype,
        "max_model_len": max_model_len,
        "batch_size": batch_size,
        "pad_token_id": pad_token_id,
    }
    return Fleet(
        TRANSFORMERS, arguments, places, os.environ,
        model_dir=model_dir, max_model_len=max_model_len,
    )  # fmt: skip
