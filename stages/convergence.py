"""Whether a run may end: the opponent can no longer be told from the data, or nothing is gained."""

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

from stages.artifacts import open_artifact
from stages.artifacts.json_file import read_object
from stages.config import RunConfig, StopConfig
from stages.decisions import METRICS, Decision, read_decision
from stages.layout import RunLayout
from stages.recipe import Recipe


def converged(layout: RunLayout, recipe: Recipe, iteration: int) -> str | None:
    """Return in words why a run has converged with an iteration that was decided; None: it has not.

    A player that alarms refused says nothing about convergence, nor does one that is its opponent
    still, such as after a step at learning rate 0.

    Raises:
        InputError: the iteration is not decided yet.
    """
    config = recipe.for_iteration(iteration)
    decision = read_decision(layout.stage(iteration, "promote"))
    if _is_alarmed(decision):
        return None
    evaluation = open_artifact(layout.stage(iteration, "evaluate"), stages=("evaluate",))
    metrics = read_object(evaluation, METRICS)
    decisions = [
        read_decision(layout.stage(t, "promote"))
        for t in range(max(0, iteration + 1 - config.stop.patience), iteration + 1)
    ]
    return (
        _cannot_be_told_apart(config, metrics)
        or _answers_alike(config.stop, metrics)
        or _gains_nothing(config.stop, decisions)
    )


def distance(layout: RunLayout, recipe: Recipe, iteration: int) -> str | None:
    """Return in words how far the discriminator is from guessing; None where it is not asked."""
    config = recipe.for_iteration(iteration)
    evaluation = open_artifact(layout.stage(iteration, "evaluate"), stages=("evaluate",))
    metrics = read_object(evaluation, METRICS)
    margin, accuracy = config.stop.discriminator_margin, metrics.get("heldout_reward_accuracy")
    if margin is None or not _is_of_humans(config) or accuracy is None:
        return None
    if not _has_moved(metrics):
        return "the last player is its opponent still"
    width = _half_width(config, metrics["heldout_reward_accuracy_stderr"])
    return (
        f"the last player tells the data from its opponent in {accuracy:.1%} (±{width:.1%}) of "
        f"held-out prompts, which is not all within {margin:.1%} of guessing"
    )


def _has_moved(metrics: Mapping[str, Any]) -> bool:
    return metrics.get("heldout_kl") != 0 or metrics.get("heldout_reward_margin") != 0


def _half_width(config: RunConfig, stderr: float) -> float:
    return NormalDist().inv_cdf((1 + config.stop.confidence) / 2) * stderr


def conditions(config: RunConfig) -> list[str]:
    """Return which conditions of the `stop` section can be met at all."""
    stop = config.stop
    asked = {
        "discriminator_margin": stop.discriminator_margin is not None and _is_of_humans(config),
        "identical_share": stop.identical_share is not None,
        "min_gain": stop.min_gain is not None,
    }
    return [name for name, is_asked in asked.items() if is_asked]


def _is_of_humans(config: RunConfig) -> bool:
    """Tell whether the loss trains a discriminator of human responses."""
    return config.pair.policy in ("human_vs_self", "human_vs_worst")


def _is_alarmed(decision: Decision) -> bool:
    return any(alarm["action"] != "note" for alarm in decision.alarms)


def _cannot_be_told_apart(config: RunConfig, metrics: Mapping[str, Any]) -> str | None:
    """Ask the discriminator: all that its accuracy may be must be close to one half.

    "Not shown to be above one half" would end a run early where few prompts are held out.
    """
    margin = config.stop.discriminator_margin
    accuracy = metrics.get("heldout_reward_accuracy")
    error = metrics.get("heldout_reward_accuracy_stderr")
    if margin is None or not _is_of_humans(config) or not _has_moved(metrics):
        return None
    if accuracy is None or error is None:
        return None
    half_width = _half_width(config, error)
    if accuracy + half_width > 0.5 + margin or accuracy - half_width < 0.5 - margin:
        return None
    return (
        f"the player tells the data from its opponent in {accuracy:.1%} (±{half_width:.1%}) of "
        f"held-out prompts, which is within {margin:.1%} of guessing"
    )


def _answers_alike(stop: StopConfig, metrics: Mapping[str, Any]) -> str | None:
    share = metrics.get("heldout_identical_share")
    if stop.identical_share is None or share is None or share < stop.identical_share:
        return None
    return (
        f"{share:.1%} of the opponent's held-out answers are the human ones, "
        f"stop.identical_share is {stop.identical_share:.1%}"
    )


def _gains_nothing(stop: StopConfig, decisions: list[Decision]) -> str | None:
    if stop.min_gain is None or len(decisions) < stop.patience:
        return None
    if any(_is_alarmed(decision) for decision in decisions):
        return None
    gains = []
    for decision in decisions:
        if decision.value is None or decision.champion_value is None:
            return None
        gains.append(decision.value - decision.champion_value)
    if max(gains) >= stop.min_gain:
        return None
    shown = ", ".join(f"{gain:+.4g}" for gain in gains)
    return (
        f"{decisions[-1].metric} gained less than stop.min_gain={stop.min_gain:g} in "
        f"{len(gains)} iterations in a row ({shown})"
    )
