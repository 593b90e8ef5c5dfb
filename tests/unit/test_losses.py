"""Pair losses against numbers worked out by hand, and their gradients against the formulas."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from stages.objective.losses import PairLogprobs, PairLossOptions, pair_losses

LN2 = 0.6931471805599453


def logprobs(chosen: list[float], rejected: list[float], grad: bool = False) -> PairLogprobs:
    return PairLogprobs(
        torch.tensor(chosen, requires_grad=grad),
        torch.tensor(rejected, requires_grad=grad),
        torch.full((len(chosen),), 4),
        torch.full((len(rejected),), 8),
    )


def options(loss: Any, **changes: Any) -> PairLossOptions:
    plain = PairLossOptions(
        loss=loss,
        beta=0.1,
        label_smoothing=0.0,
        length_normalized=False,
        reference_free=False,
        nll_weight=0.0,
    )
    return replace(plain, **changes)


# One pair: r_w = -10 - (-12) = 2, r_l = -20 - (-17) = -3, delta = 5, beta delta = 0.5.
POLICY = logprobs([-10.0], [-20.0])
REFERENCE = logprobs([-12.0], [-17.0])


@pytest.mark.parametrize(
    ("loss", "at_zero"),
    [
        ("sigmoid", 0.693147),
        ("hinge", 1.0),
        ("ipo", 25.0),
        ("exponential", 1.0),
        ("correlation", 1.0),
    ],
)
def test_value_when_player_is_the_opponent_is_the_tables(loss: str, at_zero: float) -> None:
    out = pair_losses(POLICY, POLICY.detach(), options(loss))
    assert out.losses_B.item() == pytest.approx(at_zero, abs=1e-6)
    assert out.margins_B.item() == 0.0
    assert out.accuracies_B.item() == 0.0, "a tie is not a win"


def test_first_sigmoid_loss_is_ln2_whatever_the_smoothing_and_beta() -> None:
    for beta in (0.02, 0.1, 5.0):
        for smoothing in (0.0, 0.1, 0.4):
            out = pair_losses(
                POLICY, POLICY.detach(), options("sigmoid", beta=beta, label_smoothing=smoothing)
            )
            assert out.losses_B.item() == pytest.approx(LN2, abs=1e-6)


@pytest.mark.parametrize(
    ("chosen_options", "expected"),
    [
        (options("sigmoid"), 0.474077),  # ln(1 + e^-0.5)
        (options("sigmoid", label_smoothing=0.1), 0.524077),  # 0.9 * 0.474077 + 0.1 * 0.974077
        (options("hinge"), 0.5),  # 1 - 0.5
        (options("hinge", beta=1.0), 0.0),  # 1 - 5 < 0
        (options("ipo"), 0.0),  # (5 - 5)^2
        (options("ipo", beta=0.5), 16.0),  # (5 - 1)^2
        # 2/4 - (-3)/8 = 0.875; (0.875 - 1)^2
        (options("ipo", beta=0.5, length_normalized=True), 0.015625),
        (options("exponential"), 0.606531),  # e^-0.5
        (options("correlation"), 0.5),  # 1 - 0.5
        (options("sppo"), 0.5),  # P = 0.75: target 2.5; (2 - 2.5)^2 + (-3 + 2.5)^2 = 0.5
    ],
)
def test_value_worked_by_hand(chosen_options: PairLossOptions, expected: float) -> None:
    win_probability_B = torch.tensor([0.75])
    out = pair_losses(POLICY, REFERENCE, chosen_options, win_probability_B)
    assert out.losses_B.item() == pytest.approx(expected, abs=2e-6)


def test_sppo_with_even_odds_asks_for_no_move() -> None:
    out = pair_losses(POLICY, POLICY.detach(), options("sppo"), torch.tensor([0.5]))
    assert out.losses_B.item() == 0.0


def test_rewards_margins_and_strict_accuracy_are_per_pair() -> None:
    policy = logprobs([-10.0, -10.0, -10.0], [-20.0, -20.0, -20.0])
    reference = logprobs([-12.0, -12.0, -8.0], [-17.0, -22.0, -20.0])
    out = pair_losses(policy, reference, options("sigmoid"))
    torch.testing.assert_close(out.chosen_rewards_B, torch.tensor([0.2, 0.2, -0.2]))
    torch.testing.assert_close(out.rejected_rewards_B, torch.tensor([-0.3, 0.2, 0.0]))
    torch.testing.assert_close(out.margins_B, torch.tensor([0.5, 0.0, -0.2]))
    assert out.accuracies_B.tolist() == [1.0, 0.0, 0.0]


def test_nll_is_per_token_of_the_chosen_and_added_by_its_weight() -> None:
    plain = pair_losses(POLICY, REFERENCE, options("sigmoid"))
    weighted = pair_losses(POLICY, REFERENCE, options("sigmoid", nll_weight=2.0))
    assert plain.nll_B.item() == 2.5  # 10 / 4 tokens
    assert (weighted.losses_B - plain.losses_B).item() == pytest.approx(5.0)


def test_reference_free_takes_the_reference_for_zero() -> None:
    zero = logprobs([0.0], [0.0])
    free = pair_losses(POLICY, None, options("sigmoid", reference_free=True))
    assert free.losses_B.item() == pair_losses(POLICY, zero, options("sigmoid")).losses_B.item()
    assert free.margins_B.item() == pytest.approx(1.0)  # 0.1 * (-10 + 20)


# d loss / d delta at beta delta = 0.5, from each formula.
SLOPES = {
    "sigmoid": -0.1 / (1 + math.exp(0.5)),
    "hinge": -0.1,
    "ipo": 2 * (5 - 5.0),
    "exponential": -0.1 * math.exp(-0.5),
    "correlation": -0.1,
}


@pytest.mark.parametrize("loss", SLOPES)
def test_gradient_pushes_chosen_up_and_rejected_down_by_the_same_amount(loss: str) -> None:
    policy = logprobs([-10.0], [-20.0], grad=True)
    pair_losses(policy, REFERENCE, options(loss)).losses_B.sum().backward()
    assert policy.chosen_B.grad is not None and policy.rejected_B.grad is not None
    assert policy.chosen_B.grad.item() == pytest.approx(SLOPES[loss], abs=1e-6)
    assert policy.rejected_B.grad.item() == pytest.approx(-SLOPES[loss], abs=1e-6)


def test_gradient_of_sppo_and_of_the_nll_term() -> None:
    policy = logprobs([-10.0], [-20.0], grad=True)
    out = pair_losses(policy, REFERENCE, options("sppo", nll_weight=2.0), torch.tensor([0.75]))
    out.losses_B.sum().backward()
    assert policy.chosen_B.grad is not None and policy.rejected_B.grad is not None
    # 2 (2 - 2.5) - 2 / 4 tokens; 2 (-3 + 2.5)
    assert policy.chosen_B.grad.item() == pytest.approx(-1.0 - 0.5, abs=1e-6)
    assert policy.rejected_B.grad.item() == pytest.approx(-1.0, abs=1e-6)


def test_sigmoid_stays_finite_far_from_zero() -> None:
    policy = logprobs([-9000.0, -10.0], [-10.0, -9000.0], grad=True)
    out = pair_losses(policy, logprobs([-10.0] * 2, [-10.0] * 2), options("sigmoid", beta=5.0))
    out.losses_B.sum().backward()
    assert out.losses_B.tolist() == pytest.approx([5 * 8990.0, 0.0])
    assert policy.chosen_B.grad is not None and policy.chosen_B.grad.isfinite().all()


def test_metrics_carry_no_gradient() -> None:
    out = pair_losses(logprobs([-1.0], [-2.0], grad=True), REFERENCE, options("sigmoid"))
    assert out.losses_B.requires_grad
    for metric in (out.chosen_rewards_B, out.rejected_rewards_B, out.margins_B, out.nll_B):
        assert not metric.requires_grad


def test_bf16_inputs_are_computed_in_fp32() -> None:
    policy = PairLogprobs(
        torch.tensor([-10.0], dtype=torch.bfloat16),
        torch.tensor([-20.0], dtype=torch.bfloat16),
        torch.tensor([4]),
        torch.tensor([8]),
    )
    out = pair_losses(policy, REFERENCE, options("sigmoid"))
    assert out.losses_B.dtype == torch.float32
    assert out.losses_B.item() == pytest.approx(0.474077, abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "changes", "message"),
    [
        ("dpo", {}, "loss is 'dpo'; choose one of sigmoid"),
        ("sigmoid", {"beta": 0.0}, "beta is 0.0"),
        ("sigmoid", {"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ("hinge", {"label_smoothing": 0.1}, "label_smoothing has no meaning for hinge"),
        ("sigmoid", {"length_normalized": True}, "length_normalized has no meaning for sigmoid"),
        ("sppo", {"reference_free": True}, "unset reference_free"),
        ("sigmoid", {"nll_weight": -1.0}, "nll_weight is -1.0"),
    ],
)
def test_options_without_effect_are_refused(
    loss: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        options(loss, **changes)


def test_missing_inputs_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="win_probability_B"):
        pair_losses(POLICY, REFERENCE, options("sppo"))
    with pytest.raises(ValueError, match="reference's log-probabilities"):
        pair_losses(POLICY, None, options("sigmoid"))
