"""The reward stage: every sample has a score or a reason, nothing is asked twice."""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from stages import evaluate, reward
from stages.artifacts import (
    Manifest,
    Outcome,
    Plan,
    TableWriter,
    Workspace,
    open_artifact,
    produce,
    read_rows,
)
from stages.config import RunConfig
from stages.data.rows import DROPPED, EXAMPLES, GENERATIONS, JUDGEMENTS, PROMPTS, REWARDS
from stages.errors import ConfigError, EngineError, InputError
from stages.evaluate import EvaluateInputs
from stages.reward import RewardInputs
from stages.rewards import chat_server
from tests.fakes import FakeEngine
from tests.judge_server import longer_wins, running_judge

Answers = Mapping[int, Sequence[str]]
"""From the number of a prompt to the samples."""


def prompt_id(number: int) -> str:
    return f"{number:032x}"


def make_data(place: Path, humans: Sequence[str], split: str = "train") -> Path:
    def fill(space: Workspace) -> Outcome:
        with TableWriter(space.file(f"{split}-00000.parquet"), PROMPTS) as table:
            for number, human in enumerate(humans):
                messages = [{"role": "user", "content": f"Question {number}?"}]
                row = {"prompt_id": prompt_id(number), "messages": messages, "response": human}
                table.append({**row, "source": "test", "source_row": number})
        return Outcome(counts={})

    produce(place, Plan("prepare", 1, {"humans": list(humans)}, {}), fill)
    return place


def make_generations(
    place: Path, answers: Answers, first_index: int = 0, data: Path | None = None
) -> Path:
    """Answer the prompts of the data that lies beside, if no other is given."""

    def fill(space: Workspace) -> Outcome:
        with TableWriter(space.file("part-00000.parquet"), GENERATIONS) as table:
            for number, samples in sorted(answers.items()):
                for index, text in enumerate(samples):
                    row = {"prompt_id": prompt_id(number), "sample_index": first_index + index}
                    tokens = {"prompt_token_ids": [1], "response_token_ids": [2]}
                    more = {"seed": 0, "finish_reason": "stop", "token_logprobs": [0.0]}
                    table.append({**row, **tokens, **more, "response": text})
        return Outcome(counts={})

    content = {str(number): list(samples) for number, samples in answers.items()}
    of = open_artifact(data or place.parent / "data").input_ref(None)
    produce(place, Plan("generate", 1, content, {"data": of}), fill)
    return place


def run(out: Path, data: Path, *generations: Path, **settings: Any) -> Manifest:
    config = RunConfig.model_validate({"reward": settings})
    return reward.run(config, RewardInputs(data, generations), out)


def scores(place: Path) -> dict[tuple[int, int], float]:
    rows = read_rows([open_artifact(place).file("rewards.parquet")], REWARDS)
    return {(int(r["prompt_id"], 16), r["sample_index"]): r["reward"] for r in rows}


def dropped(place: Path) -> list[tuple[int, str, str]]:
    rows = read_rows([open_artifact(place).file("dropped.parquet")], DROPPED)
    return [(int(r["prompt_id"], 16), r["reason"], r["detail"]) for r in rows]


def test_samples_have_a_score_or_a_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = make_data(tmp_path / "data", ["#### 1", "none", "#### 3"])
    answers = {0: ["#### 1", "#### 2"], 1: ["#### 1", "#### 2"], 2: ["", "#### 3"]}
    generations = make_generations(tmp_path / "generate", answers)
    made = run(tmp_path / "reward", data, generations, name="gsm8k")
    assert scores(tmp_path / "reward") == {(0, 0): 1.0, (0, 1): 0.0, (2, 0): 0.0, (2, 1): 1.0}
    why = "the human response has no `#### N`"
    assert dropped(tmp_path / "reward") == [
        (1, "no_score", f"sample {index}: {why}") for index in (0, 1)
    ]
    assert made.counts == {"samples": 6, "rows": 4, "dropped_no_score": 2}
    assert made.metrics == {
        "mean_reward": 0.5, "reward_min": 0.0, "reward_p10": 0.0, "reward_p25": 0.0,
        "reward_p50": 0.0, "reward_p75": 1.0, "reward_p90": 1.0, "reward_max": 1.0,
        "decided_share": pytest.approx(2 / 3),
    }  # fmt: skip
    assert sorted(f.path for f in made.files) == ["dropped.parquet", "rewards.parquet"]
    assert "2 of 6 samples have no score and are left out, such as: no_score: sample 0" in (
        caplog.text
    )


