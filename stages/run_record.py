"""run.json: the recipe that a run was started with, so that it is never carried on with another."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.artifacts import run_root
from stages.artifacts.files import make_folder, write_durably
from stages.artifacts.keys import canonical_json, open_sealed, sealed_text
from stages.errors import ConfigError, CorruptError, InputError
from stages.layout import RunLayout
from stages.recipe import SHRUNK, Recipe, recipe_from_json

RECORD_FORMAT = 1
_HASH_NAME = "sha256"
_MOST_RUNS = 10  # that an error names


def read_recipe(layout: RunLayout) -> Recipe:
    """Return the recipe of a run.

    Raises:
        InputError: the directory is no run, or its run.json cannot be read.
        CorruptError: its run.json is damaged.
    """
    recipe = _find_recipe(layout)
    if recipe is None:
        what = "is no run directory (no run.json)" if layout.root.exists() else "does not exist"
        raise InputError(f"{layout.root} {what}; {_remedy(layout)}")
    return recipe


def _remedy(layout: RunLayout) -> str:
    """Return what to name instead of a place that is no run."""
    above = run_root(layout.root)
    if above is not None:
        name = above if layout.root.is_absolute() else os.path.relpath(above)
        return f"it lies in the run {name}: name that"
    inside = sorted(str(record.parent) for record in layout.root.glob(f"*/{layout.record.name}"))
    if inside:
        more = ", …" if len(inside) > _MOST_RUNS else ""
        return f"name a run in it: {', '.join(inside[:_MOST_RUNS])}{more}"
    return f"correct the path, or start it: spin init {layout.root} --config RECIPE"


def start_or_resume(layout: RunLayout, recipe: Recipe, *, amend: bool = False) -> Recipe | None:
    """Write the run's record, or check that the run goes on with the recipe it was started with.

    The caller holds the run's lock.

    Args:
        amend: take the new recipe for all that is not done yet.

    Returns:
        The recipe that the run had before; None where it begins now.

    Raises:
        ConfigError: the recipe differs in what decides results, or the place is taken.
    """
    recorded = _find_recipe(layout)
    if recorded is None:
        _check_free(layout.root)
    elif recorded.to_json() == recipe.to_json():
        return recorded
    elif not amend:
        difference = first_difference(recorded, recipe)
        if difference is None:
            return recorded
        if recorded.source == f"{recipe.source}{SHRUNK}":
            raise ConfigError(
                f"{layout.root} was started with the recipe's reduced form: add --shrink, or name "
                "another --run"
            )
        raise ConfigError(
            f"{layout.root} was started with another recipe: {difference}; name another --run, "
            "or add --amend to take the new one for what is not done yet"
        )
    make_folder(layout.root)
    record = {
        "format": RECORD_FORMAT,
        "name": recipe.for_iteration().name,
        "recipe": recipe.to_json(),
    }
    write_durably(layout.record, sealed_text(record, _HASH_NAME))
    return recorded


def forget(layout: RunLayout) -> None:
    """Take back the record of a run in which nothing was made; the caller holds the run's lock."""
    made = (
        path
        for path in layout.root.iterdir()
        if path != layout.record and (path.is_dir() or not path.name.startswith("."))
    )
    if not any(made):
        layout.record.unlink(missing_ok=True)


def first_difference(old: Recipe, new: Recipe) -> str | None:
    """Return in words the first setting in which two recipes resolve differently, or None.

    Settings that only name a place or change speed are passed over.
    """
    points = {*old.turning_points(), *new.turning_points()}
    for iteration in [None, *sorted(points)]:
        before, now = old.settings(iteration), new.settings(iteration)
        for name in [*before, *(name for name in now if name not in before)]:
            if name not in before or name not in now or before[name] != now[name]:
                name = _common_name(name, before, now)
                where = "" if iteration is None else f" (iteration {iteration})"
                return f"{name}: {_shown(before, name)} there, {_shown(now, name)} now{where}"
    return None


def _common_name(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the section that is null on one side, where that is why `name` is missing there."""
    section = name.rpartition(".")[0]
    return section if section in before or section in now else name


def _shown(settings: Mapping[str, Any], name: str) -> str:
    if name in settings:
        return canonical_json(settings[name])
    return "set" if any(other.startswith(f"{name}.") for other in settings) else "absent"


def _find_recipe(layout: RunLayout) -> Recipe | None:
    try:
        data = layout.record.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(
            f"{layout.record} cannot be read ({error.strerror}); mend its permissions, or restore "
            "the file"
        ) from None
    return parse_record(data, layout.record)


def parse_record(data: bytes, path: object) -> Recipe:
    """Return the recipe in a run's record.

    Args:
        path: where it was read, for the message.

    Raises:
        CorruptError: it is not the text that was written.
        InputError: another version of spin wrote it.
    """
    try:
        record = open_sealed(data, _HASH_NAME)
    except ValueError:
        raise CorruptError(
            f"{path} is damaged (its hash does not match); restore it, or start another run"
        ) from None
    if record.get("format") != RECORD_FORMAT:
        raise InputError(
            f"{path} has format {record.get('format')}, this spin reads {RECORD_FORMAT}; "
            "use the version of spin that wrote it"
        )
    return recipe_from_json(record["recipe"])


def _check_free(root: Path) -> None:
    if not os.path.lexists(root):
        return
    if not root.is_dir():
        raise ConfigError(f"{root} is a file, not a run directory; name another --run")
    strangers = sorted(p.name for p in root.iterdir() if not p.name.startswith("."))
    if strangers:
        raise ConfigError(
            f"{root} is no run directory and not empty (it holds {strangers[0]}); "
            "name another --run"
        )
