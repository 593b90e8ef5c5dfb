"""The settings that matter: those that a recipe sets itself, and what changed by iteration."""

from dataclasses import dataclass
from typing import Any

from stages.artifacts.keys import canonical_json
from stages.lineage import flat
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
        Setting(name, _without_folders(shown(value)), _without_folders(origin))
        for name, value, origin in view.recipe.origins()
        if name in ALWAYS or (origin != "default" and name != "name")
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
            used |= flat(section, f"{name}.")
    return {name: shown(value) for name, value in {**planned, **used}.items()}


def _without_folders(text: str) -> str:
    """Return a path without the folders of this machine, and any other text as it is."""
    return f"…/{text.rpartition('/')[2]}" if text.startswith("/") else text
