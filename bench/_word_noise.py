"""Word sums with flawed human answers, and what is wrong with a model's answers."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stages.data.word_sums import LARGEST_SLIP, WordSum, word_sums

Noise = Literal["none", "sloppy", "slips"]
Verdict = Literal["right", "slip", "sloppy", "spoilt"]

STREAM = 0
"""Of the prompts; the demo's base model was trained on its first 80,000."""
MOST_SLOPPY = 0.5
"""The mixed stream has a sloppy answer to half of the prompts."""
_STEP = re.compile(r"\d+[+-]\d+=\d+\. ")
_CAREFUL = re.compile(rf"(?:{_STEP.pattern})+#### \d+")
_END = re.compile(r"=(\d+)\. #### \d+$")


@dataclass(frozen=True)
class Row:
    """A prompt with the human answer that is trained on."""

    prompt: str
    response: str


def human_rows(num: int, skip: int, noise: Noise, share: float) -> list[Row]:
    """Rows `skip` to `skip + num` of the stream, about `share` of which have a flawed answer.

    `sloppy` flaws are those of the demo's base model: a guess, a skipped step, chatter. `slips`
    are careful answers whose last total is off by 1 to 9. Which rows are flawed depends on their
    places alone, and those flawed at a small share are so at a larger one.

    Raises:
        ValueError: a share below 0, above 1, or above `MOST_SLOPPY` of sloppy answers.
    """
    most = MOST_SLOPPY if noise == "sloppy" else 1.0
    if not 0 <= share <= most:
        raise ValueError(f"human_rows: share={share} of {noise}; use 0 to {most}")
    careful = word_sums(num, "careful", STREAM, skip=skip)
    mixed = word_sums(num, "mixed", STREAM, skip=skip)
    return [
        Row(good.prompt, _answer(good, other, noise, share, random.Random(f"noise/{place}")))
        for place, (good, other) in enumerate(zip(careful, mixed, strict=True), start=skip)
    ]


def _answer(good: WordSum, mixed: WordSum, noise: Noise, share: float, rng: random.Random) -> str:
    draw = rng.random()
    if noise == "sloppy" and draw < share / MOST_SLOPPY:
        return mixed.response  # half of these are careful
    if noise == "slips" and draw < share:
        return _END.sub(lambda end: _slipped(int(end[1]), rng), good.response)
    return good.response


def _slipped(total: int, rng: random.Random) -> str:
    slip = rng.randint(1, LARGEST_SLIP) * rng.choice((-1, 1))
    wrong = total + slip if total + slip >= 0 else total - slip
    return f"={wrong}. #### {wrong}"


def verdict(prompt: str, response: str, reward: float) -> Verdict:
    """Say what is wrong with an answer.

    `slip`: every step is there, and a number is wrong. `sloppy`: a guess, chatter, or another
    number of steps than the prompt has. `spoilt`: nothing that the data has, such as an answer
    that breaks off.
    """
    if reward == 1.0:
        return "right"
    if _CAREFUL.fullmatch(response):
        return "slip" if len(_STEP.findall(response)) == prompt.count(",") else "sloppy"
    return "sloppy" if "####" in response and not _STEP.search(response) else "spoilt"


def wrong_shares(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Return the share of each verdict but `right`."""
    kinds: tuple[Verdict, ...] = ("slip", "sloppy", "spoilt")
    return {kind: verdicts.count(kind) / len(verdicts) for kind in kinds}
