"""Gates: conditions on what was measured, each answered in a sentence with its figures.

Knows nothing of artifacts and runs; promote.py hands it what was measured. docs/gates.md tells how
gates are written and how often they err.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from stages.alarms import FiredAlarm
from stages.config import (
    OF_COMPARISON,
    AtLeastConfig,
    BetterConfig,
    ConditionConfig,
    LengthWithinConfig,
    NotWorseConfig,
    RunConfig,
    WinRateSuiteConfig,
)
from stages.config.metrics import is_a_share, metrics_of
from stages.data.measures import Column
from stages.data.paired import Paired, compare, lower_bound
from stages.data.wording import amount_told, gain_told, in_points, name_of_test, p_told, unit_told
from stages.errors import ConfigError, InputError, choices

Figures = dict[str, float | int | str | bool | None]

ROUNDING = 1e-9
"""0.3 - 0.2 < 0.1 in binary, and a gate means decimal numbers."""
AMEND = "change it with --amend, since the run has begun"
"""What helps where a mistake is found after the start was evaluated."""


@dataclass(frozen=True)
class Verdict:
    """What became of a condition, and of those in it."""

    kind: str
    passed: bool
    text: str
    """A sentence with the figures."""
    figures: Figures = field(default_factory=dict)
    children: list["Verdict"] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return it as it stands in decision.json."""
        return asdict(self)


@dataclass(frozen=True)
class Measured:
    """What one evaluation or suite found."""

    where: str
    """Its place in the run, for messages and figures."""
    metrics: Mapping[str, Any]
    columns: Mapping[str, Column]
    """Of the metrics that are means over examples."""


@dataclass(frozen=True)
class Rival:
    """Whom a player is compared with."""

    name: str
    """As in a sentence: champion, opponent, start."""
    measured: Mapping[str | None, Measured]
    """By suite; None: the run's own evaluation."""


@dataclass(frozen=True)
class Evidence:
    """What a gate decides on."""

    player: Mapping[str | None, Measured]
    rivals: Mapping[str, Rival]
    alarms: Sequence[FiredAlarm] = ()


def judge(condition: ConditionConfig, evidence: Evidence) -> Verdict:
    """Return the verdict on a condition.

    Raises:
        ConfigError: it asks for a metric that is not there, or that no example has one by one.
        InputError: a rival has no such metric.
    """
    if condition.all is not None:
        return both([judge(each, evidence) for each in condition.all])
    if condition.any is not None:
        return either([judge(each, evidence) for each in condition.any])
    if condition.better is not None:
        return _better(condition.better, evidence)
    if condition.not_worse is not None:
        return _not_worse(condition.not_worse, evidence)
    if condition.at_least is not None:
        return _at_least(condition.at_least, evidence)
    if condition.length_within is not None:
        return _length_within(condition.length_within, evidence)
    assert condition.alarms_clear is not None, "a condition is one of its fields"
    return alarms_clear(evidence.alarms, any_counts=condition.alarms_clear == "note")


def both(children: list[Verdict]) -> Verdict:
    """Return the verdict of conditions that must all hold."""
    passed = all(child.passed for child in children)
    told = [child.text for child in children if passed or not child.passed]
    return Verdict("all", passed, " and ".join(told), children=children)


def either(children: list[Verdict]) -> Verdict:
    """Return the verdict of conditions of which one is enough."""
    passed = any(child.passed for child in children)
    told = [child.text for child in children if child.passed or not passed]
    text = " and ".join(told) if passed else f"none of these holds: {'; '.join(told)}"
    return Verdict("any", passed, text, children=children)


def alarms_clear(alarms: Sequence[FiredAlarm], *, any_counts: bool) -> Verdict:
    """Return the verdict on the alarms that fired.

    Args:
        any_counts: those that are only noted, too.
    """
    found = [alarm for alarm in alarms if any_counts or alarm.refuses]
    text = "; ".join(f"alarm {alarm.name}: {alarm.text}" for alarm in found)
    figures: Figures = {"fired": len(alarms), "counted": len(found)}
    which = "no alarm fired" if any_counts else "no alarm that refuses fired"
    return Verdict("alarms_clear", not found, text or which, figures)


def sentences(verdict: Verdict) -> list[str]:
    """Return the conditions that all have to hold, one sentence each.

    Where one fails, those that do come first, and the others are marked as passed.
    """
    asked = list(_asked(verdict))
    if verdict.passed:
        return [each.text for each in asked]
    failed = [each.text for each in asked if not each.passed]
    return failed + [f"passed: {each.text}" for each in asked if each.passed]


