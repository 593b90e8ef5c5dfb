"""Where everything lies in a run directory: the one place that knows its paths."""

import re
from dataclasses import dataclass
from pathlib import Path

from stages.artifacts.pointer import POINTER_NAME
from stages.artifacts.produce import RUN_MARK

ITERATION_STAGES = ("generate", "reward", "pair", "score", "train", "evaluate", "promote")
"""The stages of an iteration, in order."""


def is_of_start(evaluation: str | Path) -> bool:
    """Tell by its path whether an evaluation in a run is of the first opponent."""
    return Path(evaluation).parent.name == "start"


@dataclass(frozen=True)
class RunLayout:
    """The paths of one run."""

    root: Path

    @property
    def record(self) -> Path:
        """The recipe that the run was started with; it marks the directory as a run."""
        return self.root / RUN_MARK

    @property
    def lock(self) -> Path:
        """Held by whoever carries the run on."""
        return self.root / ".lock"

    @property
    def ending(self) -> Path:
        """How the last `spin run` ended before its time; no artifact."""
        return self.root / ".ended.json"

    @property
    def data(self) -> Path:
        """The output of prepare."""
        return self.root / "data"

    @property
    def sft(self) -> Path:
        """The first opponent, where the recipe makes one."""
        return self.root / "models" / "sft"

    @property
    def start_evaluation(self) -> Path:
        """The evaluation of the first opponent."""
        return self.root / "start" / "evaluate"

    @property
    def champion(self) -> Path:
        """The one pointer of the run."""
        return self.root / POINTER_NAME

    @property
    def tracking(self) -> Path:
        """What experiment trackers wrote; no artifact."""
        return self.root / "tracking"

    def stage(self, iteration: int, stage: str) -> Path:
        """Return the artifact of one stage of one iteration."""
        assert stage in ITERATION_STAGES, stage
        return self.root / "iterations" / f"{iteration:03d}" / stage

    def pool(self, iteration: int, member: int) -> Path:
        """Return what a member of the pool (1, 2, …) answered in one iteration."""
        return self.root / "iterations" / f"{iteration:03d}" / f"pool-{member}"

    def suite(self, iteration: int | None, name: str) -> Path:
        """Return a suite's evaluation of an iteration's player; None: of the first opponent."""
        parent = self.root / ("start" if iteration is None else f"iterations/{iteration:03d}")
        return parent / f"suite-{name}"

    def suite_data(self, name: str) -> Path:
        """Return the prompts of a suite that has its own."""
        return self.root / "suites" / name

    def iterations(self) -> list[int]:
        """Return the numbers of the iterations that were begun, in order."""
        try:
            names = [path.name for path in (self.root / "iterations").iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(name) for name in names if re.fullmatch(r"\d{3,}", name, re.ASCII))

    def relative(self, path: Path) -> str:
        """Return how manifests and the pointer name a place inside the run."""
        return path.relative_to(self.root).as_posix()

    def iteration_of(self, relative: str) -> int | None:
        """Return the iteration that a place named by `relative` belongs to; None for the start."""
        found = re.match(r"iterations/(\d{3,})/", relative, re.ASCII)
        return int(found[1]) if found else None
