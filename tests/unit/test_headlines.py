"""A suite's headline figure is told wherever there is no room for all figures."""

from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from spin_cli.app import app
from spin_cli.steps import _figures
from stages.artifacts import read_manifest
from stages.data.measures import Measure
from stages.export import _columns, _measured
from stages.headlines import in_order
from stages.layout import RunLayout
from stages.reporting.collect import collect
from stages.reporting.figures import course
from tests.evaluations import make_evaluation, outside
from tests.made_runs import write_run

QUIZ = (
    "accuracy", "cut_off_share", "greedy_accuracy", "greedy_cut_off_share", "greedy_mean_tokens",
    "greedy_unscored_share", "majority@1", "majority@8", "mean_tokens", "pass@1", "pass@8",
    "prompts", "unscored_share",
)  # fmt: skip
DUEL = (
    "identical_share", "length_controlled_win_rate", "mean_characters", "mean_reward",
    "other_mean_characters", "other_mean_reward", "prompts", "tie_share", "win_rate",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunLayout:
    suites = ["suites.quiz={kind: task, num_samples: 8, k: [1, 8]}",
              "suites.duel={kind: win_rate, against: start}", "reward.name=gsm8k"]  # fmt: skip
    layout = write_run(tmp_path_factory.mktemp("made") / "run", 1, *suites)
    against = {"against": outside("start/evaluate")}
    for name, kind, metrics, inputs in (
        ("quiz", "task", QUIZ, {}), ("duel", "win_rate", DUEL, against),
    ):  # fmt: skip
        measures = [Measure(str(n), metric, float(n % 2)) for metric in metrics for n in range(4)]
        place, config = layout.suite(0, name), {"suite": name, "kind": kind}
        make_evaluation(place, "m", measures, stage="suite", config=config, inputs=inputs)
    return layout


@pytest.mark.parametrize(
    ("kind", "names", "first"),
    [
        ("task", QUIZ, ["accuracy", "greedy_accuracy", "pass@8", "majority@8"]),
        ("win_rate", DUEL, ["win_rate", "length_controlled_win_rate", "mean_reward"]),
        ("alpaca_eval", DUEL, ["length_controlled_win_rate", "win_rate", "tie_share"]),
        ("mt_bench", ("mean_tokens", "score", "score_math", "score_turn_1"),
         ["score", "score_turn_1", "score_math", "mean_tokens"]),
        ("lm_eval", ("arc.acc", "arc.acc_stderr", "mmlu_law.acc", "mmlu.acc",
                     "open_llm_leaderboard_v1.average"),
         ["open_llm_leaderboard_v1.average", "arc.acc", "mmlu.acc", "mmlu_law.acc"]),
        (None, ("a", "pass@2", "pass@10", "majority@10", "b_share"),
         ["pass@10", "majority@10", "pass@2", "a", "b_share"]),
    ],
)  # fmt: skip
def test_headlines_come_first_and_nothing_is_lost(
    kind: str | None, names: tuple[str, ...], first: list[str]
) -> None:
    found = in_order(names, kind)
    assert found[: len(first)] == first
    assert sorted(found) == sorted(names)


def _told(run: RunLayout, where: str) -> Iterator[tuple[str, str]]:
    """Yield what a place tells of each suite."""
    runner = CliRunner()
    match where:
        case "status":
            text = runner.invoke(app, ["status", str(run.root)]).stdout
            yield "quiz", text.partition("suite quiz")[2].partition("suite duel")[0]
            yield "duel", text.partition("suite duel")[2].partition("suite quiz")[0]
        case "lineage":
            for name in ("quiz", "duel"):
                yield name, runner.invoke(app, ["lineage", str(run.suite(0, name))]).stdout
        case "log":
            for name in ("quiz", "duel"):
                yield name, _figures(read_manifest(run.suite(0, name)))
        case "report":
            view = collect(run.root)
            for group in course(view):
                drawn = " ".join(panel.title for panel in group.panels)
                yield group.name.removeprefix("Suite "), f"{drawn} {group.tables[0].caption}"


@pytest.mark.parametrize("where", ["status", "lineage", "log", "report"])
def test_pass_at_k_and_the_win_rate_are_told_and_how_many_are_not(
    run: RunLayout, where: str
) -> None:
    told = dict(_told(run, where))
    assert "pass@8" in told["quiz"]
    assert "win_rate" in told["duel"].replace("length_controlled_win_rate", "")
    assert " more" in told["quiz"], told["quiz"]
    if where == "log":
        assert told["duel"].startswith(", against start/evaluate (key start/evalua), win_rate")


def test_a_model_card_has_them_where_no_gate_asks_for_them(run: RunLayout) -> None:
    config = collect(run.root).config
    assert config is not None
    found = _measured(run, 0, config, [], verify=True)
    assert {"pass@8", "majority@8"} <= {*_columns("quiz", found["quiz"], config)}
    assert "win_rate" in _columns("duel", found["duel"], config)
