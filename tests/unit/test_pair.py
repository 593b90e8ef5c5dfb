"""Pairing on hand-made rows: every candidate becomes a pair or has a reason."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stages.config import ChatConfig, PairConfig
from stages.data.chat import Renderer, make_renderer
from stages.pair import Dropped, pairs_of_prompt

PROMPT = {"prompt_id": "a" * 32, "response": "It is 19."}


@pytest.fixture(scope="module")
def renderer(tiny_model_dir: Path) -> Renderer:
    return make_renderer(tiny_model_dir, ChatConfig())


def _sample(renderer: Renderer, index: int, text: str, **more: Any) -> dict[str, Any]:
    return {
        "prompt_id": PROMPT["prompt_id"],
        "sample_index": index,
        "prompt_token_ids": [5, 6, 7],
        "response_token_ids": renderer.response_tokens(text),
        "response": text,
        "finish_reason": "stop",
        **more,
    }


def _outcomes(
    renderer: Renderer, samples: list[dict[str, Any]], prompt: Any = None, **settings: Any
) -> list[str]:
    made = pairs_of_prompt(prompt or PROMPT, samples, PairConfig(**settings), renderer)
    return [
        m.reason if isinstance(m, Dropped) else f"{m['chosen_source']}>{m['rejected_source']}"
        for m in made
    ]


@pytest.mark.parametrize(
    ("text", "more", "settings", "outcome"),
    [
        ("It is 20.", {}, {}, "human>sample 0"),
        ("It is 19.", {}, {}, "identical"),
        ("", {}, {}, "empty"),
        (" \n", {}, {}, "empty"),
        ("It is", {"finish_reason": "length"}, {}, "cut_off"),
        ("It is", {"finish_reason": "length"}, {"drop_cut_off": False}, "human>sample 0"),
        ("It is 20.", {}, {"max_length": 4}, "too_long"),
    ],
)
def test_human_vs_self_by_hand(
    renderer: Renderer, text: str, more: Any, settings: Any, outcome: str
) -> None:
    assert _outcomes(renderer, [_sample(renderer, 0, text, **more)], **settings) == [outcome]


def test_a_pair_carries_the_tokens_of_generation(renderer: Renderer) -> None:
    sample = _sample(renderer, 0, "It is 20.")
    (pair,) = pairs_of_prompt(PROMPT, [sample], PairConfig(), renderer)
    assert isinstance(pair, dict)
    assert pair["prompt_token_ids"] == sample["prompt_token_ids"]
    assert pair["rejected_token_ids"] == sample["response_token_ids"]
    assert pair["chosen_token_ids"] == renderer.response_tokens("It is 19.")
    assert pair["chosen_token_ids"][-1] == renderer.end_token_id


def test_a_repeated_sample_is_a_duplicate(renderer: Renderer) -> None:
    samples = [_sample(renderer, i, text) for i, text in enumerate(["No.", "No.", "Yes."])]
    assert _outcomes(renderer, samples) == ["human>sample 0", "duplicate", "human>sample 2"]


def test_a_human_response_with_a_special_token_drops_the_candidates(renderer: Renderer) -> None:
    prompt = {**PROMPT, "response": "I </s> you"}
    samples = [_sample(renderer, i, "No.") for i in range(2)]
    assert _outcomes(renderer, samples, prompt) == ["special_token", "special_token"]


@pytest.mark.parametrize(
    ("rewards", "settings", "outcome"),
    [
        ([0.0, 1.0], {}, "sample 1>sample 0"),
        ([1.0, 0.0, 1.0], {}, "sample 0>sample 1"),
        ([0.5, 0.2, 0.9, 0.1], {}, "sample 2>sample 3"),
        ([1.0, 1.0], {}, "tie"),
        ([0.0, 0.0], {"tie_policy": "first"}, "sample 0>sample 1"),
        ([1.0], {}, "single"),
    ],
)
def test_ranked_by_hand(
    renderer: Renderer, rewards: list[float], settings: Any, outcome: str
) -> None:
    samples = [
        _sample(renderer, i, f"answer {i}", reward=reward) for i, reward in enumerate(rewards)
    ]
    assert _outcomes(renderer, samples, policy="best_vs_worst", **settings) == [outcome]


def test_ranked_never_pairs_equal_answers(renderer: Renderer) -> None:
    samples = [_sample(renderer, i, "same", reward=0.0) for i in range(2)]
    assert _outcomes(renderer, samples, policy="best_vs_worst", tie_policy="first") == ["identical"]


def test_every_candidate_has_one_outcome(renderer: Renderer) -> None:
    texts = ["It is 19.", "", "No.", "No.", "Yes.", " "]
    outcomes = Counter(_outcomes(renderer, [_sample(renderer, i, t) for i, t in enumerate(texts)]))
    assert outcomes.total() == len(texts)
    assert outcomes["empty"] == 2
    assert outcomes["identical"] == outcomes["duplicate"] == 1
