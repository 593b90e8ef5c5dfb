"""Recipes: files that the user names, or those that spin ships with."""

import re
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from stages.errors import ConfigError
from stages.recipe import Recipe, load_recipe


def load(
    name: str | None, overrides: list[str], source: str | None = None, *, shrink: bool = False
) -> Recipe:
    """Return a recipe with overrides.

    Args:
        name: a file, or the name of a shipped recipe; None is the schema's defaults.
        source: sets prepare.source, taken as it is.
        shrink: take the recipe's reduced form.

    Raises:
        ConfigError: there is no such recipe, or it does not fit the schema.
    """
    recipe = load_recipe(find(name) if name is not None else None, overrides, shrink=shrink)
    if source is not None:
        recipe = replace(recipe, overrides={**recipe.overrides, "prepare.source": source})
    return recipe


def find(name: str) -> Path:
    """Return the file of a recipe.

    Raises:
        ConfigError: there is neither a file nor a shipped recipe of that name.
    """
    path = Path(name)
    if path.is_file() or path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return path
    known = shipped()
    if name not in known:
        raise ConfigError(
            f"recipe {name!r} is neither a file nor a shipped recipe; those shipped are "
            f"{', '.join(known) or 'none'}"
        )
    return known[name]


def shipped() -> dict[str, Path]:
    """Return the shipped recipes, from name to file, sorted."""
    package = Path(__file__).parent
    folders = (package.parent / "configs", package / "configs")  # a checkout; an installed wheel
    found = {p.stem: p for folder in folders for p in folder.glob("*.yaml")}
    return dict(sorted(found.items()))


def summary(path: Path) -> str:
    """Return the first sentence of the comment that a recipe begins with, or nothing."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = takewhile(lambda line: line.startswith("#"), lines)
    text = " ".join(line.removeprefix("#").strip() for line in comment)
    return re.split(r"(?<=\.) ", text, maxsplit=1)[0]
