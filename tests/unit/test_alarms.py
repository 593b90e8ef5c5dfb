"""Alarms: what each looks at, when it fires, and what then happens."""

import logging
import math
from typing import Any

import pytest

from stages.alarms import LEAST_STEPS_BEFORE, RULES, TrainingWatch, fired, sound
from stages.config import AlarmsConfig
from stages.errors import DivergedError
from stages.recipe import load_recipe

HEALTHY: dict[str, dict[str, Any]] = {
    "generate": {"cut_off_share": 0.02, "empty_share": 0.0},
    "pair": {"identical_share": 0.6},
    "train": {"chosen_fall": -0.01, "highest_accuracy": 0.98, "highest_grad_norm_ratio": 2.0},
    "evaluate": {
        "heldout_human_logratio": 0.2,
        "heldout_kl": 0.4,
        "heldout_reward_accuracy": 0.67,
        "human_mean_tokens": 28.0,
        "human_repeated_share": 0.01,
        "opponent_cut_off_share": 0.05,
        "opponent_empty_share": 0.01,
        "opponent_entropy": 0.11,
        "opponent_mean_tokens": 23.0,
        "opponent_repeated_share": 0.02,
        "opponent_unscored_share": 0.0,
        "sampled_cut_off_share": 0.01,
        "sampled_empty_share": 0.0,
        "sampled_entropy": 0.05,
        "sampled_gain": 0.18,
        "sampled_gain_stderr": 0.013,
        "sampled_mean_tokens": 26.0,
        "sampled_repeated_share": 0.02,
        "sampled_unscored_share": 0.0,
    },
}
STAGE_OF = {rule.name: rule.stage for rule in RULES}
DEFAULTS = AlarmsConfig()


def value_of(name: str, **changes: Any) -> float | None:
    rule = next(rule for rule in RULES if rule.name == name)
    return rule.measure({**HEALTHY[rule.stage], **changes})


def config(**alarms: dict[str, Any]) -> AlarmsConfig:
    return AlarmsConfig.model_validate(alarms)


def test_every_alarm_of_the_recipe_has_its_rule() -> None:
    assert [rule.name for rule in RULES] == list(AlarmsConfig.model_fields)
    assert {rule.stage for rule in RULES} == set(HEALTHY)


@pytest.mark.parametrize("stage", HEALTHY)
def test_a_healthy_iteration_fires_nothing(stage: str) -> None:
    assert fired(stage, HEALTHY[stage], DEFAULTS) == []


@pytest.mark.parametrize(
    ("name", "changes", "value"),
    [
        ("generated_cut_off", {"cut_off_share": 0.7}, 0.7),
        ("generated_empty", {"empty_share": 0.06}, 0.06),
        ("identical_share", {"identical_share": 0.99}, 0.99),
        ("chosen_fall", {"chosen_fall": 0.1}, 0.1),
        ("accuracy_saturated", {"highest_accuracy": 1.0}, 1.0),
        ("gradient_norm", {"highest_grad_norm_ratio": 12.0}, 12.0),
        ("human_fall", {"heldout_human_logratio": -5.6}, 5.6 / 28),
        ("accuracy_drop", {"sampled_gain": -0.05, "sampled_gain_stderr": 0.01}, 5.0),
        ("accuracy_drop", {"sampled_gain": -0.05, "sampled_gain_stderr": 0.0}, 1000.0),
        ("divergence", {"heldout_kl": 11.5}, 0.5),
        ("heldout_saturated", {"heldout_reward_accuracy": 1.0}, 1.0),
        ("length_drift", {"sampled_mean_tokens": 60.0}, (60 / 28) / (28 / 23)),
        ("length_drift", {"sampled_mean_tokens": 10.0}, (28 / 10) / (28 / 23)),
        ("entropy_drop", {"sampled_entropy": 0.0011}, 0.99),
        ("repeated_rise", {"sampled_repeated_share": 0.5}, 0.48),
        ("cut_off_rise", {"sampled_cut_off_share": 0.9}, 0.85),
        ("empty_rise", {"sampled_empty_share": 0.2}, 0.19),
        ("unscored_rise", {"sampled_unscored_share": 0.5}, 0.5),
    ],
)
def test_each_alarm_fires_on_its_own_sign_alone(
    name: str, changes: dict[str, float], value: float
) -> None:
    stage = STAGE_OF[name]
    (alarm,) = fired(stage, HEALTHY[stage] | changes, DEFAULTS)
    setting = getattr(DEFAULTS, name)
    assert (alarm.name, alarm.stage) == (name, stage)
    assert (alarm.threshold, alarm.action) == (setting.threshold, setting.action)
    assert alarm.value == pytest.approx(value)
    assert f"alarm from {setting.threshold:g}" in alarm.text
    assert f"{alarm.value:.3g}" in alarm.text