SOMETIMES = """
def reward(prompt, response, human):
    if response.endswith("!"):
        raise ValueError(response)
    if response.endswith("?"):
        return float("nan")
    return len(response)
"""


@pytest.mark.parametrize("shard_prompts", [1, 7, 1000])
def test_in_is_out_plus_dropped_by_reason_whatever_the_shards(
    tmp_path: Path, shard_prompts: int
) -> None:
    draw = random.Random(3)
    answers = {
        number: ["x" * draw.randrange(9) + draw.choice("!?.") for _ in range(draw.randrange(1, 5))]
        for number in draw.sample(range(60), 40)
    }
    data = make_data(tmp_path / "data", ["h"] * 60)
    generations = make_generations(tmp_path / "generate", answers)
    (tmp_path / "r.py").write_text(SOMETIMES)
    out = tmp_path / "reward"
    made = run(
        out, data, generations, name="python", python={"file": str(tmp_path / "r.py")},
        shard_prompts=shard_prompts, processes=2,
    )  # fmt: skip
    texts = {(n, i): text for n, samples in answers.items() for i, text in enumerate(samples)}
    good = {key: float(len(text)) for key, text in texts.items() if text.endswith(".")}
    assert scores(out) == good
    assert list(scores(out)) == sorted(good)
    assert made.counts["samples"] == len(texts)
    assert made.counts["rows"] == len(good)
    assert made.counts["dropped_failed"] == len(dropped(out)) == len(texts) - len(good)
    values = sorted(good.values())
    assert made.metrics["mean_reward"] == pytest.approx(sum(values) / len(values))


