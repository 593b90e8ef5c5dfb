"""Win rates: who is compared, who decides, and what length has to do with it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from spin_cli.app import app
from stages import suite
from stages.artifacts import Manifest, open_artifact, read_rows
from stages.config import RunConfig, WinRateSuiteConfig
from stages.data.measures import read_measures
from stages.data.rows import DROPPED, JUDGEMENTS, SUITE_EXAMPLES
from stages.data.statistics import interval
from stages.errors import ConfigError, InputError
from stages.model.source import resolve_model
from stages.suites.base import SuiteInputs
from stages.suites.length_control import RIDGE, fit, length_controlled
from tests.evaluations import Replies, make_data, make_evaluation, prompt_id
from tests.fakes import FakeEngine
from tests.judge_server import longer_wins, running_judge, says, shown

HUMANS = {1: "#### 1", 2: "#### 2", 3: "#### 3", 4: "#### 4"}
OURS = {1: "#### 1", 2: "#### 2", 3: "#### 0", 4: "#### 0"}
THEIRS = {1: "#### 1", 2: "#### 0", 3: "#### 3", 4: "none"}


def evaluation(place: Path, model: str, sampled: Mapping[int, str], greedy: str = "g") -> Path:
    answers = {number: (text, greedy) for number, text in sampled.items()}
    return make_evaluation(place, model, answers=answers)


def compare(
    out: Path,
    data: Path | None,
    ours: Path | None = None,
    theirs: Path | None = None,
    *,
    model: str | None = None,
    engine: Any = None,
    reward: Any = None,
    of_run: Any = None,
    **settings: Any,
) -> Manifest:
    values = {
        "reward": reward or {"name": "gsm8k", "on_error": "quarantine"},
        "suites": {"duel": {"kind": "win_rate", **settings}},
        **(of_run or {}),
    }
    inputs = SuiteInputs("duel", model, data=data, answers=ours, against=theirs)
    opened = (engine or FakeEngine()).open
    return suite.run(RunConfig.model_validate(values), inputs, out, open_engine=opened)


def judge(url: str, **settings: Any) -> dict[str, Any]:
    return {"name": "judge", "judge": {"url": url, "model": "j", "concurrency": 2, **settings}}


def told(reward: Any, **settings: Any) -> list[str]:
    """What a gate is told before training that such a suite measures."""
    values = {"reward": reward, "suites": {"duel": {"kind": "win_rate", **settings}}}
    config = RunConfig.model_validate(values)
    duel = config.suites["duel"]
    assert isinstance(duel, WinRateSuiteConfig)
    return duel.metrics(config.reward)


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Data, our evaluation, and theirs."""
    return (
        make_data(tmp_path / "data", HUMANS),
        evaluation(tmp_path / "ours", "us", OURS),
        evaluation(tmp_path / "theirs", "them", THEIRS),
    )


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def wins(place: Path) -> dict[int, float]:
    rows = read_rows([open_artifact(place).file("examples.parquet")], SUITE_EXAMPLES)
    return {int(row["prompt_id"], 16): row["score"] for row in rows}


def test_the_higher_score_wins_and_a_tie_is_half_a_win(
    tmp_path: Path, sides: tuple[Path, Path, Path]
) -> None:
    manifest = compare(tmp_path / "out", *sides)
    # A tie, a win and a loss; an answer without a number is worth as much as a wrong one.
    assert wins(tmp_path / "out") == {1: 0.5, 2: 1.0, 3: 0.0, 4: 0.5}
    wanted = {"win_rate": 0.5, "tie_share": 0.5, "identical_share": 0.25, "prompts": 4,
              "mean_reward": 0.5, "other_mean_reward": 0.5}  # fmt: skip
    assert {name: manifest.metrics[name] for name in wanted} == wanted
    assert manifest.metrics["other_mean_characters"] == (6 + 6 + 6 + 4) / 4
    assert set(manifest.metrics) == {*told({"name": "gsm8k"})}
    assert manifest.inputs["model"].key == "us"
    assert manifest.config["suite"] == "duel"
    columns = read_measures(open_artifact(tmp_path / "out"))
    for name, column in columns.items():
        assert manifest.metrics[name] == pytest.approx(column.mean())


