"""Settings that follow what was found: a divergence leads β or a rate, refusals lower the rate."""

import math
from typing import Any

from stages.artifacts import open_artifact, read_manifest
from stages.artifacts.json_file import read_object
from stages.artifacts.manifest import MANIFEST_NAME
from stages.config import AdaptConfig, RunConfig
from stages.decisions import METRICS, refusals_before
from stages.errors import ConfigError
from stages.layout import RunLayout
from stages.recipe import Recipe

MEASURED = "heldout_kl"
STDERRS = 2.0
"""Standard errors that a measurement may be off."""
RATE = "train.learning_rate"


def adapted(layout: RunLayout, recipe: Recipe, iteration: int) -> dict[str, float]:
    """Return the settings that were changed for an iteration, by their dotted names.

    `adapt` leads one to a divergence; after refusals, `promote.retry` lowers the learning rate.

    Raises:
        ConfigError: an evaluation has no divergence to go by.
        InputError: an iteration before is not evaluated, or decided, yet.
    """
    changed = _led(layout, recipe, iteration)
    plain = changed.get(RATE, _value(recipe.for_iteration(iteration), RATE))
    rate = _retried(layout, recipe, iteration, plain)
    return changed if rate == plain else changed | {RATE: rate}


def _retried(layout: RunLayout, recipe: Recipe, iteration: int, plain: float) -> float:
    """Return the learning rate that is left of one after refusals.

    A player that is trained already keeps its own: what comes after refusals may be amended later.
    """
    if not iteration:
        return plain
    promote = recipe.for_iteration(iteration - 1).promote
    trained = layout.stage(iteration, "train")
    is_done = (trained / MANIFEST_NAME).is_file()
    if promote.on_refusal != "retry" and not is_done:
        return plain
    lowered = plain * promote.retry.factor ** refusals_before(layout, iteration)
    if is_done:
        rate = read_manifest(trained).config.get("train", {}).get("learning_rate")
        if rate in (plain, lowered):
            return float(rate)
    return lowered if promote.on_refusal == "retry" else plain


def _led(layout: RunLayout, recipe: Recipe, iteration: int) -> dict[str, float]:
    """Return the setting that `adapt` leads to a divergence.

    What evaluate found in each iteration before multiplies the recipe's value once more, within
    its bounds; so it can be told again at any time, and stands in the manifest of train.
    """
    config = recipe.for_iteration(iteration)
    if config.adapt.target_kl is None or iteration == 0:
        return {}
    value, factor = _value(config, config.adapt.key), 1.0
    for before in range(iteration):
        adapt = recipe.for_iteration(before).adapt
        if adapt.target_kl is not None and adapt.key == config.adapt.key:
            factor *= change(adapt, *_divergence(layout, before))
        then = recipe.for_iteration(before + 1)
        plain = _value(then, config.adapt.key)
        value = _within(then.adapt, plain * factor)
        factor = value / plain  # bounds hold the factor too, or it would have to be undone first
    return {config.adapt.key: value}


def at_iteration(layout: RunLayout, recipe: Recipe, iteration: int | None) -> Recipe:
    """Return the recipe with what was changed for an iteration; None changes nothing."""
    changed = {} if iteration is None else adapted(layout, recipe, iteration)
    return recipe.with_overrides([f"{name}={value!r}" for name, value in changed.items()])


def change(adapt: AdaptConfig, measured: float, stderr: float) -> float:
    """Return the factor by which a setting changes after a divergence was measured.

    The divergence falls as β rises and as the learning rate falls, about in proportion to its
    square near the reference; hence the root. Of what may have been measured, within two standard
    errors, the value next to the target counts, so that noise changes nothing.
    """
    assert adapt.target_kl is not None, "asked only where there is a target"
    lowest, highest = measured - STDERRS * stderr, measured + STDERRS * stderr
    ratio = max(min(max(adapt.target_kl, lowest), highest), 0.0) / adapt.target_kl
    if 1 / adapt.tolerance <= ratio <= adapt.tolerance:
        return 1.0
    root = min(max(math.sqrt(ratio), 1 / adapt.factor), adapt.factor)
    return root if adapt.key == "train.beta" else 1 / root


def _value(config: RunConfig, key: str) -> float:
    section, _, name = key.partition(".")
    return float(getattr(getattr(config, section), name))


def _within(adapt: AdaptConfig, value: float) -> float:
    return min(max(value, adapt.lowest or 0.0), adapt.highest or math.inf)


def _divergence(layout: RunLayout, iteration: int) -> tuple[float, float]:
    """Return what evaluate measured, and its standard error."""
    out = layout.stage(iteration, "evaluate")
    metrics = read_object(open_artifact(out, stages=("evaluate",)), METRICS)
    found: list[Any] = [metrics.get(name) for name in (MEASURED, f"{MEASURED}_stderr")]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in found):
        raise ConfigError(
            f"adapt.target_kl follows {MEASURED}, which {out} does not have; evaluate the player "
            "against its opponent, or set adapt.target_kl=null"
        )
    return float(found[0]), float(found[1])
