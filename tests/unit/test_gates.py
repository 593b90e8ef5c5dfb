"""Gates: each condition in its sentence, every combination, and what they refuse to judge."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from stages.alarms import FiredAlarm
from stages.config import ConditionConfig
from stages.data.measures import Column
from stages.data.paired import lower_bound
from stages.data.statistics import mcnemar, score_p_value
from stages.errors import ConfigError, InputError
from stages.gates import (
    Evidence,
    Measured,
    Rival,
    Verdict,
    check,
    check_names,
    judge,
    player_suites,
    rivals,
    sentences,
)
from stages.recipe import load_recipe

NOTED = FiredAlarm("divergence", "evaluate", 0.3, 0.2, "note", "far from its opponent")
REFUSING = FiredAlarm("human_fall", "evaluate", 0.3, 0.2, "refuse", "human answers fell")


def condition(**fields: Any) -> ConditionConfig:
    return ConditionConfig.model_validate(fields)


def column(values: Sequence[float]) -> Column:
    return Column(
        [f"p{i}" for i in range(len(values))], np.array(values, float), np.ones(len(values))
    )


def answers(wins: int, losses: int, examples: int) -> tuple[Column, Column]:
    """A player's and its rival's right answers, half of the others right for both."""
    rest = [1.0, 0.0] * (examples // 2)
    rest = rest[: examples - wins - losses]
    return (
        column([1.0] * wins + [0.0] * losses + rest),
        column([0.0] * wins + [1.0] * losses + rest),
    )


def measured(columns: Mapping[str, Column], where: str = "001/evaluate", **others: Any) -> Measured:
    means = {name: float(c.mean()) for name, c in columns.items()}
    return Measured(where, {**means, **others}, columns)


def evidence(
    wins: int = 61, losses: int = 37, examples: int = 1000, alarms: Sequence[FiredAlarm] = ()
) -> Evidence:
    mine, theirs = answers(wins, losses, examples)
    rival = measured(
        {"accuracy": theirs, "sampled_mean_tokens": column([10.0] * 4)}, "000/evaluate"
    )
    player = measured(
        {"accuracy": mine, "sampled_mean_tokens": column([12.0] * 4)},
        human_mean_tokens=11.0,
        sampled_entropy=0.5,
        broken=None,
    )
    return Evidence({None: player}, {"champion": Rival("champion", {None: rival})}, alarms)


def better(**fields: Any) -> ConditionConfig:
    return condition(better={"metric": "accuracy", **fields})


def not_worse(**fields: Any) -> ConditionConfig:
    return condition(not_worse={"metric": "accuracy", "margin": 0.02, **fields})


class TestBetter:
    def test_its_sentence_has_every_figure(self) -> None:
        verdict = judge(better(), evidence())
        assert verdict.passed
        assert verdict.text == (
            "accuracy is better than the champion's: +2.4 points (95% lower bound +0.8), McNemar p "
            "0.0077, 61 won, 37 lost of 1,000"
        )
        assert verdict.figures["p_value"] == mcnemar(61, 37, 1000)
        assert verdict.figures["rival"] == "000/evaluate"
        wanted = {
            "metric", "value", "rival_value", "rival", "gain", "low", "high", "confidence",
            "p_value", "method", "examples", "wins", "losses", "ties",
        }  # fmt: skip
        assert wanted <= verdict.figures.keys()

    def test_where_bound_and_p_value_disagree_the_sentence_says_which_decides(self) -> None:
        decides = "; the p value decides, for the bound is an approximation"
        few = judge(better(), evidence(3, 0, 79))
        assert not few.passed
        assert few.figures["low"] > 0  # type: ignore[operator]
        assert few.text.endswith("3 won, 0 lost of 79" + decides)
        for given in (evidence(), evidence(40, 37), evidence(0, 0, 100)):
            for asked in (better(), not_worse()):
                verdict = judge(asked, given)
                agree = (verdict.figures["low"] > verdict.figures["above"]) is verdict.passed  # type: ignore[operator]
                assert agree is not verdict.text.endswith(decides)

    def test_a_small_gain_is_not_shown(self) -> None:
        verdict = judge(better(), evidence(40, 37))
        assert not verdict.passed
        assert verdict.text.startswith(
            "accuracy is not shown to be better than the champion's: +0.3"
        )

    def test_by_more_than_an_amount_is_asked_by_the_score_test(self) -> None:
        verdict = judge(better(by=0.01), evidence(120, 37))
        assert verdict.passed
        assert "better than the champion's by more than 1 point: +8.3 points" in verdict.text
        assert verdict.figures["p_value"] == score_p_value(120, 37, 1000, 0.01)
        assert not judge(better(by=0.08), evidence(120, 37)).passed

    def test_confidence_decides(self) -> None:
        assert mcnemar(50, 35, 1000) < 0.06
        assert judge(better(confidence=0.9), evidence(50, 35)).passed
        assert not judge(better(confidence=0.99), evidence(50, 35)).passed

    def test_lower_can_be_better(self) -> None:
        assert judge(better(lower=True), evidence(37, 61)).passed
        assert not judge(better(lower=True), evidence(61, 37)).passed

    def test_the_start_stands_for_a_champion_and_is_named(self) -> None:
        given = evidence()
        start = Evidence(
            given.player, {"champion": Rival("start", given.rivals["champion"].measured)}
        )
        assert "better than the start's" in judge(better(), start).text

    def test_means_are_told_in_their_own_unit(self) -> None:
        rng = np.random.default_rng(0)
        rival = rng.normal(size=200)
        given = Evidence(
            {None: measured({"margin": column(list(rival + rng.normal(0.5, 0.1, 200)))})},
            {"champion": Rival("champion", {None: measured({"margin": column(list(rival))})})},
        )
        text = judge(condition(better={"metric": "margin"}), given).text
        assert "margin is better than the champion's: +0.491 (95% lower bound +0.479)" in text
        assert "points" not in text
        assert "bootstrap p 0.0005" in text

    def test_a_suites_metric_is_named_by_both(self) -> None:
        mine, theirs = answers(30, 5, 200)
        given = Evidence(
            {None: measured({}), "gsm": measured({"greedy.acc": mine})},
            {"opponent": Rival("opponent", {"gsm": measured({"greedy.acc": theirs})})},
        )
        asked = condition(better={"metric": "gsm.greedy.acc", "against": "opponent"})
        assert judge(asked, given).text.startswith("gsm.greedy.acc is better than the opponent's")
        assert (player_suites(asked), rivals(asked)) == (["gsm"], [("opponent", "gsm")])

    def test_what_is_no_number_refuses(self) -> None:
        given = evidence()
        given.player[None].columns["accuracy"].values[3] = np.nan
        for asked in (better(), not_worse()):
            verdict = judge(asked, given)
            assert not verdict.passed
            assert verdict.text == "accuracy of the player is not a finite number on 1 example"


class TestNotWorse:
    def test_a_small_fall_passes_and_a_larger_one_may_be_worse(self) -> None:
        passed = judge(not_worse(), evidence(37, 40))
        assert passed.passed
        assert passed.text == (
            "accuracy is not worse than the champion's by 2 points or more: -0.3 points (95% lower "
            f"bound {100 * passed.figures['low']:+.1f}), score test p "  # type: ignore[operator]
            f"{passed.figures['p_value']:.2g}, 37 won, 40 lost of 1,000"
        )
        refused = judge(not_worse(), evidence(37, 60))
        assert not refused.passed
        assert refused.text.startswith(
            "accuracy may be worse than the champion's by 2 points or more"
        )

    def test_few_examples_cannot_show_it(self) -> None:
        assert not judge(not_worse(), evidence(0, 0, 100)).passed  # 0.98^100 is 13%
        assert judge(not_worse(), evidence(0, 0, 150)).passed

    def test_better_implies_not_worse(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(50):
            won, lost = rng.integers(0, 40, 2)
            given = evidence(int(won), int(lost), 400)
            if judge(better(), given).passed:
                assert judge(not_worse(), given).passed

    def test_a_larger_margin_never_refuses_what_a_smaller_one_lets_through(self) -> None:
        passed = [
            judge(not_worse(margin=m), evidence(30, 36, 500)).passed for m in (0.005, 0.02, 0.1)
        ]
        assert passed == sorted(passed)
        assert passed[-1]


class TestOthers:
    @pytest.mark.parametrize(("value", "passed"), [(0.5, True), (0.6, False)])
    def test_at_least_asks_the_value(self, value: float, passed: bool) -> None:
        verdict = judge(condition(at_least={"metric": "accuracy", "value": value}), evidence())
        assert verdict.passed is passed
        assert ("reaches" in verdict.text) is passed

    def test_or_its_lower_bound(self) -> None:
        given = evidence()
        low = lower_bound(given.player[None].columns["accuracy"], 0.95)
        for value, passed in ((low - 0.001, True), (low + 0.001, False)):
            asked = {"metric": "accuracy", "value": value, "confidence": 0.95}
            verdict = judge(condition(at_least=asked), given)
            assert verdict.passed is passed
            assert "the 95% lower bound" in verdict.text

    @pytest.mark.parametrize(("count", "passed"), [(1, False), (4, False), (5, True)])
    def test_few_values_that_all_agree_have_no_lower_bound(self, count: int, passed: bool) -> None:
        """At 95% five tell one, as of coins that all fall alike: 0.5^5 is 3%."""
        values = column([0.5] * count)
        assert lower_bound(values, 0.95) == (0.5 if passed else None)
        asked = {"metric": "score", "value": 0.4, "confidence": 0.95}
        given = Evidence({None: measured({"score": values})}, {})
        verdict = judge(condition(at_least=asked), given)
        assert verdict.passed is passed
        assert ("too few for a 95% lower bound" in verdict.text) is not passed
        json.dumps(verdict.as_dict(), allow_nan=False)

    def test_few_gains_that_all_agree_are_told_without_a_bound(self) -> None:
        given = Evidence(
            {None: measured({"score": column([0.75] * 3)})},
            {"champion": Rival("champion", {None: measured({"score": column([0.5] * 3)})})},
        )
        verdict = judge(condition(better={"metric": "score"}), given)
        assert not verdict.passed
        assert "+0.25 (95% lower bound unknown, for so few examples agree)" in verdict.text

    def test_a_metric_that_could_not_be_had_refuses(self) -> None:
        verdict = judge(condition(at_least={"metric": "broken", "value": 0.0}), evidence())
        assert not verdict.passed
        assert "not a finite number" in verdict.text

    @pytest.mark.parametrize(
        ("against", "share", "passed", "said"),
        [
            ("champion", 0.2, True, "is +20.0% off the champion's 10, within 20%"),
            ("champion", 0.19, False, "is +20.0% off the champion's 10, more than 19%"),
            ("human", 0.1, True, "is +9.1% off the human one's 11, within 10%"),
        ],
    )
    def test_length(self, against: str, share: float, passed: bool, said: str) -> None:
        verdict = judge(condition(length_within={"share": share, "against": against}), evidence())
        assert verdict.passed is passed
        assert said in verdict.text
        whom = {"champion": "000/evaluate", "human": "the human answers"}
        assert verdict.figures["rival"] == whom[against]

    @pytest.mark.parametrize(
        ("counts", "alarms", "passed"),
        [
            ("refuse", [], True),
            ("refuse", [NOTED], True),
            ("refuse", [NOTED, REFUSING], False),
            ("note", [], True),
            ("note", [NOTED], False),
        ],
    )
    def test_alarms(self, counts: str, alarms: list[FiredAlarm], passed: bool) -> None:
        verdict = judge(condition(alarms_clear=counts), evidence(alarms=alarms))
        assert verdict.passed is passed
        assert passed or alarms[-1].text in verdict.text


HOLDS = {"at_least": {"metric": "accuracy", "value": 0.1}}
FAILS = {"at_least": {"metric": "accuracy", "value": 0.9}}


class TestCombinations:
    @pytest.mark.parametrize("given", itertools.product([True, False], repeat=3))
    def test_all_and_any(self, given: tuple[bool, ...]) -> None:
        leaves = [HOLDS if holds else FAILS for holds in given]
        for name, rule in (("all", all), ("any", any)):
            verdict = judge(condition(**{name: leaves}), evidence())
            assert verdict.passed is rule(given)
            assert [child.passed for child in verdict.children] == list(given)

    @pytest.mark.parametrize("outer", ["all", "any"])
    @pytest.mark.parametrize("inner", ["all", "any"])
    @pytest.mark.parametrize("given", itertools.product([True, False], repeat=3))
    def test_one_in_the_other(self, outer: str, inner: str, given: tuple[bool, ...]) -> None:
        one, *others = [HOLDS if holds else FAILS for holds in given]
        rule = {"all": all, "any": any}
        verdict = judge(condition(**{outer: [one, {inner: others}]}), evidence())
        assert verdict.passed is rule[outer]([given[0], rule[inner](given[1:])])

    LEAVES = (
        {"better": {"metric": "accuracy"}},
        {"better": {"metric": "accuracy", "by": 0.02}},
        {"not_worse": {"metric": "accuracy", "margin": 0.02}},
        {"not_worse": {"metric": "accuracy", "margin": 0.02, "lower": True}},
        HOLDS,
        FAILS,
        {"length_within": {"share": 0.2, "against": "champion"}},
        {"length_within": {"share": 0.1, "against": "champion"}},
        {"alarms_clear": "refuse"},
        {"alarms_clear": "note"},
    )
    """Of each kind one that holds and one that does not, of what `given` shows."""

    def test_random_trees_are_the_logic_of_their_leaves(self) -> None:
        rng = np.random.default_rng(0)
        given = evidence(alarms=[NOTED])
        alone = [judge(condition(**leaf), given) for leaf in self.LEAVES]
        assert [verdict.passed for verdict in alone] == [True, False] * 5
        assert len({verdict.kind for verdict in alone}) == 5

        def grown(depth: int) -> tuple[dict[str, Any], bool, list[Verdict]]:
            """A tree, whether it holds, and its leaves' verdicts in order."""
            if depth == 0 or rng.random() < 0.3:
                drawn = rng.integers(len(alone))
                return self.LEAVES[drawn], alone[drawn].passed, [alone[drawn]]
            name = "all" if rng.random() < 0.5 else "any"
            inner = [grown(depth - 1) for _ in range(rng.integers(1, 4))]
            rule = all if name == "all" else any
            told = [leaf for _, _, leaves in inner for leaf in leaves]
            return {name: [tree for tree, _, _ in inner]}, rule(h for _, h, _ in inner), told

        def leaves(verdict: Verdict) -> list[Verdict]:
            children = [leaf for child in verdict.children for leaf in leaves(child)]
            return children if verdict.children else [verdict]

        for _ in range(40):
            tree, expected, told = grown(4)
            verdict = judge(condition(**tree), given)
            assert verdict.passed is expected
            assert leaves(verdict) == told
            assert all(sentences(verdict))

    def test_what_failed_is_told_and_what_holds_where_it_does(self) -> None:
        refused = judge(condition(any=[FAILS, {"all": [HOLDS, FAILS]}]), evidence())
        assert refused.text.count("is below 0.9") == 2
        assert refused.text.startswith("none of these holds: ")
        assert "reaches" not in refused.text
        passed = judge(condition(any=[FAILS, HOLDS]), evidence())
        assert "is below" not in passed.text
        whole = judge(condition(all=[HOLDS, {"all": [HOLDS, FAILS]}]), evidence())
        told = sentences(whole)
        assert len(told) == 3
        assert "is below 0.9" in told[0]
        assert all(each.startswith("passed: accuracy is ") for each in told[1:])

    def test_a_verdict_is_plain_json(self) -> None:
        verdict = judge(condition(all=[better(), not_worse(), HOLDS]), evidence())
        tree = json.loads(json.dumps(verdict.as_dict(), allow_nan=False))
        assert [child["kind"] for child in tree["children"]] == ["better", "not_worse", "at_least"]
        assert isinstance(verdict, Verdict)


