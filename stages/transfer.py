"""push and pull: artifacts and runs to an fsspec URL and back, with their manifests and hashes.

The other side has the same folders and files. There too an artifact is whole or not there: its
files go first, its manifest last. A run's artifacts go in the order of their inputs, then its
pointer; so what is there at any time is a run, if perhaps a shorter one. Nothing is overwritten but
the pointer, by one whose history goes on from it, and with `amend` the record.

Each byte is read once on its way, and hashed while it goes. A file that is at the other side, from
a push that was cut off, is not sent again if its content is known to be that of the manifest: S3
keeps the SHA-256 that a file was sent with as metadata of the very object, and loses it when
somebody replaces the object; its ETag is no SHA-256, and not used. From other stores the file is
read again and hashed.
"""

import functools
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

from stages.artifacts import Manifest, locks, read_manifest
from stages.artifacts.files import inner_path, make_folder, temporary_path, write_durably, writing
from stages.artifacts.keys import sha256_file
from stages.artifacts.manifest import MANIFEST_NAME, FileEntry, check_listing, parse_manifest
from stages.artifacts.pointer import Pointer, parse_pointer, put_pointer, read_pointer
from stages.artifacts.produce import RUN_MARK, check_same, receive
from stages.errors import ConfigError, CorruptError, InputError, SpinError
from stages.layout import RunLayout
from stages.progress import Progress, progress
from stages.remote import CHUNK_BYTES, Remote, open_remote
from stages.run_record import first_difference, parse_record, read_recipe

log = logging.getLogger("spin")

DEFAULT_THREADS = 4
_LARGEST_RECORD_BYTES = 64 * 2**20
"""Of a manifest, pointer or run record: what is longer is none of ours."""


class _Stored(NamedTuple):
    """A manifest, and the bytes that it is to have everywhere."""

    manifest: Manifest
    data: bytes


@dataclass
class Report:
    """What went to the other side, or came from it."""

    artifacts: int = 0
    there: int = 0
    """Artifacts that were there already."""
    files: int = 0
    size_bytes: int = 0
    seconds: float = 0.0

    def line(self, verb: str) -> str:
        """Return the report in words."""
        if not self.artifacts:
            return f"already there ({self.there} artifacts)" if self.there > 1 else "already there"
        rate = self.size_bytes / 1e6 / max(self.seconds, 1e-9)
        had = f"; {self.there} were there already" if self.there else ""
        return (
            f"{self.artifacts} artifacts {verb}, {self.files} files, {self.size_bytes / 1e6:,.1f} "
            f"MB in {self.seconds:.1f} s ({rate:,.0f} MB/s){had}"
        )


def push(place: Path, url: str, *, threads: int = DEFAULT_THREADS, amend: bool = False) -> Report:
    """Send an artifact or a run to a URL; what is there already is not sent again.

    Args:
        threads: how many files are sent at once.
        amend: of a run: replace a record there that was started with another recipe.

    Raises:
        InputError: `place` is neither an artifact nor a run.
        CorruptError: a file is not what its manifest says; its artifact is not there then.
        ConfigError: another artifact or run is at the URL, or it cannot be written.
        BusyError: the run is being carried on.
        SpinError: the other side cannot be reached.
    """
    with ExitStack() as held:
        if (place / MANIFEST_NAME).exists():
            remote = open_remote(url, for_writing=True)
            stored = {"": _read_stored(place)}
        elif RunLayout(place).record.exists():
            remote = open_remote(url, for_writing=True)
            held.enter_context(locks.hold(RunLayout(place).lock, f"run {place}"))
            stored = _stored_in_run(place)
        else:
            what = "is neither an artifact nor a run" if place.exists() else "does not exist"
            raise InputError(f"{place} {what} (no manifest.json, no run.json); correct the path")
        return _Push(place, remote, stored, remote.files(), threads).carry_out(amend)