def test_no_interval_leaves_the_range_of_its_metric_but_that_of_the_fit(
    tmp_path: Path, sides: tuple[Path, Path, Path]
) -> None:
    compare(tmp_path / "out", *sides)
    found = json.loads(open_artifact(tmp_path / "out").file("intervals.json").read_text())
    column = read_measures(open_artifact(tmp_path / "out"))["win_rate"]
    low, high = interval(column.values, column.weights) or (0, 0)
    assert low < 0 < high - 1  # so that there is something to cut
    assert found["win_rate"] == [0.0, 1.0]
    assert found["other_mean_characters"][0] > 0
    assert found["length_controlled_win_rate"][1] > 1


def test_without_another_side_the_human_answers_are_compared_with(
    tmp_path: Path, sides: tuple[Path, Path, Path]
) -> None:
    data, ours, _ = sides
    compare(tmp_path / "out", data, ours)
    assert wins(tmp_path / "out") == {1: 0.5, 2: 0.5, 3: 0.0, 4: 0.0}


def test_swapping_the_sides_turns_the_win_rate_round(
    tmp_path: Path, sides: tuple[Path, Path, Path]
) -> None:
    data, ours, theirs = sides
    there = compare(tmp_path / "there", data, ours, theirs).metrics
    back = compare(tmp_path / "back", data, theirs, ours).metrics
    for name in ("win_rate", "length_controlled_win_rate"):
        assert there[name] == pytest.approx(1 - float(back[name] or 0))


def test_a_judge_sees_both_orders_and_its_bias_is_told(
    tmp_path: Path, sides: tuple[Path, Path, Path]
) -> None:
    data, _, theirs = sides
    ours = evaluation(tmp_path / "judged", "us", {1: "#### 1", 2: "longer", 3: "#", 4: "none!"})

    def says_a_of_odd_prompts(body: dict[str, Any], number: int) -> Any:
        odd = "Question 3?" in body["messages"][0]["content"]
        return says("[[A]]") if odd else longer_wins(body, number)

    with running_judge(says_a_of_odd_prompts) as server:
        manifest = compare(tmp_path / "out", data, ours, theirs, reward=judge(server.url))
        asked = [shown(body) for body in server.requests]
    assert sorted(asked) == sorted(
        [("longer", "#### 0"), ("#### 0", "longer"), ("#", "#### 3"), ("#### 3", "#"),
         ("none!", "none"), ("none", "none!")]
    )  # fmt: skip
    assert wins(tmp_path / "out") == {1: 0.5, 2: 0.5, 3: 0.5, 4: 1.0}
    assert manifest.metrics["position_flip_share"] == 0.25
    assert set(manifest.metrics) == {*told(judge("http://x/v1"))}
    file = open_artifact(tmp_path / "out").file("judgements.parquet")
    said = {(r["prompt_id"], r["order"]): r["verdict"] for r in read_rows([file], JUDGEMENTS)}
    assert (said[prompt_id(3), "ab"], said[prompt_id(3), "ba"]) == ("a", "b")
    assert said[prompt_id(1), "ab"] == "tie"


def test_without_swap_each_pair_is_shown_once_in_an_order_that_stays(
    tmp_path: Path,
) -> None:
    humans = dict.fromkeys(range(40), "h")
    data = make_data(tmp_path / "data", humans)
    ours = evaluation(tmp_path / "ours", "us", dict.fromkeys(humans, "ours"))
    theirs = evaluation(tmp_path / "theirs", "them", dict.fromkeys(humans, "xxx"))
    firsts = []
    for name in ("one", "two"):
        with running_judge(longer_wins) as server:
            manifest = compare(
                tmp_path / name, data, ours, theirs, reward=judge(server.url), swap=False
            )
            assert len(server.requests) == len(humans)
            firsts.append(sum(shown(body)[0] == "ours" for body in server.requests))
        assert manifest.metrics["win_rate"] == 1.0
        assert set(manifest.metrics) == {*told(judge("http://x/v1"), swap=False)}
    assert firsts[0] == firsts[1]
    assert 8 < firsts[0] < 32


def test_the_judges_template_shows_the_human_answer_and_not_the_others(
    tmp_path: Path, sides: tuple[Path, Path, Path]
) -> None:
    template = "{prompt} {human} | {answer_a} | {answer_b}"
    with running_judge(lambda body, _: says("[[tie]]")) as server:
        compare(tmp_path / "out", *sides, reward=judge(server.url, template=template))
        texts = [body["messages"][0]["content"] for body in server.requests]
    assert all("#### 3 |" in text for text in texts if "Question 3?" in text)
    assert any("Question 3?" in text for text in texts)