@pytest.mark.parametrize(
    ("name", "changes", "value"),
    [
        # Towards the human length from far away is no drift, nor is standing far away still.
        ("length_drift", {"opponent_mean_tokens": 280.0, "sampled_mean_tokens": 28.0}, 0.1),
        ("length_drift", {"opponent_mean_tokens": 280.0, "sampled_mean_tokens": 280.0}, 1.0),
        # What the data itself does is no fault.
        ("repeated_rise", {"human_repeated_share": 0.4, "sampled_repeated_share": 0.4}, 0.0),
        ("accuracy_drop", {"sampled_gain": 0.0, "sampled_gain_stderr": 0.0}, 0.0),
        ("entropy_drop", {"sampled_entropy": 0.22}, -1.0),
    ],
)
def test_what_is_no_sign(name: str, changes: dict[str, float], value: float) -> None:
    assert value_of(name, **changes) == pytest.approx(value)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("gap", [None, "missing", True])
def test_a_figure_that_is_not_there_fires_nothing(rule: Any, gap: Any) -> None:
    assert rule.measure({}) is None
    metrics = {} if gap == "missing" else dict.fromkeys(HEALTHY[rule.stage], gap)
    assert rule.measure(metrics) is None


def test_an_alarm_fires_from_its_threshold_on_and_can_be_turned_off() -> None:
    metrics = {"identical_share": 0.9}
    at = config(identical_share={"threshold": 0.9})
    above = config(identical_share={"threshold": math.nextafter(0.9, 1)})
    off = config(identical_share={"threshold": None})
    assert [len(fired("pair", metrics, each)) for each in (at, above, off)] == [1, 0, 0]


def test_a_recipe_changes_threshold_or_action_alone() -> None:
    found = load_recipe(None, ["alarms.human_fall.action=stop", "alarms.divergence.threshold=1"])
    alarms = found.for_iteration().alarms
    assert (alarms.human_fall.action, alarms.human_fall.threshold) == ("stop", 0.1)
    assert (alarms.divergence.action, alarms.divergence.threshold) == ("note", 1)
    assert alarms.length_drift == DEFAULTS.length_drift


ALIKE = {"identical_share": 0.99}


class TestSound:
    def test_a_note_says_so_in_one_line(self, caplog: pytest.LogCaptureFixture) -> None:
        sound("pair", ALIKE, DEFAULTS)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert record.getMessage().startswith("pair: alarm identical_share: 0.99 of the pairs")
        assert "promoted" not in record.getMessage()

    def test_a_refusal_says_what_will_come(self, caplog: pytest.LogCaptureFixture) -> None:
        sound("pair", ALIKE, config(identical_share={"action": "refuse"}))
        assert caplog.messages[0].endswith("; the player will not be promoted")

    def test_a_stop_ends_the_stage(self) -> None:
        with pytest.raises(DivergedError, match=r"stopped by alarms\.identical_share\. Look at it"):
            sound("pair", ALIKE, config(identical_share={"action": "stop"}))