class TestMistakes:
    def test_an_unknown_metric_is_told_with_those_there_are(self) -> None:
        for asked in (
            condition(better={"metric": "x"}),
            condition(at_least={"metric": "x", "value": 1}),
        ):
            with pytest.raises(
                ConfigError, match=r"asks for x: 001/evaluate has no such .*accuracy"
            ):
                judge(asked, evidence())

    def test_one_that_is_no_mean_over_examples_cannot_be_paired(self) -> None:
        with pytest.raises(ConfigError, match="sampled_entropy on paired .* no mean over examples"):
            judge(condition(better={"metric": "sampled_entropy"}), evidence())

    def test_a_rival_without_it_is_named(self) -> None:
        given = evidence()
        given.rivals["champion"].measured[None].columns.pop("accuracy")  # type: ignore[attr-defined]
        with pytest.raises(InputError, match="000/evaluate has no accuracy on single examples"):
            judge(better(), given)

    def test_so_are_two_without_a_common_example(self) -> None:
        given = evidence()
        given.rivals["champion"].measured[None].columns["accuracy"].example_ids[:] = ["x"] * 1000
        with pytest.raises(InputError, match="share no example with accuracy"):
            judge(better(), given)

    @pytest.mark.parametrize(
        ("gate", "message"),
        [
            ({}, "this one has none"),
            ({"all": []}, "`all` holds no condition"),
            ({"better": {"metric": "a"}, "any": [HOLDS]}, "this one has "),
            ({"better": {"metric": "a", "confidence": 0.5}}, "greater than 0.5"),
            ({"better": {"metric": "a", "confidence": 0.9999}}, "less than or equal to 0.999"),
            ({"not_worse": {"metric": "a", "margin": 0}}, "greater than 0"),
            ({"length_within": {"share": 1}}, "less than 1"),
            (
                {"length_within": {"share": 0.2, "metric": "accuracy", "against": "human"}},
                "nothing but the length is known, so that accuracy cannot be against human",
            ),
            (
                {"length_within": {"share": 0.1, "metric": "q.mean_tokens", "against": "human"}},
                r"q\.mean_tokens cannot be against human; name a metric of evaluate",
            ),
            ({"better": {"metric": "a", "against": "human"}}, "'champion', 'opponent' or 'start'"),
        ],
    )
    def test_a_gate_that_means_nothing_is_no_recipe(self, gate: Any, message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            ConditionConfig.model_validate(gate)


class TestTypos:
    """The nearest name comes first, and a line stays short."""

    @pytest.mark.parametrize(
        ("gate", "message"),
        [
            (
                "[{alarms_clear: note}]",
                r"promote\.gate=.*one condition is needed; several go into \{all: \[\.\.\.\]\}",
            ),
            ("3", r"promote\.gate=3: a mapping is needed"),
            (
                "{any: [{nope: 1}]}",
                r"key promote\.gate\.any\.0\.nope; known here: alarms_clear, all, any, at_least, "
                "better, length_within, not_worse$",
            ),
            ("{beter: {metric: a}}", r"key promote\.gate\.beter; did you mean better\? "),
            (
                "{any: [{all: [{better: {metrc: a}}]}]}",
                r"key promote\.gate\.any\.0\.all\.0\.better\.metrc; did you mean metric\? ",
            ),
            ("{any: {alarms_clear: note}}", r"promote\.gate\.any=.*: a list is needed"),
        ],
    )
    def test_a_gate_in_another_form(self, gate: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            load_recipe(None, [f"promote.gate={gate}"])

    def test_a_metric_that_is_nearly_one(self) -> None:
        metrics = [f"sampled_figure_{i}" for i in range(40)] + ["sampled_accuracy"]
        config = load_recipe(
            None, ["promote.gate={better: {metric: sampled_acuracy}}"]
        ).for_iteration()
        with pytest.raises(ConfigError, match=r"; did you mean sampled_accuracy\? ") as caught:
            check(config, None, metrics, metrics)
        assert "evaluations have sampled_accuracy, " in str(caught.value)
        assert " and 31 more; change it with --amend, since the run " in str(caught.value)
        given = Evidence({None: measured(dict.fromkeys(metrics, column([1.0])))}, {})
        asked = condition(at_least={"metric": "sampled_acuracy", "value": 0})
        with pytest.raises(ConfigError, match=r"did you mean sampled_accuracy\? it has .* 31 more"):
            judge(asked, given)


class TestBeforeTraining:
    """What can never be judged is told once the start was evaluated."""

    def check(self, gate: str, suite: str | None = None, *more: str) -> None:
        config = load_recipe(None, [f"promote.gate={gate}", *more]).for_iteration()
        check(config, suite, ["accuracy", "entropy"], ["accuracy"])

    def check_names(self, gate: str, *more: str) -> None:
        check_names(load_recipe(None, [f"promote.gate={gate}", *more]).for_iteration())

    @pytest.mark.parametrize(
        "gate",
        [
            "{better: {metric: accuracy}}",
            "{at_least: {metric: entropy, value: 1}}",
            "{at_least: {metric: heldout_reward_accuracy, value: 0.5}}",
            "{any: [{alarms_clear: note}, {not_worse: {metric: accuracy, margin: 0.1}}]}",
        ],
    )
    def test_what_can_be_had_passes(self, gate: str) -> None:
        self.check(gate)

    @pytest.mark.parametrize(
        ("gate", "message"),
        [
            (
                "{better: {metric: x}}",
                "asks for x, which is not measured .* have accuracy, entropy",
            ),
            ("{any: [{at_least: {metric: x, value: 1}}]}", "asks for x, which is not measured"),
            ("{better: {metric: entropy}}", "no mean over examples; those are accuracy"),
            ("{better: {metric: heldout_reward_margin}}", "is a comparison itself"),
            (
                "{length_within: {share: 0.1}}",
                "asks for sampled_mean_tokens, which is not measured",
            ),
        ],
    )
    def test_what_can_not_is_refused(self, gate: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            self.check(gate)

    def test_a_suites_metric_is_looked_for_in_the_suite(self) -> None:
        task = "suites.gsm={kind: task, reward: {name: gsm8k}}"
        self.check("{better: {metric: gsm.x}}", None, task)
        with pytest.raises(ConfigError, match=r"gsm\.x, .*suites\.gsm has accuracy"):
            self.check("{better: {metric: gsm.x}}", "gsm", task)

    def test_a_win_rate_is_a_comparison_already(self) -> None:
        wins = "suites.duel={kind: win_rate, reward: {name: gsm8k}}"
        self.check("{at_least: {metric: duel.win_rate, value: 0.5}}", None, wins)
        with pytest.raises(ConfigError, match="is a comparison itself"):
            self.check("{better: {metric: duel.win_rate}}", None, wins)

    def test_a_win_rates_metrics_are_known_before_it_is_asked(self) -> None:
        """The start is never asked such a suite, so its evaluation cannot tell."""
        wins = "suites.duel={kind: win_rate, reward: {name: gsm8k}}"
        self.check_names("{at_least: {metric: duel.mean_characters, value: 9}}", wins)
        for metric in ("win_rat", "position_flip_share"):
            gate = f"{{at_least: {{metric: duel.{metric}, value: 0.5}}}}"
            with pytest.raises(ConfigError, match=rf"duel\.{metric}, which is not measured .*duel"):
                self.check_names(gate, wins)
        reward = "{name: judge, judge: {url: 'http://x/v1', model: m}}"
        judged = f"suites.duel={{kind: win_rate, reward: {reward}}}"
        self.check_names("{at_least: {metric: duel.position_flip_share, value: 0}}", judged)
