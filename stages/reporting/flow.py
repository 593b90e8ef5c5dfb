"""From prompts to the pairs that were trained on: how many are left at each step, and why."""

from collections.abc import Iterator
from dataclasses import dataclass

from stages.reporting.collect import IterationView

PREFIX = "dropped_"


@dataclass(frozen=True)
class Drop:
    """What was left out at a step, by its reason."""

    reason: str
    count: int


@dataclass(frozen=True)
class Level:
    """How many there are, and what is left out on the way to the next level."""

    name: str
    count: int
    drops: tuple[Drop, ...] = ()


@dataclass(frozen=True)
class Flow:
    """The levels of an iteration, from prompts downwards."""

    levels: tuple[Level, ...]

    def drops(self) -> Iterator[tuple[Level, Drop]]:
        """Yield all that was left out, with where."""
        for level in self.levels:
            for drop in level.drops:
                yield level, drop


def flow(iteration: IterationView) -> Flow | None:
    """Return the flow of an iteration as far as it went; None before its answers are there."""
    generated = iteration.manifest("generate")
    if generated is None:
        return None
    counts = generated.counts
    drawn = counts.get("drawn", counts.get("prompts"))
    every = counts.get("train_prompts", drawn)
    levels: list[Level] = []
    if drawn is not None and every is not None:
        if every != drawn:
            levels.append(Level("prompts", every, (Drop("not drawn", every - drawn),)))
        levels.append(Level("prompts drawn", drawn, _drops(counts)))
    if "rows" in counts:
        levels.append(Level("answers", counts["rows"]))
    paired = iteration.manifest("pair")
    if paired is not None and "candidates" in paired.counts:
        levels.append(Level("candidate pairs", paired.counts["candidates"], _drops(paired.counts)))
        levels.append(Level("pairs", paired.counts.get("pairs", 0)))
    trained = iteration.manifest("train")
    if trained is not None and levels and "pairs" in trained.counts:
        if paired is not None and _drops(trained.counts):
            levels[-1] = Level(levels[-1].name, levels[-1].count, _drops(trained.counts))
        levels.append(Level("trained on", trained.counts["pairs"]))
    return Flow(tuple(levels)) if levels else None


def _drops(counts: dict[str, int]) -> tuple[Drop, ...]:
    found = [
        Drop(name.removeprefix(PREFIX).replace("_", " "), count)
        for name, count in counts.items()
        if name.startswith(PREFIX) and count
    ]
    return tuple(sorted(found, key=lambda drop: (-drop.count, drop.reason)))
