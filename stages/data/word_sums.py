"""The miniature task: word sums of two or three steps, with careful and with sloppy answers.

    Ann has 27 pens, finds 5, loses 9. How many?
    careful   27+5=32. 32-9=23. #### 23
    sloppy    a guess, a skipped step, or chatter; the answer after `#### ` is often wrong

A small model trained on a mixture of both answers well when decoded greedily and badly when
sampled: room for self-play to improve it within minutes on two CPU cores.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from stages.errors import ConfigError

Style = Literal["careful", "mixed"]
Step = tuple[str, int]  # ("+" or "-", amount)

START_RANGE = (10, 60)
AMOUNT_RANGE = (1, 20)
NAMES = (
    *("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ivan", "June"),
    *("Kai", "Lena", "Max", "Nora", "Otto", "Pia", "Rosa", "Sam", "Tess", "Vera"),
)
THINGS = (
    *("bags", "cards", "coins", "cups", "eggs", "figs", "hats", "jars", "keys"),
    *("maps", "mugs", "nuts", "pens", "pins", "rings", "shoes", "toys"),
)
GAINS = ("finds", "gets", "buys", "wins", "makes")
LOSSES = ("loses", "sells", "drops", "lends", "gives")
CHATTER = (
    "Well, that is a lot of {things}!",
    "{name} likes {things}.",
    "Hm, let me think about it.",
    "I am not sure about this one.",
    "That sounds easy enough.",
)
HEDGES = (
    "Maybe {guess}.",
    "About {guess}, I guess.",
    "I would say {guess}.",
    "It must be {guess}.",
)
SLOPPY_SHARE = 0.5
"""Share of sloppy responses in the "mixed" style."""
LARGEST_SLIP = 9
"""A guess is at most this far from the answer."""


@dataclass(frozen=True, slots=True)
class WordSum:
    """One word sum.

    `answer` is right; the number after `#### ` in `response` is too only if it was careful.
    """

    prompt: str
    response: str
    answer: int


def word_sums(num_examples: int, style: Style, seed: int, *, skip: int = 0) -> Iterator[WordSum]:
    """Word sums number `skip` to `skip + num_examples` of the stream that belongs to `seed`.

    The prompts of a stream are distinct and do not depend on the style, so slices of one stream
    are disjoint splits whatever their styles: `word_sums(80_000, "mixed", 0)` and
    `word_sums(4_000, "careful", 0, skip=80_000)` share no prompt. Streams of two seeds do share
    some.

    A "careful" response shows every step; half of the "mixed" ones are sloppy. Totals are never
    negative. Equal arguments give equal examples on every platform.
    """
    if num_examples < 0 or skip < 0:
        raise ConfigError(
            f"word_sums: num_examples={num_examples}, skip={skip}: neither may be negative"
        )
    if style not in ("careful", "mixed"):
        raise ConfigError(f"word_sums: unknown style {style!r}; use 'careful' or 'mixed'")
    return _slice(num_examples, style, seed, skip)


def _slice(num_examples: int, style: Style, seed: int, skip: int) -> Iterator[WordSum]:
    questions = itertools.islice(_questions(seed), skip, skip + num_examples)
    for position, (name, things, start, steps, prompt) in enumerate(questions, start=skip):
        # A generator an example: the responses of a slice do not depend on where the slice begins.
        rng = random.Random(f"{seed}/{style}/{position}")
        if style == "mixed" and rng.random() < SLOPPY_SHARE:
            response = _sloppy(rng, name, things, start, steps)
        else:
            response = _careful(start, steps)
        yield WordSum(prompt, response, _totals(start, steps)[-1])


def _questions(seed: int) -> Iterator[tuple[str, str, int, list[Step], str]]:
    """Distinct questions without end: name, things, start, steps and the prompt that says them."""
    rng = random.Random(f"{seed}/questions")
    seen = set()
    while True:
        name, things, start = rng.choice(NAMES), rng.choice(THINGS), rng.randint(*START_RANGE)
        steps = [(rng.choice("+-"), rng.randint(*AMOUNT_RANGE)) for _ in range(rng.choice((2, 3)))]
        clauses = [
            f", {rng.choice(GAINS if sign == '+' else LOSSES)} {amount}" for sign, amount in steps
        ]
        prompt = f"{name} has {start} {things}{''.join(clauses)}. How many?"
        if min(_totals(start, steps)) >= 0 and prompt not in seen:
            seen.add(prompt)
            yield name, things, start, steps, prompt


def _totals(start: int, steps: list[Step]) -> list[int]:
    """What there is before the first step, and after each."""
    return list(
        itertools.accumulate((a if sign == "+" else -a for sign, a in steps), initial=start)
    )


def _careful(start: int, steps: list[Step]) -> str:
    totals = _totals(start, steps)
    lines = [
        f"{totals[i]}{sign}{amount}={totals[i + 1]}." for i, (sign, amount) in enumerate(steps)
    ]
    return f"{' '.join(lines)} #### {totals[-1]}"


def _sloppy(rng: random.Random, name: str, things: str, start: int, steps: list[Step]) -> str:
    guess = max(0, _totals(start, steps)[-1] + rng.randint(-LARGEST_SLIP, LARGEST_SLIP))
    kind = rng.choice(("guess", "skip", "chatter"))
    if kind == "guess":
        return f"{rng.choice(HEDGES).format(guess=guess)} #### {guess}"
    if kind == "skip":
        left_out = rng.randrange(len(steps))
        kept = steps[:left_out] + steps[left_out + 1 :]
        if min(_totals(start, kept)) >= 0:
            return _careful(start, kept)
    return f"{rng.choice(CHATTER).format(name=name, things=things)} #### {guess}"
