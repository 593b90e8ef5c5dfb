"""Losses on pairs: how far the player should move from the reference, given both responses.

Shape legend: B = pairs in the batch.

Every function takes tensors and gives tensors: no files, no config, no collectives. All sums are
fp32, because sequence log-probabilities lie near -5,000, where bf16 has steps of 32.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

LossName = Literal["sigmoid", "hinge", "ipo", "exponential", "correlation", "sppo"]


@dataclass(frozen=True)
class PairLogprobs:
    """Both responses of every pair under one model: summed log-probabilities and token counts."""

    chosen_B: Tensor
    """log pi(y_w|x): sum over the response's tokens, EOS included, prompt excluded."""
    rejected_B: Tensor
    """log pi(y_l|x), summed likewise."""
    chosen_tokens_B: Tensor
    """Number of response tokens that were summed, at least 1."""
    rejected_tokens_B: Tensor

    def detach(self) -> "PairLogprobs":
        """Returns the same numbers outside the graph, as a reference needs them."""
        return PairLogprobs(
            self.chosen_B.detach(),
            self.rejected_B.detach(),
            self.chosen_tokens_B,
            self.rejected_tokens_B,
        )


@dataclass(frozen=True)
class PairLossOptions:
    """Which loss, and its options; a combination that would change nothing is refused.

    Has no defaults: those live in the config schema.
    """

    loss: LossName
    beta: float
    """Strength of the pull towards the reference; > 0."""
    label_smoothing: float
    """sigmoid only: probability that a label is flipped, in [0, 0.5)."""
    length_normalized: bool
    """ipo only: divide each log-ratio by its number of response tokens."""
    reference_free: bool
    """Take the reference's log-probabilities for zero."""
    nll_weight: float
    """Weight of the chosen response's mean negative log-likelihood a token; >= 0."""

    def __post_init__(self) -> None:
        names = get_args(LossName)
        if self.loss not in names:
            raise ValueError(f"loss is {self.loss!r}; choose one of {', '.join(names)}")
        if not self.beta > 0:
            raise ValueError(f"beta is {self.beta}; it must be > 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must be in [0, 0.5)")
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing has no meaning for {self.loss}; set it to 0")
        if self.length_normalized and self.loss != "ipo":
            raise ValueError(f"length_normalized has no meaning for {self.loss}; set it to false")
        if self.reference_free and self.loss == "sppo":
            raise ValueError("sppo regresses the log-ratio to the reference; unset reference_free")
        if not self.nll_weight >= 0:
            raise ValueError(f"nll_weight is {self.nll_weight}; it must be >= 0")


@dataclass(frozen=True)
class PairLossOutput:
    """One value a pair. Only `losses_B` carries a gradient; the rest are metrics."""

    losses_B: Tensor
    """Preference loss + nll_weight * nll; its mean is what the optimizer minimises."""
    chosen_rewards_B: Tensor
    """beta * (log pi(y_w|x) - log pi_ref(y_w|x))"""
    rejected_rewards_B: Tensor
    margins_B: Tensor
    """chosen reward - rejected reward = beta * delta"""
    accuracies_B: Tensor
    """1.0 where the chosen reward is strictly greater; a tie is a miss."""
    nll_B: Tensor
    """-log pi(y_w|x) / chosen tokens, whatever nll_weight is."""


def pair_losses(
    policy: PairLogprobs,
    reference: PairLogprobs | None,
    options: PairLossOptions,
    win_probability_B: Tensor | None = None,
) -> PairLossOutput:
    """Loss and rewards of each pair.

    With r_w = log pi(y_w|x) - log pi_ref(y_w|x), r_l likewise, delta = r_w - r_l, e = smoothing:

        sigmoid      -(1-e) log sigmoid(beta delta) - e log sigmoid(-beta delta)
                     DPO (arXiv 2305.18290, eq. 7), SPIN (arXiv 2401.01335, eq. 4.7 with the
                     logistic loss); smoothing: cDPO (Mitchell, 2023)
        hinge        max(0, 1 - beta delta)                       SLiC (arXiv 2305.10425)
        ipo          (delta - 1/(2 beta))^2                       IPO (arXiv 2310.12036, eq. 17);
                     length_normalized: r_w and r_l each divided by its token count, as TRL does
        exponential  exp(-beta delta)                             SPIN, section 4
        correlation  1 - beta delta                               SPIN, section 4
        sppo         (r_w - (P-1/2)/beta)^2 + (r_l + (P-1/2)/beta)^2
                     SPPO (arXiv 2405.00675, eq. 4.7 with eta = 1/beta)

    nll_weight adds the term of RPO (arXiv 2404.19733, eq. 1), per token of the chosen response.

    `win_probability_B` is P, in [1/2, 1]; only sppo reads it. `reference` may be None if and only
    if the options say `reference_free`. `exponential` overflows to inf at beta delta < -88: that
    is left to the caller's check for non-finite losses. No reduction over pairs is done here, so
    that the caller can weight by the global batch.
    """
    r_chosen_B = policy.chosen_B.float()
    r_rejected_B = policy.rejected_B.float()
    nll_B = -r_chosen_B / policy.chosen_tokens_B
    if not options.reference_free:
        if reference is None:
            raise ValueError("pair_losses needs the reference's log-probabilities; run spin score")
        r_chosen_B = r_chosen_B - reference.chosen_B.float()
        r_rejected_B = r_rejected_B - reference.rejected_B.float()

    beta = options.beta
    scaled_B = beta * (r_chosen_B - r_rejected_B)
    if options.loss == "sigmoid":
        smoothing = options.label_smoothing
        losses_B = -(1 - smoothing) * F.logsigmoid(scaled_B) - smoothing * F.logsigmoid(-scaled_B)
    elif options.loss == "hinge":
        losses_B = torch.relu(1 - scaled_B)
    elif options.loss == "ipo":
        delta_B = r_chosen_B - r_rejected_B
        if options.length_normalized:
            delta_B = r_chosen_B / policy.chosen_tokens_B - r_rejected_B / policy.rejected_tokens_B
        losses_B = (delta_B - 1 / (2 * beta)) ** 2
    elif options.loss == "exponential":
        losses_B = torch.exp(-scaled_B)
    elif options.loss == "correlation":
        losses_B = 1 - scaled_B
    elif options.loss == "sppo":
        if win_probability_B is None:
            raise ValueError("sppo needs win_probability_B, one in [0.5, 1] for each pair")
        target_B = (win_probability_B.float() - 0.5) / beta
        losses_B = (r_chosen_B - target_B) ** 2 + (r_rejected_B + target_B) ** 2
    if options.nll_weight:
        losses_B = losses_B + options.nll_weight * nll_B

    chosen_rewards_B = (beta * r_chosen_B).detach()
    rejected_rewards_B = (beta * r_rejected_B).detach()
    return PairLossOutput(
        losses_B=losses_B,
        chosen_rewards_B=chosen_rewards_B,
        rejected_rewards_B=rejected_rewards_B,
        margins_B=chosen_rewards_B - rejected_rewards_B,
        accuracies_B=(chosen_rewards_B > rejected_rewards_B).float(),
        nll_B=nll_B.detach(),
    )
