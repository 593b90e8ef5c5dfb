"""From prompts to the pairs that were trained on: how many are left at each step, and why.

What is at a level, with what comes in and less what is left out, is what is at the next one, unless
there something else is counted: answers instead of prompts, pairs instead of answers.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from stages.artifacts import Manifest
from stages.reporting.collect import IterationView

PREFIX = "dropped_"


@dataclass(frozen=True)
class Drop:
    """What was left out at a step, by its reason."""

    reason: str
    count: int


@dataclass(frozen=True)
class Gain:
    """What comes in at a step, by what it is."""

    name: str
    count: int


@dataclass(frozen=True)
class Level:
    """How many there are, and what happens on the way to the next level."""

    name: str
    count: int
    drops: tuple[Drop, ...] = ()
    gains: tuple[Gain, ...] = ()
    becomes: str = ""
    """How the next level's things are made of these, where others are counted there."""


@dataclass(frozen=True)
class Flow:
    """The levels of an iteration, from prompts downwards."""

    levels: tuple[Level, ...]

    def drops(self) -> Iterator[tuple[Level, Drop]]:
        """Yield all that was left out, with where."""
        for level in self.levels:
            for drop in level.drops:
                yield level, drop

    def gains(self) -> Iterator[Gain]:
        """Yield all that came in on the way."""
        for level in self.levels:
            yield from level.gains


def flow(iteration: IterationView) -> Flow | None:
    """Return the flow of an iteration as far as it went; None before its answers are there."""
    generated = iteration.manifest("generate")
    if generated is None:
        return None
    pool = [p.manifest for p in iteration.pieces if p.name.startswith("pool-") and p.manifest]
    levels = _answers([generated, *pool])
    paired = iteration.manifest("pair")
    if paired is not None and "candidates" in paired.counts:
        levels = [*levels[:-1], *(_ranked(level, paired) for level in levels[-1:])]
        levels += _pairs(paired, iteration)
    trained = iteration.manifest("train")
    if trained is not None and levels and "pairs" in trained.counts:
        if paired is not None:
            levels[-1] = replace(levels[-1], drops=_drops(trained.counts))
        levels.append(Level("trained on", trained.counts["pairs"]))
    return Flow(tuple(levels)) if levels else None


def _answers(generated: list[Manifest]) -> list[Level]:
    """Return the levels down to answers: the opponent's, and those of the pool's other members."""
    counts = generated[0].counts
    drawn = counts.get("drawn", counts.get("prompts"))
    every = counts.get("train_prompts", drawn)
    asked = sum(each.counts.get("prompts", 0) for each in generated)
    rows = sum(each.counts.get("rows", 0) for each in generated)
    levels: list[Level] = []
    if drawn is not None and every is not None:
        if every != drawn:
            levels.append(Level("prompts", every, (Drop("not drawn", every - drawn),)))
        drops = _drops(*(each.counts for each in generated))
        unasked = drawn - asked - sum(drop.count for drop in drops)
        if unasked > 0:  # a member of the pool that has not answered yet
            drops = (*drops, Drop("not answered", unasked))
        levels.append(Level("prompts drawn", drawn, drops))
        if drops and rows != asked:
            levels.append(Level("prompts asked", asked))
        if asked and rows != asked:
            levels[-1] = replace(levels[-1], becomes=f"{rows // asked} answers each")
    if "rows" in counts:
        levels.append(Level("answers", rows))
    return levels


def _ranked(answers: Level, paired: Manifest) -> Level:
    """Return the level of answers, which a policy that ranks pairs with each other."""
    policy = str(paired.config.get("pair", {}).get("policy", ""))
    is_ranking = policy.startswith(("best_", "random"))
    return replace(answers, becomes="paired by rank") if is_ranking else answers


def _pairs(paired: Manifest, iteration: IterationView) -> list[Level]:
    counts = paired.counts
    replayed = (iteration.pairs or {}).get("replay_candidates")
    replayed = replayed if isinstance(replayed, int) else 0
    levels = [Level("candidate pairs", counts["candidates"], _drops(counts))]
    if replayed:
        own = Level("candidate pairs", counts["candidates"] - replayed)
        levels = [
            replace(own, gains=(Gain("replayed", replayed),)),
            replace(levels[0], name="with replayed pairs"),
        ]
    return [*levels, Level("pairs", counts.get("pairs", 0))]


def _drops(*counts: dict[str, int]) -> tuple[Drop, ...]:
    """Return what was left out, of all parts together, the most frequent reason first."""
    found: Counter[str] = Counter()
    for part in counts:
        found.update({n: count for n, count in part.items() if n.startswith(PREFIX) and count})
    drops = [Drop(n.removeprefix(PREFIX).replace("_", " "), count) for n, count in found.items()]
    return tuple(sorted(drops, key=lambda drop: (-drop.count, drop.reason)))
