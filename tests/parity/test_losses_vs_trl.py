"""Our losses against the code of TRL's DPOTrainer, on the same log-probabilities.

TRL's `_compute_loss` runs unchanged, on a model that returns prepared token log-probabilities: so
the loss, the rewards and the gradient are TRL's own. Compared where both mean the same thing:
sigmoid, hinge, ipo (TRL's is the length-normalised one), and sppo at win probability 1
(`sppo_hard`). TRL's label smoothing is another loss (`robust`), its `sft` averages over the tokens
of the batch and not per pair: neither is compared.

Shape legend: S = 2B sequences, chosen first; T = positions.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from stages.objective.losses import PairLogprobs, PairLossOptions, pair_losses

trl = pytest.importorskip("trl")

PAIRS, LENGTH, BETA = 6, 24, 0.1


class PreparedModel(torch.nn.Module):
    """Answers like TRL's fused head, with given token log-probabilities."""

    def __init__(self, token_logprobs_ST: Tensor) -> None:
        super().__init__()
        self.token_logprobs_ST = token_logprobs_ST

    def forward(self, **_: Any) -> SimpleNamespace:
        zeros = torch.zeros_like(self.token_logprobs_ST)
        return SimpleNamespace(
            log_probs=self.token_logprobs_ST,
            log_sum_sq_probs=zeros,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )


def trl_loss_and_metrics(
    loss: str, token_logprobs_ST: Tensor, reference: PairLogprobs, completion_mask_ST: Tensor
) -> tuple[Tensor, dict[str, list[float]]]:
    """Runs DPOTrainer._compute_loss; returns the mean loss and what it would log."""
    metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss],
        loss_weights=[1.0],
        beta=BETA,
        label_smoothing=0.0,
        use_weighting=False,
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.ones_like(completion_mask_ST),
        "attention_mask": torch.ones_like(completion_mask_ST),
        "completion_mask": completion_mask_ST,
        "ref_chosen_logps": reference.chosen_B,
        "ref_rejected_logps": reference.rejected_B,
    }
    model = PreparedModel(token_logprobs_ST)
    value = trl.DPOTrainer._compute_loss(trainer, model, inputs, False)
    return value, metrics["train"]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("sigmoid", "sigmoid"), ("hinge", "hinge"), ("ipo", "ipo"), ("sppo", "sppo_hard")],
)
def test_loss_rewards_and_gradient_equal_trls(
    ours: Literal["sigmoid", "hinge", "ipo", "sppo"], theirs: str
) -> None:
    torch.manual_seed(0)
    response_lengths_S = torch.randint(3, 20, (2 * PAIRS, 1))
    completion_mask_ST = (torch.arange(LENGTH) >= LENGTH - response_lengths_S).long()
    # TRL's fused head gives log-probabilities of the shifted labels, zero where masked.
    token_logprobs_ST = -3 * torch.rand(2 * PAIRS, LENGTH - 1) * completion_mask_ST[:, 1:]
    tokens_S = response_lengths_S.flatten()
    sums_S = token_logprobs_ST.sum(1) + 4 * torch.randn(2 * PAIRS)
    reference = PairLogprobs(sums_S[:PAIRS], sums_S[PAIRS:], tokens_S[:PAIRS], tokens_S[PAIRS:])

    their_tokens_ST = token_logprobs_ST.clone().requires_grad_()
    their_loss, logged = trl_loss_and_metrics(
        theirs, their_tokens_ST, reference, completion_mask_ST
    )
    their_loss.backward()

    our_tokens_ST = token_logprobs_ST.clone().requires_grad_()
    our_sums_S = our_tokens_ST.sum(1)
    policy = PairLogprobs(
        our_sums_S[:PAIRS], our_sums_S[PAIRS:], tokens_S[:PAIRS], tokens_S[PAIRS:]
    )
    options = PairLossOptions(
        loss=ours,
        beta=BETA,
        label_smoothing=0.0,
        length_normalized=ours == "ipo",
        reference_free=False,
        nll_weight=0.0,
    )
    out = pair_losses(policy, reference, options, torch.ones(PAIRS))
    out.losses_B.mean().backward()

    torch.testing.assert_close(out.losses_B.mean(), their_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(our_tokens_ST.grad, their_tokens_ST.grad, rtol=1e-6, atol=1e-7)
    for metric, value_B in (
        ("rewards/chosen", out.chosen_rewards_B),
        ("rewards/rejected", out.rejected_rewards_B),
        ("rewards/margins", out.margins_B),
        ("rewards/accuracies", out.accuracies_B),
    ):
        assert value_B.mean().item() == pytest.approx(logged[metric][0], abs=1e-6), metric