def _asked(verdict: Verdict) -> Iterator[Verdict]:
    if verdict.kind != "all":
        yield verdict
        return
    for child in verdict.children:
        yield from _asked(child)


def split(metric: str) -> tuple[str | None, str]:
    """Return the suite (None: the run's evaluation) and the metric in it of SUITE.METRIC."""
    suite, dot, name = metric.partition(".")
    return (suite, name) if dot else (None, metric)


def leaves(condition: ConditionConfig) -> Iterator[ConditionConfig]:
    """Yield the conditions that hold no others."""
    inner = (*(condition.all or ()), *(condition.any or ()))
    if not inner:
        yield condition
    for each in inner:
        yield from leaves(each)


def rivals(condition: ConditionConfig) -> list[tuple[str, str | None]]:
    """Return which rivals' evaluation (None) or suite a condition asks for, each once."""
    asked = [
        (each.against, split(each.metric)[0])
        for leaf in leaves(condition)
        for each in (leaf.better, leaf.not_worse, leaf.length_within)
        if each is not None and each.against != "human"
    ]
    return list(dict.fromkeys(asked))


def player_suites(condition: ConditionConfig) -> list[str]:
    """Return the suites that a condition asks for."""
    names = (split(metric)[0] for metric in condition.metrics())
    return sorted({name for name in names if name is not None})


def check(
    config: RunConfig, suite: str | None, metrics: Sequence[str], means: Sequence[str] | None
) -> None:
    """Check that a recipe's gate can be judged, as soon as the start was evaluated.

    Args:
        suite: the suite that was asked; None: the run's evaluation.
        metrics: those that it found at the start.
        means: those of them that are means over examples; None where that is not known.

    Raises:
        ConfigError: the gate asks for a metric that cannot be had, or compared.
    """
    check_comparable(config)
    for leaf in _leaves_of(config):
        is_paired = leaf.better is not None or leaf.not_worse is not None
        for metric in leaf.metrics():
            asked, name = split(metric)
            of_comparison = asked is None and name.startswith(OF_COMPARISON)
            if asked != suite:
                continue
            if not of_comparison and name not in metrics:
                raise ConfigError(f"{_not_measured(metric, metrics)}; {AMEND}")
            if is_paired and means is not None and name not in means:
                raise ConfigError(f"{_no_mean(metric, means)}; {AMEND}")


def check_names(config: RunConfig) -> None:
    """Check, before anything is made, that what `promote` asks for can be measured at all.

    Raises:
        ConfigError: an evaluation can never have such a metric, or reach such a value; or see
            `check_comparable`.
    """
    check_comparable(config)
    promote, known = config.promote, metrics_of(config, None)
    if promote.metric not in known:
        told = choices(promote.metric, known.names, "they have")
        raise ConfigError(
            f"promote.metric={promote.metric}: evaluations of this run have no such metric; {told}"
        )
    if promote.min_value is not None and is_a_share(config, None, promote.metric):
        _check_share(f"promote.min_value of {promote.metric}", promote.min_value)
    for leaf in _leaves_of(config):
        for metric in leaf.metrics():
            suite, name = split(metric)
            known = metrics_of(config, suite)
            if name not in known:
                raise ConfigError(_not_measured(metric, known.names))
        if leaf.at_least is not None and is_a_share(config, *split(leaf.at_least.metric)):
            _check_share(_bound(leaf.at_least), leaf.at_least.value)


def _check_share(what: str, bound: float) -> None:
    if bound > 1:
        is_percent = 2 <= bound <= 100
        remedy = f"write {bound / 100:g}" if is_percent else "it is never above 1"
        raise ConfigError(f"{what} is {bound:g}, but that is a share of 1: {remedy}")


def _bound(asked: AtLeastConfig) -> str:
    return f"promote.gate: at_least of {asked.metric}"


def _leaves_of(config: RunConfig) -> Iterator[ConditionConfig]:
    yield from leaves(config.promote.gate) if config.promote.gate is not None else ()


def _not_measured(metric: str, metrics: Sequence[str]) -> str:
    suite, name = split(metric)
    who = "evaluations have" if suite is None else f"suites.{suite} has"
    return (
        f"promote.gate asks for {metric}, which is not measured in this run; "
        f"{choices(name, metrics, who)}"
    )


