"""Rules that score a response, row by row, and how a recipe names them."""

from pathlib import Path

import pytest

from stages.config import ExactRewardConfig, RewardConfig
from stages.recipe import load_recipe
from stages.rewards import Question, Unscored, find_reward, open_reward
from stages.rewards.exact import exact_reward
from stages.rewards.gsm8k import final_answer, gsm8k_reward


def score(config: RewardConfig, *rows: tuple[str, str]) -> list[object]:
    """Return the score of each (response, human response)."""
    source = find_reward(config, None)
    assert source is not None
    questions = (Question(f"{n:032x}", [], human, (text,)) for n, (text, human) in enumerate(rows))
    with open_reward(source) as reward:
        return [scored.scores[0] for scored in reward.score(questions)]


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


def test_gsm8k_is_one_or_zero() -> None:
    assert gsm8k_reward("#### 1,000", "… #### 1000") == 1.0
    assert gsm8k_reward("#### 999", "… #### 1000") == 0.0
    assert gsm8k_reward("no idea", "… #### 1000") == 0.0


def test_a_human_response_without_answer_gives_no_score_rather_than_a_zero() -> None:
    config = RewardConfig(name="gsm8k")
    assert score(config, ("#### 1", "one"), ("#### 1", "#### 1")) == [
        Unscored("no_score", "the human response has no `#### N`"),
        1.0,
    ]


@pytest.mark.parametrize(
    ("response", "human", "settings", "reward"),
    [
        ("Paris", "Paris", {}, 1.0),
        (" Paris\n", "Paris", {}, 1.0),
        (" Paris\n", "Paris", {"strip": False}, 0.0),
        ("paris", "Paris", {}, 0.0),
        ("STRASSE", "straße", {"ignore_case": True}, 1.0),
        ("New  \n York", "New York", {}, 0.0),
        ("New  \n York", "New York", {"collapse_whitespace": True}, 1.0),
        (" New York", "New York", {"collapse_whitespace": True, "strip": False}, 0.0),
        ("", "", {}, 1.0),
        ("Paris.", "Paris", {}, 0.0),
    ],
)
def test_exact_match_overlooks_what_the_recipe_says(
    response: str, human: str, settings: dict[str, bool], reward: float
) -> None:
    assert exact_reward(ExactRewardConfig(**settings), response, human) == reward
    assert score(RewardConfig(name="exact", exact=settings), (response, human)) == [reward]


def test_no_reward_is_none() -> None:
    assert find_reward(RewardConfig(), None) is None


@pytest.mark.parametrize("name", ["regex", "python", "model", "judge"])
def test_a_reward_without_what_it_needs_is_refused_with_the_recipe(name: str) -> None:
    with pytest.raises(ValueError, match=rf"reward.name={name} needs reward.{name}.\w+; set it"):
        RewardConfig(name=name)


def test_a_file_beside_the_recipe_is_found(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def reward(prompt, response, human):\n    return 7\n")
    (tmp_path / "ask.txt").write_text("{prompt} {answer_a} {answer_b}")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "reward:\n  name: python\n  python: {file: recipe://mine.py}\n"
        "  judge: {template: recipe://ask.txt}\n"
    )
    found = load_recipe(recipe).for_iteration(0).reward
    assert found.python.file == str(tmp_path / "mine.py")
    assert found.judge.template == "{prompt} {answer_a} {answer_b}"
    assert score(found, ("a", "b")) == [7.0]


def test_a_reason_is_one_line_that_a_terminal_can_show() -> None:
    detail = Unscored("failed", "a\n\x1b[31mb\ud800\u202e " + "x" * 9_000).detail
    assert detail.startswith("a [31mb? xxx")
    assert len(detail) == 500


def test_only_the_section_that_is_used_enters_keys() -> None:
    plain = RewardConfig(name="gsm8k")
    assert plain.identity() == {"name": "gsm8k"}
    assert RewardConfig(name="gsm8k", exact={"ignore_case": True}).identity() == plain.identity()
    ways = [RewardConfig(name="exact", exact=e) for e in ({}, {"ignore_case": True})]
    assert ways[0].identity() != ways[1].identity()
    assert RewardConfig(name="exact", processes=3, on_error="stop").identity() == (
        ways[0].identity()
    )
