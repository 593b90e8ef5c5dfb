"""The trainer's model, as score and train load it, computing an engine's answers again.

Shape legend: N = tokens of an answer, V = vocabulary, K = tokens kept by top-k.
"""

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from stages.config import ForwardConfig, SamplingConfig
from stages.data.tokens import PairTokens
from stages.model.attention import ATTENTION_NAME, attention_implementation
from stages.model.load import load_model
from stages.model.pairs import PairForward, autocast, check_exact, placed
from stages.model.parity_gap import Answered, Logprobs

Precision = Literal["fp32", "bf16"]


class ParityModel:
    """A loaded model; make it with `loaded`."""

    def __init__(
        self,
        model_dir: Path,
        config: ForwardConfig,
        pad_token_id: int,
        longest: int,
        device: torch.device,
    ) -> None:
        model = load_model(model_dir).to(device)
        self._config = config
        self._forward = PairForward(model, config.attention, pad_token_id, longest)
        self._is_checked = False

    @property
    def mode(self) -> str:
        """How rows go through the model; see `PairForward`."""
        return self._forward.mode

    @property
    def bos_token_ids(self) -> set[int]:
        """The tokens that the model's configuration says texts begin with."""
        model = self._forward.model
        found = {model.config.bos_token_id} if hasattr(model.config, "bos_token_id") else set()
        if model.generation_config is not None:
            found.add(model.generation_config.bos_token_id)
        return {token for token in found if isinstance(token, int)}

    @property
    def max_positions(self) -> float:
        """The longest prompt and response together that the model has positions for."""
        found: float = getattr(self._forward.model.config, "max_position_embeddings", math.inf)
        return found

    def logprobs(self, rows: Sequence[Answered], precision: Precision) -> Logprobs:
        """Return the log-probabilities of the response tokens at temperature 1.

        bf16 is the trainer's: fp32 weights, and matrix products in bf16.

        Raises:
            DivergedError: see `check_exact`.
        """
        pairs = [PairTokens(row.prompt, row.response, ()) for row in rows]
        if not self._is_checked:
            checked = self._config.model_copy(update={"precision": precision})
            check_exact(self._forward, pairs, checked)
            self._is_checked = True
        found = [np.zeros(0)] * len(rows)
        budget, rows_at_a_time = self._config.token_budget, self._config.micro_batch_size
        (groups,) = self._forward.micro_batches(pairs, budget, rows_at_a_time)
        for group in groups:
            lengths = [len(pairs[i].chosen) for i in group]
            logprobs_N = self._token_logprobs([pairs[i] for i in group], precision)
            for i, row_N in zip(group, torch.split(logprobs_N, lengths), strict=True):
                found[i] = row_N.double().numpy()
        return found

    def round_weights(self) -> None:
        """Round the weights to bf16 for good.

        From here on `logprobs(…, "fp32")` runs in bf16 throughout, as engines in bf16 do: residual
        stream, norms and logits too.
        """
        for parameter in self._forward.model.parameters():  # buffers stay, as in `load_model`
            parameter.data = parameter.data.to(torch.bfloat16)
        self._is_checked = True  # as far as it can be: ways differ by more than fp32 may

    @torch.inference_mode()
    def logits(self, row: Answered, most: int, precision: Precision) -> Tensor:
        """Return the fp32 logits [N, V] that the first `most` response tokens were drawn from."""
        forward = self._forward
        response = row.response[:most]
        ids = torch.tensor([[*row.prompt, *response]], device=forward.device)
        with autocast(forward.device, precision), _own_attention(forward.model):
            out: Tensor = forward.model(
                input_ids=ids, use_cache=False, logits_to_keep=len(response) + 1
            ).logits
        return out[0, :-1].float()

    @torch.inference_mode()
    def _token_logprobs(self, pairs: Sequence[PairTokens], precision: Precision) -> Tensor:
        device = self._forward.device
        with autocast(device, precision):
            batch = placed(self._forward.lay_out(pairs), device)
            return self._forward.token_logprobs(batch).float().cpu()


@contextmanager
def loaded(
    model_dir: Path,
    config: ForwardConfig,
    pad_token_id: int,
    rows: Sequence[Answered],
    device: torch.device,
) -> Iterator[ParityModel]:
    """Lend the model of a folder, adapters merged, and free its memory when the block ends.

    Raises:
        InputError: the folder holds no loadable model.
    """
    longest = max(len(row.prompt) + len(row.response) for row in rows) + 1
    model = ParityModel(model_dir, config, pad_token_id, longest, device)
    try:
        yield model
    finally:
        del model._forward
        gc.collect()  # models hold themselves in cycles
        if device.type == "cuda":
            torch.cuda.empty_cache()


def processed_logprobs(logits_NV: Tensor, tokens_N: Tensor, how: SamplingConfig) -> Tensor:
    """Return the log-probabilities of tokens in what is drawn from, not in the model itself.

    Temperature comes first, then top-k, then top-p; the rest is normalised. -inf for a token that
    is left out.
    """
    scaled_NV = logits_NV / how.temperature
    chosen_N = scaled_NV.gather(1, tokens_N[:, None]).squeeze(1)
    if how.top_k == 0 and how.top_p == 1:
        return chosen_N - scaled_NV.logsumexp(-1)
    most = min(how.top_k or scaled_NV.shape[-1], scaled_NV.shape[-1])
    kept_NK = scaled_NV.topk(most).values
    weights_NK = kept_NK.softmax(-1)
    before_NK = weights_NK.cumsum(-1) - weights_NK
    kept_NK = kept_NK.masked_fill(before_NK >= how.top_p, -torch.inf)
    least_N = kept_NK.masked_fill(kept_NK.isinf(), torch.inf).amin(-1)
    logprobs_N = chosen_N - kept_NK.logsumexp(-1)
    return logprobs_N.masked_fill(chosen_N < least_N, -torch.inf)


def _own_attention(model: Any) -> AbstractContextManager[None]:
    """Return the context in which a model that packs rows takes plain ones."""
    if model.config._attn_implementation == ATTENTION_NAME:
        return attention_implementation(model, "sdpa")
    return nullcontext()
