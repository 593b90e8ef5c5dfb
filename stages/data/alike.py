"""Whether two evaluations measured in one way: the one rule of gates and of comparisons."""

from typing import Any

from stages.artifacts import Manifest

OF_BETA = frozenset({"heldout_reward_margin"})
"""Metrics in a unit of train.beta; all others are the same at any beta > 0."""
_OF_MODEL = ("model", "opponent", "opponent_evaluation", "answers", "against", "judged")
"""Inputs that differ between models that are measured alike."""
_OF_DRAWS = {"evaluate": ("engine", "seed", "beta"), "suite": ("engine",)}
"""Stage → settings that change which samples are drawn, or by whom, and not what metrics mean. A
suite's seed can choose its questions (few-shot examples), and beta has OF_BETA."""
_INFO = ("judge", "reference")


def way(manifest: Manifest) -> dict[str, Any]:
    """Return what decides what an evaluation's metrics mean; equal where two measured alike.

    It is settings, data, reward model, and who judged, by name.
    """
    left_out = _OF_DRAWS.get(manifest.stage, ())
    settings = {name: value for name, value in manifest.config.items() if name not in left_out}
    judges = {name: manifest.info[name] for name in _INFO if manifest.info.get(name) is not None}
    inputs = {
        name: ref.key if ref.key == ref.content else f"{ref.key} {ref.content}"
        for name, ref in manifest.inputs.items()
        if name not in _OF_MODEL
    }
    return {"format_version": manifest.format_version, **settings, **judges, **inputs}


def draws(manifest: Manifest) -> dict[str, Any]:
    """Return what two may differ in though they measured alike, by name."""
    names = _OF_DRAWS.get(manifest.stage, ())
    return {name: manifest.config.get(name) for name in names if name != "beta"}


def share_beta(one: Manifest, other: Manifest) -> bool:
    """Tell whether metrics of OF_BETA have one unit."""
    return one.config.get("beta") == other.config.get("beta")