def check_comparable(config: RunConfig) -> None:
    """Check that what a gate compares with a rival's is of the player alone.

    Raises:
        ConfigError: it is of the player against a rival that changes.
    """
    for leaf in _leaves_of(config):
        if leaf.at_least is not None:
            continue
        for metric in leaf.metrics():
            suite, name = split(metric)
            of_comparison = suite is None and name.startswith(OF_COMPARISON)
            if of_comparison or isinstance(config.suites.get(suite or ""), WinRateSuiteConfig):
                raise ConfigError(
                    f"promote.gate compares {metric} with a rival's, but it is a comparison "
                    "itself, of a player with whom it played or was asked against; ask for it by "
                    "at_least"
                )


def _no_mean(metric: str, means: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"promote.gate asks for {metric} on paired examples, but it is no mean over examples; "
        f"{choices(split(metric)[1], means, 'those are')}"
    )


@dataclass(frozen=True)
class _Comparison:
    rival: str
    found: Paired | None
    """None where a value is no finite number."""
    problem: str
    figures: Figures


def _better(condition: BetterConfig, evidence: Evidence) -> Verdict:
    compared = _compare(condition, condition.by, evidence)
    found = compared.found
    if found is None:
        return Verdict("better", False, compared.problem, compared.figures)
    passed = _is_sure(found, condition.confidence)
    by = f" by more than {amount_told(condition.by, found.method)}" if condition.by else ""
    how = "is better" if passed else "is not shown to be better"
    text = f"{condition.metric} {how} than the {compared.rival}'s{by}"
    return Verdict("better", passed, f"{text}: {_tell(found, condition)}", compared.figures)


def _not_worse(condition: NotWorseConfig, evidence: Evidence) -> Verdict:
    compared = _compare(condition, -condition.margin, evidence)
    found = compared.found
    if found is None:
        return Verdict("not_worse", False, compared.problem, compared.figures)
    passed = _is_sure(found, condition.confidence)
    how = "is not" if passed else "may be"
    margin = amount_told(condition.margin, found.method)
    text = f"{condition.metric} {how} worse than the {compared.rival}'s by {margin} or more"
    return Verdict("not_worse", passed, f"{text}: {_tell(found, condition)}", compared.figures)


def _is_sure(found: Paired, confidence: float) -> bool:
    return found.p_value <= 1 - confidence + ROUNDING


def _compare(
    condition: BetterConfig | NotWorseConfig, above: float, evidence: Evidence
) -> _Comparison:
    """Compare the player with the rival of a condition.

    Raises:
        ConfigError: the player was not measured on single examples.
        InputError: the rival was not, or on none of the same.
    """
    suite, name = split(condition.metric)
    rival, player = evidence.rivals[condition.against], evidence.player[suite]
    measured = rival.measured[suite]
    mine = _column(player, condition.metric, name)
    if name not in measured.columns:
        raise InputError(
            f"{measured.where} has no {name} on single examples, which promote.gate compares with "
            "it; evaluate it in the same way as the player, or change the gate"
        )
    theirs = measured.columns[name]
    figures: Figures = {"metric": condition.metric, "against": condition.against}
    figures |= {"rival": measured.where}
    for who, column in (("player", mine), (rival.name, theirs)):
        wrong = int((~np.isfinite(column.values)).sum())
        if wrong:
            on = f"{wrong} example{'' if wrong == 1 else 's'}"
            problem = f"{condition.metric} of the {who} is not a finite number on {on}"
            return _Comparison(rival.name, None, problem, figures)
    # 2c - 1: each end of the interval is then the one-sided bound at c
    two_sided = 2 * condition.confidence - 1
    found = compare(mine, theirs, above=above, confidence=two_sided, lower=condition.lower)
    if found is None:
        raise InputError(
            f"{measured.where} and {player.where} share no example with {condition.metric}; "
            "evaluate both on the same prompts"
        )
    figures |= {**found.figures(), "confidence": condition.confidence}
    return _Comparison(rival.name, found, "", figures)


def _column(measured: Measured, metric: str, name: str) -> Column:
    if name not in measured.columns:
        if name in measured.metrics:
            raise _no_mean(metric, list(measured.columns))
        raise _no_metric(measured, metric)
    return measured.columns[name]


def _no_metric(measured: Measured, metric: str) -> ConfigError:
    known = choices(split(metric)[1], measured.metrics, "it has")
    return ConfigError(
        f"promote.gate asks for {metric}: {measured.where} has no such metric; {known}"
    )