def pull(url: str, place: Path, *, threads: int = DEFAULT_THREADS, amend: bool = False) -> Report:
    """Fetch an artifact or a run from a URL; what is here already is not fetched again.

    A run in `place` gets what it lacks. One that is new becomes a run, by its record, as the last
    step: cut off before, it is no run that could be carried on without the rest.

    Args:
        threads: how many files are fetched at once.
        amend: of a run: take the record from there, where it has another recipe by now.

    Raises:
        InputError: there is no artifact and no run at the URL, or it cannot be read.
        CorruptError: something there is not what its manifest says; it does not become an artifact.
        ConfigError: `place` holds something else.
        BusyError: the run is being carried on.
        NoSpaceError: the disk is full; what is whole is kept.
        SpinError: the other side cannot be reached.
    """
    if re.match(r"\w+:/", str(place)):
        raise ConfigError(f"{place} is no local folder; the order is: spin pull URL PLACE")
    remote = open_remote(url)
    listing = remote.files()
    fetch = _Pull(remote, place, listing, threads)
    if MANIFEST_NAME in listing:
        return fetch.artifact()
    if RUN_MARK in listing:
        return fetch.run(amend)
    raise InputError(
        f"{remote.url} holds no artifact (yet) and no run: no manifest.json, no run.json; push it "
        "to there (again), or correct the URL"
    )


# Pushing


def _read_stored(artifact: Path) -> _Stored:
    data = (artifact / MANIFEST_NAME).read_bytes()
    return _Stored(read_manifest(artifact), data)


def _stored_in_run(root: Path) -> dict[str, _Stored]:
    """Return the manifests of a run's artifacts by their place in it, inputs first.

    Raises:
        CorruptError: one is damaged.
    """
    found: dict[str, _Stored] = {}
    for name, folder_names, file_names in os.walk(root):
        folder_names[:] = sorted(n for n in folder_names if not n.startswith("."))
        if MANIFEST_NAME in file_names:
            folder_names.clear()
            found[Path(name).relative_to(root).as_posix()] = _read_stored(Path(name))
    return _inputs_first(found)


def _inputs_first(stored: Mapping[str, _Stored]) -> dict[str, _Stored]:
    ordered: dict[str, _Stored] = {}
    waiting = sorted(stored)
    while waiting:
        ready = [
            place
            for place in waiting
            if all(i == place or i not in waiting for i in _inputs(stored[place].manifest))
        ]
        for place in ready or waiting:  # inputs in a circle: the keys will not agree
            ordered[place] = stored[place]
        waiting = [place for place in waiting if place not in ordered]
    return ordered


def _inputs(manifest: Manifest) -> dict[str, str]:
    """Return the keys of the inputs that lie in the run, by their place in it."""
    return {ref.path: ref.key for ref in manifest.inputs.values() if ref.inside_run}


def _below(place: str, name: str) -> str:
    return f"{place}/{name}" if place else name


