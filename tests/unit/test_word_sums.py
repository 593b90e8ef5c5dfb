import hashlib
import re
from itertools import islice, pairwise

import pytest

from stages.data.word_sums import AMOUNT_RANGE, GAINS, LOSSES, START_RANGE, WordSum, word_sums
from stages.errors import ConfigError

ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")


def said(example: WordSum) -> int:
    """The final answer that the response gives, read as an evaluation would."""
    return int(ANSWER.findall(example.response[-300:])[-1])


def totals_in_prompt(prompt: str) -> list[int]:
    """Start and running totals, worked out from the words alone."""
    start = int(re.search(r" has (\d+) ", prompt)[1])
    totals = [start]
    for verb, amount in re.findall(r", (\w+) (\d+)", prompt):
        assert verb in GAINS or verb in LOSSES
        assert AMOUNT_RANGE[0] <= int(amount) <= AMOUNT_RANGE[1]
        totals.append(totals[-1] + (int(amount) if verb in GAINS else -int(amount)))
    return totals


def test_careful_response_shows_every_step_and_ends_in_the_right_answer() -> None:
    for example in word_sums(3_000, "careful", seed=1):
        totals = totals_in_prompt(example.prompt)
        lines = re.findall(r"(\d+)([+-])(\d+)=(\d+)\.", example.response)
        assert [(int(a), int(d)) for a, _, _, d in lines] == list(pairwise(totals))
        assert all(eval(f"{a}{sign}{b}") == int(c) for a, sign, b, c in lines)
        assert said(example) == example.answer == totals[-1]


def test_sums_have_two_or_three_steps_and_never_go_below_zero() -> None:
    totals = [totals_in_prompt(example.prompt) for example in word_sums(3_000, "careful", seed=2)]
    assert {len(t) for t in totals} == {3, 4}
    assert all(START_RANGE[0] <= t[0] <= START_RANGE[1] and min(t) >= 0 for t in totals)


def test_half_of_mixed_responses_are_sloppy_and_mostly_wrong() -> None:
    mixed, careful = word_sums(4_000, "mixed", seed=3), word_sums(4_000, "careful", seed=3)
    sloppy = [m for m, c in zip(mixed, careful, strict=True) if m.response != c.response]
    assert 0.47 < len(sloppy) / 4_000 < 0.53
    assert sum(said(example) == example.answer for example in sloppy) / len(sloppy) < 0.15
    assert all(len(ANSWER.findall(example.response)) == 1 for example in sloppy)


def test_style_changes_responses_and_never_prompts() -> None:
    mixed, careful = word_sums(500, "mixed", seed=4), word_sums(500, "careful", seed=4)
    for m, c in zip(mixed, careful, strict=True):
        assert (m.prompt, m.answer) == (c.prompt, c.answer)


@pytest.mark.parametrize("style", ["careful", "mixed"])
def test_a_slice_equals_that_part_of_the_stream(style) -> None:
    whole = list(word_sums(300, style, seed=5))
    assert list(word_sums(100, style, seed=5, skip=150)) == whole[150:250]
    assert list(islice(word_sums(10_000, style, seed=5), 300)) == whole


def test_a_stream_has_enough_distinct_prompts_for_every_split() -> None:
    prompts = [example.prompt for example in word_sums(90_000, "careful", seed=0)]
    assert len(set(prompts)) == len(prompts) == 90_000
    assert max(map(len, prompts)) < 80


def test_equal_arguments_give_equal_examples_whatever_the_platform() -> None:
    text = "\n".join(f"{e.prompt}|{e.response}|{e.answer}" for e in word_sums(1_000, "mixed", 0))
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "af32e4652aad1f57a878b1eaa33be93a2e45de40205de16a0eb1489a4086f201"
    )
    assert list(word_sums(20, "mixed", seed=0)) != list(word_sums(20, "mixed", seed=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, "mixed", 0), "num_examples=-1"),
        ((1, "tidy", 0), "unknown style 'tidy'; use 'careful' or 'mixed'"),
    ],
)
def test_senseless_arguments_are_refused_at_the_call(arguments, message) -> None:
    with pytest.raises(ConfigError, match=message):
        word_sums(*arguments)
