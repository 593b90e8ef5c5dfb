"""Pairing on hand-made rows: every candidate becomes a pair or has a reason."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.config import PairConfig, RunConfig
from stages.data.pairing import Rule
from tests.pairs_by_hand import (
    ITERATION,
    SEED,
    Sample,
    draw,
    letters,
    pair_fast,
    pair_slowly,
    sample,
)

RANKING = ("best_vs_worst", "best_vs_random", "random")
POLICIES = ("human_vs_self", "human_vs_worst", *RANKING)
CUT = {"finish_reason": "length"}


def outcomes(samples: list[Sample], human: str = "It is 19.", **settings: Any) -> list[str]:
    """What becomes of each candidate, in the order in which they are preferred."""
    _, _, found = pair_fast({"a": (human, samples)}, PairConfig(**settings))
    return [reason or f"{chosen}>{rejected}" for _, (reason, chosen, rejected), _ in found]


@pytest.mark.parametrize(
    ("text", "more", "settings", "outcome"),
    [
        ("It is 20.", {}, {}, "human>sample 0"),
        ("It is 19.", {}, {}, "identical"),
        ("IT IS 19.", {}, {}, "identical"),  # other text, same tokens
        ("It is 19.", {"response_token_ids": [9, 9, 1]}, {}, "identical"),  # the other way round
        ("It is 19.", CUT, {}, "identical"),
        ("", {}, {}, "empty"),
        (" \n\u2003", {}, {}, "empty"),
        ("It is", CUT, {}, "cut_off"),
        ("It is", CUT, {"drop_cut_off": False}, "human>sample 0"),
        ("It is 20.", {}, {"max_length": 13}, "human>sample 0"),
        ("It is 20.", {}, {"max_length": 12}, "too_long"),
        ("No.", {}, {"min_response_tokens": 4}, "human>sample 0"),
        ("No.", {}, {"min_response_tokens": 5}, "short_response"),
        ("It is 20.", {}, {"max_response_tokens": 10}, "human>sample 0"),
        ("It is 20.", {}, {"max_response_tokens": 9}, "long_response"),
        ("No.", {}, {"max_length_ratio": 2.5}, "human>sample 0"),
        ("No.", {}, {"max_length_ratio": 2.4}, "length_ratio"),
    ],
)
def test_human_vs_self_by_hand(text: str, more: Any, settings: Any, outcome: str) -> None:
    assert outcomes([sample(0, text, **more)], **settings) == [outcome]


@pytest.mark.parametrize(
    ("texts", "max_pairs", "expected"),
    [
        (["No.", "No.", "Yes."], None, ["human>sample 0", "duplicate", "human>sample 2"]),
        (["No.", "No.", "Yes."], 1, ["human>sample 0", "duplicate", "surplus"]),
        (["It is 19.", "No.", "Yes."], 1, ["identical", "human>sample 1", "surplus"]),
        (["No.", "So.", "Yes."], 2, ["human>sample 0", "human>sample 1", "surplus"]),
    ],
)
def test_several_are_rejected_by_one_human_response(
    texts: list[str], max_pairs: int | None, expected: list[str]
) -> None:
    samples = [sample(index, text) for index, text in enumerate(texts)]
    assert outcomes(samples, max_pairs=max_pairs) == expected


def test_a_human_response_with_a_special_token_drops_the_candidates() -> None:
    samples = [sample(index, "No.") for index in range(2)]
    assert outcomes(samples, "I </s> you") == ["special_token"] * 2
    _, dropped, _ = pair_fast({"a": ("I </s> you", samples)}, PairConfig())
    assert dropped["detail"].to_pylist() == ["human: '</s>' stands in the text"] * 2


def test_a_pair_carries_the_tokens_of_generation() -> None:
    generated = sample(0, "It is 20.", prompt_token_ids=[8, 9], response_token_ids=[4, 4, 1])
    table, _, _ = pair_fast({"a": ("It is 19.", [generated])}, PairConfig())
    [pair] = table.to_pylist()
    assert pair["prompt_token_ids"] == [8, 9]
    assert pair["rejected_token_ids"] == [4, 4, 1]
    assert pair["chosen_token_ids"] == letters("It is 19.")
    assert (pair["iteration"], pair["weight"], pair["pair_index"]) == (ITERATION, 1.0, 0)
    assert pair["win_probability"] is pair["chosen_reward"] is pair["rejected_reward"] is None


WORST = [0.5, 0.2, 0.9, 0.1]
SURPLUS_2 = ["surplus"] * 2


@pytest.mark.parametrize(
    ("policy", "rewards", "settings", "expected"),
    [
        ("best_vs_worst", [0.0, 1.0], {}, ["sample 1>sample 0"]),
        ("best_vs_worst", WORST, {}, ["sample 2>sample 3", "surplus", "surplus"]),
        (
            "best_vs_worst", WORST, {"max_pairs": 2},
            ["sample 2>sample 3", "sample 2>sample 1", "surplus"],
        ),
        ("best_vs_worst", [1.0, 0.0, 1.0], {}, ["sample 0>sample 1", "tie"]),
        ("best_vs_worst", [1.0, 1.0], {}, ["tie"]),
        ("best_vs_worst", [0.0, 0.0, 0.0], {}, ["tie", "tie"]),
        ("best_vs_worst", [0.0, 0.0], {"tie_policy": "first"}, ["sample 0>sample 1"]),
        ("best_vs_worst", [1.0], {}, ["single"]),
        ("best_vs_worst", [1.0, None, 0.0], {}, ["sample 0>sample 2", "no_reward"]),
        ("best_vs_worst", [None, 1.0], {}, ["single", "no_reward"]),
        ("best_vs_worst", [None, None], {}, ["no_reward", "no_reward"]),
        ("best_vs_worst", WORST, {"min_margin": 0.9}, ["small_margin"] * 3),
        ("best_vs_worst", [0.5, 0.0], {"min_margin": 0.5}, ["sample 0>sample 1"]),
        ("best_vs_worst", [0.5, 0.0], {"max_margin": 0.5}, ["sample 0>sample 1"]),
        (
            "best_vs_worst", WORST, {"max_margin": 0.75},
            ["large_margin", "sample 2>sample 1", "surplus"],
        ),
        ("best_vs_worst", WORST, {"min_chosen_reward": 0.95}, ["low_chosen_reward"] * 3),
        ("best_vs_worst", WORST, {"min_chosen_reward": 0.9}, ["sample 2>sample 3", *SURPLUS_2]),
        (
            "best_vs_worst", WORST, {"max_rejected_reward": 0.3, "max_pairs": 3},
            ["sample 2>sample 3", "sample 2>sample 1", "high_rejected_reward"],
        ),
        ("human_vs_worst", WORST, {}, ["human>sample 3"] + 3 * ["surplus"]),
        (
            "human_vs_worst", [0.5, None, 0.1], {"max_pairs": 2},
            ["human>sample 2", "human>sample 0", "no_reward"],
        ),
        ("human_vs_worst", [0.5], {"max_rejected_reward": 0.4}, ["high_rejected_reward"]),
        ("human_vs_worst", [0.2, 0.2], {}, ["human>sample 0", "surplus"]),
        ("best_vs_random", [1.0], {}, ["single"]),
        ("random", [1.0], {}, ["single"]),
        ("random", [0.0, 1.0], {}, ["sample 1>sample 0"]),
        ("random", [1.0, 1.0], {"tie_policy": "first"}, ["sample 0>sample 1"]),
        ("random", [1.0, 1.0], {}, ["tie"]),
    ],
)  # fmt: skip
def test_rewards_rank_by_hand(
    policy: str, rewards: list[float | None], settings: Any, expected: list[str]
) -> None:
    samples = [sample(index, f"answer {index}", reward) for index, reward in enumerate(rewards)]
    assert outcomes(samples, policy=policy, **settings) == expected


def test_the_best_fit_sample_is_chosen_and_the_unfit_are_counted() -> None:
    samples = [
        sample(0, "cut", 5.0, **CUT),
        sample(1, "good", 1.0),
        sample(2, "bad", 0.0),
        sample(3, " ", -1.0),
    ]
    expected = ["empty", "sample 1>sample 2", "cut_off"]
    assert outcomes(samples, policy="best_vs_worst") == expected
    assert outcomes(samples[::3], policy="best_vs_worst") == ["empty"]


def test_ranked_never_pairs_equal_answers() -> None:
    samples = [sample(index, "same", 0.0) for index in range(2)]
    for policy in RANKING:
        assert outcomes(samples, policy=policy, tie_policy="first") == ["identical"]


def test_the_length_penalty_changes_the_ranks_but_no_stored_reward() -> None:
    samples = [sample(0, "long answer", 1.0), sample(1, "short", 0.9), sample(2, "none", 0.0)]
    settings: Any = {"policy": "best_vs_worst", "min_chosen_reward": 0.9}
    assert outcomes(samples, **settings)[0] == "sample 0>sample 2"
    assert outcomes(samples, length_penalty=0.1, **settings)[0] == "sample 1>sample 2"
    config = PairConfig(length_penalty=0.1, win_probability="bradley_terry", **settings)
    table, _, _ = pair_fast({"a": ("", samples)}, config)
    [pair] = table.to_pylist()
    assert (pair["chosen_reward"], pair["rejected_reward"]) == (0.9, 0.0)
    margin = (0.9 - 0.1 * len(letters("short"))) - (0.0 - 0.1 * len(letters("none")))
    assert pair["win_probability"] == pytest.approx(1 / (1 + math.exp(-margin)))


def test_bounds_of_rewards_are_asked_before_the_length_penalty() -> None:
    samples = [sample(0, "abc", 0.5), sample(1, "ab", 0.25)]
    for policy in ("best_vs_worst", "random"):
        settings: Any = {"policy": policy, "length_penalty": 0.1}
        assert outcomes(samples, min_chosen_reward=0.5, **settings) == ["sample 0>sample 1"]
        assert outcomes(samples, max_rejected_reward=0.2, **settings) == ["high_rejected_reward"]


def test_ties_and_margins_are_those_of_the_ranked_rewards() -> None:
    samples = [sample(0, "abc", 0.5), sample(1, "a", 0.0)]
    settings: Any = {"policy": "best_vs_worst", "length_penalty": 0.25}
    assert outcomes(samples, **settings) == ["tie"]
    assert outcomes(samples, min_margin=0.25, tie_policy="first", **settings) == ["small_margin"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("none", None), ("one", 1.0), ("bradley_terry", 1 / (1 + math.exp(-0.5))), ("win_rate", 0.75)],
)
def test_win_probabilities_by_hand(kind: str, expected: float | None) -> None:
    config = PairConfig(policy="best_vs_worst", win_probability=kind)  # type: ignore[arg-type]
    table, _, _ = pair_fast({"a": ("", [sample(0, "a", 0.75), sample(1, "b", 0.25)])}, config)
    assert table["win_probability"].to_pylist() == [pytest.approx(expected) if expected else None]


def test_win_probabilities_of_huge_margins_are_one() -> None:
    for kind in ("bradley_terry", "win_rate"):
        config = PairConfig(policy="best_vs_worst", win_probability=kind)  # type: ignore[arg-type]
        samples = [sample(0, "a", 1e300), sample(1, "b", -1e300)]
        table, _, _ = pair_fast({"a": ("", samples)}, config)
        assert table["win_probability"].to_pylist() == [1.0]


@pytest.mark.parametrize("policy", ["best_vs_random", "random"])
def test_draws_are_fair_and_go_by_the_prompt(policy: str) -> None:
    texts = [f"answer {index}" for index in range(4)]
    prompts = {
        f"{number:03d}": (
            "",
            [sample(i, text, -i, prompt_id=f"{number:03d}") for i, text in enumerate(texts)],
        )
        for number in range(600)
    }
    table, _, _ = pair_fast(prompts, PairConfig(policy=policy))  # type: ignore[arg-type]
    found = Counter(zip(*(table[c].to_pylist() for c in ("chosen", "rejected")), strict=True))
    couples = [("answer 0", f"answer {i}") for i in (1, 2, 3)]
    if policy == "random":
        couples = [(texts[i], texts[j]) for i in range(4) for j in range(i + 1, 4)]
    assert set(found) == set(couples)
    expected = 600 / len(couples)
    assert all(abs(n - expected) < 4 * math.sqrt(expected) for n in found.values())
    drawn = prompts["000"]
    alone, _, _ = pair_fast({"000": drawn}, PairConfig(policy=policy))  # type: ignore[arg-type]
    assert alone.to_pylist() == table.slice(0, 1).to_pylist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_margin": 0.1}, "pair.min_margin asks for rewards that pair.policy=human_vs_self"),
        ({"policy": "human_vs_worst", "tie_policy": "first"}, "pair.tie_policy asks for rewards"),
        ({"policy": "human_vs_worst", "min_chosen_reward": 1.0}, "pair.min_chosen_reward asks"),
        ({"length_penalty": 0.1}, "pair.length_penalty asks for rewards"),
        ({"max_rejected_reward": 0.1}, "pair.max_rejected_reward asks for rewards"),
        ({"win_probability": "win_rate"}, "is made of two rewards, and a human response has none"),
        (
            {"policy": "random", "min_margin": 2.0, "max_margin": 1.0},
            "pair.min_margin=2.0 is above pair.max_margin=1.0",
        ),
        (
            {"min_response_tokens": 3, "max_response_tokens": 2},
            "pair.min_response_tokens=3 is above",
        ),
    ],
)
def test_settings_that_cannot_be_heeded_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PairConfig(**settings)


def test_sppo_without_win_probabilities_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"train.loss=sppo .* set pair.win_probability"):
        RunConfig.model_validate({"train": {"loss": "sppo"}})


RESPONSES = st.sampled_from(["", " ", "a", "A", "b", "abc", "abcd", "abcdefgh"])
REWARD = st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
SAMPLE = st.tuples(RESPONSES, REWARD, st.sampled_from(["stop", "stop", "length"]))
PROMPTS = st.lists(
    st.tuples(st.sampled_from(["a", "abc", "xyz", "", "</s>"]), st.lists(SAMPLE, max_size=6)),
    max_size=5,
)
MAYBE = st.none()


@st.composite
def configs(draws: st.DrawFn) -> PairConfig:
    """Any valid section `pair`."""
    policy = draws(st.sampled_from(POLICIES))
    settings = {
        "max_pairs": draws(st.one_of(MAYBE, st.integers(1, 3))),
        "tie_policy": draws(st.sampled_from(["drop", "first"])),
        "min_margin": draws(st.one_of(MAYBE, st.sampled_from([0.25, 0.5]))),
        "max_margin": draws(st.one_of(MAYBE, st.sampled_from([0.5, 0.75]))),
        "min_chosen_reward": draws(st.one_of(MAYBE, st.sampled_from([0.25, 1.0]))),
        "max_rejected_reward": draws(st.one_of(MAYBE, st.sampled_from([0.0, 0.5]))),
        "length_penalty": draws(st.sampled_from([0.0, 0.0, 0.125])),
        "win_probability": draws(st.sampled_from(["none", "one", "bradley_terry", "win_rate"])),
        "drop_cut_off": draws(st.booleans()),
        "max_length": draws(st.sampled_from([7, 2048])),
        "min_response_tokens": draws(st.sampled_from([0, 3])),
        "max_response_tokens": draws(st.one_of(MAYBE, st.sampled_from([4, 5]))),
        "max_length_ratio": draws(st.one_of(MAYBE, st.sampled_from([1.0, 2.0]))),
    }
    if policy not in RANKING:
        for name in ("tie_policy", "min_margin", "max_margin", "min_chosen_reward"):
            del settings[name]
        settings["win_probability"] = draws(st.sampled_from(["none", "one"]))
    if policy == "human_vs_self":
        del settings["max_rejected_reward"], settings["length_penalty"]
    return PairConfig(policy=policy, **settings)


def as_prompts(drawn: Any) -> dict[str, tuple[str, list[Sample]]]:
    return {
        f"p{number}": (
            human,
            [
                sample(i, text, reward, finish_reason=reason, prompt_id=f"p{number}")
                for i, (text, reward, reason) in enumerate(group)
            ],
        )
        for number, (human, group) in enumerate(drawn)
    }


@settings(max_examples=300)
@given(drawn=PROMPTS, config=configs())
def test_all_prompts_at_once_equal_one_at_a_time(drawn: Any, config: PairConfig) -> None:
    prompts = as_prompts(drawn)
    _, _, fast = pair_fast(prompts, config)
    slow = [
        (name, outcome, win)
        for name, (human, samples) in prompts.items()
        for outcome, win in pair_slowly(human, samples, config)
    ]
    assert [(name, outcome) for name, outcome, _ in fast] == [
        (name, outcome) for name, outcome, _ in slow
    ]
    assert [win for *_, win in fast] == pytest.approx([win for *_, win in slow])


@given(drawn=PROMPTS, config=configs(), chance=st.randoms(use_true_random=False))
def test_the_invariants_of_pairs(drawn: Any, config: PairConfig, chance: Any) -> None:
    prompts = as_prompts(drawn)
    pairs, dropped, found = pair_fast(prompts, config)
    rows = pairs.to_pylist()
    assert len(found) == len(rows) + dropped.num_rows
    assert all(dropped["reason"].to_pylist()) and all(dropped["detail"].to_pylist())
    for name, (human, samples) in prompts.items():
        number = len([one for one, *_ in found if one == name])
        scored = sum(s["reward"] is not None for s in samples)
        lonely = (len(samples) - scored) + (scored == 1)
        assert number == {
            "human_vs_self": len(samples),
            "human_vs_worst": len(samples),
            "random": lonely + scored // 2,
        }.get(config.policy, lonely + max(0, scored - 1))
        mine = [row for row in rows if row["prompt_id"] == name]
        assert [row["pair_index"] for row in mine] == list(range(len(mine)))
        if config.max_pairs or config.needs_rewards:
            assert len(mine) <= (config.max_pairs or 1)
        texts = {s["response"] for s in samples}
        for row in mine:
            assert row["rejected"] in texts
            assert row["chosen"] in ({human} if config.chooses_human else texts)
            assert row["chosen"] != row["rejected"]
            assert row["chosen_token_ids"] != row["rejected_token_ids"]
            win = row["win_probability"]
            assert win is None if config.win_probability == "none" else 0.5 <= win <= 1
        couples = [(row["chosen"], row["rejected"]) for row in mine]
        assert len(set(couples)) == len(couples)
    for _, samples in prompts.values():
        chance.shuffle(samples)
    again, _, _ = pair_fast(prompts, config)
    assert again.to_pylist() == rows


def test_draws_depend_on_seed_iteration_prompt_and_sample() -> None:
    which = [
        (SEED, ITERATION, "a", 0),
        (SEED + 1, ITERATION, "a", 0),
        (SEED, ITERATION + 1, "a", 0),
    ]
    which += [(SEED, ITERATION, "b", 0), (SEED, ITERATION, "a", 1)]
    assert len({draw("pair", *one) for one in which}) == len(which)


@pytest.mark.parametrize("policy", POLICIES)
def test_only_policies_that_draw_ask_for_draws(policy: Any) -> None:
    assert Rule(PairConfig(policy=policy)).draws == (policy in ("best_vs_random", "random"))
    assert np.iinfo(np.uint64).max >= draw("pair", "anything")
