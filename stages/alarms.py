"""Alarms: signs of a collapse that loss and reward accuracy do not show.

A rule reads one number out of a finished stage's metrics, the larger the worse; the recipe's
`alarms` section says from where on it fires, and what then happens. docs/alarms.md tells which
means what.
"""

import bisect
import logging
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stages.config import AlarmConfig, AlarmsConfig
from stages.errors import DivergedError

log = logging.getLogger("spin")

Metrics = Mapping[str, Any]
"""Of a stage's manifest; None where a figure could not be had."""

LEAST_WINDOW = 5
"""Steps that training's figures are at least averaged over: one batch alone is noise."""
LEAST_STEPS_BEFORE = 10
"""Steps before a gradient norm is held against their median."""
MOST_STDERRS = 1000.0
"""What a fall without any spread counts as."""


@dataclass(frozen=True)
class Rule:
    """What one alarm looks at."""

    name: str
    """Of its section in `AlarmsConfig`."""
    stage: str
    measure: Callable[[Metrics], float | None]
    """None where the metrics do not hold what it takes."""
    says: str
    """With `{value}` and `{threshold}`, both formatted."""


@dataclass(frozen=True)
class FiredAlarm:
    """An alarm that fired, as it stands in decision.json."""

    name: str
    stage: str
    value: float
    threshold: float
    action: str
    text: str

    @property
    def refuses(self) -> bool:
        """Whether the player is not to be promoted."""
        return self.action != "note"


def _value(name: str) -> Callable[[Metrics], float | None]:
    return lambda metrics: _number(metrics, name)


def _rise(name: str, *over: str) -> Callable[[Metrics], float | None]:
    """Measure how far a figure is above the highest of others."""

    def measure(metrics: Metrics) -> float | None:
        value, *others = (_number(metrics, each) for each in (name, *over))
        known = [other for other in others if other is not None]
        if value is None or len(known) < len(over):
            return None
        return value - max(known)

    return measure


def _human_fall(metrics: Metrics) -> float | None:
    """Nats a token."""
    return _quotient(
        _negated(metrics, "heldout_human_logratio"), _number(metrics, "human_mean_tokens")
    )


def _divergence(metrics: Metrics) -> float | None:
    """Nats a token."""
    return _quotient(_number(metrics, "heldout_kl"), _number(metrics, "opponent_mean_tokens"))


def _accuracy_drop(metrics: Metrics) -> float | None:
    """Standard errors."""
    fall, spread = _negated(metrics, "sampled_gain"), _number(metrics, "sampled_gain_stderr")
    if fall is None or spread is None:
        return None
    if not spread:
        return MOST_STDERRS if fall > 0 else 0.0
    return min(fall / spread, MOST_STDERRS)


def _length_drift(metrics: Metrics) -> float | None:
    """How many times farther from the human length the player is than its opponent was."""
    player, opponent, human = (
        _number(metrics, f"{who}_mean_tokens") for who in ("sampled", "opponent", "human")
    )
    if not player or not opponent or not human:
        return None
    return max(player / human, human / player) / max(opponent / human, human / opponent)


def _entropy_drop(metrics: Metrics) -> float | None:
    player, opponent = _number(metrics, "sampled_entropy"), _number(metrics, "opponent_entropy")
    share = _quotient(player, opponent)
    return None if share is None else 1 - share


RULES = (
    Rule(
        "generated_cut_off",
        "generate",
        _value("cut_off_share"),
        "{value} of the opponent's answers were cut off (alarm from {threshold})",
    ),
    Rule(
        "generated_empty",
        "generate",
        _value("empty_share"),
        "{value} of the opponent's answers are empty (alarm from {threshold})",
    ),
    Rule(
        "identical_share",
        "pair",
        _value("identical_share"),
        "{value} of the pairs are identical: the opponent answers as the data does "
        "(alarm from {threshold})",
    ),
    Rule(
        "chosen_fall",
        "train",
        _value("chosen_fall"),
        "the chosen responses lost {value} nats a token against the reference "
        "(alarm from {threshold})",
    ),
    Rule(
        "accuracy_saturated",
        "train",
        _value("highest_accuracy"),
        "reward accuracy is saturated at {value} (alarm from {threshold}): nothing is left to "
        "learn from these pairs",
    ),
    Rule(
        "gradient_norm",
        "train",
        _value("highest_grad_norm_ratio"),
        "a gradient norm was {value} times the median of those before (alarm from {threshold})",
    ),
    Rule(
        "human_fall",
        "evaluate",
        _human_fall,
        "held-out human responses lost {value} nats a token against the opponent "
        "(alarm from {threshold})",
    ),
    Rule(
        "accuracy_drop",
        "evaluate",
        _accuracy_drop,
        "the reward of sampled answers fell below the opponent's by {value} standard errors "
        "(alarm from {threshold})",
    ),
    Rule(
        "unscored_rise",
        "evaluate",
        _rise("sampled_unscored_share", "opponent_unscored_share"),
        "the share of sampled answers without a score rose by {value} over the opponent's, and "
        "accuracy leaves them out (alarm from {threshold})",
    ),
    Rule(
        "divergence",
        "evaluate",
        _divergence,
        "the player is {value} nats a token from its opponent (alarm from {threshold})",
    ),
    Rule(
        "heldout_saturated",
        "evaluate",
        _value("heldout_reward_accuracy"),
        "held-out reward accuracy is saturated at {value} (alarm from {threshold})",
    ),
    Rule(
        "length_drift",
        "evaluate",
        _length_drift,
        "answers are {value} times farther from the human length than the opponent's "
        "(alarm from {threshold})",
    ),
    Rule(
        "entropy_drop",
        "evaluate",
        _entropy_drop,
        "the entropy of sampled tokens fell by a share of {value} of the opponent's "
        "(alarm from {threshold})",
    ),
    Rule(
        "repeated_rise",
        "evaluate",
        _rise("sampled_repeated_share", "opponent_repeated_share", "human_repeated_share"),
        "the share of repeated 4-grams rose by {value} over the opponent's and the human ones' "
        "(alarm from {threshold})",
    ),
    Rule(
        "cut_off_rise",
        "evaluate",
        _rise("sampled_cut_off_share", "opponent_cut_off_share"),
        "the share of answers cut off rose by {value} over the opponent's (alarm from {threshold})",
    ),
    Rule(
        "empty_rise",
        "evaluate",
        _rise("sampled_empty_share", "opponent_empty_share"),
        "the share of empty answers rose by {value} over the opponent's (alarm from {threshold})",
    ),
)  # fmt: skip


