"""Models side by side: who is compared with whom, by what, and what may not be."""

import io
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from spin_cli.app import app
from spin_cli.compare_commands import _change, _number, _row
from spin_cli.compare_commands import compare as compare_by_hand
from stages.artifacts import Outcome, Plan, open_artifact, produce
from stages.artifacts.keys import canonical_json
from stages.artifacts.manifest import InputRef
from stages.artifacts.pointer import PointerEntry, move_pointer
from stages.compare import (
    EVALUATION,
    Comparison,
    Difference,
    Value,
    compare,
    meaning_of_a_rise,
    verdict,
)
from stages.data.measures import Measure
from stages.data.paired import Paired
from stages.errors import ConfigError, InputError
from stages.evidence import differences
from stages.layout import RunLayout
from tests.evaluations import column, make_evaluation, outside, prompt_id

RIGHT = [0.0] * 30 + [1.0] * 70
"""Seventy of a hundred right."""
MORE = [0.0] * 15 + [1.0] * 85
"""Fifteen more, and none fewer."""


def evaluation(place: Path, model: str, accuracy: list[float], **settings: Any) -> Path:
    return make_evaluation(place, model, column("sampled_accuracy", accuracy), **settings)


def only(found: Comparison, suite: str = EVALUATION) -> list[Difference]:
    [table] = [table for table in found.suites if table.suite == suite]
    return list(table.differences)


@pytest.fixture
def run(tmp_path: Path) -> RunLayout:
    """A run of two iterations, the second champion, with a suite that the start was not asked."""
    layout = RunLayout(tmp_path / "run")
    layout.root.mkdir()
    layout.record.write_text("{}")
    models = {None: "base", 0: "zero", 1: "one"}
    right = {None: RIGHT, 0: RIGHT, 1: MORE}
    for number, model in models.items():
        place = layout.start_evaluation if number is None else layout.stage(number, "evaluate")
        inputs = {} if number is None else {"opponent": outside(f"rival {number}")}
        measures = column("sampled_accuracy", right[number])
        if inputs:
            measures += column("heldout_reward_accuracy", [1.0, 0.0])
        config = {"seed": 0, "beta": None if number is None else 0.1}
        make_evaluation(place, model, measures, inputs=inputs, config=config)
        if number is not None:
            produce(
                layout.stage(number, "train"),
                Plan("train", 1, {"iteration": number}, {}),
                lambda space: Outcome(counts={}),
            )
            make_evaluation(
                layout.suite(number, "quiz"), model, column("pass@1", right[number]),
                stage="suite", config={"suite": "quiz"},
            )  # fmt: skip
    manifest = open_artifact(layout.stage(1, "train")).manifest
    move_pointer(
        layout.champion,
        PointerEntry(path="iterations/001/train", key=manifest.key, reason="better", at="now",
                     decision_key="d"),
    )  # fmt: skip
    return layout


def test_differences_are_paired_by_example(tmp_path: Path) -> None:
    """Fifteen of 100 examples are won and none lost: paired this is sure, unpaired it is not."""
    one = evaluation(tmp_path / "one", "a", RIGHT)
    shuffled = list(reversed(column("sampled_accuracy", MORE)))
    other = make_evaluation(tmp_path / "other", "b", shuffled)
    found = compare([str(one), str(other)])
    [difference] = only(found)
    paired = difference.paired
    assert (paired.value, paired.rival_value) == (0.85, 0.70)
    assert (paired.wins, paired.losses, paired.ties, paired.examples) == (15, 0, 85, 100)
    assert paired.gain == pytest.approx(0.15)
    assert paired.low > 0.08
    assert (paired.method, difference.verdict) == ("mcnemar", "better")
    assert difference.p_value == pytest.approx(2 * 0.5**15 / 2)  # mid-p, two-sided
    value, low, high = [
        [getattr(v, name) for v in found.suites[0].values["sampled_accuracy"]]
        for name in ("value", "low", "high")
    ]
    assert value == [0.70, 0.85]
    assert high[0] > low[1]  # the models' own intervals overlap all the same


