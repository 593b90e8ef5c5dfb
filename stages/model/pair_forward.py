"""Log-probabilities of pairs under a causal language model: one fast way and its two slow twins.

Shape legend: B = pairs, S = 2B sequences, T = positions of a row or of the longest sequence,
N = response tokens, D = hidden width, V = vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from stages.data.tokens import PairTokens
from stages.model.attention import ATTENTION_NAME, PairLayout
from stages.objective.logprobs import (
    chunked_logprobs,
    logprobs_from_logits,
    token_logprobs_from_logits,
)
from stages.objective.losses import PairLogprobs


def supports_chunked_head(config: PretrainedConfig) -> str | None:
    """None if logits are a plain linear map of the last hidden state, else the reason."""
    for name, neutral in (
        ("final_logit_softcapping", None),
        ("logit_scale", 1.0),
        ("logits_scaling", 1.0),
    ):
        value = getattr(config, name, neutral)
        if value is not None and value != neutral:
            return f"{config.model_type} changes its logits after the head ({name} = {value})"
    return None


def pair_logprobs_shared(
    model: PreTrainedModel, layout: PairLayout, chunk_size: int | None = None
) -> PairLogprobs:
    """Both responses of every pair in one packed row, in one forward of the base model.

    `model` must use the attention "spin_shared" (`model.set_attn_implementation`). A layout
    without sharing also runs with any other attention for which transformers tells packed
    documents apart by their restarting positions; that is the way for models that
    `supports_shared` refuses, as far as `supports_chunked_head` does not. Whole logits never
    exist. Sums are added up in fp64 and returned in fp32: fp32 adds lose 1e-6 of sums near -5,000.
    """
    logprobs_N = token_logprobs_shared(model, layout, chunk_size)
    sums_S = logprobs_N.new_zeros(2 * layout.num_pairs, dtype=torch.float64)
    sums_S = sums_S.index_add(0, layout.owner_N, logprobs_N.double())
    return PairLogprobs(
        chosen_B=sums_S[0::2].to(logprobs_N.dtype),
        rejected_B=sums_S[1::2].to(logprobs_N.dtype),
        chosen_tokens_B=layout.chosen_tokens_B,
        rejected_tokens_B=layout.rejected_tokens_B,
    )


def token_logprobs_shared(
    model: PreTrainedModel, layout: PairLayout, chunk_size: int | None = None
) -> Tensor:
    """Log-probabilities of a packed row's response tokens; `pair_logprobs_shared` adds them up."""
    kwargs = {}
    if model.config._attn_implementation == ATTENTION_NAME:
        kwargs["spin_segments"] = layout.segments
    elif layout.is_shared:
        raise ValueError(
            f"a layout with shared prompts needs attention {ATTENTION_NAME}, not "
            f"{model.config._attn_implementation}; call model.set_attn_implementation"
        )
    decoder: nn.Module = model.get_decoder()
    hidden_TD = decoder(
        input_ids=layout.input_ids_T.unsqueeze(0),
        position_ids=layout.position_ids_T.unsqueeze(0),
        use_cache=False,
        **kwargs,
    ).last_hidden_state.squeeze(0)
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear), f"the head of {type(model).__name__} is {type(head)}"
    return chunked_logprobs(
        hidden_TD.index_select(0, layout.predictor_N),
        head.weight,
        layout.label_N,
        bias_V=head.bias,
        chunk_size=chunk_size,
    )


def pair_logprobs_one_at_a_time(
    model: PreTrainedModel, pairs: Sequence[PairTokens], device: torch.device | None = None
) -> PairLogprobs:
    """The slow twin: each sequence alone through the plain model, with all of its logits.

    `device` is where the model computes, if its weights wait elsewhere.
    """
    device = device or model.device
    sums_S = []
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            if not len(response):  # a supervised row has no rejected response
                sums_S.append(torch.zeros(1, device=device))
                continue
            ids_T = torch.tensor([*pair.prompt, *response], device=device)
            logits_1TV = model(input_ids=ids_T.unsqueeze(0), use_cache=False).logits
            scored_T = torch.arange(1, len(ids_T), device=device) >= len(pair.prompt)
            sums_S.append(logprobs_from_logits(logits_1TV[:, :-1], ids_T[None, 1:], scored_T[None]))
    both_S = torch.cat(sums_S)
    return PairLogprobs(
        chosen_B=both_S[0::2].clone(),
        rejected_B=both_S[1::2].clone(),
        chosen_tokens_B=torch.tensor([len(pair.chosen) for pair in pairs], device=device),
        rejected_tokens_B=torch.tensor([len(p.rejected) for p in pairs], device=device),
    )


@dataclass(frozen=True)
class PaddedPairs:
    """Chosen and rejected sequences, in turns, as one right-padded batch."""

    input_ids_ST: Tensor
    attention_mask_ST: Tensor
    scored_ST: Tensor
    """Which tokens belong to a response."""
    chosen_tokens_B: Tensor
    rejected_tokens_B: Tensor


def pad_pairs(pairs: Sequence[PairTokens], pad_token_id: int) -> PaddedPairs:
    """Return pairs as one right-padded batch, on the CPU."""
    sequences = [
        (pair.prompt, response) for pair in pairs for response in (pair.chosen, pair.rejected)
    ]
    longest = max(len(prompt) + len(response) for prompt, response in sequences)
    ids_ST = torch.full((len(sequences), longest), pad_token_id)
    attention_ST = torch.zeros_like(ids_ST)
    scored_ST = torch.zeros_like(ids_ST)
    for row, (prompt, response) in enumerate(sequences):
        stop = len(prompt) + len(response)
        ids_ST[row, :stop] = torch.tensor([*prompt, *response])
        attention_ST[row, :stop] = 1
        scored_ST[row, len(prompt) : stop] = 1
    return PaddedPairs(
        ids_ST,
        attention_ST,
        scored_ST,
        chosen_tokens_B=torch.tensor([len(pair.chosen) for pair in pairs]),
        rejected_tokens_B=torch.tensor([len(pair.rejected) for pair in pairs]),
    )


def pair_logprobs_padded(model: PreTrainedModel, batch: PaddedPairs) -> PairLogprobs:
    """The usual way: one right-padded batch, with all of its logits."""
    sums_S = token_logprobs_padded(model, batch).sum(-1)
    return PairLogprobs(
        chosen_B=sums_S[0::2].clone(),  # no view: FSDP hooks into what a forward pass returns
        rejected_B=sums_S[1::2].clone(),
        chosen_tokens_B=batch.chosen_tokens_B,
        rejected_tokens_B=batch.rejected_tokens_B,
    )


def token_logprobs_padded(model: PreTrainedModel, batch: PaddedPairs) -> Tensor:
    """Log-probability of the token after each position, [S, T - 1]; 0 where it is not scored."""
    logits_STV = model(
        input_ids=batch.input_ids_ST, attention_mask=batch.attention_mask_ST, use_cache=False
    ).logits
    return token_logprobs_from_logits(
        logits_STV[:, :-1], batch.input_ids_ST[:, 1:], batch.scored_ST[:, 1:]
    )
