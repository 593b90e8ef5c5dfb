"""Finding models: our own artifacts, plain folders, and the hub. Loads no weights and no torch."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from stages.artifacts import Artifact, InputRef, open_artifact
from stages.artifacts.keys import sha256_file
from stages.artifacts.manifest import MANIFEST_NAME, content_hash
from stages.artifacts.pointer import read_pointer
from stages.errors import InputError

MODEL_STAGES = ("sft", "train")
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class ModelSource:
    """A model that was found: the local folder to load, and its identity for keys."""

    path: Path
    ref: InputRef
    artifact: Artifact | None = None

    def verified(self) -> Path:
        """Return the folder, with the SHA-256 of an artifact's files checked first.

        Raises:
            CorruptError: its bytes have changed.
        """
        if self.artifact is not None:
            self.artifact.files()
        return self.path


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
        InputError: there is no such model, or it would need code of its own or pickle files.
        CorruptError: it is an artifact with a file missing, extra, or of another size.
    """
    path = Path(name)
    if path.is_file():
        pointer = read_pointer(path)
        assert pointer is not None, "the file exists"
        path = path.parent / pointer.path
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


def _hub(name: str, revision: str | None) -> ModelSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(MODEL_FILES)))
    except HFValidationError:
        raise InputError(f"model {name!r} is neither a folder nor a hub id; correct it") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"model {name!r} is no local folder and cannot be had from the hub ({reason})"
        ) from error
    source = _plain_folder(folder)
    commit = folder.name  # the hub's cache names a snapshot by its commit
    key = f"hub:{hashlib.sha256(f'{name}@{commit}'.encode()).hexdigest()}"
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