def test_turning_the_two_round_turns_the_difference_round(tmp_path: Path) -> None:
    names = [str(evaluation(tmp_path / name, name, right)) for name, right in
             (("a", RIGHT), ("b", MORE))]  # fmt: skip
    [there], [back] = only(compare(names)), only(compare(names[::-1]))
    assert there.paired.gain == -back.paired.gain
    assert (there.paired.low, there.paired.high) == pytest.approx(
        (-back.paired.high, -back.paired.low), abs=1e-6
    )
    assert there.p_value == back.p_value
    assert (there.verdict, back.verdict) == ("better", "worse")


def test_names_of_one_model_are_refused(
    run: RunLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run.root == tmp_path / "run"
    for names in (("run:0", "run:0"), ("run", "run:1"), ("run:0", "run:1", "run/iterations/000")):
        with pytest.raises(ConfigError, match="are the same model; name others$") as told:
            compare(names)
        assert told.value.exit_code == 2


def test_whom_models_were_compared_with_stands_above_their_figures(tmp_path: Path) -> None:
    def made(name: str, rival: str | None) -> Path:
        inputs = {"against": outside(rival)} if rival else {}
        config = {"suite": "duel", "kind": "win_rate"}
        rates = column("win_rate", RIGHT)
        return make_evaluation(tmp_path / name, name, rates, stage="suite", config=config,
                               inputs=inputs)  # fmt: skip

    one, two, other, humans = (made(*each) for each in (
        ("one", "start"), ("two", "start"), ("other", "elsewhere"), ("humans", None),
    ))  # fmt: skip
    assert "duel: against start (key start)\nduel: values," in spin("compare", one, two)[1]
    told = spin("compare", one, other, humans)[1]
    assert "duel: A against start (key start)\nduel: B against elsewhere (key else" in told
    assert "duel: C against the human answers\nduel: values," in told
    assert compare([str(one), str(other)]).to_json()["suites"]["duel"]["rivals"] == [
        "start (key start)", "elsewhere (key elsewhere)",
    ]  # fmt: skip


def test_rivals_have_one_name_each_and_one_rival_one_name(tmp_path: Path) -> None:
    def made(name: str, path: str, key: str, *, inside: bool) -> str:
        rival = InputRef(path=path, inside_run=inside, key=key, content=key)
        config = {"suite": "duel", "kind": "win_rate"}
        return str(make_evaluation(
            tmp_path / name, name, column("win_rate", RIGHT), stage="suite", config=config,
            inputs={"against": rival},
        ))  # fmt: skip

    here = made("here", "start/evaluate", "a" * 64, inside=True)
    beside = made("beside", "evaluate", "a" * 64, inside=False)
    elsewhere = made("elsewhere", "evaluate", "b" * 64, inside=False)
    another = made("another", "start/evaluate", "c" * 64, inside=True)
    hub = made("hub", "Qwen/Qwen3", f"hub:{'d' * 40}", inside=False)
    [table] = compare([here, beside, hub]).suites
    assert list(table.rivals) == ["start/evaluate", "start/evaluate", "Qwen/Qwen3"]
    [table] = compare([beside, elsewhere]).suites
    assert list(table.rivals) == [f"evaluate (key {letter * 12})" for letter in "ab"]
    [table] = compare([here, another]).suites
    assert list(table.rivals) == [f"start/evaluate (key {letter * 12})" for letter in "ac"]


def test_a_model_compared_with_its_copy_is_the_same(tmp_path: Path) -> None:
    places = [str(evaluation(tmp_path / name, "a", RIGHT)) for name in "ab"]
    [difference] = only(compare(places))
    assert (difference.verdict, difference.paired.gain, difference.p_value) == ("same", 0, 1)


@pytest.mark.parametrize("seed", range(3))
def test_no_difference_is_found_where_there_is_only_noise(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    hard = rng.normal(0, 5, 200)
    for name in ("a", "b"):
        noisy = (hard + rng.normal(0, 1, 200)).tolist()
        make_evaluation(tmp_path / name, name, column("score", noisy))
    [difference] = only(compare([str(tmp_path / "a"), str(tmp_path / "b")]))
    assert difference.paired.method == "bootstrap"
    assert difference.paired.high - difference.paired.low < 0.8  # what is hard is hard for both


def paired(low: float | None, high: float | None, wins: int = 3) -> Paired:
    return Paired(
        value=0, rival_value=0, gain=0.0, low=low, high=high, confidence=0.95,
        p_value=0.0, above=0, method="bootstrap", examples=9, wins=wins, losses=0, ties=9 - wins,
        unmatched=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "rise", "fall"),
    [
        ("sampled_accuracy", "better", "worse"),
        ("length_controlled_win_rate", "better", "worse"),
        ("pass@8", "better", "worse"),
        ("majority@4", "better", "worse"),
        ("score_turn_2", "better", "worse"),
        ("sampled_cut_off_share", "worse", "better"),
        ("sampled_mean_tokens", "higher", "lower"),
        ("heldout_reward_accuracy", "higher", "lower"),
        ("opponent_accuracy", "higher", "lower"),
    ],
)
def test_what_a_difference_means(metric: str, rise: str, fall: str) -> None:
    means = meaning_of_a_rise(metric, {})
    assert verdict(paired(0.1, 0.2), 0.01, means) == rise
    assert verdict(paired(-0.2, -0.1), 0.01, means) == fall
    assert verdict(paired(-0.1, 0.2), 0.01, means) == "open"
    assert verdict(paired(0.1, 0.2), 0.06, means) == "open"  # on the edge the test can differ
    assert verdict(paired(None, None), 1.0, means) == "open"
    assert verdict(paired(0.0, 0.0, wins=0), 1.0, means) == "same"


@pytest.mark.parametrize(
    ("metric", "means"),
    [
        ("arc_easy.acc_norm", "better"),
        ("gsm8k.exact_match.strict-match", "better"),
        ("wikitext.word_perplexity", "worse"),
        ("accuracy_bias.toxicity", "higher"),
        ("acc_task.perplexity_rank", "higher"),
        ("win_rate.bits_per_byte", "worse"),
        ("score.toxicity.acc", "higher"),  # a filter called acc
        ("my.acc.toxicity", "higher"),  # a task called my.acc
        ("heldout_quiz.acc", "better"),
        ("open_llm_leaderboard_v1.average", "better"),
    ],
)
def test_of_a_task_the_metric_tells_which_way_is_better_and_not_its_name(
    metric: str, means: str
) -> None:
    config = {"kind": "lm_eval", "tasks": ["my", "my.acc"], "asked": {"arc_easy": {}}}
    assert meaning_of_a_rise(metric, config) == means


@pytest.mark.parametrize("examples", [1, 2, 3, 5, 6])
def test_few_examples_that_all_agree_are_no_proof(tmp_path: Path, examples: int) -> None:
    for name, value in (("a", 0.5), ("b", 0.75)):
        make_evaluation(tmp_path / name, name, column("sampled_accuracy", [value] * examples))
    [difference] = only(compare([str(tmp_path / "a"), str(tmp_path / "b")]))
    is_proof = examples == 6
    assert difference.verdict == ("better" if is_proof else "open")
    assert (difference.p_value <= 0.05) is (difference.paired.low is not None) is is_proof
    json.dumps(difference.to_json(), allow_nan=False)
    code, out = spin("compare", tmp_path / "a", tmp_path / "b")
    assert (code, "nan" in out) == (0, False)


def test_another_beta_leaves_out_only_what_is_told_in_its_unit(tmp_path: Path) -> None:
    """Gates accept two iterations with betas of their own, and so does a comparison."""
    for name, beta in (("a", 0.1), ("b", 5.0)):
        measures = [*column("sampled_accuracy", RIGHT), *column("heldout_reward_accuracy", MORE)]
        make_evaluation(
            tmp_path / name, name, measures + column("heldout_reward_margin", RIGHT),
            config={"seed": 0, "beta": beta}, inputs={"opponent": outside("rival")},
        )  # fmt: skip
    places = [tmp_path / "a", tmp_path / "b"]
    assert differences(*map(open_artifact, places)) == []
    [table] = compare(list(map(str, places))).suites
    compared = [one.metric for one in table.differences]
    assert compared == ["sampled_accuracy", "heldout_reward_accuracy"]
    assert [one["metric"] for one in table.unpaired] == ["heldout_reward_margin"]
    assert "train.beta" in table.unpaired[0]["why"]


@pytest.mark.parametrize("name", ["seed", "engine"])
def test_other_draws_are_compared_as_gates_do_and_told(tmp_path: Path, name: str) -> None:
    places = [
        evaluation(tmp_path / model, model, right, config={name: number})
        for number, (model, right) in enumerate((("a", RIGHT), ("b", MORE)))
    ]
    assert differences(*map(open_artifact, places)) == []
    found = compare(list(map(str, places)))
    assert len(only(found)) == 1
    assert f"drawn differently ({name}: 0 and 1)" in found.warnings[0]


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"chat": 1}},
        {"config": {"reward": {"name": "exact"}}},
        {"config": {"evaluate": {"temperature": 0.5}}},
        {"inputs": {"data": outside("other data")}},
        {"config": {"suite": "quiz", "seed": 1}, "stage": "suite"},
    ],
)
def test_what_comparisons_refuse_gates_refuse(tmp_path: Path, change: dict[str, Any]) -> None:
    stage = str(change.get("stage", "evaluate"))
    config = {"suite": "quiz", "seed": 0} if stage == "suite" else {}
    one = evaluation(tmp_path / "a", "a", RIGHT, stage=stage, config=config)
    other = evaluation(tmp_path / "b", "b", MORE, **change)
    assert differences(*map(open_artifact, (one, other)))
    with pytest.raises(InputError, match="in different ways"):
        compare([str(one), str(other)])