@dataclass(frozen=True)
class _Push:
    root: Path
    remote: Remote
    stored: Mapping[str, _Stored]
    listing: Mapping[str, int]
    threads: int
    report: Report = field(default_factory=Report)

    def carry_out(self, amend: bool) -> Report:
        start = time.monotonic()
        is_run = "" not in self.stored
        self._check_kind(is_run)
        missing = [place for place in self.stored if not self._is_there(place)]
        if is_run:
            self._check_chain(missing)
            pointer = self._pointer_to_send()
            self._send_record(amend)
        self.report.there = len(self.stored) - len(missing)
        with _Lanes("push", self.threads, [self.stored[place] for place in missing]) as lanes:
            for place in missing:
                self._send(place, lanes)
        lanes.account(self.report)
        if is_run and pointer is not None:
            self.remote.replace(RunLayout(self.root).champion.name, pointer.to_text().encode())
            log.info("%s: champion is %s", self.remote.url, pointer.path)
        self.report.seconds = time.monotonic() - start
        return self.report

    def _check_kind(self, is_run: bool) -> None:
        """Check that a run is not mixed with an artifact, nor one with what is no object of ours.

        Raises:
            ConfigError: otherwise.
        """
        url = self.remote.url
        if "" in self.listing:
            raise ConfigError(f"{url} is an object, no folder; name another place")
        if not is_run and RUN_MARK in self.listing:
            raise ConfigError(f"{url} holds a run; name a place of its own for the artifact")
        if is_run and MANIFEST_NAME in self.listing:
            raise ConfigError(f"{url} holds an artifact; name a place of its own for the run")
        if is_run and RUN_MARK not in self.listing and self.listing:
            raise ConfigError(
                f"{url} is no run and not empty (it holds {min(self.listing)}); name another place"
            )

    def _is_there(self, place: str) -> bool:
        """Tell whether an artifact is at the other side, whole.

        Raises:
            ConfigError: another one is there.
            CorruptError: it is, and has lost a file.
        """
        at = _below(place, MANIFEST_NAME)
        manifest = self.stored[place].manifest
        if at in self.listing:
            there = _fetch_manifest(self.remote, place, self.listing).manifest
            check_same(there, manifest, self.remote.shown(place), self.root / place)
            _check_remote_listing(self.remote, place, there, self.listing)
            return True
        check_listing(self.root / place, manifest)
        ours = {_below(place, entry.path) for entry in manifest.files}
        ours |= {temporary_path(Path(name)).as_posix() for name in ours}  # of a push cut off
        prefix = f"{place}/" if place else ""
        strangers = {name for name in self.listing if name.startswith(prefix)} - ours
        if strangers:
            raise ConfigError(
                f"{self.remote.shown(min(strangers))} does not belong to the artifact "
                f"{self.root / place}; name another place, or delete it"
            )
        return False

    def _check_chain(self, missing: Sequence[str]) -> None:
        """Check that the inputs of what is sent are in the run, here or there.

        Raises:
            InputError: otherwise.
        """
        for place in missing:
            for name, key in _inputs(self.stored[place].manifest).items():
                found = self.stored.get(name)
                if found is None and _below(name, MANIFEST_NAME) in self.listing:
                    found = _fetch_manifest(self.remote, name, self.listing)
                if found is None or found.manifest.key != key:
                    state = "is not in the run any more" if found is None else "is another now"
                    raise InputError(
                        f"{self.root / place}: its input {name} {state}; see "
                        f"`spin verify {self.root}`, and run its stage again"
                    )

    def _pointer_to_send(self) -> Pointer | None:
        """Return our pointer where it has gone on from the one there, None where they agree.

        Raises:
            ConfigError: it has not: going back is refused.
        """
        layout = RunLayout(self.root)
        ours = read_pointer(layout.champion)
        there = _fetch_pointer(self.remote, self.listing)
        if there is not None and not _goes_on(there, ours):
            raise ConfigError(
                f"{self.remote.shown(layout.champion.name)} has {_move(there, ours)} that "
                f"{self.root} has not; get it first: spin pull {self.remote.url} {self.root}"
            )
        if ours is not None:
            _check_target(ours, self.stored, layout.champion)
        return None if ours is None or (there is not None and _goes_on(ours, there)) else ours

    def _send_record(self, amend: bool) -> None:
        """Send run.json, the mark of a run, unless it is there.

        Raises:
            ConfigError: one with another recipe is, and it shall not be amended.
        """
        path = RunLayout(self.root).record
        recipe, data = read_recipe(RunLayout(self.root)), path.read_bytes()
        there = _fetch(self.remote, RUN_MARK, self.listing)
        if there is None:
            self.remote.create(RUN_MARK, data)
        elif there != data:
            difference = first_difference(parse_record(there, self.remote.shown(RUN_MARK)), recipe)
            if difference is not None and not amend:
                raise ConfigError(
                    f"{self.remote.url} is a run with another recipe: {difference}; name another "
                    "place, or add --amend to replace the recipe there"
                )
            if difference is not None:
                self.remote.replace(RUN_MARK, data)

    def _send(self, place: str, lanes: "_Lanes") -> None:
        """Send one artifact: its files, then its manifest.

        Raises:
            ConfigError: somebody else has sent another meanwhile.
        """
        manifest, data = self.stored[place]
        lanes.do(functools.partial(self._send_file, place, f, lanes) for f in manifest.files)
        if not self.remote.create(_below(place, MANIFEST_NAME), data):
            there = _fetch_manifest(self.remote, place, self.remote.files()).manifest
            check_same(there, manifest, self.remote.shown(place), self.root / place)
        self.report.artifacts += 1

    def _send_file(self, place: str, entry: FileEntry, lanes: "_Lanes") -> None:
        at = _below(place, entry.path)
        if self.listing.get(at) == entry.size_bytes and self._holds(at, entry, lanes):
            lanes.skip(entry.size_bytes)
            return
        path = inner_path(self.root / place, entry.path)
        remedy = f"delete {self.root / place} and make or fetch it again"
        chunks = _hashed(_read(path, remedy), entry, path, remedy)
        self.remote.write(at, entry.size_bytes, lanes.counted(chunks), entry.sha256)
        lanes.count_file()

    def _holds(self, at: str, entry: FileEntry, lanes: "_Lanes") -> bool:
        """Tell whether an object has the bytes of a file; see the module's text."""
        sent = self.remote.sent_sha256(at)
        if sent is not None:
            return sent == entry.sha256
        digest = hashlib.sha256()
        for chunk in self.remote.chunks(at, entry.size_bytes, lanes.ahead):
            lanes.check()
            digest.update(chunk)
        return digest.hexdigest() == entry.sha256