def _at_least(condition: AtLeastConfig, evidence: Evidence) -> Verdict:
    suite, name = split(condition.metric)
    measured = evidence.player[suite]
    figures: Figures = {"metric": condition.metric, "at_least": condition.value}
    if condition.confidence is None:
        value = number(_metric(measured, condition.metric, name))
        passed = _reaches(value, condition.value)
        text = f"{condition.metric} is {shown(value)}, which {reaches(passed)} {condition.value:g}"
        return Verdict("at_least", passed, text, {**figures, "value": value})
    column = _column(measured, condition.metric, name)
    value, count = number(column.mean()), len(column.values)
    low = None if value is None else lower_bound(column, condition.confidence)
    passed = _reaches(low, condition.value)
    text = (
        f"the {_percent(condition.confidence)} lower bound {shown(low)} of {condition.metric} "
        f"({shown(value)} on {count:,} examples) {reaches(passed)} {condition.value:g}"
    )
    if low is None and value is not None:
        text = (
            f"{condition.metric} is {shown(value)} on {'each of ' if count > 1 else ''}{count:,} "
            f"example{'' if count == 1 else 's'}, too few for a {_percent(condition.confidence)} "
            "lower bound where all agree"
        )
    figures |= {"value": value, "low": low, "confidence": condition.confidence, "examples": count}
    return Verdict("at_least", passed, text, figures)


def _reaches(value: float | None, bound: float) -> bool:
    return value is not None and value >= bound - ROUNDING


def _length_within(condition: LengthWithinConfig, evidence: Evidence) -> Verdict:
    suite, name = split(condition.metric)
    mine = evidence.player[suite]
    if condition.against == "human":
        whose, theirs, their_name = "human one's", mine, "human_mean_tokens"
        place = "the human answers"
    else:
        rival = evidence.rivals[condition.against]
        whose, theirs, their_name = f"{rival.name}'s", rival.measured[suite], name
        place = theirs.where
    value = number(_metric(mine, condition.metric, name))
    rival_value = number(_metric(theirs, condition.metric, their_name))
    figures: Figures = {"metric": condition.metric, "against": condition.against}
    figures |= {"value": value, "rival_value": rival_value, "rival": place}
    figures |= {"share": condition.share}
    if value is None or not rival_value:
        text = f"{condition.metric} is {shown(value)}, the {whose} {shown(rival_value)}: no length"
        return Verdict("length_within", False, text, figures)
    off = value / rival_value - 1
    passed = abs(off) <= condition.share + ROUNDING
    how = "within" if passed else "more than"
    text = (
        f"{condition.metric} {value:.4g} is {off:+.1%} off the {whose} {rival_value:.4g}, {how} "
        f"{_percent(condition.share)}"
    )
    return Verdict("length_within", passed, text, {**figures, "off": off})


def _metric(measured: Measured, metric: str, name: str) -> Any:
    if name not in measured.metrics:
        raise _no_metric(measured, metric)
    return measured.metrics[name]


def number(value: Any) -> float | None:
    """Return a metric's value, None where it is no finite number."""
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if usable and math.isfinite(value) else None


def shown(value: float | None) -> str:
    """Return a value as sentences tell it."""
    return "not a finite number" if value is None else f"{value:g}"


def reaches(good: bool) -> str:
    """Return how sentences tell that a bound is reached."""
    return "reaches" if good else "is below"


def _percent(share: float) -> str:
    return f"{100 * share:g}%"


def _tell(found: Paired, condition: BetterConfig | NotWorseConfig) -> str:
    """Return the figures of a comparison in words."""
    gain = gain_told(found.gain, found.method) + unit_told(found.method)
    low = "unknown, for so few examples agree"
    if found.low is not None:
        low = gain_told(found.low, found.method)
    missing = f", {found.unmatched:,} in only one of the two" if found.unmatched else ""
    return (
        f"{gain} ({_percent(condition.confidence)} lower bound {low}), "
        f"{name_of_test(found.method, found.above)} p {p_told(found.p_value)}, "
        f"{found.wins:,} won, {found.losses:,} lost of {found.examples:,}{missing}"
        f"{_disagreement(found, condition)}"
    )


def _disagreement(found: Paired, condition: BetterConfig | NotWorseConfig) -> str:
    """Return what to say where the bound alone would have decided otherwise."""
    would_pass = found.low is not None and found.low > found.above
    if would_pass == _is_sure(found, condition.confidence) or not in_points(found.method):
        return ""
    return "; the p value decides, for the bound is an approximation"