def names_of(found: Comparison) -> list[str]:
    return [model.name for model in found.models]


def test_a_run_alone_stands_for_all_its_iterations(run: RunLayout) -> None:
    found = compare([str(run.root)])
    assert names_of(found) == [f"{run.root}:{n}" for n in ("start", 0, 1)]
    assert [table.suite for table in found.suites] == ["evaluate", "quiz"]
    accuracy = [d for d in only(found) if d.metric == "sampled_accuracy"]
    assert [(d.model, d.base, d.verdict) for d in accuracy] == [(1, 0, "same"), (2, 0, "better")]
    # The start was not asked the quiz: its base is the first model that was.
    assert [(d.model, d.base) for d in only(found, "quiz")] == [(2, 1)]
    quiz = found.suites[1].values["pass@1"]
    assert [value and value.value for value in quiz] == [None, 0.70, 0.85]


def test_a_run_among_others_stands_for_its_champion(run: RunLayout) -> None:
    found = compare([f"{run.root}:start", str(run.root)])
    assert found.models[1].evaluations["evaluate"] == run.stage(1, "evaluate")
    assert only(found)[0].verdict == "better"
    run.champion.unlink()
    with pytest.raises(InputError, match="has no champion yet; name an iteration"):
        compare([f"{run.root}:start", str(run.root)])