def _read(path: Path, remedy: str) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise CorruptError(f"{path} cannot be read ({error.strerror}); {remedy}") from error


def _hashed(
    chunks: Iterator[bytes], entry: FileEntry, shown: object, remedy: str
) -> Iterator[bytes]:
    """Yield the chunks of a file, the last one only when all of them are what its manifest says.

    Raises:
        CorruptError: they are not.
    """
    digest, size_bytes = hashlib.sha256(), 0
    held = b""
    for chunk in chunks:
        digest.update(chunk)
        size_bytes += len(chunk)
        if held:
            yield held
        held = chunk
        if size_bytes > entry.size_bytes:
            break
    if size_bytes != entry.size_bytes or digest.hexdigest() != entry.sha256:
        raise CorruptError(
            f"{shown} is damaged (its SHA-256 does not match the manifest); {remedy}"
        )
    if held:
        yield held


# Pulling


@dataclass(frozen=True)
class _Pull:
    remote: Remote
    root: Path
    listing: Mapping[str, int]
    threads: int
    report: Report = field(default_factory=Report)

    def artifact(self) -> Report:
        start = time.monotonic()
        stored = _fetch_manifest(self.remote, "", self.listing)
        _check_remote_listing(self.remote, "", stored.manifest, self.listing)
        self._receive_all({"": stored})
        self.report.seconds = time.monotonic() - start
        return self.report

    def run(self, amend: bool) -> Report:
        start = time.monotonic()
        layout = RunLayout(self.root)
        pointer = _fetch_pointer(self.remote, self.listing)  # it was sent after what it names
        record = _fetch(self.remote, RUN_MARK, self.listing)
        assert record is not None, "it is how the run was recognized"
        stored = self._stored()
        if pointer is not None:
            _check_target(pointer, stored, self.remote.shown(layout.champion.name))
        self._check_free(stored)
        with writing(self.root):
            make_folder(self.root)
        with locks.hold(layout.lock, f"run {self.root}"):
            changed = self._check_record(record, amend)
            moves = self._check_pointer(pointer)
            self._receive_all(stored)
            if pointer is not None and moves:
                put_pointer(layout.champion, pointer)
                log.info("%s: champion is %s", self.root, pointer.path)
            if changed:
                write_durably(layout.record, record.decode())
        self.report.seconds = time.monotonic() - start
        return self.report

    def _stored(self) -> dict[str, _Stored]:
        """Return the manifests of the artifacts there, inputs first.

        Raises:
            CorruptError: one is damaged, lacks a file or an input, or has a place outside the run.
        """
        suffix = f"/{MANIFEST_NAME}"
        names = sorted(n.removesuffix(suffix) for n in self.listing if n.endswith(suffix))
        found: dict[str, _Stored] = {}
        for place in names:
            parents = {p.as_posix() for p in Path(place).parents}
            if found.keys() & parents or any(p.startswith(".") for p in Path(place).parts):
                continue
            inner_path(self.root, place, named_by=self.remote.url)
            found[place] = _fetch_manifest(self.remote, place, self.listing)
            _check_remote_listing(self.remote, place, found[place].manifest, self.listing)
        for place, stored in found.items():
            for name, key in _inputs(stored.manifest).items():
                if name not in found or found[name].manifest.key != key:
                    raise CorruptError(
                        f"{self.remote.shown(place)}: its input {name} is not there, or another; "
                        "push the run again, or delete this artifact there"
                    )
        return _inputs_first(found)

    def _check_free(self, stored: Mapping[str, _Stored]) -> None:
        """Check that the run may be put here: nothing is, or it is, or some of it.

        Raises:
            ConfigError: otherwise.
        """
        if not os.path.lexists(self.root) or RunLayout(self.root).record.exists():
            return
        if not self.root.is_dir():
            raise ConfigError(f"{self.root} is a file; name another place")
        ours = {Path(place).parts[0] for place in stored} | {RunLayout(self.root).champion.name}
        here = {p.name for p in self.root.iterdir() if not p.name.startswith(".")}
        if here - ours:
            raise ConfigError(
                f"{self.root} is no run directory and not empty (it holds {min(here - ours)}); "
                "name another place"
            )

    def _check_record(self, record: bytes, amend: bool) -> bool:
        """Tell whether run.json is to be written.

        Raises:
            ConfigError: the run here has another recipe.
        """
        there = parse_record(record, self.remote.shown(RUN_MARK))
        layout = RunLayout(self.root)
        if not layout.record.exists():
            return True
        difference = first_difference(read_recipe(layout), there)
        if difference is not None and not amend:
            raise ConfigError(
                f"{self.root} is a run with another recipe than {self.remote.url}: {difference}; "
                "name another place, or add --amend to take the recipe from there"
            )
        return difference is not None

    def _check_pointer(self, pointer: Pointer | None) -> bool:
        """Tell whether the pointer there is further than ours.

        Raises:
            ConfigError: each has moves that the other has not.
        """
        ours = read_pointer(RunLayout(self.root).champion)
        if pointer is None or (ours is not None and _goes_on(pointer, ours)):
            return False
        if ours is not None and not _goes_on(ours, pointer):
            raise ConfigError(
                f"{RunLayout(self.root).champion} has {_move(ours, pointer)} that "
                f"{self.remote.url} has not: the two runs went apart; pull to another place"
            )
        return True

    def _receive_all(self, stored: Mapping[str, _Stored]) -> None:
        with _Lanes("pull", self.threads, stored.values()) as lanes:
            for place, (manifest, data) in stored.items():
                self._receive(place, manifest, data, lanes)
        lanes.account(self.report)

    def _receive(self, place: str, manifest: Manifest, data: bytes, lanes: "_Lanes") -> None:
        def fill(folder: Path) -> None:
            for inner in {(folder / f.path).parent for f in manifest.files}:
                make_folder(inner)
            lanes.do(
                functools.partial(self._fetch_file, place, f, folder, lanes) for f in manifest.files
            )

        if receive(self.root / place, data, self.remote.shown(place), fill):
            self.report.artifacts += 1
        else:
            self.report.there += 1
            lanes.skip(sum(f.size_bytes for f in manifest.files))

    def _fetch_file(self, place: str, entry: FileEntry, folder: Path, lanes: "_Lanes") -> None:
        path = inner_path(folder, entry.path)
        if path.exists():
            if path.stat().st_size == entry.size_bytes and sha256_file(path) == entry.sha256:
                lanes.skip(entry.size_bytes)
                return
            path.unlink()
        at = _below(place, entry.path)
        chunks = self.remote.chunks(at, entry.size_bytes, lanes.ahead)
        remedy = f"delete {self.remote.shown(place)} there and push it again"
        hashed = _hashed(chunks, entry, self.remote.shown(at), remedy)
        temporary = temporary_path(path)
        try:
            with temporary.open("xb") as file:
                for chunk in lanes.counted(hashed):
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
        lanes.count_file()


