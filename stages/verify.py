"""verify: every byte against its manifest, and every manifest against those it was made from."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.artifacts import InputRef, Manifest, read_manifest
from stages.artifacts.files import inner_path
from stages.artifacts.keys import KEY_CHARS
from stages.artifacts.manifest import MANIFEST_NAME, FileEntry, check_file, check_listing
from stages.artifacts.pointer import read_pointer
from stages.errors import InputError, SpinError
from stages.layout import RunLayout
from stages.run_record import read_recipe


@dataclass
class Report:
    """What verify found."""

    artifacts: int = 0
    files: int = 0
    size_bytes: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    """One line each; none means that all is sound."""

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "ok": not self.problems,
            "artifacts": self.artifacts,
            "files": self.files,
            "size_bytes": self.size_bytes,
            "seconds": round(self.seconds, 3),
            "problems": self.problems,
        }


def verify(place: Path, *, threads: int | None = None) -> Report:
    """Hash every file of an artifact or a run again, and check that the chain holds.

    The chain: each input that lies in the run is there, with the key and the bytes that were
    used; and the champion pointer's target is there with its key.

    Args:
        threads: how many files are hashed at once; None: one a CPU.

    Raises:
        InputError: `place` is neither an artifact nor a run.
    """
    start = time.monotonic()
    report = Report()
    layout = RunLayout(place)
    if (place / MANIFEST_NAME).exists():
        _check_artifacts([place], report, threads)
    elif layout.record.exists():
        _attempt(report, lambda: read_recipe(layout))
        folders = list(_artifact_folders(place, report))
        manifests = _check_artifacts(folders, report, threads)
        for folder, manifest in manifests.items():
            for name, ref in manifest.inputs.items():
                _check_input(place, folder, name, ref, manifests, report)
        _attempt(report, lambda: _check_pointer(layout))
    else:
        what = "is neither an artifact nor a run" if place.exists() else "does not exist"
        raise InputError(f"{place} {what} (no manifest.json, no run.json); correct the path")
    report.seconds = time.monotonic() - start
    return report


def _artifact_folders(root: Path, report: Report) -> Iterator[Path]:
    """Yield every artifact below a run; folders with files of no artifact are problems.

    Hidden files and folders are locks and unfinished attempts, which are no artifacts yet; what
    experiment trackers wrote is none of ours.
    """
    for name, folder_names, file_names in os.walk(root):
        folder = Path(name)
        folder_names[:] = sorted(n for n in folder_names if not n.startswith("."))
        if folder == RunLayout(root).tracking:
            folder_names.clear()
            continue
        if MANIFEST_NAME in file_names:
            folder_names.clear()
            yield folder
        elif folder != root:
            strangers = sorted(n for n in file_names if not n.startswith("."))
            if strangers:
                folder_names.clear()
                report.problems.append(
                    f"{folder} holds {strangers[0]} but no {MANIFEST_NAME}: it is no artifact; "
                    "delete it and run its stage again"
                )


def _check_artifacts(
    folders: list[Path], report: Report, threads: int | None
) -> dict[Path, Manifest]:
    """Check manifests and every file; return the manifests that can be read."""
    manifests: dict[Path, Manifest] = {}
    jobs: list[tuple[Path, FileEntry]] = []
    for folder in folders:
        report.artifacts += 1
        if not _attempt(report, lambda: manifests.update({folder: read_manifest(folder)})):  # noqa: B023
            continue
        _attempt(report, lambda: check_listing(folder, manifests[folder]))  # noqa: B023
        jobs += [(folder, entry) for entry in _present(folder, manifests[folder])]
    jobs.sort(key=lambda job: -job[1].size_bytes)  # the largest first, so that none is left alone
    with ThreadPoolExecutor(max_workers=threads or os.cpu_count() or 1) as pool:
        found = pool.map(_file_problem, jobs)
        report.problems += [problem for problem in found if problem is not None]
    report.files += len(jobs)
    report.size_bytes += sum(entry.size_bytes for _, entry in jobs)
    return manifests


def _present(folder: Path, manifest: Manifest) -> list[FileEntry]:
    """Return the entries whose file is there at its size; check_listing has told of the others."""
    present = []
    for entry in manifest.files:
        try:
            path = inner_path(folder, entry.path)
        except SpinError:
            continue
        if path.is_file() and path.stat().st_size == entry.size_bytes:
            present.append(entry)
    return present


def _file_problem(job: tuple[Path, FileEntry]) -> str | None:
    folder, entry = job
    try:
        check_file(folder / entry.path, entry, artifact=folder)
    except SpinError as error:
        return str(error)
    return None


def _check_input(
    root: Path,
    folder: Path,
    name: str,
    ref: InputRef,
    manifests: dict[Path, Manifest],
    report: Report,
) -> None:
    if not ref.inside_run:
        return
    present = manifests.get(root / ref.path)
    where = f"{folder}: its input {name} ({ref.path})"
    if present is None:
        report.problems.append(f"{where} is not in the run any more; run its stage again")
    elif present.key != ref.key:
        report.problems.append(
            f"{where} is another artifact now (key {present.key[:KEY_CHARS]}, used was "
            f"{ref.key[:KEY_CHARS]}); "
            f"delete {folder} and run its stage again"
        )
    elif present.content() != ref.content:
        report.problems.append(
            f"{where} was made anew with other bytes; delete {folder} and run its stage again"
        )


def _check_pointer(layout: RunLayout) -> None:
    pointer = read_pointer(layout.champion)
    if pointer is None:
        return
    target = read_manifest(layout.root / pointer.path)
    if target.key != pointer.key:
        raise InputError(
            f"{layout.champion} points to {pointer.path} with key {pointer.key[:KEY_CHARS]}, but "
            f"{target.key[:KEY_CHARS]} is there; roll back: spin promote {layout.root} --rollback"
        )


def _attempt(report: Report, check: Callable[[], object]) -> bool:
    """Note what a check finds, as one problem; tell whether it passed."""
    try:
        check()
    except (SpinError, OSError) as error:
        report.problems.append(str(error))
        return False
    return True
