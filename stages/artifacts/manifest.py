"""The manifest: what an artifact is, what made it, and the hash of every byte in it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from stages.artifacts.files import files_below, inner_path
from stages.artifacts.keys import (
    canonical_json,
    open_sealed,
    sealed_text,
    sha256_file,
    sha256_text,
    stage_key,
)
from stages.errors import CorruptError, InputError

log = logging.getLogger("spin")

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1
_HASH_NAME = "manifest_sha256"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class InputRef(_Record):
    """One input of a stage.

    `path` is relative to the run when the input lies in it; otherwise it is the name the user
    gave (a folder, a hub id), for people to read and never opened again.
    """

    path: str
    inside_run: bool
    key: str
    content: str
    """Hash over the input's own file hashes: equal keys with unequal bytes stay visible."""


class FileEntry(_Record):
    """One file of an artifact."""

    path: str
    size_bytes: int
    sha256: str
    rows: int | None = None
    volatile: bool = False
    """True for a file whose bytes differ from run to run by design (timings)."""


class Cost(_Record):
    """What making the artifact took. The only place where times are kept."""

    started_at: str
    wall_s: float
    peak_memory_bytes: int
    tokens: int = 0


class Manifest(_Record):
    """Everything that is known about an artifact; see the module's text."""

    manifest_format: int
    stage: str
    format_version: int
    key: str
    config: dict[str, Any]
    inputs: dict[str, InputRef]
    fingerprints: dict[str, str]
    files: list[FileEntry]
    counts: dict[str, int]
    metrics: dict[str, float | int | str | bool | None]
    info: dict[str, Any]
    versions: dict[str, str]
    git: dict[str, Any]
    cost: Cost

    def key_fields(self) -> dict[str, Any]:
        """Return the fields that the key is the hash of."""
        return key_fields(
            self.stage,
            self.format_version,
            self.config,
            {name: ref.key for name, ref in self.inputs.items()},
            self.fingerprints,
        )

    def content(self) -> str:
        """Return a hash over the hashes of all files that are meant to be reproducible."""
        return content_hash({f.path: f.sha256 for f in self.files if not f.volatile})

    def to_text(self) -> str:
        """Return the canonical text that is stored, its own hash included."""
        return sealed_text(self.model_dump(mode="json"), _HASH_NAME)


def key_fields(
    stage: str,
    format_version: int,
    config: Mapping[str, Any],
    input_keys: Mapping[str, str],
    fingerprints: Mapping[str, str],
) -> dict[str, Any]:
    """Return the one arrangement of fields that a stage's key hashes."""
    return {
        "stage": stage,
        "format_version": format_version,
        "config": dict(config),
        "inputs": dict(input_keys),
        "fingerprints": dict(fingerprints),
    }


def content_hash(hashes: Mapping[str, str]) -> str:
    """Return one hash for a set of files, from relative path to SHA-256."""
    return sha256_text(canonical_json(dict(hashes)))


def read_manifest(artifact: Path) -> Manifest:
    """Read and check an artifact's manifest.

    Raises:
        InputError: there is none, so there is no artifact; or it cannot be read, or another
            version of spin wrote it.
        CorruptError: it is not the text that was written, or its key is not that of its fields.
    """
    remedy = f"delete {artifact} and run its stage again"
    return parse_manifest(_manifest_bytes(artifact), artifact / MANIFEST_NAME, remedy)


def parse_manifest(data: bytes, path: object, remedy: str) -> Manifest:
    """Return the manifest that was written as `data`.

    Args:
        path: where it was read, for the message.
        remedy: what to do if it is damaged.

    Raises:
        CorruptError, InputError: see `read_manifest`.
    """
    try:
        body = open_sealed(data, _HASH_NAME)
    except ValueError:
        raise CorruptError(f"{path} is damaged (its hash does not match); {remedy}") from None
    if body.get("manifest_format") != MANIFEST_FORMAT:
        raise InputError(
            f"{path} has manifest format {body.get('manifest_format')}, this spin reads "
            f"{MANIFEST_FORMAT}; use the version of spin that wrote it"
        )
    try:
        manifest = Manifest.model_validate(body)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in reason["loc"])
        raise CorruptError(f"{path} is damaged ({name}: {reason['msg']}); {remedy}") from None
    if stage_key(manifest.key_fields()) != manifest.key:
        raise CorruptError(f"{path} is damaged (its key is not that of its fields); {remedy}")
    return manifest


