"""evaluate's metrics, on hand-made rows."""

import math
from typing import Any

import pytest

from stages.config import RewardConfig
from stages.data.repeats import repeated_share
from stages.data.rows import EXAMPLES
from stages.evaluate import measured, ranges, summarize


def row(**values: Any) -> dict[str, Any]:
    """A row of EXAMPLES as a model leaves it that answers as the human did."""
    answer = {"human": "a b", "human_token_ids": [1, 2, 0], "human_logprob": -3.0}
    own = {
        "sampled": "a b",
        "sampled_token_ids": [1, 2, 0],
        "sampled_finish_reason": "stop",
        "sampled_logprob": -0.6,
    }
    made = dict.fromkeys(EXAMPLES.names) | answer | own | values
    assert made.keys() == set(EXAMPLES.names)
    return made


def compared(human: tuple[float, float], sample: tuple[float, float], **values: Any) -> Any:
    """A row with (player's, opponent's) log-probabilities of both responses, at β = 0.1."""
    return row(
        **{
            "human_logprob": human[0],
            "opponent_human_logprob": human[1],
            "opponent_sample": "c",
            "opponent_sample_token_ids": [3, 0],
            "opponent_sample_finish_reason": "stop",
            "player_opponent_sample_logprob": sample[0],
            "opponent_sample_logprob": sample[1],
            "human_margin": 0.1 * (human[0] - human[1]),
            "opponent_margin": 0.1 * (sample[0] - sample[1]),
            **values,
        }
    )


WON = compared((-1.0, -2.0), (-9.0, -4.0))
LOST = compared((-3.0, -2.0), (-1.0, -4.0))
TIE = compared((-3.0, -2.0), (-5.0, -4.0))


def test_a_model_alone_has_no_comparison() -> None:
    metrics = summarize([row()])
    assert not [name for name in metrics if name.startswith(("heldout", "opponent"))]
    assert "sampled_accuracy" not in metrics
    assert metrics["human_logprob_per_token"] == -1.0
    assert metrics["sampled_identical_share"] == 1


def test_what_samples_are_like() -> None:
    metrics = summarize(
        [
            row(sampled_reward=1.0),
            row(
                sampled=" \n",
                sampled_token_ids=[5] * 7,
                sampled_finish_reason="length",
                sampled_logprob=-0.4,
                sampled_reward=0.0,
            ),
        ]
    )
    assert metrics["sampled_accuracy"] == 0.5
    assert metrics["sampled_empty_share"] == 0.5
    assert metrics["sampled_cut_off_share"] == 0.5
    assert metrics["sampled_mean_tokens"] == 5
    assert metrics["sampled_entropy"] == pytest.approx(1.0 / 10)  # a token, not a response
    assert metrics["sampled_repeated_share"] == pytest.approx((0 + 3 / 4) / 2)


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0), ([1, 2, 3], 0), ([1, 2, 3, 4], 0), ([1, 2, 3, 4, 5], 0),
        ([1, 2, 1, 2, 1, 2, 1, 2], 3 / 5), ([7] * 5, 1 / 2), ([7] * 1003, 999 / 1000),
        ([1, 2, 3, 4, 9, 1, 2, 3, 4], 1 / 6),
    ],
)  # fmt: skip
def test_repeated_share(tokens: list[int], share: float) -> None:
    assert repeated_share(tokens) == pytest.approx(share)


def test_reward_accuracy_counts_a_tie_as_one_half_and_has_a_standard_error() -> None:
    metrics = summarize([WON, LOST, TIE])
    assert metrics["heldout_reward_accuracy"] == pytest.approx(0.5)
    # values 1, 0, ½: variance ¼ with n − 1, over three
    assert metrics["heldout_reward_accuracy_stderr"] == pytest.approx(math.sqrt(0.25 / 3))
    assert summarize([WON, WON])["heldout_reward_accuracy_stderr"] == 0
    assert summarize([WON])["heldout_reward_accuracy_stderr"] == 0.5


def test_kl_is_of_the_opponent_from_the_player_on_its_own_samples() -> None:
    metrics = summarize([WON, LOST])
    assert metrics["heldout_kl"] == pytest.approx((5 - 3) / 2)
    assert metrics["heldout_human_logratio"] == pytest.approx((1 - 1) / 2)
    assert metrics["opponent_entropy"] == pytest.approx(8 / 4)


@pytest.mark.parametrize(
    ("lengths", "accuracy"),
    [
        ([1, 1], 1.0),  # human has 3 tokens and is longer: always
        ([4, 4], 1.0),  # "the shorter one is human" tells them apart as well
        ([1, 4], 0.5),
        ([1, 3], 0.75),  # a tie counts one half
        ([3, 3], 0.5),
    ],
)
def test_length_alone(lengths: list[int], accuracy: float) -> None:
    rows = [WON | {"opponent_sample_token_ids": [3] * n} for n in lengths]
    metrics = summarize(rows)
    assert metrics["heldout_length_accuracy"] == pytest.approx(accuracy)
    assert metrics["heldout_length_explained"] == pytest.approx((accuracy - 0.5) / 0.5)


@pytest.mark.parametrize("rows", [[TIE], [LOST], [LOST, WON]])
def test_length_explains_nothing_where_nothing_is_told_apart(rows: list[Any]) -> None:
    assert summarize(rows)["heldout_length_explained"] is None


def test_the_opponents_accuracy_is_known_only_with_its_rewards() -> None:
    assert "opponent_accuracy" not in summarize([WON])
    assert summarize([WON | {"opponent_sample_reward": 1.0}])["opponent_accuracy"] == 1


def test_what_is_measured_on_each_example_has_the_metrics_as_its_means() -> None:
    rows = [
        {**WON, "sampled_reward": 1.0, "greedy_reward": 0.5, "opponent_sample_reward": 0.0},
        {**LOST, "sampled_reward": 0.0, "opponent_sample_reward": 0.5, "human_token_ids": [1] * 9},
        {**TIE, "sampled_finish_reason": "length", "greedy_reward": 1.0, "sampled": " "},
    ]
    metrics = summarize(rows)
    sums: dict[str, tuple[float, float]] = {}
    for each in measured(rows):
        total, weight = sums.get(each.metric, (0.0, 0.0))
        sums[each.metric] = (total + each.weight * each.value, weight + each.weight)
    means = {name: total / weight for name, (total, weight) in sums.items()}
    assert {"heldout_kl", "sampled_gain", "opponent_accuracy", "human_mean_tokens"} <= means.keys()
    assert means == {name: pytest.approx(metrics[name]) for name in means}


@pytest.mark.parametrize(("reward", "most"), [("gsm8k", (0.0, 1.0)), ("python", None)])
def test_accuracies_end_at_one_unless_they_are_rewards_of_any_scale(
    reward: str, most: tuple[float, float] | None
) -> None:
    config = RewardConfig.model_validate({"name": reward, "python": {"file": "x.py"}})
    range_of = ranges(config)
    for name in ("sampled_accuracy", "greedy_accuracy", "opponent_accuracy"):
        assert range_of(name) == most
    for name in ("heldout_reward_accuracy", "sampled_repeated_share", "heldout_identical_share"):
        assert range_of(name) == (0.0, 1.0)
    for name in ("heldout_reward_margin", "human_logprob_per_token", "sampled_gain"):
        assert range_of(name) is None
