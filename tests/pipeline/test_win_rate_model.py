"""Win rates by a reward model: its logits decide, which this test asks for itself."""

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForSequenceClassification

from stages import suite
from stages.artifacts import open_artifact, read_rows
from stages.config import RunConfig
from stages.data.rows import DROPPED, SUITE_EXAMPLES
from stages.rewards import Question
from stages.suites.base import SuiteInputs
from tests.evaluations import make_data, make_evaluation, prompt_id
from tests.unit.test_reward_model import by_transformers, save

TEXTS = ("12+7=19. #### 19", "Paris is the capital.", "12", "", "No.", "x" * 50)
SAME = {100 + number: "Ann has 12 cups. "[number % 9 :] * (1 + number % 4) for number in range(60)}
REFUSED = 7
OURS = dict(enumerate(TEXTS)) | SAME | {REFUSED: "a</s>b"}
THEIRS = dict(enumerate(TEXTS[::-1])) | SAME | {REFUSED: "fine"}


def test_the_answer_with_the_higher_logit_wins_and_equal_answers_tie(tmp_path: Path) -> None:
    """The budget of tokens parts equal answers, and logits of one text differ with its batch."""
    model = save(tmp_path / "judge", LlamaForSequenceClassification, LlamaConfig)
    data = make_data(tmp_path / "data", dict.fromkeys(OURS, "a human answer"))
    sides = [
        make_evaluation(tmp_path / name, name, answers={n: (t, None) for n, t in texts.items()})
        for name, texts in (("ours", OURS), ("theirs", THEIRS))
    ]
    reward = {"name": "model", "on_error": "quarantine",
              "model": {"path": str(model), "token_budget": 100}}  # fmt: skip
    config = RunConfig.model_validate(
        {"reward": {"name": "exact"}, "suites": {"duel": {"kind": "win_rate", "reward": reward}}}
    )
    out = tmp_path / "out"
    inputs = SuiteInputs("duel", data=data, answers=sides[0], against=sides[1])
    made = suite.run(config, inputs, out)

    compared = [number for number in OURS if number != REFUSED]
    asked = [
        Question("", [{"role": "user", "content": f"Question {n}?"}], "", (OURS[n], THEIRS[n]))
        for n in compared
    ]
    logits = by_transformers(model, asked)
    mine, other = logits[::2], logits[1::2]
    wins = {
        number: 0.5 if number in SAME else float(a > b)
        for number, a, b in zip(compared, mine, other, strict=True)
    }
    assert {0.0, 0.5, 1.0} == set(wins.values())
    assert min(abs(a - b) for a, b in zip(mine[: len(TEXTS)], other, strict=False)) > 1e-3
    rows = list(read_rows([out / "examples.parquet"], SUITE_EXAMPLES))
    assert {int(row["prompt_id"], 16): row["score"] for row in rows} == wins
    assert {row["scored_by"] for row in rows} == {"win by model"}
    assert made.metrics["win_rate"] == sum(wins.values()) / len(wins)
    assert made.metrics["mean_reward"] == pytest.approx(sum(mine) / len(mine), abs=1e-5)
    assert made.metrics["other_mean_reward"] == pytest.approx(sum(other) / len(other), abs=1e-5)
    assert made.inputs["reward_model"].key.startswith("folder:")
    [left_out] = read_rows([open_artifact(out).file("unscored.parquet")], DROPPED)
    assert left_out["prompt_id"] == prompt_id(REFUSED)
    assert "special_token" in left_out["detail"]