def test_prompts_that_a_side_did_not_answer_are_counted_and_none_in_common_is_an_error(
    tmp_path: Path, sides: tuple[Path, Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    data, ours, _ = sides
    theirs = evaluation(tmp_path / "few", "them", {2: "#### 2", 9: "#### 9"})
    manifest = compare(tmp_path / "out", data, ours, theirs)
    assert wins(tmp_path / "out") == {2: 0.5}
    assert manifest.counts == {"prompts": 1, "dropped_no_other_answer": 3}
    told = "evaluate --suite duel: 3 of 4 prompts have no answer to compare with"
    assert told in caplog.text
    nobody = evaluation(tmp_path / "nobody", "them", {9: "#### 9"})
    with pytest.raises(InputError, match=r"no prompt of .* was answered by both sides \(4 sampled"):
        compare(tmp_path / "none", data, ours, nobody)


def test_a_pair_without_a_score_on_either_side_is_left_out(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", {1: "#### 1", 2: "no number at all"})
    ours = evaluation(tmp_path / "ours", "us", {1: "#### 1", 2: "#### 2"})
    theirs = evaluation(tmp_path / "theirs", "them", {1: "#### 2", 2: "#### 2"})
    manifest = compare(tmp_path / "out", data, ours, theirs)
    assert (manifest.metrics["win_rate"], manifest.counts) == (1.0, {"prompts": 1, "unscored": 1})
    file = open_artifact(tmp_path / "out").file("unscored.parquet")
    assert {row["prompt_id"] for row in read_rows([file], DROPPED)} == {prompt_id(2)}
    with pytest.raises(InputError, match="cannot be scored"):
        compare(tmp_path / "stop", data, ours, theirs, reward={"name": "gsm8k", "on_error": "stop"})


def test_greedy_answers_are_compared_where_the_suite_says_so(
    tmp_path: Path, sides: tuple[Path, Path, Path]
) -> None:
    data, _, theirs = sides
    ours = evaluation(tmp_path / "greedy", "us", OURS, greedy="#### 3")
    compare(tmp_path / "out", data, ours, theirs, answers="greedy")
    assert wins(tmp_path / "out") == {1: 0.5, 2: 0.5, 3: 1.0, 4: 0.5}


def test_answers_of_another_model_are_refused(
    tmp_path: Path, sides: tuple[Path, Path, Path], tiny_model_dir: Path
) -> None:
    with pytest.raises(InputError, match="holds the answers of another model than"):
        compare(tmp_path / "out", *sides, model=str(tiny_model_dir))


def test_the_model_is_asked_where_there_are_no_answers_and_its_evaluation_says_the_same(
    tmp_path: Path, sides: tuple[Path, Path, Path], tiny_model_dir: Path
) -> None:
    data, _, theirs = sides
    run = {"evaluate": {"max_new_tokens": 8}}
    engine = Replies(tiny_model_dir, lambda request: OURS[int(request.partition("/")[0], 16)])
    model = str(tiny_model_dir)
    asked = compare(tmp_path / "a", data, None, theirs, model=model, engine=engine, of_run=run)
    ours = evaluation(tmp_path / "own", resolve_model(model).ref.key, OURS)
    given = compare(tmp_path / "b", data, ours, theirs, model=model)
    assert asked.metrics == given.metrics
    assert wins(tmp_path / "a") == wins(tmp_path / "b")
    assert {sampling.temperature for _, sampling in engine.asked.values()} == {1.0}
    greedy = Replies(tiny_model_dir, lambda _: "#### 3")
    compare(tmp_path / "c", data, None, theirs, model=model, engine=greedy, of_run=run,
            answers="greedy")  # fmt: skip
    assert {sampling.temperature for _, sampling in greedy.asked.values()} == {0.0}


def test_the_command_line_takes_given_answers_without_a_model(
    tmp_path: Path, sides: tuple[Path, Path, Path]
) -> None:
    data, ours, theirs = sides
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {path: nowhere}\nreward: {name: gsm8k}\nsuites: {duel: {kind: win_rate}}\n"
    )
    words = ["evaluate", "--suite", "duel", "--config", recipe, "--data", data,
             "--answers", ours, "--against", theirs, "--out", tmp_path / "out"]  # fmt: skip
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    assert wins(tmp_path / "out") == {1: 0.5, 2: 1.0, 3: 0.0, 4: 0.5}


def test_another_suites_answers_will_do(
    tmp_path: Path, sides: tuple[Path, Path, Path], tiny_model_dir: Path
) -> None:
    data, ours, _ = sides
    config = RunConfig.model_validate(
        {"reward": {"name": "gsm8k"}, "suites": {"task": {"kind": "task", "max_new_tokens": 8}}}
    )
    engine = Replies(tiny_model_dir, lambda request: "#### 3" if request.endswith("/0") else "no")
    inputs = SuiteInputs("task", str(tiny_model_dir), data=data)
    suite.run(config, inputs, tmp_path / "task", open_engine=engine.open)
    compare(tmp_path / "out", data, ours, tmp_path / "task")
    assert wins(tmp_path / "out") == {1: 1.0, 2: 1.0, 3: 0.0, 4: 0.5}


WAYS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 8}
NO_CHAT = {"template": None, "system": None, "prompt_suffix": ""}


@pytest.mark.parametrize(
    ("ours", "theirs", "which", "told"),
    [
        ({}, {}, "sampled", None),
        ({}, {"max_new_tokens": 9, "temperature": 0.5}, "sampled",
         "(max_new_tokens 8 and 9; temperature 1.0 and 0.5)"),
        ({}, {"temperature": 0.5}, "greedy", None),
        ({"max_new_tokens": 9}, {}, "greedy", "(max_new_tokens 9 and 8)"),
        ({"system": "Be brief. " * 9}, {}, "sampled",
         "(chat.system Be brief. Be brief. Be brief. … and null)"),
    ],
)  # fmt: skip
def test_sides_that_were_asked_in_different_ways_are_told(
    ours: dict[str, Any], theirs: dict[str, Any], which: str, told: str | None,
    tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    places = []
    for name, change, said in (("ours", ours, OURS), ("theirs", theirs, THEIRS)):
        settings = {
            "evaluate": {key: change.get(key, value) for key, value in WAYS.items()},
            "chat": {key: change.get(key, value) for key, value in NO_CHAT.items()},
        }
        answers = {number: (text, text) for number, text in said.items()}
        place = tmp_path / name
        places.append(make_evaluation(place, name, answers=answers, config=settings))
    compare(tmp_path / "out", make_data(tmp_path / "data", HUMANS), *places, answers=which)
    lines = [record.getMessage() for record in caplog.records if "different ways" in record.msg]
    assert [told in line for line in lines] == ([] if told is None else [True])


def test_a_model_that_is_asked_now_is_asked_as_the_other_side_was_or_told(
    tmp_path: Path, sides: tuple[Path, Path, Path], tiny_model_dir: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    data, model = sides[0], str(tiny_model_dir)
    answers = {number: (text, None) for number, text in THEIRS.items()}
    ways = {"evaluate": WAYS, "chat": NO_CHAT}
    theirs = make_evaluation(tmp_path / "other", "them", answers=answers, config=ways)
    engine = Replies(tiny_model_dir, lambda request: "#### 1")
    for tokens, told in ((8, False), (9, True)):
        run = {"evaluate": {"max_new_tokens": tokens, "engine": {"name": "vllm", "gpus": 2}}}
        out = tmp_path / str(tokens)
        made = compare(out, data, None, theirs, model=model, engine=engine, of_run=run)
        assert made.info["gpus"] == 2
        assert ("different ways (max_new_tokens 9 and 8)" in caplog.text) == told


def test_settings_enter_the_key_and_who_is_played_against_by_the_answers_alone(
    tmp_path: Path, sides: tuple[Path, Path, Path]
) -> None:
    data, ours, theirs = sides
    first = compare(tmp_path / "1", data, ours, theirs).key
    assert compare(tmp_path / "2", data, ours, theirs, against="start").key == first
    others = [
        compare(tmp_path / "3", data, ours, ours).key,
        compare(tmp_path / "4", data, ours).key,
        compare(tmp_path / "5", data, ours, theirs, max_prompts=3).key,
        compare(tmp_path / "6", data, ours, theirs, swap=False).key,
        compare(tmp_path / "7", data, ours, theirs, answers="greedy").key,
        compare(tmp_path / "8", data, ours, theirs, reward={"name": "exact"}).key,
    ]
    assert len({first, *others}) == len(others) + 1
    assert len(wins(tmp_path / "5")) == 3


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"reward": {"name": "none"}}, ConfigError, "nobody decides who wins; set suites.duel"),
        ({"data": None}, ConfigError, "suites.duel needs --data"),
        ({"ours": None}, ConfigError, "suites.duel needs --answers"),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path,
    sides: tuple[Path, Path, Path],
    given: dict[str, Any],
    error: type[Exception],
    text: str,
) -> None:
    data, ours, _ = sides
    with pytest.raises(error, match=text):
        compare(tmp_path / "out", **{"data": data, "ours": ours, **given})


