"""One JSON object as a file of an artifact: metrics.json, decision.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.artifacts.keys import canonical_json
from stages.artifacts.manifest import Artifact
from stages.errors import CorruptError


def write_object(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as canonical JSON: equal values give equal bytes."""
    path.write_text(canonical_json(value) + "\n", encoding="utf-8")


def read_object(artifact: Artifact, relative: str) -> dict[str, Any]:
    """Return the JSON object in one file of an artifact.

    Raises:
        CorruptError: the file is damaged or holds no JSON object.
        InputError: the artifact has no such file.
    """
    path = artifact.file(relative)
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise CorruptError(
            f"{path} holds no JSON object; delete {artifact.path} and run its stage again"
        )
    return value