@pytest.mark.parametrize(
    "name", ["{}:1", "{}/iterations/001", "{}/iterations/001/train", "{}/champion"]
)
def test_a_player_stands_for_the_evaluations_beside_it(run: RunLayout, name: str) -> None:
    found = compare([f"{run.root}:0", name.format(run.root)])
    assert found.models[1].evaluations == {
        "evaluate": run.stage(1, "evaluate"), "quiz": run.suite(1, "quiz"),
    }  # fmt: skip


def test_metrics_against_different_opponents_are_shown_and_not_compared(run: RunLayout) -> None:
    found = compare([f"{run.root}:0", f"{run.root}:1"], ["evaluate"])
    [table] = found.suites
    assert [d.metric for d in table.differences] == ["sampled_accuracy"]
    assert [one["metric"] for one in table.unpaired] == ["heldout_reward_accuracy"]
    assert table.unpaired[0]["why"] == "each was compared with another model"
    assert [value and value.value for value in table.values["heldout_reward_accuracy"]] == [0.5] * 2


@pytest.mark.parametrize("against", ["same", "other"])
def test_win_rates_are_compared_where_the_other_side_is_one(tmp_path: Path, against: str) -> None:
    for name, rival in (("a", "same"), ("b", against)):
        make_evaluation(
            tmp_path / name, name,
            [*column("win_rate", RIGHT), *column("mean_characters", RIGHT)],
            stage="suite", config={"suite": "duel"}, inputs={"against": outside(rival)},
        )  # fmt: skip
    [table] = compare([str(tmp_path / "a"), str(tmp_path / "b")]).suites
    compared = ["win_rate", "mean_characters"] if against == "same" else ["mean_characters"]
    assert [d.metric for d in table.differences] == compared


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config": {"seed": 0, "chat": {"system": "s"}}}, "chat.system: absent and s"),
        ({"config": {"seed": 0, "evaluate": {"temperature": 0.5}}}, "evaluate.temperature: absent"),
        ({"inputs": {"data": outside("other data")}}, "data: data and other data"),
    ],
)
def test_evaluations_in_different_ways_are_refused_by_name_unless_mixed(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    one = str(evaluation(tmp_path / "a", "a", RIGHT))
    other = str(evaluation(tmp_path / "b", "b", MORE, **change))
    with pytest.raises(InputError, match=rf"were evaluated in different ways \({named}"):
        compare([one, other])
    found = compare([one, other], mixed=True)
    assert len(only(found)) == 1
    assert any(named in text for text in found.warnings)


def test_another_tokenizer_is_no_obstacle_but_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = str(evaluation(tmp_path / "a", "a", RIGHT, fingerprints={"tokenizer": "x"}))
    other = str(evaluation(tmp_path / "b", "b", MORE, fingerprints={"tokenizer": "y"}))
    assert len(only(compare([one, other]))) == 1
    assert "have different tokenizers" in caplog.text


def test_examples_of_one_side_only_are_left_out_and_told(tmp_path: Path) -> None:
    one = str(evaluation(tmp_path / "a", "a", RIGHT))
    other = str(make_evaluation(tmp_path / "b", "b", column("sampled_accuracy", MORE, start=40)))
    found = compare([one, other])
    assert only(found)[0].paired.examples == 60
    assert "up to 80 examples are of one of" in found.warnings[0]


@pytest.mark.parametrize(
    ("names", "suites", "text"),
    [
        (["{run}:0", "{run}:7"], [], "the run has no iteration 7; it has 0, 1"),
        (["{run}:0", "{run}/nowhere"], [], "does not exist"),
        (["{run}:start", "{run}:1"], ["quiz"], r"--suite quiz is not common .*: spin evaluate$"),
        (
            ["{run}/start/evaluate", "{run}/iterations/000/suite-quiz"],
            [],
            "no evaluation is common",
        ),
    ],
)
def test_what_cannot_be_compared_is_said(
    run: RunLayout, names: list[str], suites: list[str], text: str
) -> None:
    with pytest.raises(InputError, match=text):
        compare([name.format(run=run.root) for name in names], suites)


def test_what_is_wrong_with_the_words_alone_is_usage(run: RunLayout) -> None:
    with pytest.raises(ConfigError, match="is one model; name two or more"):
        compare([f"{run.root}:0"])
    known = r"--suite evalute: did you mean evaluate\? they have evaluate, quiz$"
    with pytest.raises(ConfigError, match=known):
        compare([f"{run.root}:0", f"{run.root}:1"], ["evalute"])


def test_an_iteration_that_was_not_evaluated_is_left_out_with_a_warning(
    run: RunLayout, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(run.stage(1, "evaluate"))
    shutil.rmtree(run.suite(1, "quiz"))
    found = compare([str(run.root)])
    assert names_of(found) == [f"{run.root}:start", f"{run.root}:0"]
    [warning] = found.to_json()["warnings"]
    assert warning.startswith(f"{run.root}:1, the champion, has no evaluation and is left out")
    assert warning in caplog.text


def test_where_one_suite_is_unlike_the_others_are_named(tmp_path: Path) -> None:
    runs = []
    for name, right, seed in (("a", RIGHT, 0), ("b", MORE, 1)):
        layout = RunLayout(tmp_path / name)
        layout.root.mkdir()
        layout.record.write_text("{}")
        evaluation(layout.stage(0, "evaluate"), name, right)
        for suite, config in (("quiz", {"seed": seed}), ("duel", {"seed": 0})):
            evaluation(layout.suite(0, suite), name, right, stage="suite",
                       config={"suite": suite, **config})  # fmt: skip
        runs.append(f"{layout.root}/iterations/000")
    with pytest.raises(InputError, match="--mixed to compare all the same, or compare by") as told:
        compare(runs)
    words = str(told.value).partition("alike: ")[2].split()
    assert words == ["--suite", "evaluate", "--suite", "duel"]
    assert len(compare(runs, words[1::2]).suites) == 2
    with pytest.raises(InputError, match="to compare all the same$"):
        compare(runs, ["quiz"])


def test_a_row_has_one_number_of_decimals_enough_for_its_intervals(tmp_path: Path) -> None:
    fine = {"a": -0.016, "b": -0.0078, "c": -0.00404}
    places = [
        make_evaluation(tmp_path / name, name, column("human_logprob_per_token", [
            value + 0.003 * (i % 3 - 1) * (ord(name) % 5 - 1 + i % 2) for i in range(90)
        ])) for name, value in fine.items()
    ]  # fmt: skip
    lines = [line.split() for line in spin("compare", *places)[1].splitlines()]
    rows = [words for words in lines if words[:1] == ["human_logprob_per_token"]]
    assert len(rows) >= 3
    for row in rows:
        figures = re.findall(r"\d+\.\d+", " ".join(row))
        assert len({len(figure.partition(".")[2]) for figure in figures}) == 1
        assert all(float(figure) for figure in figures)
    assert float(rows[0][1]) == pytest.approx(-0.016)
    assert _change(Difference("m", 1, 0, paired(0.01160, 0.01240), 0, "higher"))[1] == (
        "[+0.01160, +0.01240]"
    )
    assert [_number(value, 3) for value in (-0.0001, 0.0, -0.1)] == ["0.000", "0.000", "-0.100"]
    assert _row([Value(1000.0, None, None, None), None]) == ["1000", "-"]
    assert _row([Value(3e30, 2e30, 4e30, 9)]) == ["3e+30 ±1e+30"]
    assert _row([Value(0.5, 0.5, 0.5, 9), Value(0.25, 0.25 - 1e-12, 0.25, 9)])[0].startswith("0.5")


@pytest.mark.parametrize("columns", [200, 80, 40, 20])
def test_names_and_numbers_are_whole_on_any_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    metric = "open_llm_leaderboard_v1.hendrycks_test-high_school_statistics.acc_norm"
    places = [make_evaluation(tmp_path / name, name, column(metric, values)) for name, values in
              (("a", RIGHT), ("b", MORE))]  # fmt: skip
    size, written = os.terminal_size((columns, 24)), io.StringIO()
    monkeypatch.setattr("shutil.get_terminal_size", lambda: size)
    monkeypatch.setattr(sys, "stdout", written)
    monkeypatch.setattr(written, "isatty", lambda: True, raising=False)
    compare_by_hand(list(map(str, places)))
    text = written.getvalue()
    assert "…" not in text
    assert "\x1b" not in text
    for figure in ("0.700", "±0.096", "0.850", "±0.083", "+0.150", "[+0.093,", "+0.233]"):
        assert figure in text.split()
    parts = re.findall(r"[^_.]+[_.]*", metric)
    assert all(text.count(part) >= 2 for part in parts)
    if columns in (200, 80):
        tables = text.partition(": values")[2]
        assert max(map(len, tables.splitlines())) <= columns


def test_an_evaluation_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    one = str(evaluation(tmp_path / "a", "a", RIGHT))
    produce(tmp_path / "old", Plan("evaluate", 2, {}, {}), lambda space: Outcome(counts={}))
    with pytest.raises(InputError, match="written by an earlier version of spin"):
        compare([one, str(tmp_path / "old")])


def test_all_of_it_is_json(run: RunLayout) -> None:
    found = compare([str(run.root)]).to_json()
    json.dumps(found, allow_nan=False)
    canonical_json(found)
    difference = found["suites"]["quiz"]["differences"][0]
    assert difference["metric"] == "pass@1"
    assert {"gain", "low", "high", "p_value", "wins", "losses", "examples"} <= difference.keys()


def test_weights_hold_in_differences_too(tmp_path: Path) -> None:
    """MT-Bench's score counts turns: a question with one judged turn weighs half."""
    for name, gain in (("a", 0.0), ("b", 1.0)):
        measures = [Measure(prompt_id(i), "score", 5.0 + gain * (i < 5), 1 + i % 2) for i in
                    range(20)]  # fmt: skip
        make_evaluation(tmp_path / name, name, measures)
    [difference] = only(compare([str(tmp_path / "a"), str(tmp_path / "b")]))
    assert difference.paired.gain == pytest.approx(7 / 30)
    assert math.isfinite(difference.paired.low)


def spin(*words: object) -> tuple[int, str]:
    """Exit code and stdout of a command, which is no terminal."""
    done = CliRunner().invoke(app, list(map(str, words)))
    return done.exit_code, done.stdout


def test_the_tables_fit_80_columns_and_say_what_changed(run: RunLayout) -> None:
    long = "length_controlled_win_rate"
    for number in (0, 1):
        make_evaluation(
            run.suite(number, "duel"), str(number), column(long, [0.1 * number, 0.5, 0.25] * 9),
            stage="suite", config={"suite": "duel"},
        )  # fmt: skip
    code, out = spin("compare", run.root)
    assert code == 0
    lines = [line for line in out.splitlines() if str(run.root) not in line]
    assert max(map(len, lines)) <= 80
    assert f"A  {run.root}:start  (evaluate)" in out
    assert f"C  {run.root}:1  (evaluate, duel, quiz)" in out
    words = [line.split() for line in lines]
    assert ["pass@1", "0.700", "±0.096", "0.850", "±0.083"] in words
    assert ["pass@1", "C", "+0.150", "[+0.093,", "+0.233]", "better"] in words
    assert "quiz: C against B: better pass@1; no difference in 0 of 1" in out
    _, out = spin("compare", f"{run.root}:0", f"{run.root}:1", "--suite", "evaluate")
    assert "evaluate: not compared, since each was compared with another model:" in out


def test_many_models_are_told_in_several_tables(tmp_path: Path) -> None:
    places = [evaluation(tmp_path / f"m{i}", f"m{i}", RIGHT) for i in range(9)]
    code, out = spin("compare", *places)
    assert code == 0
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 80
    assert out.count("further models") == 2
    rows = [line.split() for line in out.splitlines() if line.startswith("sampled_accuracy")]
    assert sum(row.count("0.700") for row in rows) == 9


def test_json_is_one_object_and_text_that_steers_a_terminal_is_not_printed(
    tmp_path: Path,
) -> None:
    name = tmp_path / "a\x1b[31mred"
    one = evaluation(name, "a", RIGHT, others={"plain\x1b]0;title\x07": 1.0})
    other = evaluation(tmp_path / "b", "b", MORE)
    code, out = spin("compare", one, other, "--all")
    assert code == 0
    assert "\x1b" not in out
    assert "\x07" not in out
    code, out = spin("compare", one, other, "--json")
    found = json.loads(out)
    assert found["suites"]["evaluate"]["differences"][0]["gain"] == pytest.approx(0.15)
    assert found["confidence"] == 0.95


def test_metrics_without_an_interval_are_shown_when_asked(tmp_path: Path) -> None:
    places = [evaluation(tmp_path / n, n, RIGHT, others={"entropy": 1.25}) for n in "ab"]
    assert "entropy" not in spin("compare", *places)[1]
    assert "entropy" in spin("compare", *places, "--all")[1]


def test_a_refusal_is_an_exit_code(tmp_path: Path) -> None:
    one = evaluation(tmp_path / "a", "a", RIGHT)
    other = evaluation(tmp_path / "b", "b", RIGHT, config={"chat": {"system": "s"}})
    assert spin("compare", one, other) == (3, "")
    assert spin("compare", one, other, "--mixed")[0] == 0
