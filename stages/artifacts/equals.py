"""Equal artifacts in one run: what was made once need not be made again."""

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from stages.artifacts.manifest import (
    MANIFEST_NAME,
    Artifact,
    InputRef,
    check_listing,
    read_manifest,
)
from stages.errors import SpinError

log = logging.getLogger("spin")


def artifact_folders(root: Path) -> Iterator[Path]:
    """Yield every finished artifact below a folder, in the order of their names.

    Hidden folders are unfinished attempts. No symlink is followed.
    """
    for name, folder_names, file_names in os.walk(root):
        folder_names[:] = sorted(n for n in folder_names if not n.startswith("."))
        if MANIFEST_NAME in file_names:
            folder_names.clear()
            yield Path(name)


def equal_artifacts(root: Path, key: str, inputs: Mapping[str, InputRef]) -> Iterator[Artifact]:
    """Yield the artifacts below a run that have a key, and were made of the same bytes.

    One that cannot be read, or lacks a file, is passed over with a warning. Files are verified when
    they are opened, whatever the recipe says.
    """
    contents = {name: ref.content for name, ref in inputs.items()}
    for folder in artifact_folders(root):
        try:
            # A look at the bytes first: most manifests of a run are of other artifacts.
            if key.encode() not in (folder / MANIFEST_NAME).read_bytes():
                continue
            manifest = read_manifest(folder)
            theirs = {name: ref.content for name, ref in manifest.inputs.items()}
            if manifest.key == key and theirs == contents:
                check_listing(folder, manifest)
                yield Artifact(folder, manifest)
        except FileNotFoundError:
            continue  # deleted meanwhile
        except SpinError as error:
            log.warning("%s is not taken for its equal: %s", folder, error)