def _manifest_bytes(artifact: Path) -> bytes:
    path = artifact / MANIFEST_NAME
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        what = "is no artifact (no manifest.json)" if artifact.exists() else "does not exist"
        raise InputError(
            f"{artifact} {what}; run the stage that makes it, or correct the path"
        ) from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); mend its permissions or its disk"
        ) from None


@dataclass
class Artifact:
    """A finished artifact, opened for reading. `file` verifies before it hands out a path."""

    path: Path
    manifest: Manifest
    verify: bool = True
    _verified: set[str] = field(default_factory=set)

    def file(self, relative: str) -> Path:
        """Return the path of one file, its SHA-256 checked once.

        Raises:
            CorruptError: its bytes are not those of the manifest.
            InputError: the manifest names no such file.
        """
        entry = next((f for f in self.manifest.files if f.path == relative), None)
        if entry is None:
            raise InputError(
                f"{self.path} ({self.manifest.stage}) has no {relative}; "
                "is it the artifact you meant?"
            )
        path = inner_path(self.path, relative)
        if self.verify and relative not in self._verified:
            check_file(path, entry, artifact=self.path)
            self._verified.add(relative)
        return path

    def files(self, prefix: str = "") -> list[Path]:
        """Return the verified paths of all files whose relative path starts with `prefix`."""
        return [self.file(f.path) for f in self.manifest.files if f.path.startswith(prefix)]

    def input_ref(self, run_root: Path | None) -> InputRef:
        """Return this artifact as an input of another; see `InputRef`."""
        path, root = self.path.resolve(), run_root.resolve() if run_root else None
        inside = root is not None and path.is_relative_to(root)
        shown = path.relative_to(root).as_posix() if inside and root else self.path.absolute().name
        return InputRef(
            path=shown.encode("utf-8", "replace").decode(),  # file names may be no valid text
            inside_run=inside,
            key=self.manifest.key,
            content=self.manifest.content(),
        )


def open_artifact(
    path: Path, *, stages: tuple[str, ...] | None = None, verify: bool = True
) -> Artifact:
    """Open a finished artifact; the set of files and their sizes are checked at once.

    Args:
        stages: the stages whose output will do; None takes any.
        verify: also check the SHA-256 of each file before its first use.

    Raises:
        InputError: no artifact there, or one of another stage.
        CorruptError: a file is missing, extra, or of another size.
    """
    manifest = read_manifest(path)
    if stages and manifest.stage not in stages:
        raise InputError(
            f"{path} is the output of {manifest.stage!r}, but {' or '.join(stages)} is needed; "
            "correct the path"
        )
    check_listing(path, manifest)
    if not verify:
        log.warning("%s: hashes are NOT checked (verify=false); damage would go unseen", path)
    return Artifact(path=path, manifest=manifest, verify=verify)


def check_listing(path: Path, manifest: Manifest) -> None:
    """Check that an artifact holds exactly its files, at their sizes.

    Raises:
        CorruptError: otherwise; the message names the first offender and the remedy.
    """
    remedy = f"delete {path} and run its stage again"
    found = set(files_below(path)) - {MANIFEST_NAME}
    named = {f.path for f in manifest.files}
    for relative in sorted(found ^ named):
        state = "is missing" if relative in named else "does not belong there"
        raise CorruptError(f"{path / relative} {state}; {remedy}")
    for entry in manifest.files:
        size = inner_path(path, entry.path).stat().st_size
        if size != entry.size_bytes:
            raise CorruptError(
                f"{path / entry.path} has {size} bytes, its manifest says {entry.size_bytes}; "
                f"{remedy}"
            )


def check_file(path: Path, entry: FileEntry, *, artifact: Path | None = None) -> None:
    """Check one file's SHA-256.

    Args:
        artifact: the artifact that holds the file, to be named in the remedy; None: its folder.

    Raises:
        CorruptError: it differs, or the file cannot be read.
    """
    try:
        intact = sha256_file(path) == entry.sha256
        state = "is damaged (its SHA-256 does not match the manifest)"
    except OSError as error:
        intact, state = False, f"cannot be read ({error.strerror})"
    if not intact:
        raise CorruptError(
            f"{path} {state}; delete {artifact or path.parent} and run its stage again"
        )
