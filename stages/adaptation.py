"""Settings that follow a measurement: β or the learning rate is led to a divergence."""

import math
from typing import Any

from stages.artifacts import open_artifact
from stages.artifacts.json_file import read_object
from stages.config import AdaptConfig
from stages.decisions import METRICS
from stages.errors import ConfigError
from stages.layout import RunLayout
from stages.recipe import Recipe

MEASURED = "heldout_kl"


def adapted(layout: RunLayout, recipe: Recipe, iteration: int) -> dict[str, float]:
    """Return the setting that measurements changed for an iteration, by its dotted name.

    What evaluate found in each iteration before multiplies the recipe's value by one factor more;
    so it can be told again at any time, and stands in the manifest of train.

    Raises:
        ConfigError: an evaluation has no divergence to go by.
        InputError: an iteration before is not evaluated yet.
    """
    factor = 1.0
    for before in range(iteration):
        adapt = recipe.for_iteration(before).adapt
        if adapt.target_kl is not None:
            factor *= change(adapt, _divergence(layout, before))
    config = recipe.for_iteration(iteration)
    if config.adapt.target_kl is None or iteration == 0:
        return {}
    section, _, name = config.adapt.key.partition(".")
    value = getattr(getattr(config, section), name) * factor
    lowest, highest = config.adapt.lowest or 0.0, config.adapt.highest or math.inf
    return {config.adapt.key: min(max(value, lowest), highest)}


def at_iteration(layout: RunLayout, recipe: Recipe, iteration: int | None) -> Recipe:
    """Return the recipe with what measurements changed for an iteration; None changes nothing."""
    changed = {} if iteration is None else adapted(layout, recipe, iteration)
    return recipe.with_overrides([f"{name}={value!r}" for name, value in changed.items()])


def change(adapt: AdaptConfig, measured: float) -> float:
    """Return the factor by which a setting changes after a divergence was measured.

    The divergence falls as β rises and as the learning rate falls, about in proportion to its
    square near the reference; hence the root.
    """
    assert adapt.target_kl is not None, "asked only where there is a target"
    ratio = max(measured, 0.0) / adapt.target_kl
    if 1 / adapt.tolerance <= ratio <= adapt.tolerance:
        return 1.0
    root = min(max(math.sqrt(ratio), 1 / adapt.factor), adapt.factor)
    return root if adapt.key == "train.beta" else 1 / root


def _divergence(layout: RunLayout, iteration: int) -> float:
    out = layout.stage(iteration, "evaluate")
    value: Any = read_object(open_artifact(out, stages=("evaluate",)), METRICS).get(MEASURED)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(
            f"adapt.target_kl follows {MEASURED}, which {out} does not have; evaluate the player "
            "against its opponent, or set adapt.target_kl=null"
        )
    return float(value)
