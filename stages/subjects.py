"""What a user means by ARTIFACT, RUN, RUN:ITERATION, or a folder of an iteration."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from stages.artifacts import run_root
from stages.artifacts.manifest import MANIFEST_NAME
from stages.artifacts.pointer import read_pointer
from stages.errors import InputError
from stages.layout import RunLayout


@dataclass(frozen=True)
class Subject:
    """An artifact, an iteration of a run, or a whole run."""

    name: str
    """As the user gave it."""
    layout: RunLayout | None
    """The run that it is or lies in; None for an artifact outside of runs."""
    artifact: Path | None = None
    iteration: int | None = None

    @property
    def kind(self) -> str:
        """`artifact`, `iteration` or `run`."""
        if self.artifact is not None:
            return "artifact"
        return "run" if self.iteration is None else "iteration"

    def artifacts(self) -> dict[str, Path]:
        """Return the finished artifacts that it is or holds, by names that fit another like it.

        They are in the order of the places' names. An artifact alone is called by its stage's
        folder; one of an iteration likewise; one of a run by its path in the run.
        """
        if self.artifact is not None:
            return {self.artifact.name: self.artifact}
        assert self.layout is not None, "runs and iterations have a layout"
        top = self.layout.root
        if self.iteration is not None:
            top = self.layout.stage(self.iteration, "train").parent
        return {path.relative_to(top).as_posix(): path for path in _artifacts_below(top)}


def find_subject(text: str) -> Subject:
    """Find what `text` names; a run's `champion` file means the artifact it points to.

    Raises:
        InputError: it names nothing of the kind.
        CorruptError: it is a damaged pointer.
    """
    path = Path(text)
    if path.is_file():
        pointer = read_pointer(path)
        assert pointer is not None, "the file exists"
        path = path.parent / pointer.path
    if path.is_dir():
        found = _in_folder(text, path.resolve())
    else:
        run, _, number = text.rpartition(":")
        found = _iteration(text, Path(run).resolve(), number) if run else None
    if found is None:
        what = "is no artifact, no run and no iteration" if path.exists() else "does not exist"
        raise InputError(
            f"{text} {what}; name a folder with manifest.json, a run, or RUN:N for an iteration"
        )
    return found


def _in_folder(text: str, path: Path) -> Subject | None:
    root = run_root(path)
    if (path / MANIFEST_NAME).is_file():
        return Subject(text, RunLayout(root) if root else None, artifact=path)
    own = RunLayout(path)
    if own.record.is_file():
        return Subject(text, own)
    if root is None:
        return None
    inside = path.relative_to(root)
    return _iteration(text, root, path.name) if inside.parent == Path("iterations") else None


def _iteration(text: str, root: Path, number: str) -> Subject | None:
    layout = RunLayout(root)
    if not layout.record.is_file() or not re.fullmatch(r"\d+", number, re.ASCII):
        return None
    if int(number) not in layout.iterations():
        known = ", ".join(map(str, layout.iterations())) or "none"
        raise InputError(f"{text}: the run has no iteration {int(number)}; it has {known}")
    return Subject(text, layout, iteration=int(number))


def _artifacts_below(top: Path) -> list[Path]:
    """Return the finished artifacts of a folder; hidden places are unfinished attempts."""
    found = []
    for name, folder_names, file_names in os.walk(top):
        folder_names[:] = sorted(n for n in folder_names if not n.startswith("."))
        if MANIFEST_NAME in file_names:
            folder_names.clear()
            found.append(Path(name))
    return sorted(found)
