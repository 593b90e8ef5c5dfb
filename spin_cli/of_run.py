"""What an evaluation by hand takes from the run that its model lies in."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.artifacts.manifest import MANIFEST_NAME
from stages.artifacts.pointer import read_pointer
from stages.config import RunConfig, WinRateSuiteConfig
from stages.decisions import rival_evaluation
from stages.layout import RunLayout
from stages.run_record import read_recipe

if TYPE_CHECKING:
    from stages.recipe import Recipe

log = logging.getLogger("spin")


@dataclass(frozen=True)
class OfRun:
    """The run that a model, or an evaluation of it, lies in."""

    layout: RunLayout
    place: Path

    @classmethod
    def find(cls, place: str | None) -> "OfRun | None":
        """Return the run that a place lies in, if it lies in one."""
        from stages.artifacts import run_root

        path = Path(place) if place is not None else None
        root = run_root(path) if path is not None and path.exists() else None
        return None if root is None or path is None else cls(RunLayout(root), path)

    def recipe(self, overrides: list[str] | None) -> "Recipe":
        """Return the run's recipe with overrides, and say that it is taken."""
        found = read_recipe(self.layout).with_overrides(list(overrides or []))
        log.info("settings: the recipe of %s; others by --config", self.layout.root)
        return found

    def data_of(self, suite: str | None) -> Path | None:
        """Return the data that the run asks, or a suite's own."""
        own = [self.layout.suite_data(suite)] if suite is not None else []
        return next((place for place in (*own, self.layout.data) if place.is_dir()), None)

    def rival(self, against: str) -> Path | None:
        """Return the evaluation that `spin run` compares the model's answers with, if there is one.

        Args:
            against: see `WinRateSuiteConfig.against`.
        """
        place = self.place.resolve()
        if place == self.layout.champion.resolve():
            pointer = read_pointer(self.layout.champion)
            relative = pointer.path if pointer else ""
        else:
            relative = place.relative_to(self.layout.root.resolve()).as_posix()
        iteration = self.layout.iteration_of(f"{relative}/")
        if iteration is None or against == "human":
            return None
        found = rival_evaluation(self.layout, against, iteration)
        return found if (found / MANIFEST_NAME).is_file() else None


def rival_by_hand(config: RunConfig, suite: str, run: OfRun | None) -> Path | None:
    """Return whom a win rate compares with where nobody is named; say who it is.

    None where those are the human answers, and of other suites.
    """
    section = config.suites.get(suite)
    if not isinstance(section, WinRateSuiteConfig) or section.against == "human":
        return None
    found = run.rival(section.against) if run is not None else None
    if found is None:
        log.warning(
            "evaluate --suite %s: against the human answers (the recipe says %s, which only a "
            "run's iterations have; name it by --against)", suite, section.against,
        )  # fmt: skip
    else:
        log.info("evaluate --suite %s: against %s (%s)", suite, found, section.against)
    return found
