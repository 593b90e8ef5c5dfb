"""Pairing one prompt at a time, in plain Python: the slow twin of stages/data/pairing.py.

And the fast way on rows made by hand.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from stages.config import PairConfig
from stages.data.chat import RowRefusedError
from stages.data.draw import drawn_number as draw
from stages.data.pair_rows import Sides
from stages.data.pairing import Rule
from stages.data.rows import GENERATIONS

SEED, ITERATION = 7, 3
SAMPLE_COLUMNS = (
    "prompt_id", "sample_index", "prompt_token_ids", "response_token_ids", "response",
    "finish_reason",
)  # fmt: skip
Sample = dict[str, Any]
"""A row of GENERATIONS, with its `reward` or None."""
Outcome = tuple[str, str, str]
"""Reason ("" for a pair), source of the chosen and of the rejected response."""


class Letters:
    """A tokenizer of one token a letter; upper and lower case are the same token."""

    def responses_tokens(self, texts: Sequence[str]) -> list[list[int] | RowRefusedError]:
        return [
            RowRefusedError("special_token", "'</s>' stands in the text")
            if "</s>" in text
            else letters(text)
            for text in texts
        ]


def letters(text: str) -> list[int]:
    return [*map(ord, text.lower()), 1]


def sample(index: int, text: str, reward: float | None = None, **more: Any) -> Sample:
    return {
        "prompt_id": "a",
        "sample_index": index,
        "prompt_token_ids": [5, 6, 7],
        "response_token_ids": letters(text),
        "response": text,
        "finish_reason": "stop",
        "reward": reward,
        **more,
    }


def pair_fast(
    prompts: Mapping[str, tuple[str, Sequence[Sample]]], config: PairConfig
) -> tuple[pa.Table, pa.Table, list[tuple[str, Outcome, float | None]]]:
    """Rows of PAIRS and DROPPED, and (prompt, outcome, win probability) of each candidate.

    Args:
        prompts: by id the human response and the samples.
    """
    ids = sorted(p for p, (_, group) in prompts.items() if group)
    rows = [(number, row) for number, p in enumerate(ids) for row in prompts[p][1]]
    schema = pa.schema([GENERATIONS.field(name) for name in SAMPLE_COLUMNS])
    samples = pa.Table.from_pylist(
        [{name: row[name] for name in SAMPLE_COLUMNS} for _, row in rows], schema=schema
    )
    sources = pa.array([f"sample {row['sample_index']}" for _, row in rows], pa.string())
    samples = samples.append_column("source", sources)
    rule = Rule(config)
    human = pa.array([prompts[p][0] for p in ids], pa.string()) if config.chooses_human else None
    sides = Sides.of(samples, human, Letters())  # type: ignore[arg-type]
    rewards = [math.nan if row["reward"] is None else row["reward"] for _, row in rows]
    draws = [draw("pair", SEED, ITERATION, r["prompt_id"], r["sample_index"]) for _, r in rows]
    responses = sides.responses(
        samples,
        np.array([number for number, _ in rows], np.int64),
        np.array(rewards, np.float64),
        np.array(draws, np.uint64),
    )
    found = rule.candidates(responses)
    verdict = rule.judge(responses, found)
    outcomes = []
    names = sides.source_R.to_pylist()
    for reason, win, chosen, rejected in zip(
        verdict.reason_C,
        verdict.win_probability_C.tolist(),
        found.chosen_C.tolist(),
        found.rejected_C.tolist(),
        strict=True,
    ):
        outcome = (reason, names[chosen], names[rejected])
        probability = None if reason or math.isnan(win) else win
        outcomes.append((samples["prompt_id"][rejected].as_py(), outcome, probability))
    pairs = sides.pairs(responses, found, verdict, ITERATION)
    return pairs, sides.dropped(responses, found, verdict), outcomes


def pair_slowly(
    human: str, samples: Sequence[Sample], config: PairConfig
) -> list[tuple[Outcome, float | None]]:
    """The outcome and win probability of each candidate of one prompt, in order of preference."""
    samples = sorted(samples, key=lambda s: s["sample_index"])
    unscored = [s for s in samples if config.needs_rewards and s["reward"] is None]
    ranked = [s for s in samples if s not in unscored]
    couples, alone = _couples(human, ranked, config)
    outcomes: list[tuple[Outcome, float | None]] = []
    seen, made = set(), 0
    most = config.max_pairs or (1 if config.needs_rewards else math.inf)
    for chosen, rejected in couples:
        reason = _reason(chosen, rejected, config)
        texts = (chosen["response"], rejected["response"])
        if not reason and texts in seen:
            reason = "duplicate"
        if not reason:
            seen.add(texts)
            reason, made = ("surplus", made) if made >= most else ("", made + 1)
        win = None if reason else _win_probability(chosen, rejected, config)
        outcomes.append(((reason, _source(chosen), _source(rejected)), win))
    for reason, lonely in (("single", alone), ("no_reward", unscored)):
        outcomes += [((reason, _source(s), _source(s)), None) for s in lonely]
    return outcomes


def _couples(
    human: str, samples: list[Sample], config: PairConfig
) -> tuple[list[tuple[Sample, Sample]], list[Sample]]:
    """Couples of chosen and rejected, and samples that have no partner."""
    if config.chooses_human:
        [tokens] = Letters().responses_tokens([human])
        refused = tokens.reason if isinstance(tokens, RowRefusedError) else ""
        ids = [] if isinstance(tokens, RowRefusedError) else tokens
        answer = sample(-1, human, response_token_ids=ids, refused=refused)
        order = (
            sorted(samples, key=lambda s: _worth(s, config)) if config.needs_rewards else samples
        )
        return [(answer, s) for s in order], []
    if len(samples) < 2:
        return [], samples
    if config.policy == "random":
        drawn = sorted(samples, key=lambda s: (_unfit(s, config), _draw(s)))
        couples = []
        for one, other in zip(drawn[::2], drawn[1::2], strict=False):
            by_index = sorted((one, other), key=lambda s: s["sample_index"])
            couples.append(tuple(sorted(by_index, key=lambda s: -_worth(s, config))))
        return couples, []  # type: ignore[return-value]
    best = min(samples, key=lambda s: (_unfit(s, config), -_worth(s, config)))
    others = [s for s in samples if s is not best]
    worst_first = config.policy == "best_vs_worst"
    others.sort(key=lambda s: _worth(s, config) if worst_first else _draw(s))
    return [(best, s) for s in others], []


def _worth(one: Sample, config: PairConfig) -> float:
    return one["reward"] - config.length_penalty * len(one["response_token_ids"])


def _draw(one: Sample) -> int:
    return draw("pair", SEED, ITERATION, one["prompt_id"], one["sample_index"])


def _source(one: Sample) -> str:
    return "human" if one["sample_index"] < 0 else f"sample {one['sample_index']}"


def _unfit(one: Sample, config: PairConfig) -> bool:
    tokens = len(one["response_token_ids"])
    return (
        not one["response"].strip()
        or (config.drop_cut_off and one["finish_reason"] == "length")
        or len(one["prompt_token_ids"]) + tokens > config.max_length
        or tokens < config.min_response_tokens
        or (config.max_response_tokens is not None and tokens > config.max_response_tokens)
    )


def _reason(chosen: Sample, rejected: Sample, config: PairConfig) -> str:
    if chosen.get("refused"):
        return str(chosen["refused"])
    both = (chosen, rejected)
    if len({s["response"] for s in both}) == 1:
        return "identical"
    if chosen["response_token_ids"] == rejected["response_token_ids"]:
        return "identical"
    if any(not s["response"].strip() for s in both):
        return "empty"
    if config.drop_cut_off and any(s["finish_reason"] == "length" for s in both):
        return "cut_off"
    tokens = sorted(len(s["response_token_ids"]) for s in both)
    if len(rejected["prompt_token_ids"]) + tokens[1] > config.max_length:
        return "too_long"
    if tokens[0] < config.min_response_tokens:
        return "short_response"
    if config.max_response_tokens is not None and tokens[1] > config.max_response_tokens:
        return "long_response"
    if config.max_length_ratio is not None and tokens[1] > config.max_length_ratio * tokens[0]:
        return "length_ratio"
    return _reward_reason(chosen, rejected, config)


def _reward_reason(chosen: Sample, rejected: Sample, config: PairConfig) -> str:
    most = config.max_rejected_reward
    if chosen["reward"] is not None:
        margin = _worth(chosen, config) - _worth(rejected, config)
        if config.tie_policy == "drop" and margin == 0:
            return "tie"
        if config.min_margin is not None and margin < config.min_margin:
            return "small_margin"
        if config.max_margin is not None and margin > config.max_margin:
            return "large_margin"
        least = config.min_chosen_reward
        if least is not None and chosen["reward"] < least:
            return "low_chosen_reward"
    if most is not None and rejected["reward"] > most:
        return "high_rejected_reward"
    return ""


def _win_probability(chosen: Sample, rejected: Sample, config: PairConfig) -> float | None:
    if config.win_probability in ("none", "one"):
        return None if config.win_probability == "none" else 1.0
    margin = _worth(chosen, config) - _worth(rejected, config)
    if config.win_probability == "win_rate":
        return min(1.0, (1 + margin) / 2)
    return 1 / (1 + math.exp(-margin))