def fired(stage: str, metrics: Metrics, config: AlarmsConfig) -> list[FiredAlarm]:
    """Return which alarms of a stage its metrics set off, in the order of `RULES`."""
    found = (_apply(rule, metrics, config) for rule in RULES if rule.stage == stage)
    return [alarm for alarm in found if alarm is not None]


def sound(stage: str, metrics: Metrics, config: AlarmsConfig) -> None:
    """Say which alarms of a stage that is about to finish have fired.

    Raises:
        DivergedError: one of them is set to stop; nothing is committed.
    """
    for alarm in fired(stage, metrics, config):
        _sound(alarm, alarm.text)


class TrainingWatch:
    """Is told every step of a training, and fires the alarms of train while it goes on.

    All ranks are told the same figures, so all of them stop at the same step.
    """

    def __init__(
        self, total_steps: int, chosen_tokens: float, config: AlarmsConfig, *, aloud: bool
    ) -> None:
        """Watch a training of so many steps.

        Args:
            chosen_tokens: mean tokens of a chosen response.
            aloud: say what fires; on one rank of all.
        """
        window = min(total_steps, max(LEAST_WINDOW, total_steps // 10))
        self._chosen = deque[float](maxlen=window)
        self._accuracy = deque[float](maxlen=window)
        self._norms: list[float] = []
        self._chosen_tokens = chosen_tokens
        self._config = config
        self._aloud = aloud
        self._said: set[str] = set()
        self._worst: dict[str, float] = {}

    def add(
        self, step: int, *, accuracy: float, chosen_logratio: float, grad_norm: float, is_new: bool
    ) -> None:
        """Take note of one step.

        Args:
            is_new: false for a step of an earlier attempt, whose alarms were told then.

        Raises:
            DivergedError: an alarm fired that is set to stop.
        """
        self._chosen.append(chosen_logratio)
        self._accuracy.append(accuracy)
        if len(self._chosen) == self._chosen.maxlen:
            self._note("chosen_fall", -statistics.fmean(self._chosen) / self._chosen_tokens)
            self._note("highest_accuracy", statistics.fmean(self._accuracy))
        if len(self._norms) >= LEAST_STEPS_BEFORE:
            median = self._norms[len(self._norms) // 2]
            self._note("highest_grad_norm_ratio", grad_norm / median if median else 0.0)
        bisect.insort(self._norms, grad_norm)
        self._sound(step, is_new)

    def metrics(self) -> dict[str, float]:
        """Return the worst figures so far, whether an alarm looks at them or not.

        `chosen_fall`: nats a token that the chosen responses lost against the reference, negative
        where they gained; `highest_accuracy`; both means over a tenth of the steps, five at least,
        so that `last_accuracy`, over a tenth but of one step if need be, may lie above the highest.
        `highest_grad_norm_ratio`: of a step's gradient norm to the median of those before, where
        there were ten.
        """
        return dict(self._worst)

    def _note(self, name: str, value: float) -> None:
        self._worst[name] = max(value, self._worst.get(name, value))

    def _sound(self, step: int, is_new: bool) -> None:
        for alarm in fired("train", self._worst, self._config):
            if alarm.name in self._said:
                continue
            self._said.add(alarm.name)
            if alarm.action == "stop" or (self._aloud and is_new):
                _sound(alarm, f"step {step}: {alarm.text}")


def _sound(alarm: FiredAlarm, text: str) -> None:
    if alarm.action == "stop":
        remedy = "Lower the learning rate" if alarm.stage in ("train", "evaluate") else "Look at it"
        raise DivergedError(
            f"{alarm.stage}: {text}; stopped by alarms.{alarm.name}. {remedy}, or raise "
            f"alarms.{alarm.name}.threshold (or set its action to refuse or note) with --amend"
        )
    outcome = "; the player will not be promoted" if alarm.refuses else ""
    log.warning("%s: alarm %s: %s%s", alarm.stage, alarm.name, text, outcome)


def _apply(rule: Rule, metrics: Metrics, config: AlarmsConfig) -> FiredAlarm | None:
    setting: AlarmConfig = getattr(config, rule.name)
    value = rule.measure(metrics)
    if setting.threshold is None or value is None or value < setting.threshold:
        return None
    text = rule.says.format(value=f"{value:.3g}", threshold=f"{setting.threshold:g}")
    return FiredAlarm(rule.name, rule.stage, value, setting.threshold, setting.action, text)


def _number(metrics: Metrics, name: str) -> float | None:
    value = metrics.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def _negated(metrics: Metrics, name: str) -> float | None:
    value = _number(metrics, name)
    return None if value is None else -value


def _quotient(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below