# What both read of the other side


def _fetch(remote: Remote, at: str, listing: Mapping[str, int]) -> bytes | None:
    """Return the bytes of a manifest, pointer or record; None where there is none.

    Raises:
        CorruptError: it is too large to be one.
    """
    size = listing.get(at)
    if size is None:
        return None
    if size > _LARGEST_RECORD_BYTES:
        raise CorruptError(
            f"{remote.shown(at)} has {size:,} bytes; none of ours is longer than "
            f"{_LARGEST_RECORD_BYTES:,}: look at what is there"
        )
    return remote.read(at, size)


def _fetch_manifest(remote: Remote, place: str, listing: Mapping[str, int]) -> _Stored:
    at = _below(place, MANIFEST_NAME)
    data = _fetch(remote, at, listing)
    assert data is not None, f"{at} is listed"
    remedy = f"delete {remote.shown(place)} there and push it again"
    return _Stored(parse_manifest(data, remote.shown(at), remedy), data)


def _fetch_pointer(remote: Remote, listing: Mapping[str, int]) -> Pointer | None:
    at = RunLayout(Path()).champion.name
    data = _fetch(remote, at, listing)
    if data is None:
        return None
    return parse_pointer(data, remote.shown(at), f"delete {remote.shown(at)} and push again")


def _check_remote_listing(
    remote: Remote, place: str, manifest: Manifest, listing: Mapping[str, int]
) -> None:
    """Check that all files of an artifact are there, at their sizes.

    Raises:
        CorruptError: otherwise.
    """
    for entry in manifest.files:
        at = _below(place, entry.path)
        size = listing.get(at)
        if size != entry.size_bytes:
            state = "is missing" if size is None else f"has {size} bytes"
            raise CorruptError(
                f"{remote.shown(at)} {state}, its manifest says {entry.size_bytes} bytes; delete "
                f"{remote.shown(place)} there and push it again"
            )


