"""Joining tables by id in one pass: all of them are sorted by `prompt_id`."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from stages.artifacts.tables import Row
from stages.errors import CorruptError


def grouped(rows: Iterable[Row], where: Path) -> Iterator[tuple[str, list[Row]]]:
    """Group rows by prompt id.

    Raises:
        CorruptError: the ids do not rise, so a join would lose rows.
    """
    last = ""
    for prompt_id, group in groupby(rows, key=lambda row: row["prompt_id"]):
        if prompt_id <= last:
            raise CorruptError(
                f"{where} is not sorted by prompt_id ({prompt_id} follows {last}); "
                f"delete {where} and run its stage again"
            )
        last = prompt_id
        yield prompt_id, list(group)


def inner_join(
    left: Iterable[tuple[str, Any]], right: Iterable[tuple[str, Any]]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (id, left, right) for the ids that both rising streams hold."""
    rights = iter(right)
    id_right, value_right = next(rights, ("", None))
    for id_left, value_left in left:
        while id_right and id_right < id_left:
            id_right, value_right = next(rights, ("", None))
        if not id_right:
            return
        if id_right == id_left:
            yield id_left, value_left, value_right
