"""Pairing side by side with the two programs whose games we play, on the same toy inputs.

Their semantics are re-implemented here in a few lines from what their code does, not copied:
uclaml/SPIN's spin/generate_vllm.py with spin/convert_data.py, and verl's recipe/spin
(compute_onlinedpo_pref in core_algos.py, called after the trainer has balanced the batch). Where we
differ, the difference is asserted, and docs/pairing.md lists it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from stages.config import PairConfig
from tests.pairs_by_hand import Sample, pair_fast, sample

UCLAML = PairConfig(drop_cut_off=False)
VERL = PairConfig(policy="best_vs_worst", tie_policy="first", drop_cut_off=False)
Pairs = list[tuple[str, str, str]]
"""Prompt, chosen, rejected."""


def uclaml(rows: Sequence[tuple[str, str, str]]) -> Pairs:
    """A pair of each row (prompt, real, generated), in the order of the rows, whatever they hold.

    Answers lose `</s>` and white space at their beginning: the text is tokenized again later.
    """
    return [(p, real, text.replace("</s>", "").lstrip()) for p, real, text in rows]


def verl(rows: Sequence[tuple[str, str, float]]) -> Pairs:
    """A pair of each two neighbours in a batch of (prompt, answer, reward); a tie is the first's.

    Neighbours are told by their place alone; a pair is trained on with the prompts they came with,
    which is to say with the chosen one's.
    """
    if len(rows) % 2:
        raise ValueError("the batch must be even")
    pairs = []
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        chosen, rejected = (other, one) if other[2] > one[2] else (one, other)
        pairs.append((chosen[0], chosen[1], rejected[1]))
    return pairs


def ours_of_humans(rows: Sequence[tuple[str, str, str]], config: PairConfig = UCLAML) -> Pairs:
    prompts = {p: (real, [sample(0, text, prompt_id=p)]) for p, real, text in rows}
    return _pairs(prompts, config)


def ours_of_ranked(rows: Sequence[tuple[str, str, float]], config: PairConfig = VERL) -> Pairs:
    prompts: dict[str, tuple[str, list[Sample]]] = {}
    for p, text, reward in rows:
        group = prompts.setdefault(p, ("", []))[1]
        group.append(sample(len(group), text, reward, prompt_id=p))
    return _pairs(prompts, config)


def _pairs(prompts: Mapping[str, Any], config: PairConfig) -> Pairs:
    table, _, _ = pair_fast(prompts, config)
    columns = (table[name].to_pylist() for name in ("prompt_id", "chosen", "rejected"))
    return list(zip(*columns, strict=True))


HUMAN = [("p1", "It is 19.", "It is 20."), ("p2", "Paris.", "Rome."), ("p3", "Yes.", "no")]
RANKED = [
    ("p1", "19", 1.0), ("p1", "20", 0.0),
    ("p2", "Rome", 0.0), ("p2", "Paris", 1.0),
    ("p3", "worse", -0.5), ("p3", "bad", -0.25),
]  # fmt: skip


def test_the_papers_pairs_are_the_same() -> None:
    assert ours_of_humans(HUMAN) == uclaml(HUMAN)


def test_order_of_rows_is_theirs_of_ids_ours() -> None:
    assert uclaml(HUMAN[::-1]) == uclaml(HUMAN)[::-1]
    assert ours_of_humans(HUMAN[::-1]) == ours_of_humans(HUMAN)


@pytest.mark.parametrize(
    ("real", "generated", "rejected"),
    [("Yes.", "Yes.", "Yes."), ("Yes.", "", ""), ("Yes.", " Yes.", "Yes."), ("", "no", "no")],
)
def test_identical_and_empty_rows_are_kept_there_and_dropped_here(
    real: str, generated: str, rejected: str
) -> None:
    rows = [("p1", real, generated)]
    assert uclaml(rows) == [("p1", real, rejected)]
    assert ours_of_humans(rows) == ([] if generated != " Yes." else [("p1", real, " Yes.")])


def test_we_keep_the_text_that_was_generated_and_they_trim_it() -> None:
    rows = [("p1", "Yes.", "\n no")]
    assert uclaml(rows) == [("p1", "Yes.", "no")]
    assert ours_of_humans(rows) == [("p1", "Yes.", "\n no")]


def test_cut_off_answers_are_kept_there_and_here_only_if_told() -> None:
    prompts = {"p1": ("Yes.", [sample(0, "no", prompt_id="p1", finish_reason="length")])}
    assert _pairs(prompts, UCLAML) == uclaml([("p1", "Yes.", "no")])
    assert _pairs(prompts, PairConfig()) == []


def test_verls_pairs_are_the_same_with_two_samples_a_prompt() -> None:
    assert ours_of_ranked(RANKED) == verl(RANKED)


def test_a_tie_is_the_first_ones_there_and_here_if_told() -> None:
    rows = [("p1", "one", 1.0), ("p1", "two", 1.0)]
    assert ours_of_ranked(rows) == verl(rows) == [("p1", "one", "two")]
    assert ours_of_ranked(rows, PairConfig(policy="best_vs_worst")) == []


def test_equal_answers_are_a_pair_there_and_never_here() -> None:
    rows = [("p1", "one", 1.0), ("p1", "one", 1.0)]
    assert verl(rows) == [("p1", "one", "one")]
    assert ours_of_ranked(rows) == []


def test_four_samples_are_two_couples_there_and_ranked_together_here() -> None:
    rows = [("p1", "b", 0.5), ("p1", "d", 0.0), ("p1", "a", 1.0), ("p1", "c", 0.25)]
    assert verl(rows) == [("p1", "b", "d"), ("p1", "a", "c")]
    assert ours_of_ranked(rows) == [("p1", "a", "d")]
    best = max(rows, key=lambda row: row[2])
    worst = min(rows, key=lambda row: row[2])
    assert ours_of_ranked(rows) == [("p1", best[1], worst[1])]


def test_one_sample_a_prompt_pairs_two_prompts_there_and_none_here() -> None:
    rows = [("p1", "one", 1.0), ("p2", "two", 0.0)]
    assert verl(rows) == [("p1", "one", "two")]  # the answer to p2, under p1
    assert ours_of_ranked(rows) == []


def test_a_balanced_batch_pairs_across_prompts_there_and_changes_nothing_here() -> None:
    order = [0, 2, 5, 4, 1, 3]  # by length, as a balanced batch may be
    shuffled = [RANKED[i] for i in order]
    answers = {(p, text) for p, text, _ in RANKED}
    assert [(p, rejected) in answers for p, _, rejected in verl(shuffled)] == [False, True, False]
    prompts: dict[str, tuple[str, list[Sample]]] = {}
    for i in order:  # as it comes; the sample index is the one of generation
        p, text, reward = RANKED[i]
        prompts.setdefault(p, ("", []))[1].append(sample(i % 2, text, reward, prompt_id=p))
    assert _pairs(prompts, VERL) == verl(RANKED)