class TestTrainingWatch:
    def watch(self, steps: int = 50, *, aloud: bool = True, **alarms: Any) -> TrainingWatch:
        return TrainingWatch(steps, 10.0, config(**alarms), aloud=aloud)

    def tell(
        self,
        watch: TrainingWatch,
        *,
        chosen: list[float],
        accuracy: float = 0.9,
        norm: float = 1.0,
        is_new: bool = True,
    ) -> None:
        for step, value in enumerate(chosen):
            watch.add(
                step,
                accuracy=accuracy,
                chosen_logratio=value,
                grad_norm=norm,
                is_new=is_new,
            )

    def test_figures_are_means_over_a_tenth_of_the_steps_and_the_worst_is_kept(self) -> None:
        watch = self.watch(100)
        self.tell(watch, chosen=[0.0] * 20 + [-1.0] * 5 + [0.0] * 20)
        assert watch.metrics()["chosen_fall"] == pytest.approx(0.05)  # 5 of 10 steps, 10 tokens

    def test_one_bad_batch_is_no_fall(self, caplog: pytest.LogCaptureFixture) -> None:
        self.tell(self.watch(), chosen=[0.0] * 10 + [-2.0] + [0.0] * 10)
        assert not caplog.records

    def test_a_training_shorter_than_the_window_is_judged_at_its_end(self) -> None:
        watch = self.watch(2)
        self.tell(watch, chosen=[-3.0])
        assert watch.metrics() == {}
        self.tell(watch, chosen=[-5.0])
        assert watch.metrics()["chosen_fall"] == pytest.approx(0.4)

    def test_it_is_said_once_with_its_step(self, caplog: pytest.LogCaptureFixture) -> None:
        self.tell(self.watch(), chosen=[0.0] * 10 + [-5.0] * 10)
        (message,) = caplog.messages
        assert message.startswith("train: alarm chosen_fall: step 10: the chosen responses lost")

    @pytest.mark.parametrize("silence", [{"aloud": False}, {"is_new": False}])
    def test_other_ranks_and_steps_of_an_earlier_attempt_are_silent(
        self, silence: dict[str, bool], caplog: pytest.LogCaptureFixture
    ) -> None:
        watch = self.watch(aloud=silence.get("aloud", True))
        self.tell(watch, chosen=[-5.0] * 10, is_new=silence.get("is_new", True))
        assert watch.metrics()["chosen_fall"] == pytest.approx(0.5)
        assert not caplog.records

    @pytest.mark.parametrize("silence", [{"aloud": False}, {"is_new": False}])
    def test_but_all_of_them_stop(self, silence: dict[str, bool]) -> None:
        stops = {"chosen_fall": {"action": "stop"}}
        watch = self.watch(aloud=silence.get("aloud", True), **stops)
        with pytest.raises(DivergedError, match=r"train: step 4: the chosen responses lost 0\.5"):
            self.tell(watch, chosen=[-5.0] * 10, is_new=silence.get("is_new", True))

    def test_saturation(self, caplog: pytest.LogCaptureFixture) -> None:
        self.tell(self.watch(), chosen=[0.0] * 10, accuracy=1.0)
        assert "reward accuracy is saturated at 1" in caplog.text

    def test_a_gradient_norm_is_held_against_the_median_before(self) -> None:
        watch = self.watch()
        self.tell(watch, chosen=[0.0] * (LEAST_STEPS_BEFORE - 1))
        watch.add(9, accuracy=0.5, chosen_logratio=0.0, grad_norm=50.0, is_new=True)
        assert "highest_grad_norm_ratio" not in watch.metrics()  # too few before
        watch.add(10, accuracy=0.5, chosen_logratio=0.0, grad_norm=20.0, is_new=True)
        assert watch.metrics()["highest_grad_norm_ratio"] == 20.0
