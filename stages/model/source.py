"""Finding models: our own artifacts, plain folders, and the hub. Loads no weights and no torch."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stages.artifacts import Artifact, InputRef, open_artifact, run_root
from stages.artifacts.keys import sha256_file
from stages.artifacts.manifest import MANIFEST_NAME, content_hash
from stages.artifacts.pointer import pointed_to
from stages.errors import CorruptError, InputError
from stages.model.base import BASE_NAME, Base, base_of, is_adapter

MODEL_STAGES = ("sft", "train")
OPTIMIZER_FOLDER = "optimizer/"
"""Of a train artifact: what its training leaves for the next one (see `carried`), no part of the
model."""
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
_HUB = "hub:"


@dataclass(frozen=True)
class ModelSource:
    """A model that was found: the local folder to load, and its identity for keys."""

    path: Path
    ref: InputRef
    artifact: Artifact | None = None
    base: "ModelSource | None" = None
    """What the folder's adapter changes the weights of; None where the folder is a whole model."""

    def verified(self) -> Path:
        """Return the folder, with the SHA-256 of an artifact's files, and its bases', checked.

        Raises:
            CorruptError: its bytes have changed.
        """
        for source in self.chain():
            if source.artifact is not None:
                for file in source.artifact.manifest.files:
                    if not file.path.startswith(OPTIMIZER_FOLDER):  # twice as large as the weights
                        source.artifact.file(file.path)
        return self.path

    def chain(self) -> "list[ModelSource]":
        """Return the whole model at the bottom, the adapters on it in order, and this one last."""
        return [*(self.base.chain() if self.base else []), self]

    def as_base(self, adapter: Path) -> Base:
        """Return how an adapter records this model as its base.

        Args:
            adapter: the folder that the adapter will lie in.
        """
        root, place = run_root(adapter.resolve()), self.path.resolve()
        if self.ref.key.startswith(_HUB):
            path = self.ref.path
        elif root is not None and place.is_relative_to(root):
            path = Path(os.path.relpath(place, adapter.resolve())).as_posix()
        else:
            path = str(place)
        return Base(path=path, key=self.ref.key, content=self.ref.content)


def resolve_model(
    name: str, revision: str | None = None, root: Path | None = None, verify: bool = True
) -> ModelSource:
    """Find the model that `name` means; the files of a plain folder are hashed.

    Args:
        name: a model artifact, the `champion` file of a run, a plain model folder, or a hub id.
        revision: the commit, tag or branch of a hub model.
        root: the run directory that recorded paths are relative to.
        verify: check the SHA-256 of an artifact's files, when `ModelSource.verified` is called.

    Raises:
        InputError: there is no such model, or it would need code of its own or pickle files; or
            it is an adapter whose base is gone or another model now.
        CorruptError: it is an artifact with a file missing, extra, or of another size.
    """
    return _with_base(_find(name, revision, root, verify), root, verify, above=())


def model_chain(folder: Path) -> list[Path]:
    """Return the folder of a whole model, those of the adapters on it in order, `folder` last.

    Raises:
        InputError, CorruptError: the base of an adapter is not where it is recorded.
    """
    chain = [folder]
    while is_adapter(chain[0]):
        _, name, revision = base_of(chain[0])
        base = Path(name) if revision is None else _download(name, revision, only_local=True)
        _refuse_circle(base, chain)
        if not base.is_dir():
            raise InputError(f"{chain[0]} changes {base}, which does not exist; put it back")
        chain.insert(0, base)
    return chain


def _with_base(
    source: ModelSource, root: Path | None, verify: bool, above: tuple[Path, ...]
) -> ModelSource:
    """Return a model with the base of its adapter, if it is one, and that with its own.

    Args:
        above: the adapters that led to it.
    """
    if not is_adapter(source.path):
        return source
    _refuse_circle(source.path, above)
    record, name, revision = base_of(source.path)
    place = f"{source.path} changes the weights of {record.path}"
    try:
        found = _hub(name, revision) if record.is_on_hub else _find(name, revision, root, verify)
    except InputError as error:
        raise InputError(f"{place}, which cannot be opened: {error}") from error
    if found.ref.key != record.key:
        raise InputError(
            f"{place}, which is another model now (key {found.ref.key[:20]}, it was "
            f"{record.key[:20]}); put that one back, or train the adapter again"
        )
    if found.ref.content != record.content:
        raise InputError(
            f"{place}, which was made anew with other bytes; put the old ones back, or train the "
            "adapter again"
        )
    return replace(source, base=_with_base(found, root, verify, (*above, source.path)))


def _refuse_circle(folder: Path, above: Sequence[Path]) -> None:
    if any(folder.resolve() == other.resolve() for other in above):
        raise CorruptError(
            f"{folder / BASE_NAME} leads back to itself; delete {folder} and run its stage again"
        )


def _find(name: str, revision: str | None, root: Path | None, verify: bool) -> ModelSource:
    path = Path(name)
    if path.is_file():
        path = pointed_to(path)
    if (path / MANIFEST_NAME).is_file():
        artifact = open_artifact(path, stages=MODEL_STAGES, verify=verify)
        _refuse_code(path)
        return ModelSource(path, artifact.input_ref(root), artifact)
    if path.is_dir():
        return _plain_folder(path)
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1 or not name:
        raise InputError(f"model {name!r} does not exist; correct the path")
    return _hub(name, revision)


def _plain_folder(path: Path) -> ModelSource:
    is_adapter(path)  # one that spin cannot use is refused
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is no model: it has no config.json; correct the path")
    _refuse_code(path)
    if not any(path.glob("*.safetensors")):
        raise InputError(
            f"{path} has no safetensors weights; pickle files are not loaded: convert them with "
            "transformers' save_pretrained"
        )
    files = sorted({p for pattern in MODEL_FILES for p in path.glob(pattern)})
    content = content_hash({p.name: sha256_file(p) for p in files})
    return ModelSource(
        path, InputRef(path=path.name, inside_run=False, key=f"folder:{content}", content=content)
    )


def _download(name: str, revision: str | None, *, only_local: bool = False) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(MODEL_FILES),
                local_files_only=only_local,
            )
        )
    except HFValidationError:
        raise InputError(f"model {name!r} is neither a folder nor a hub id; correct it") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"model {name!r} is no local folder and cannot be had from the hub ({reason})"
        ) from error


def _hub(name: str, revision: str | None) -> ModelSource:
    folder = _download(name, revision)
    source = _plain_folder(folder)
    commit = folder.name  # the hub's cache names a snapshot by its commit
    key = f"{_HUB}{hashlib.sha256(f'{name}@{commit}'.encode()).hexdigest()}"
    shown = f"{name}@{commit}"
    return ModelSource(
        folder, InputRef(path=shown, inside_run=False, key=key, content=source.ref.content)
    )


def _refuse_code(path: Path) -> None:
    for file in ("config.json", "tokenizer_config.json"):
        if (path / file).is_file():
            content = json.loads((path / file).read_text(encoding="utf-8"))
            if isinstance(content, dict) and "auto_map" in content:
                raise InputError(
                    f"{path / file} asks to run code of the model (auto_map); spin never does: "
                    "use a family that transformers itself supports"
                )
    if any(path.glob("*.py")):
        raise InputError(f"{path} holds Python files; remove them: spin runs no code of a model")
