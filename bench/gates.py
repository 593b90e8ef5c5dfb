"""Claim: a gate at 95% lets a player through that is no better in at most 5% of cases.

    python bench/gates.py [--json bench/results/gates.json]

Simulates players of known true gain, and asks the tests that gates ask (stages/data/paired.py):
answers that are right or wrong, of which a known share differs between player and rival; and means
of skewed numbers. Then ten gates in a row that no player deserves to pass. What is asked for the
claim is marked: the largest share of false promotions, and its simulation error. Where answers are
right or wrong, the same is summed over all outcomes too, for other sizes and shares; and how often
the intervals of evaluations hold the truth is simulated.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from _report import commit, hardware, write  # noqa: E402

from stages.data.statistics import (  # noqa: E402
    intervals,
    mcnemar,
    score_p_value,
    share_bound,
    studentized_sets,
)

ALPHA = 0.05
EXAMPLES = (100, 250, 500, 1000)
PLAYERS = 20_000
"""Simulated players a cell, of right and wrong answers; a share of 5% is then known to 0.15%."""
SETS = 4_000
"""Of skewed numbers: 5% is known to 0.34%."""
MARGIN = 0.02
DIFFERING = (0.02, 0.1, 0.3)
"""Shares of prompts that one answers right and the other wrong: with the same seeds for every model
it is the lowest (the demo's late iterations), with fresh samples the highest."""
GAINS = (-MARGIN, 0.0, 0.005, 0.01, 0.025, 0.05, 0.1)
EFFECTS = (0.0, 0.1, 0.2, 0.3)
"""True gains of means, in standard deviations of an example's difference."""
ITERATIONS = 10
RUNS = 2_000
SIZES = (4, 8, 12, 20, 30, 50, 80, 100, 150, 200, 250, 500)
COVERED = 2_000

Floats = NDArray[np.float64]
Drawn = Callable[[np.random.Generator, tuple[int, int]], Floats]


def main() -> None:
    """Simulate, print the tables, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    answers = list(right_or_wrong(PLAYERS))
    numbers = list(means(SETS))
    looks = [repeated(RUNS, gate, step) for gate, step in GATES]
    looks.append(repeated(RUNS, "better", 0.0, alpha=0.005))
    exact = [summed(examples) for examples in SIZES]
    truths = list(coverage(COVERED))
    worst = [max_error(answers, PLAYERS), max_error(numbers, SETS)]
    tell(answers, numbers, looks, worst)
    tell_exact(exact, truths)
    report = {
        "hardware": hardware(),
        "commit": commit(),
        "alpha": ALPHA,
        "margin": MARGIN,
        "right_or_wrong": answers,
        "means": numbers,
        "repeated": looks,
        "worst": worst,
        "summed": exact,
        "coverage": truths,
    }
    write(report, arguments.json)


def right_or_wrong(players: int) -> Iterator[dict[str, Any]]:
    """Yield how often each gate passes, by examples, share that differs, and true gain."""
    rng = np.random.default_rng(0)
    for examples in EXAMPLES:
        for differing in DIFFERING:
            for gain in GAINS:
                if abs(gain) > differing:
                    continue
                rates = [(differing + gain) / 2, (differing - gain) / 2, 1 - differing]
                drawn = rng.multinomial(examples, rates, players)
                for gate, above in (("better", 0.0), ("not_worse", -MARGIN)):
                    passed = float(passes(drawn[:, 0], drawn[:, 1], examples, above).mean())
                    yield {
                        "gate": gate,
                        "examples": examples,
                        "differing": differing,
                        "gain": gain,
                        "passed": passed,
                        "is_false": gain <= above,
                    }


def passes(
    wins: NDArray[np.int64],
    losses: NDArray[np.int64],
    examples: int,
    above: float,
    alpha: float = ALPHA,
) -> NDArray[np.bool_]:
    """Return which simulated players pass; each outcome is tested once."""
    pairs, which = np.unique(np.stack([wins, losses], 1), axis=0, return_inverse=True)
    answers = [_p_value(int(won), int(lost), examples, above) <= alpha for won, lost in pairs]
    return np.array(answers)[which.ravel()]


@cache
def _p_value(wins: int, losses: int, examples: int, above: float) -> float:
    if above:
        return score_p_value(wins, losses, examples, above)
    return mcnemar(wins, losses, examples)


def _ties(rng: np.random.Generator, size: tuple[int, int]) -> Floats:
    return (rng.random(size) < 0.1) * rng.normal(size=size)


SHAPES: dict[str, Drawn] = {
    # what two models of one kind give: skewed measures, an even difference
    "log-normal minus log-normal": lambda rng, size: (
        rng.lognormal(size=size) - rng.lognormal(size=size)
    ),
    "nine of ten tie": _ties,
    "rare large gains": lambda rng, size: rng.exponential(size=size) - 1,
    "rare large losses": lambda rng, size: 1 - rng.exponential(size=size),
}
"""Differences of single examples whose true mean is 0."""


def _rarest(rng: np.random.Generator, size: tuple[int, int]) -> Floats:
    chance = rng.random(size)
    return np.where(chance < 0.08, 0.5, 0.0) - np.where(chance > 0.98, 2.0, 0.0)


HARDEST: dict[str, Drawn] = {
    "2% lose 2, 8% gain ½": _rarest,
    "rare huge losses (log-normal)": lambda rng, size: np.exp(0.5) - rng.lognormal(size=size),
}
"""Where the promise is not kept at small sizes."""


def means(sets: int, examples: tuple[int, ...] = EXAMPLES) -> Iterator[dict[str, Any]]:
    """Yield how often `better` passes on means, by shape of the differences and true gain."""
    for name, drawn in {**SHAPES, **HARDEST}.items():
        spread = float(drawn(np.random.default_rng(9), (1000, 1000)).std())
        for count in examples:
            none = drawn(np.random.default_rng(count), (sets, count))
            found = studentized_sets(none)
            for effect in EFFECTS:
                # a true gain moves all differences alike, and with them the mean alone
                passed = np.mean([one.p_value(-effect * spread) <= ALPHA for one in found])
                yield {
                    "gate": "better",
                    "shape": name,
                    "examples": count,
                    "gain": effect,
                    "passed": float(passed),
                    "is_false": effect == 0 and name in SHAPES,
                }


GATES: tuple[tuple[str, float], ...] = (
    ("better", 0.0),
    ("min_gain", 0.0),
    ("not_worse", 0.0),
    ("not_worse", -0.01),
)
"""Gate, and how much worse than its champion each player truly is."""


def repeated(
    runs: int, gate: str, step: float, examples: int = 1000, alpha: float = ALPHA
) -> dict[str, Any]:
    """Return what ten gates in a row let through, each player being the champion's equal, or worse.

    One prompt in five is answered right with a chance of one half, so that a tenth of answers
    differs; the others always are, but for what a worse player loses. The champion's answers stay
    those it was promoted with, as its evaluation does.
    """
    rng = np.random.default_rng(1)
    chances = np.where(rng.random((runs, examples)) < 0.2, 0.5, 1.0)
    champion = rng.random((runs, examples)) < chances
    fall, promoted = np.zeros(runs), np.zeros(runs, np.int64)
    for _ in range(ITERATIONS):
        # a player is worse by `step`: so many of its right answers are lost
        lost = (-(fall + step))[:, None]
        player = (rng.random((runs, examples)) < chances) & (rng.random((runs, examples)) >= lost)
        wins, losses = (player & ~champion).sum(1), (champion & ~player).sum(1)
        if gate == "min_gain":
            passed = wins >= losses
        else:
            passed = passes(wins, losses, examples, 0.0 if gate == "better" else -MARGIN, alpha)
        champion[passed] = player[passed]
        fall[passed] += step
        promoted += passed
    return {
        "gate": gate,
        "confidence": 1 - alpha,
        "examples": examples,
        "step": step,
        "any_passed": float((promoted > 0).mean()),
        "mean_passed": float(promoted.mean()),
        "mean_fall": float(fall.mean()),
        "runs_fallen_by_margin": float((fall <= -MARGIN + 1e-9).mean()),
    }


def summed(examples: int) -> dict[str, Any]:
    """Return the most that tests of right and wrong err at one size, over all shares.

    Summed over all outcomes: `better` of equals, by the share that differs in steps of half a
    point, and the lower bound of `at_least`, by the true share in the same steps.
    """
    shares = np.arange(0.005, 1, 0.005)
    errs = [
        sum(chance for won, chance in enumerate(_binomial(differing, 0.5))
            if mcnemar(won, differing - won, examples) <= ALPHA)
        for differing in range(examples + 1)
    ]  # fmt: skip
    better = [float(_binomial(examples, share) @ errs) for share in shares]
    bounds = np.array([share_bound(count, examples, 1 - ALPHA) for count in range(examples + 1)])
    at_least = [float(_binomial(examples, share)[bounds > share].sum()) for share in shares]
    return {"examples": examples, "better": max(better), "at_least": max(at_least)}


def _binomial(trials: int, share: float) -> Floats:
    """Return the chance of every count, shape (trials + 1,)."""
    count = np.arange(trials + 1)
    logs = np.cumsum(np.log(np.maximum(1, count)))
    ways = logs[-1] - logs[count] - logs[trials - count]
    chances: Floats = np.exp(ways + count * np.log(share) + (trials - count) * np.log1p(-share))
    return chances


def coverage(evaluations: int) -> Iterator[dict[str, Any]]:
    """Yield how often the interval of a metric, at 95%, holds its true value."""
    shapes: dict[str, Drawn] = {
        "normal": lambda rng, size: rng.normal(size=size),
        "exponential": lambda rng, size: rng.exponential(size=size) - 1,
    }
    for name, drawn in shapes.items():
        for examples in (3, 5, 10, 30):
            sets = drawn(np.random.default_rng(examples), (evaluations, examples))
            found = intervals([(values, np.ones(examples)) for values in sets])
            held = np.mean([ends is not None and ends[0] <= 0 <= ends[1] for ends in found])
            yield {"values": name, "examples": examples, "held": float(held)}


def max_error(rows: list[dict[str, Any]], trials: int) -> dict[str, Any]:
    """Return the largest share of false promotions, and its simulation error."""
    worst = max((row for row in rows if row["is_false"]), key=lambda row: row["passed"])
    return {**worst, "stderr": (ALPHA * (1 - ALPHA) / trials) ** 0.5}


def tell(
    answers: list[dict[str, Any]],
    numbers: list[dict[str, Any]],
    looks: list[dict[str, Any]],
    worst: list[dict[str, Any]],
) -> None:
    """Print the tables, in Markdown."""
    for gate in ("better", "not_worse"):
        what = "better" if gate == "better" else f"not_worse by {100 * MARGIN:g} points"
        lines(f"\n{what}: share of players that pass, by true gain in points")
        lines("| examples | differing | " + " | ".join(f"{100 * g:+g}" for g in GAINS) + " |")
        rows = [row for row in answers if row["gate"] == gate]
        for examples in EXAMPLES:
            for differing in DIFFERING:
                found = {
                    row["gain"]: row["passed"]
                    for row in rows
                    if (row["examples"], row["differing"]) == (examples, differing)
                }
                cells = " | ".join(share(found.get(gain)) for gain in GAINS)
                lines(f"| {examples} | {100 * differing:g}% | {cells} |")
    lines("\nmeans: share that pass `better`, by true gain in standard deviations")
    lines("| differences | examples | " + " | ".join(f"{e:g}" for e in EFFECTS) + " |")
    for shape in {**SHAPES, **HARDEST}:
        for examples in EXAMPLES:
            of_cell = [r for r in numbers if (r["shape"], r["examples"]) == (shape, examples)]
            cells = " | ".join(share(row["passed"]) for row in of_cell)
            lines(f"| {shape} | {examples} | {cells} |")
    lines(f"\n{ITERATIONS} gates in a row, {looks[0]['examples']} examples")
    lines("| gate | each player is | any passes | passes a run | the champion's true fall |")
    for row in looks:
        truth = f"{-100 * row['step']:g} point worse" if row["step"] else "no better"
        fall = f"{abs(100 * row['mean_fall']):.1f} points"
        told = f"{share(row['any_passed'])} | {row['mean_passed']:.2f} | {fall}"
        sure = "" if row["confidence"] == 1 - ALPHA else f" at {100 * row['confidence']:g}%"
        lines(f"| {row['gate']}{sure} | {truth} | {told} |")
    for row in worst:
        where = f"{row['examples']} examples, {row.get('shape') or row['differing']}"
        lines(f"\nmost false promotions: {share(row['passed'])} ± {share(row['stderr'])} ({where})")


def tell_exact(exact: list[dict[str, Any]], truths: list[dict[str, Any]]) -> None:
    """Print the tables that are not of simulated players."""
    lines("\nright or wrong, summed over all outcomes: the most errors at any share")
    lines("| examples | " + " | ".join(str(row["examples"]) for row in exact) + " |")
    for name in ("better", "at_least"):
        lines(f"| {name} | " + " | ".join(f"{100 * row[name]:.2f}%" for row in exact) + " |")
    lines("\nintervals of metrics that hold the truth, at 95%")
    for name in dict.fromkeys(row["values"] for row in truths):
        held = [f"{share(r['held'])} ({r['examples']})" for r in truths if r["values"] == name]
        lines(f"| {name} | " + " | ".join(held) + " |")


def share(value: float | None) -> str:
    """Return a share in percent."""
    return "" if value is None else f"{100 * value:.1f}%"


def lines(text: str) -> None:
    """Print."""
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