def test_a_suites_own_reward_decides(tmp_path: Path, sides: tuple[Path, Path, Path]) -> None:
    data, ours, theirs = sides
    values = {
        "reward": {"name": "none"},
        "suites": {"duel": {"kind": "win_rate", "reward": {"name": "exact"}}},
    }
    inputs = SuiteInputs("duel", data=data, answers=ours, against=theirs)
    suite.run(RunConfig.model_validate(values), inputs, tmp_path / "out")
    assert wins(tmp_path / "out") == {1: 0.5, 2: 1.0, 3: 0.0, 4: 0.5}


# Length control.


def simulated(
    count: int, strength: float, pull: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Wins whose log-odds are `strength`, and `pull` times tanh of the scaled difference."""
    rng = np.random.default_rng(seed)
    ours, other = rng.normal(600, 150, count), rng.normal(500, 150, count)
    longer = (ours - other) / np.std(ours - other, ddof=1)
    chance = 1 / (1 + np.exp(-strength - pull * np.tanh(longer)))
    return (rng.random(count) < chance).astype(float), ours, other


@pytest.mark.parametrize("strength", [-0.8, 0.0, 0.8])
def test_the_win_rate_at_equal_lengths_is_the_one_that_was_simulated(strength: float) -> None:
    wins, ours, other = simulated(40_000, strength, 2.0)
    values = length_controlled(wins, ours, other)
    assert values.mean() == pytest.approx(1 / (1 + np.exp(-strength)), abs=0.015)
    assert wins.mean() > values.mean() + 0.05  # answers are longer, and that pays


def test_without_a_pull_of_length_the_win_rate_stays_what_it_was() -> None:
    wins, ours, other = simulated(40_000, 0.4, 0.0)
    assert length_controlled(wins, ours, other).mean() == pytest.approx(wins.mean(), abs=0.01)
    same = np.full(len(wins), 100.0)
    assert length_controlled(wins, same, same).mean() == pytest.approx(wins.mean(), abs=1e-5)


@pytest.mark.parametrize("win", [0.0, 0.5, 1.0])
def test_where_all_is_won_or_lost_the_interval_is_that_of_the_win_rate(win: float) -> None:
    wins, ours, other = np.full(10, win), np.arange(10.0), np.arange(10.0)[::-1]
    values = length_controlled(wins, ours, other)
    assert interval(values, np.ones(10)) == interval(wins, np.ones(10))


def test_the_regression_is_where_its_likelihood_is_highest() -> None:
    """The slow twin: a grid that closes in on the maximum, with no derivative in it."""
    wins, ours, other = simulated(300, 0.5, 1.5)
    longer = (ours - other) / np.std(ours - other, ddof=1)
    features = np.column_stack([np.ones(300), np.tanh(longer)])

    def loss(coefficients: np.ndarray) -> float:
        logits = features @ coefficients
        likelihood = wins @ logits - np.logaddexp(0, logits).sum()
        return float(RIDGE / 2 * coefficients @ coefficients - likelihood)

    best, step = np.zeros(2), 4.0
    while step > 1e-7:
        around = [best + step * np.array([i, j]) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        nearest = min(around, key=loss)
        step = step if loss(nearest) < loss(best) else step / 2
        best = nearest if loss(nearest) < loss(best) else best
    assert fit(wins, features) == pytest.approx(best, abs=1e-5)


def test_its_interval_is_that_of_fitting_resamples() -> None:
    """The slow twin: the regression is fitted anew on every resample."""
    wins, ours, other = simulated(400, 0.3, 1.5, seed=3)
    found = interval(length_controlled(wins, ours, other), np.ones(400))
    assert found is not None
    low, high = found
    rng = np.random.default_rng(5)
    refitted = []
    for _ in range(600):
        drawn = rng.integers(0, 400, 400)
        refitted.append(length_controlled(wins[drawn], ours[drawn], other[drawn]).mean())
    slow_low, slow_high = np.quantile(refitted, (0.025, 0.975))
    assert high - low == pytest.approx(slow_high - slow_low, rel=0.12)
    assert low == pytest.approx(slow_low, abs=0.015)


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 9000), st.integers(0, 9000)),
        min_size=1,
        max_size=30,
    )
)
def test_no_wins_and_no_lengths_make_it_fail(found: list[tuple[float, int, int]]) -> None:
    wins, ours, other = (np.array(column, float) for column in zip(*found, strict=True))
    values = length_controlled(wins, ours, other)
    assert np.isfinite(values).all()
    assert 0 <= values.mean() <= 1
    assert length_controlled(1 - wins, other, ours).mean() == pytest.approx(1 - values.mean())
