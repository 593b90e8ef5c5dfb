"""The settings that matter: those that a recipe sets itself, and what changed by iteration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.artifacts.keys import canonical_json
from stages.recipe import Recipe
from stages.reporting.collect import IterationView, RunView

ALWAYS = (
    "seed", "pair.policy", "train.loss", "train.beta", "train.learning_rate", "train.batch_size",
    "train.epochs", "train.precision", "generate.temperature", "generate.num_samples",
    "generate.max_new_tokens", "reference.policy", "promote.metric", "promote.min_value",
    "promote.min_gain", "promote.on_refusal",
)  # fmt: skip
"""Told even where they are defaults."""
FROM_MANIFESTS = ("generate", "pair", "score", "train", "evaluate")
"""Stages whose manifests hold their own section as it was used."""


@dataclass(frozen=True)
class Setting:
    """One setting; `origin` is default, override, or the recipe's file."""

    name: str
    value: str
    origin: str


@dataclass(frozen=True)
class Change:
    """A setting that is not the same in all iterations, one value each."""

    name: str
    values: tuple[str, ...]


def settings(view: RunView) -> list[Setting]:
    """Return what the recipe sets, and what one asks for in any case, in the schema's order."""
    if view.recipe is None:
        return []
    return [
        Setting(name, shown(value), _origin(origin))
        for name, value, origin in view.recipe.origins()
        if name in ALWAYS or origin != "default"
    ]


def changes(view: RunView) -> list[Change]:
    """Return the settings that differ between iterations, as their artifacts were made."""
    found = [_of_iteration(view.recipe, iteration) for iteration in view.iterations]
    names = dict.fromkeys(name for each in found for name in each)
    rows = (Change(name, tuple(each.get(name, "") for each in found)) for name in names)
    return [row for row in rows if len({value for value in row.values if value}) > 1]


def shown(value: Any) -> str:
    """Return a setting's value as it may stand in a recipe."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) and value else canonical_json(value)


def _of_iteration(recipe: Recipe | None, iteration: IterationView) -> dict[str, str]:
    planned = recipe.settings(iteration.index) if recipe else {}
    used: dict[str, Any] = {}
    for name in FROM_MANIFESTS:
        manifest = iteration.manifest(name)
        section = manifest.config.get(name) if manifest else None
        if isinstance(section, dict):
            used |= _flat(section, f"{name}.")
    return {name: shown(value) for name, value in {**planned, **used}.items()}


def _flat(section: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in section.items():
        nested = isinstance(value, dict) and value
        found |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found


def _origin(origin: str) -> str:
    """Return where a value came from, without the folders of this machine."""
    return origin.rpartition("/")[2]
