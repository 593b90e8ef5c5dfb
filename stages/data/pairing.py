"""Pairing policies: which responses to a prompt become its pairs, and why others do not.

Arrays in, arrays out, many prompts at a time; docs/pairing.md has the policies as a table.

Shapes: R responses, S of them samples, C candidates. A **candidate** is a pair that may be made:
- `human_*`: the human response with each sample;
- `best_*`: the best sample with each other one;
- `random`: two neighbours in the drawn order, so n // 2 of n samples.
A sample without the reward that the policy needs is a candidate by itself, and so is one that has
no other to be ranked against. Every candidate is made or has one reason, the first that applies.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.config import PairConfig

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Words = npt.NDArray[Any]
"""Of dtype object: reasons, "" where there is none."""

SURPLUS = "surplus"
"""Nothing is wrong with the candidate: the prompt has its `max_pairs` already."""


@dataclass(frozen=True)
class Responses:
    """Responses to some prompts: S samples, then one human response a prompt where it is chosen."""

    num_samples: int
    prompt_R: Ints
    """Number of the prompt: 0, 1, … in the order of ids."""
    index_R: Ints
    """Sample index; no two samples of a prompt have the same."""
    tokens_R: Ints
    prompt_tokens_R: Ints
    text_R: Ints
    """Equal for equal texts."""
    ids_R: Ints
    """Equal for equal token ids."""
    empty_R: Bools
    cut_off_R: Bools
    refused_R: Words
    """Why the renderer refused a human response."""
    reward_R: Floats
    """NaN where there is none."""
    draw_R: npt.NDArray[np.uint64]
    """What policies that draw sort by; see `Rule.draws`."""

    @property
    def samples_S(self) -> Ints:
        """The numbers of the samples."""
        return np.arange(self.num_samples)


@dataclass(frozen=True)
class Candidates:
    """Pairs that may be made, sorted by prompt and then by preference."""

    chosen_C: Ints
    rejected_C: Ints
    """Numbers of responses; the rejected one is a sample."""
    lone_C: Words
    """The reason of a sample that has no partner: both its numbers are the same."""

    @classmethod
    def of(cls, chosen_C: Ints, rejected_C: Ints) -> "Candidates":
        """Return candidates that all have two sides."""
        return cls(chosen_C, rejected_C, np.full(len(chosen_C), "", object))

    def __len__(self) -> int:
        return len(self.chosen_C)


@dataclass(frozen=True)
class Verdict:
    """What became of each candidate."""

    reason_C: Words
    """Why it is dropped; "" for a pair."""
    identical_C: Bools
    empty_C: Bools
    cut_off_C: Bools
    """What holds of it, whatever the reason is."""
    win_probability_C: Floats
    """In ½..1 for a pair; NaN where the policy says none."""


class Rule:
    """The section `pair` of a recipe, applied to responses."""

    def __init__(self, config: PairConfig) -> None:
        self._config = config
        self._most = config.max_pairs or (1 if config.needs_rewards else None)

    @property
    def draws(self) -> bool:
        """Whether the policy needs `Responses.draw_R`."""
        return self._config.policy in ("best_vs_random", "random")

    def candidates(self, responses: Responses) -> Candidates:
        """Return the candidates in the order in which they are preferred."""
        samples = responses.samples_S
        unscored = samples[:0]
        if self._config.needs_rewards:
            is_scored = ~np.isnan(responses.reward_R[samples])
            samples, unscored = samples[is_scored], samples[~is_scored]
        by_policy: dict[str, Callable[[Responses, Ints], Candidates]] = {
            "human_vs_self": self._human_first,
            "human_vs_worst": self._human_first,
            "best_vs_worst": self._best_first,
            "best_vs_random": self._best_first,
            "random": self._drawn,
        }
        ranked = by_policy[self._config.policy](responses, samples)
        return _by_prompt(responses, ranked, _lone(unscored, "no_reward"))

    def judge(self, responses: Responses, found: Candidates) -> Verdict:
        """Return what becomes of the candidates."""
        chosen, rejected = found.chosen_C, found.rejected_C
        is_couple = found.lone_C == ""
        identical = is_couple & (
            (responses.text_R[chosen] == responses.text_R[rejected])
            | (responses.ids_R[chosen] == responses.ids_R[rejected])
        )
        reason = np.where(is_couple, self._reasons(responses, found, identical), found.lone_C)
        pair_texts = responses.text_R[chosen] * (responses.text_R.max(initial=0) + 1)
        pair_texts += responses.text_R[rejected]
        prompt = responses.prompt_R[rejected]
        reason[repeats(prompt, pair_texts, reason == "")] = "duplicate"
        if self._most is not None:
            reason[rank_among(prompt, reason == "") >= self._most] = SURPLUS
        return Verdict(
            reason_C=reason,
            identical_C=identical,
            empty_C=responses.empty_R[chosen] | responses.empty_R[rejected],
            cut_off_C=responses.cut_off_R[chosen] | responses.cut_off_R[rejected],
            win_probability_C=self._win_probabilities(self._margins(responses, found)),
        )

    def _ranked(self, responses: Responses) -> Floats:
        return responses.reward_R - self._config.length_penalty * responses.tokens_R

    def _margins(self, responses: Responses, found: Candidates) -> Floats:
        ranked_R = self._ranked(responses)
        margins: Floats = ranked_R[found.chosen_C] - ranked_R[found.rejected_C]
        return margins

    def _win_probabilities(self, margin_C: Floats) -> Floats:
        match self._config.win_probability:
            case "none":
                return np.full(len(margin_C), np.nan)
            case "one":
                return np.ones(len(margin_C))
            case "bradley_terry":
                # Of the margin's own size: exp of a large positive number would overflow.
                return 1 / (1 + np.exp(-np.abs(margin_C)))
            case "win_rate":
                return np.clip((1 + margin_C) / 2, 0.5, 1.0)

    def _unfit(self, responses: Responses) -> Bools:
        """Tell which responses can be in no pair, so that the best of the others is chosen."""
        config = self._config
        unfit = responses.empty_R | (responses.tokens_R < config.min_response_tokens)
        unfit |= responses.prompt_tokens_R + responses.tokens_R > config.max_length
        if config.drop_cut_off:
            unfit |= responses.cut_off_R
        if config.max_response_tokens is not None:
            unfit |= responses.tokens_R > config.max_response_tokens
        return unfit

    def _human_first(self, responses: Responses, samples: Ints) -> Candidates:
        """Pair the human response with samples: by number, or the lowest reward first."""
        keys: list[npt.NDArray[Any]] = [responses.index_R, responses.prompt_R]
        if self._config.needs_rewards:
            keys.insert(1, self._ranked(responses))
        rejected = samples[np.lexsort([key[samples] for key in keys])]
        return Candidates.of(responses.num_samples + responses.prompt_R[rejected], rejected)

    def _best_first(self, responses: Responses, samples: Ints) -> Candidates:
        """Pair the best fit sample with the others: the worst first, or in the drawn order."""
        prompt, index, ranked = responses.prompt_R, responses.index_R, self._ranked(responses)
        keys = (index, -ranked, self._unfit(responses), prompt)
        best_first = samples[np.lexsort([key[samples] for key in keys])]
        is_best = _is_first(prompt[best_first])
        best, others = best_first[is_best], best_first[~is_best]
        preferred = ranked if self._config.policy == "best_vs_worst" else responses.draw_R
        rejected = others[np.lexsort([key[others] for key in (index, preferred, prompt)])]
        chosen = best[np.searchsorted(prompt[best], prompt[rejected])]
        single = best[~np.isin(prompt[best], prompt[others])]
        return _by_prompt(responses, Candidates.of(chosen, rejected), _lone(single, "single"))

    def _drawn(self, responses: Responses, samples: Ints) -> Candidates:
        """Pair neighbours in the drawn order, fit ones first; the higher reward is chosen."""
        prompt, index = responses.prompt_R, responses.index_R
        keys = (index, responses.draw_R, self._unfit(responses), prompt)
        drawn = samples[np.lexsort([key[samples] for key in keys])]
        place = rank_among(prompt[drawn], np.ones(len(drawn), bool))
        is_last = np.append(_is_first(prompt[drawn])[1:], True)[: len(drawn)]
        [first] = np.nonzero((place % 2 == 0) & ~is_last)
        one, other = drawn[first], drawn[first + 1]
        ranked = self._ranked(responses)
        wins = (ranked[one] > ranked[other]) | (
            (ranked[one] == ranked[other]) & (index[one] < index[other])
        )
        couples = Candidates.of(np.where(wins, one, other), np.where(wins, other, one))
        single = drawn[(place == 0) & is_last]
        return _by_prompt(responses, couples, _lone(single, "single"))

    def _reasons(self, responses: Responses, found: Candidates, identical_C: Bools) -> Words:
        """Return the first reason that rules each couple out, or ""."""
        chosen, rejected, config = found.chosen_C, found.rejected_C, self._config
        refused = responses.refused_R[chosen]
        tokens = np.stack([responses.tokens_R[chosen], responses.tokens_R[rejected]])
        shorter, longer = tokens.min(axis=0), tokens.max(axis=0)
        empty = responses.empty_R[chosen] | responses.empty_R[rejected]
        cut_off = responses.cut_off_R[chosen] | responses.cut_off_R[rejected]
        rules: list[tuple[Bools, Any]] = [
            (refused != "", refused),
            (identical_C, "identical"),
            (empty, "empty"),
            (cut_off & config.drop_cut_off, "cut_off"),
            (responses.prompt_tokens_R[rejected] + longer > config.max_length, "too_long"),
            (shorter < config.min_response_tokens, "short_response"),
        ]
        if config.max_response_tokens is not None:
            rules.append((longer > config.max_response_tokens, "long_response"))
        if config.max_length_ratio is not None:
            rules.append((longer > config.max_length_ratio * shorter, "length_ratio"))
        rules += self._reward_rules(responses, found)
        reason: Words = np.full(len(found), "", object)
        for holds, name in reversed(rules):  # so that the first has the last word
            reason = np.where(holds, name, reason)
        return reason

    def _reward_rules(self, responses: Responses, found: Candidates) -> list[tuple[Bools, Any]]:
        config, margin = self._config, self._margins(responses, found)
        rules: list[tuple[Bools, Any]] = []
        if config.tie_policy == "drop":
            rules.append((margin == 0, "tie"))
        if config.min_margin is not None:
            rules.append((margin < config.min_margin, "small_margin"))
        if config.max_margin is not None:
            rules.append((margin > config.max_margin, "large_margin"))
        if config.min_chosen_reward is not None:
            low = responses.reward_R[found.chosen_C] < config.min_chosen_reward
            rules.append((low, "low_chosen_reward"))
        if config.max_rejected_reward is not None:
            high = responses.reward_R[found.rejected_C] > config.max_rejected_reward
            rules.append((high, "high_rejected_reward"))
        return rules


def _lone(samples: Ints, reason: str) -> Candidates:
    return Candidates(samples, samples, np.full(len(samples), reason, object))


def _by_prompt(responses: Responses, *parts: Candidates) -> Candidates:
    """Return all candidates, sorted by prompt; within it, the first part's come first."""
    rejected = np.concatenate([part.rejected_C for part in parts])
    order = np.argsort(responses.prompt_R[rejected], kind="stable")
    chosen = np.concatenate([part.chosen_C for part in parts])
    lone = np.concatenate([part.lone_C for part in parts])
    return Candidates(chosen[order], rejected[order], lone[order])


def _is_first(group_N: Ints) -> Bools:
    """Tell which entries begin a run of equal ones."""
    return np.append(True, group_N[1:] != group_N[:-1])[: len(group_N)]


def rank_among(group_N: Ints, counted_N: Bools) -> Ints:
    """Return the place of each counted entry among the counted of its run; −1 for others."""
    before: Ints = np.cumsum(counted_N) - counted_N
    [starts] = np.nonzero(_is_first(group_N))
    run = np.cumsum(_is_first(group_N)) - 1
    ranks: Ints = np.where(counted_N, before - before[starts][run], -1)
    return ranks


def repeats(group_N: Ints, value_N: Ints, counted_N: Bools) -> Ints:
    """Return the numbers of counted entries that an earlier counted one of their group equals."""
    [numbers] = np.nonzero(counted_N)
    order = numbers[np.lexsort([numbers, value_N[numbers], group_N[numbers]])]
    same = (group_N[order][1:] == group_N[order][:-1]) & (value_N[order][1:] == value_N[order][:-1])
    repeats: Ints = order[1:][same]
    return repeats
