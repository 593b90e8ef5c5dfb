"""The base of an adapter: the model whose weights it changes, as the adapter's folder records it.

An adapter-only model folder holds peft's files, what else a model folder has but weights, and
`base.json`. The base may be an adapter itself. Loads no weights and no torch.
"""

import json
import os
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, ValidationError

from stages.artifacts import run_root
from stages.artifacts.files import inner_path
from stages.artifacts.keys import canonical_json
from stages.errors import CorruptError, InputError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_NAME = "base.json"


class Base(BaseModel):
    """The content of `base.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    """From the adapter's folder to the base, `../…`, where both lie in one run; else the base's
    absolute path, or `id@commit` of a hub model."""
    key: str
    """The identity of the base; see `InputRef`."""
    content: str
    """Hash over the base's file hashes."""

    @property
    def is_inside_run(self) -> bool:
        """Tell whether base and adapter lie in one run."""
        return self.path.startswith("../")

    @property
    def is_on_hub(self) -> bool:
        """Tell whether the base is a model of the hub."""
        return not self.is_inside_run and not Path(self.path).is_absolute()


def is_adapter(folder: Path) -> bool:
    """Tell whether a model folder holds an adapter, and no whole model.

    Raises:
        InputError: it holds both, or an adapter of which spin cannot know the base.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    if weights != [ADAPTER_WEIGHTS]:
        raise InputError(
            f"{folder} holds {ADAPTER_CONFIG}, and as weights {', '.join(weights) or 'nothing'}, "
            f"not {ADAPTER_WEIGHTS} alone: adapter and whole model need a folder each"
        )
    if not (folder / BASE_NAME).is_file():
        raise InputError(
            f"{folder} holds an adapter without {BASE_NAME}, so spin did not write it; "
            "merge it into its base (peft's merge_and_unload) and give that model"
        )
    return True


def base_of(folder: Path) -> tuple[Base, str, str | None]:
    """Return the base that an adapter's folder records, with name and revision to find it by.

    Raises:
        CorruptError: base.json is damaged, or names a place outside the run that it may not.
        InputError: the base lies in the adapter's run, and the adapter was taken out of it.
    """
    base = _read(folder)
    if base.is_on_hub:
        name, _, revision = base.path.rpartition("@")
        return base, name, revision
    if not base.is_inside_run:
        return base, base.path, None
    root = run_root(folder.resolve())
    if root is None:
        raise InputError(
            f"{folder} names its base as {base.path}, in the run that both were made in, but lies "
            "in no run; use it where it was made, or train with lora.output=merged"
        )
    here = PurePosixPath(folder.resolve().relative_to(root))
    inside = os.path.normpath(here / base.path)
    return base, str(inner_path(root, inside, named_by=str(folder / BASE_NAME))), None


def write_base(folder: Path, base: Base) -> None:
    """Write `base.json`."""
    text = canonical_json(base.model_dump()) + "\n"
    (folder / BASE_NAME).write_text(text, encoding="utf-8")


def _read(folder: Path) -> Base:
    path = folder / BASE_NAME
    try:
        return Base.model_validate(json.loads(path.read_bytes()))
    except (ValueError, ValidationError):
        raise CorruptError(f"{path} is damaged; delete {folder} and run its stage again") from None
