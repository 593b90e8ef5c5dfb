"""What a user means by ARTIFACT, RUN, RUN:ITERATION, RUN:start, or the folder of one of them."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from stages.artifacts import run_root
from stages.artifacts.manifest import MANIFEST_NAME
from stages.artifacts.pointer import pointed_to
from stages.errors import InputError
from stages.layout import RunLayout

START = "start"
"""After RUN:, what was there before the first iteration."""


@dataclass(frozen=True)
class Subject:
    """An artifact, an iteration of a run or its start, or a whole run.

    Its paths begin with what the user typed, as far as that leads there.
    """

    name: str
    """As the user gave it."""
    layout: RunLayout | None
    """The run that it is or lies in; None for an artifact outside of runs."""
    artifact: Path | None = None
    iteration: int | None = None
    is_start: bool = False

    @property
    def kind(self) -> str:
        """`artifact`, `iteration` or `run`; the start counts as an iteration."""
        if self.artifact is not None:
            return "artifact"
        return "run" if self.iteration is None and not self.is_start else "iteration"

    def folder(self) -> Path:
        """Return the folder of what it is."""
        if self.artifact is not None:
            return self.artifact
        assert self.layout is not None, "runs and iterations have a layout"
        if self.is_start:
            return self.layout.start_evaluation.parent
        if self.iteration is None:
            return self.layout.root
        return self.layout.stage(self.iteration, "train").parent

    def artifacts(self) -> dict[str, Path]:
        """Return the finished artifacts that it is or holds, by names that fit another like it.

        They are in the order of the places' names. An artifact alone is called by its stage's
        folder; one of an iteration likewise; one of a run by its path in the run. Of the start they
        are the first opponent, where the run made it, and its evaluations.
        """
        if self.artifact is not None:
            return {self.artifact.name: self.artifact}
        top = self.folder()
        found = {path.relative_to(top).as_posix(): path for path in _artifacts_below(top)}
        if self.is_start and self.layout is not None:
            sft = self.layout.sft
            found |= {sft.name: sft} if (sft / MANIFEST_NAME).is_file() else {}
        return found


def find_subject(text: str) -> Subject:
    """Find what `text` names; a run's `champion` file means the artifact it points to.

    Raises:
        InputError: it names nothing of the kind.
        CorruptError: it is a damaged pointer.
    """
    path = Path(text)
    found = None
    if path.is_dir():
        found = _in_folder(text, path, path.resolve())
    elif path.is_file():
        found = _in_folder(text, path, pointed_to(path).resolve())
    else:
        run, _, part = text.rpartition(":")
        if run:
            found = _part(text, Path(run), Path(run).resolve(), part)
    if found is None:
        what = "is no artifact, no run and no iteration" if path.exists() else "does not exist"
        raise InputError(
            f"{text} {what}; name a folder with manifest.json, a run, RUN:N for an iteration, or "
            f"RUN:{START}"
        )
    return found


def player_of(name: str) -> str:
    """Return the model that RUN:N or RUN:start means; any other text as it is.

    Raises:
        InputError: the run has no such iteration, or no player there.
    """
    run, _, _ = name.rpartition(":")
    if Path(name).exists() or not run or not RunLayout(Path(run)).record.is_file():
        return name
    subject = find_subject(name)
    assert subject.layout is not None, "what lies in a run has its layout"
    if subject.iteration is not None:
        place, why = subject.layout.stage(subject.iteration, "train"), "was not trained yet"
    else:
        place, why = subject.layout.sft, "is not made by the run; it is the recipe's model.path"
    if not (place / MANIFEST_NAME).is_file():
        raise InputError(f"{name} is no model: its player ({place}) {why}")
    return str(place)


def _in_folder(text: str, typed: Path, path: Path) -> Subject | None:
    """Return what a folder is.

    Args:
        typed: how the user led there.
        path: the folder, resolved.
    """
    root = run_root(path)
    if (path / MANIFEST_NAME).is_file():
        if root is None:
            return Subject(text, None, artifact=_as_typed(typed, path))
        layout = RunLayout(_as_typed(typed, root))
        return Subject(text, layout, artifact=layout.root / path.relative_to(root))
    if RunLayout(path).record.is_file():
        return Subject(text, RunLayout(_as_typed(typed, path)))
    if root is None:
        return None
    inside = path.relative_to(root)
    part = inside.name if inside.parent in (Path(), Path("iterations")) else ""
    if (part == START) == (inside.parent == Path()):
        return _part(text, typed, root, part)
    return None


def _part(text: str, typed: Path, root: Path, part: str) -> Subject | None:
    """Return an iteration of a run, or its start."""
    layout = RunLayout(_as_typed(typed, root))
    is_number = re.fullmatch(r"\d+", part, re.ASCII)
    if not layout.record.is_file() or not (is_number or part == START):
        return None
    if not is_number:
        return Subject(text, layout, is_start=True)
    if int(part) not in layout.iterations():
        known = ", ".join(map(str, layout.iterations())) or "none"
        raise InputError(f"{text}: the run has no iteration {int(part)}; it has {known}")
    return Subject(text, layout, iteration=int(part))


def _as_typed(typed: Path, path: Path) -> Path:
    """Return a resolved place by what the user typed, as far as that leads there."""
    for above in (typed, *typed.parents):
        resolved = above.resolve()
        if path.is_relative_to(resolved):
            return above / path.relative_to(resolved)
    return path if typed.is_absolute() else Path(os.path.relpath(path))


def _artifacts_below(top: Path) -> list[Path]:
    """Return the finished artifacts of a folder; hidden places are unfinished attempts."""
    found = []
    for name, folder_names, file_names in os.walk(top):
        folder_names[:] = sorted(n for n in folder_names if not n.startswith("."))
        if MANIFEST_NAME in file_names:
            folder_names.clear()
            found.append(Path(name))
    return sorted(found)
