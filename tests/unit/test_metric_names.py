"""The names that a gate may ask for before anything is made are those that evaluations write."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.artifacts import Manifest, open_artifact
from stages.config import RunConfig
from stages.config.metrics import Metrics, is_a_share, metrics_of
from stages.data.measures import read_measures
from stages.errors import ConfigError
from stages.gates import check_names
from stages.recipe import load_recipe
from tests.evaluations import make_data
from tests.unit import test_alpaca_eval as of_alpaca
from tests.unit import test_mt_bench as of_mt_bench
from tests.unit import test_opponents as of_models
from tests.unit import test_suite_task as of_task
from tests.unit.test_alpaca_eval import answers
from tests.unit.test_mt_bench import asked

__all__ = ["answers", "asked"]  # fixtures
SCORED: dict[str, Any] = {"reward": {"name": "exact"}}


def known(suite: str | None = None, **values: Any) -> Metrics:
    return metrics_of(RunConfig.model_validate(values), suite)


def of_suite(**section: Any) -> Metrics:
    return known("x", suites={"x": section})


def written(place: Path) -> set[str]:
    found = open_artifact(place)
    return {*json.loads(found.file("metrics.json").read_text())}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path / "data", {1: "one", 2: "two", 3: "three"})


@pytest.mark.parametrize("settings", [{}, SCORED, {**SCORED, "greedy": False}])
def test_an_evaluation_writes_those_of_its_recipe_and_no_others(
    settings: dict[str, Any], data: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    settings = dict(settings)
    drawn = {"evaluate": {"max_new_tokens": 8, "precision": "fp32",
                          "greedy": settings.pop("greedy", True)}, **settings}  # fmt: skip

    def ask(name: str, *against: Path) -> Manifest:
        return of_models.ask(tmp_path / name, tiny_model_dir, data, *against, **drawn)

    ask("start")
    ask("player", tiny_model_dir, tmp_path / "start")
    names = known(**drawn).names
    assert sorted(written(tmp_path / "player")) == sorted(names)
    assert written(tmp_path / "start") < {*names}


def test_a_task_writes_those_of_its_kind(tmp_path: Path, tiny_model_dir: Path) -> None:
    data = of_task.make_data(tmp_path / "data", heldout={1: "#### 1", 2: "#### 2"})
    for number, section in enumerate(
        [{"num_samples": 3, "k": [1, 3]}, {"num_samples": 0}, {"greedy": False}]
    ):
        engine = of_task.Scripted(tiny_model_dir, of_task.TEXTS)
        place = tmp_path / str(number)
        of_task.ask(place, tiny_model_dir, data, engine, **section)
        assert sorted(of_suite(kind="task", **section).names) == sorted(written(place))


def test_mt_bench_writes_those_of_its_kind(asked: tuple[Path, Any], tmp_path: Path) -> None:
    found, lines = of_suite(kind="mt_bench"), of_mt_bench.judgements(asked[0])
    judged = of_mt_bench.write_lines(tmp_path / "j.jsonl", lines)
    of_mt_bench.read_back(tmp_path / "out", asked[0], judged)
    names = written(asked[0]) | written(tmp_path / "out")
    assert {*found.names} <= names
    assert all(name in found for name in names)
    assert "scores" not in found


def test_alpaca_eval_writes_those_of_its_kind(answers: Path, tmp_path: Path) -> None:
    found, preferences = of_suite(kind="alpaca_eval"), [1.25, 2.0, 1.5, 1.0]
    of_alpaca.read_back(tmp_path / "out", answers, of_alpaca.annotated(answers, [*preferences]))
    names = written(answers) | written(tmp_path / "out")
    assert {*found.names} <= names
    assert all(name in found for name in names)
    assert "win_rat" not in found


def test_what_is_a_share_stays_between_0_and_1(
    data: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    of_models.ask(tmp_path / "out", tiny_model_dir, data, tiny_model_dir, **SCORED)
    config = RunConfig.model_validate(SCORED)
    values = read_measures(open_artifact(tmp_path / "out"))
    shares = {name for name in values if is_a_share(config, None, name)}
    assert {"sampled_accuracy", "sampled_empty_share", "heldout_reward_accuracy"} <= shares
    assert not {name for name in values if name.endswith("tokens")} & shares
    assert all(0 <= value <= 1 for name in shares for value in values[name].values)
    scored: dict[str, Any] = {"reward": {"name": "python", "python": {"file": "x.py"}}}
    assert not is_a_share(RunConfig.model_validate(scored), None, "sampled_accuracy")


WORDS = (
    "reward.name=gsm8k",
    "suites.quiz={kind: task, k: [1]}",
    "suites.duel={kind: win_rate}",
    "suites.mt={kind: mt_bench}",
    "suites.alpaca={kind: alpaca_eval}",
    "suites.lm={kind: lm_eval, tasks: [arc_easy]}",
)


def check(*words: str) -> None:
    check_names(load_recipe(None, [*WORDS, *words]).for_iteration())


@pytest.mark.parametrize(
    ("metric", "near"),
    [
        ("heldout_reward_acuracy", "heldout_reward_accuracy"),
        ("quiz.acuracy", "accuracy"),
        ("quiz.greedy_acc", "greedy_accuracy"),
        ("duel.win_rates", "win_rate"),
        ("mt.mean_token", "mean_tokens"),
        ("alpaca.win_rat", "win_rate"),
    ],
)
def test_a_name_that_no_evaluation_has_is_refused(metric: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"is not measured .* did you mean {near}\?"):
        check(f"promote.gate={{any: [{{at_least: {{metric: {metric}, value: 0.5}}}}]}}")


@pytest.mark.parametrize(
    "metric",
    [
        "sampled_gain", "heldout_kl", "quiz.pass@9", "mt.score_coding", "alpaca.win_rate_koala",
        "lm.anything,at_all", "mt.score",
    ],
)  # fmt: skip
def test_one_that_may_be_is_not(metric: str) -> None:
    check(f"promote.gate={{at_least: {{metric: '{metric}', value: 0.9}}}}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reward.name=none", "promote.metric=sampled_accuracy"], "have no such metric"),
        (["promote.metric=quiz.accuracy"], "have no such metric"),
        (["promote.metric=sampled_accuracy", "promote.min_value=80"],
         r"^promote.min_value of sampled_accuracy is 80, .* share of 1: write 0\.8$"),
        (["promote.gate={at_least: {metric: quiz.accuracy, value: 62.5}}"], r": write 0\.625$"),
        (["promote.gate={at_least: {metric: quiz.accuracy, value: 101}}"], "is never above 1$"),
        (["promote.gate={at_least: {metric: duel.win_rate, value: 55}}"], r": write 0\.55$"),
    ],
)  # fmt: skip
def test_so_is_one_that_cannot_be_there_or_reach_that(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(*words)