def _check_target(pointer: Pointer, stored: Mapping[str, _Stored], shown: object) -> None:
    target = stored.get(pointer.path)
    if target is None or target.manifest.key != pointer.key:
        state = "is not in the run" if target is None else "is another artifact now"
        raise CorruptError(
            f"{shown} points to {pointer.path}, which {state}; roll back, or make it again"
        )


def _goes_on(before: Pointer, after: Pointer | None) -> bool:
    """Tell whether a pointer's history begins with all of another's; times do not count."""
    old, new = _history(before), _history(after)
    return new[: len(old)] == old


def _history(pointer: Pointer | None) -> list[dict[str, str | None]]:
    entries = pointer.history if pointer is not None else []
    return [entry.model_dump(exclude={"at"}) for entry in entries]


def _move(pointer: Pointer, other: Pointer | None) -> str:
    """Return in words the first move of a pointer that another has not made."""
    ours, theirs = _history(pointer), _history(other)
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    entry = pointer.history[len(theirs) if same is None else same]
    return f"a move to {entry.path} ({entry.reason})"


# Threads


class _StoppedError(SpinError):
    """Another thread failed, or the user stopped the command; that is what will be told."""


class _Lanes:
    """A few threads that carry files, and the bytes they have carried."""

    def __init__(self, what: str, threads: int, stored: Iterable[_Stored]) -> None:
        """Carry the files of some artifacts in all."""
        total_bytes = sum(f.size_bytes for s in stored for f in s.manifest.files)
        self._bar = progress(what, total=total_bytes, unit="bytes")
        self._threads = threads
        self._stop = threading.Event()
        self._guard = threading.Lock()
        self._num_files = self._carried = 0
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        self._open = ExitStack()
        self._shown: Progress = self._open.enter_context(self._bar)
        self._shown.note(self._rate)
        self._files = self._open.enter_context(ThreadPoolExecutor(self._threads))
        self.ahead: Executor = self._open.enter_context(ThreadPoolExecutor(2 * self._threads))
        """Fetches chunks before they are asked for."""
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._open.close()

    def do(self, jobs: Iterable[Callable[[], None]]) -> None:
        """Do all jobs; the first failure stops the others and is raised."""
        futures = [self._files.submit(job) for job in jobs]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            self._stop.set()
            for future in futures:
                future.cancel()
            wait(futures)
            raise

    def counted(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Yield chunks and count their bytes, until the work is stopped."""
        for chunk in chunks:
            self.check()
            yield chunk
            with self._guard:
                self._carried += len(chunk)
                self._shown.advance(len(chunk))

    def count_file(self) -> None:
        """Count a file that was carried."""
        with self._guard:
            self._num_files += 1

    def account(self, report: Report) -> None:
        """Put down what was carried."""
        report.files, report.size_bytes = self._num_files, self._carried

    def skip(self, size_bytes: int) -> None:
        """Tell that so many bytes need not be carried."""
        with self._guard:
            self._shown.skip(size_bytes)

    def check(self) -> None:
        """Leave a job whose result nobody waits for any more.

        Raises:
            _StoppedError: so it is.
        """
        if self._stop.is_set():
            raise _StoppedError("stopped")

    def _rate(self) -> str:
        return f"{self._carried / 1e6 / max(time.monotonic() - self._start, 1e-9):,.0f} MB/s"
