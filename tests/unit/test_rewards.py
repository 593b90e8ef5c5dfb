"""The GSM8K rule, row by row."""

import pytest

from stages.errors import ConfigError
from stages.rewards import open_reward
from stages.rewards.gsm8k import final_answer, gsm8k_reward


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 18", "18"),
        ("so 9+9=18. #### 18", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### -3.5", "-3.5"),
        ("#### 12.", "12"),
        ("#### 1 #### 2", "2"),
        ("####18", None),
        ("#### x", None),
        ("the answer is 18", None),
        ("", None),
        ("#### 5" + " " * 300, None),
        ("#### 5" + " " * 294, "5"),
    ],
)
def test_last_answer_in_the_last_300_characters(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_reward_is_one_or_zero() -> None:
    assert gsm8k_reward("#### 1,000", "… #### 1000") == 1.0
    assert gsm8k_reward("#### 999", "… #### 1000") == 0.0
    assert gsm8k_reward("no idea", "… #### 1000") == 0.0


def test_a_human_response_without_answer_is_an_error_not_a_zero() -> None:
    with pytest.raises(ValueError, match="no `#### N`"):
        gsm8k_reward("#### 1", "one")


def test_unknown_reward_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match="choose gsm8k"):
        open_reward("none")