def test_the_generations_of_a_pool_are_one_table(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", ["a"] * 6)
    newest = make_generations(tmp_path / "generate", {0: ["a"], 3: ["b"], 5: ["a"]})
    older = make_generations(tmp_path / "pool-1", {1: ["b"], 2: ["a"]})
    made = run(tmp_path / "reward", data, newest, older, name="exact")
    expected = {(0, 0): 1.0, (1, 0): 0.0, (2, 0): 1.0, (3, 0): 0.0, (5, 0): 1.0}
    assert scores(tmp_path / "reward") == expected
    assert list(made.inputs) == ["data", "generations", "generations_1"]
    with pytest.raises(InputError, match="is answered in 2 of the artifacts"):
        run(tmp_path / "twice", data, newest, newest, name="exact")


def test_samples_to_prompts_that_the_data_lacks_are_refused(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", ["a"] * 2)
    generations = make_generations(tmp_path / "generate", {1: ["a"], 2: ["a", "b"]})
    with pytest.raises(InputError, match="2 of 3 samples answer prompts that .*data does not hold"):
        run(tmp_path / "reward", data, generations, name="exact")


def test_samples_of_other_data_are_refused_before_any_is_scored(tmp_path: Path) -> None:
    """The same prompts with other human answers have the same ids."""
    data = make_data(tmp_path / "data", ["Paris"])
    make_data(tmp_path / "other", ["Rome"])
    generations = make_generations(tmp_path / "generate", {0: ["Rome"]}, data=tmp_path / "other")
    with pytest.raises(InputError, match="generate was made from another data than .*data; give"):
        run(tmp_path / "reward", data, generations, name="exact")


def test_another_reward_of_the_same_samples_is_another_artifact(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", ["Paris"])
    generations = make_generations(tmp_path / "generate", {0: ["Paris", "paris"]})
    first = run(tmp_path / "exact", data, generations, name="exact")
    loose = {"name": "exact", "exact": {"ignore_case": True}}
    second = run(tmp_path / "loose", data, generations, **loose)
    assert scores(tmp_path / "exact") == {(0, 0): 1.0, (0, 1): 0.0}
    assert scores(tmp_path / "loose") == {(0, 0): 1.0, (0, 1): 1.0}
    assert first.key != second.key
    assert run(tmp_path / "exact", data, generations, name="exact") == first
    with pytest.raises(ConfigError, match="finished with other settings: reward.exact.ignore_case"):
        run(tmp_path / "exact", data, generations, **loose)


def test_a_changed_reward_function_is_another_reward(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", ["h"])
    generations = make_generations(tmp_path / "generate", {0: ["a", "ab"]})
    file = tmp_path / "r.py"
    file.write_text(SOMETIMES)
    settings = {"name": "python", "python": {"file": str(file)}}
    run(tmp_path / "reward", data, generations, **settings)
    file.write_text(SOMETIMES.replace("len(response)", "-len(response)"))
    with pytest.raises(ConfigError, match="reward.python.sha256"):
        run(tmp_path / "reward", data, generations, **settings)


def test_none_that_can_be_scored_and_on_error_stop_are_errors_that_say_why(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", ["h", "h"])
    (tmp_path / "r.py").write_text(SOMETIMES)
    settings: dict[str, Any] = {"name": "python", "python": {"file": str(tmp_path / "r.py")}}
    bad = make_generations(tmp_path / "bad", {0: ["a!"], 1: ["b!"]})
    with pytest.raises(InputError, match=r"none of 2 samples .*failed: sample 0: ValueError: a!"):
        run(tmp_path / "reward", data, bad, **settings)
    mixed = make_generations(tmp_path / "mixed", {0: ["a", "b?"], 1: ["c"]})
    why = rf"sample 1 of prompt {prompt_id(0)} cannot be scored \(failed\): it returned nan"
    with pytest.raises(InputError, match=why):
        run(tmp_path / "reward", data, mixed, on_error="stop", **settings)
    run(tmp_path / "reward", data, mixed, **settings)
    # What was made has no error in it, or they are counted: the policy is no part of the key.
    assert run(tmp_path / "reward", data, mixed, on_error="stop", **settings).counts["rows"] == 2


def test_no_reward_is_refused(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", ["h"])
    generations = make_generations(tmp_path / "generate", {0: ["a"]})
    with pytest.raises(ConfigError, match="reward.name=none scores nothing"):
        run(tmp_path / "reward", data, generations)


@pytest.fixture
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_server, "BACKOFF_S", 0.01)
    monkeypatch.setenv("no_proxy", "*")


@pytest.mark.usefixtures("_no_pauses")
def test_what_a_judge_said_is_kept_and_not_asked_again(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", ["hh"] * 8)
    answers = {n: ["x" * n, "xxxx", "yy"] for n in range(8)}
    generations = make_generations(tmp_path / "generate", answers, first_index=5)

    def until(number: int) -> Callable[..., Any]:
        return lambda body, so_far: longer_wins(body, 0) if so_far < number else (500, {}, b"")

    out = tmp_path / "reward"
    with running_judge(until(22)) as judge:
        settings = {"name": "judge", "shard_prompts": 2}
        how = {"model": "m", "retries": 0, "concurrency": 1}
        with pytest.raises(EngineError, match="what it said is kept"):
            run(out, data, generations, **settings, judge={**how, "url": judge.url})
    with running_judge(longer_wins) as again:
        made = run(out, data, generations, **settings, judge={**how, "url": again.url})
        whole = run(tmp_path / "whole", data, generations, **settings,
                    judge={**how, "url": again.url, "concurrency": 7})  # fmt: skip
    lengths = {(n, i): len(text) for n, texts in answers.items() for i, text in enumerate(texts, 5)}
    for (n, i), found in scores(out).items():
        rivals = [lengths[n, j] for j in (5, 6, 7) if j != i]
        assert found == sum((lengths[n, i] > r) + 0.5 * (lengths[n, i] == r) for r in rivals) / 2
    total = 7 * 6 + 2  # prompt 4 has the same text twice
    assert len(again.requests) == (total - 12) + total  # the shard of prompts 0 and 1 was kept
    names = [f"judgements-{n:05d}.parquet" for n in range(4)]
    assert sorted(f.path for f in made.files) == ["dropped.parquet", *names, "rewards.parquet"]
    rows = list(read_rows([open_artifact(out).file(name) for name in names], JUDGEMENTS))
    assert len(rows) == 8 * 6
    assert {(r["a"], r["b"]) for r in rows} == {(5, 6), (5, 7), (6, 7)}
    assert sum(r["text"] is not None for r in rows) == 8 * 6 - 2
    assert {f.path: f.sha256 for f in made.files} == {f.path: f.sha256 for f in whole.files}


def evaluated(out: Path, model: Path, humans: Sequence[str], **settings: Any) -> Manifest:
    data = make_data(out.with_name(f"{out.name}-data"), humans, split="heldout")
    values = {"reward": settings, "evaluate": {"max_new_tokens": 8, "precision": "fp32"}}
    config = RunConfig.model_validate(values)
    engine = FakeEngine()
    return evaluate.run(config, EvaluateInputs(str(model), data), out, open_engine=engine.open)


def test_evaluate_leaves_out_what_has_no_score_and_counts_it(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    (tmp_path / "r.py").write_text(
        "def reward(prompt, response, human):\n"
        "    assert prompt == [{'role': 'user', 'content': f'Question {human}?'}]\n"
        "    return len(response) if human != '2' else None\n"
    )
    python = {"file": str(tmp_path / "r.py")}
    settings: dict[str, Any] = {"name": "python", "python": python}
    humans = [str(n) for n in range(5)]
    made = evaluated(tmp_path / "some", tiny_model_dir, humans, **settings)
    rows = list(read_rows([open_artifact(tmp_path / "some").file("examples.parquet")], EXAMPLES))
    rewards = [(r["sampled_reward"], r["greedy_reward"]) for r in rows]
    assert rewards.pop(2) == (None, None)
    del rows[2]
    assert rewards == [(len(r["sampled"]), len(r["greedy"])) for r in rows]
    assert made.counts["unscored"] == 2
    assert made.metrics["sampled_accuracy"] == pytest.approx(sum(s for s, _ in rewards) / 4)
    path = open_artifact(tmp_path / "some").file("unscored.parquet")
    found = [(r["reason"], r["detail"].split(":")[0]) for r in read_rows([path], DROPPED)]
    assert found == [("failed", "sampled"), ("failed", "greedy")]
    with pytest.raises(InputError, match=r"2 of 10 answers .*returned NoneType.*"):
        evaluated(tmp_path / "stop", tiny_model_dir, humans, **settings, on_error="stop")
    with pytest.raises(InputError, match="2 of 2 answers cannot be scored"):
        evaluated(tmp_path / "none", tiny_model_dir, ["0", "2"][1:], **settings)


@pytest.mark.usefixtures("_no_pauses")
def test_evaluate_has_each_answer_judged_against_the_human_one(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    with running_judge(longer_wins) as judge:
        settings = {"name": "judge", "judge": {"url": judge.url, "model": "m"}}
        made = evaluated(tmp_path / "out", tiny_model_dir, ["x" * 100, ""], **settings)
    assert made.metrics["sampled_accuracy"] == made.metrics["greedy_accuracy"] == 0.5
    path = open_artifact(tmp_path / "out").file("judgements.parquet")
    rows = list(read_rows([path], JUDGEMENTS))
    assert {(r["a"], r["b"]) for r in rows} == {(0, -1), (1, -1)}
    assert len(rows) == 2 * 2 * 2
    assert "unscored" not in made.counts
