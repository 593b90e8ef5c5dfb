"""win_rate: a model's answers against others to the same prompts, by a reward or a judge.

A win counts 1, a tie one half. By rule or reward model the answer with the higher score wins, and
equal answers tie; a judge is shown both, in both orders unless `swap` is off.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stages.artifacts import (
    Artifact,
    InputRef,
    Manifest,
    Outcome,
    Plan,
    TableWriter,
    Workspace,
    open_artifact,
    produce,
    read_rows,
)
from stages.artifacts.tables import Row
from stages.config import SamplingConfig, WinRateSuiteConfig
from stages.data.chat import chat_fingerprints
from stages.data.measures import Measure, write_measures
from stages.data.rows import EXAMPLES, JUDGEMENTS, SUITE_EXAMPLES
from stages.engines import gpus_used
from stages.errors import ConfigError, InputError
from stages.model.source import ModelSource
from stages.rewards import RewardSource, find_reward
from stages.rewards.judge import conversation
from stages.suites import exchange
from stages.suites.answering import (
    GREEDY,
    Answers,
    Asked,
    chosen_rows,
    score_answers,
)
from stages.suites.base import STAGE, SuiteWork
from stages.suites.wins import Win, measured_wins, range_of_wins

FORMAT_VERSION = 2
OURS, OTHER = "ours", "other"
"""What the two answers are called; in judgements.parquet they are 0 and 1."""
SAMPLE = {"sampled": 0, "greedy": GREEDY}
"""What `sample` is in a suite's examples."""
_log = logging.getLogger("spin")


@dataclass(frozen=True)
class _Sources:
    """Where the answers come from."""

    data: Artifact
    answers: Artifact | None
    model: ModelSource | None
    """Who is asked; None where there are `answers`."""
    against: Artifact | None
    """None: the human answers of `data`."""


@dataclass(frozen=True)
class _Pair:
    """A prompt with both answers."""

    asked: Asked
    ours: str
    other: str


@dataclass(frozen=True)
class _Verdict:
    """Who won a pair."""

    pair: _Pair
    scores: tuple[float, float]
    """Ours and the other's: a judge's are shares of wins against each other."""
    win: float
    """1, 0, or what is between."""

    @property
    def prompt_id(self) -> str:
        """The pair's prompt."""
        return self.pair.asked.prompt_id


def run(work: SuiteWork, suite: WinRateSuiteConfig) -> Manifest:
    """Compare answers pair by pair; see the module's text.

    Metrics, of all pairs that have a verdict, are those of `measured_wins`; of a reward further
    `mean_reward` and `other_mean_reward`; of a judge with `swap` also `position_flip_share`, how
    often its verdict changes with the order.

    Raises:
        ConfigError: nobody is named who decides, or an input is missing or of no use.
        InputError: inputs do not belong together, or have no prompt in common.
    """
    work.refuse_all_but("model", "revision", "data", "answers", "against")
    config, reward = work.config, _find_reward(work, suite)
    sources, refs = _open(work)
    asked = sources.model
    _warn_of_other_ways(work, suite, sources)
    plan = Plan(
        stage=STAGE,
        format_version=FORMAT_VERSION,
        config={
            "suite": work.inputs.name,
            **suite.identity(),
            "reward": dict(reward.identity),
            **({} if asked is None else _asking(work)),
        },
        inputs={**refs, **reward.inputs},
        fingerprints={} if asked is None else chat_fingerprints(asked.path, config.chat),
    )

    def fill(space: Workspace) -> Outcome:
        rows = chosen_rows(sources.data.files("heldout-"), suite.max_prompts)
        if asked is None:
            assert sources.answers is not None, "no model is asked only where there are answers"
            ours = answers_of(sources.answers, suite.answers)
        else:
            ours = _ask(work, suite, asked, rows, space)
        pairs, counts = _pairs(work.inputs.name, sources, suite, rows, ours)
        outcome = _fill(space, work.inputs.name, suite, pairs, reward, counts)
        if asked is None:
            return outcome
        return replace(outcome, info={"gpus": gpus_used(work.config.answering_engine())})

    return produce(work.out, plan, fill, resumable=True, reuse=True)


def answers_of(artifact: Artifact, which: str) -> dict[str, str]:
    """Return the answers of an evaluation or a suite by prompt id.

    Args:
        which: `sampled` or `greedy`.
    """
    file = artifact.file("examples.parquet")
    if artifact.manifest.stage == STAGE:
        names = ["prompt_id", "sample", "response"]
        rows = read_rows([file], SUITE_EXAMPLES, columns=names)
        found = ((row["prompt_id"], row["response"]) for row in rows
                 if row["sample"] == SAMPLE[which])  # fmt: skip
    else:
        rows = read_rows([file], EXAMPLES, columns=["prompt_id", which])
        found = ((row["prompt_id"], row[which]) for row in rows)
    return {prompt_id: text for prompt_id, text in found if text is not None}


def _find_reward(work: SuiteWork, suite: WinRateSuiteConfig) -> RewardSource:
    config = suite.reward or work.config.reward
    if config.name == "judge":
        # One comparison a prompt: of our answer and the other.
        pairwise = {"against": "samples", "max_comparisons": None}
        config = config.model_copy(update={"judge": config.judge.model_copy(update=pairwise)})
    found = find_reward(config, work.root, work.config.verify)
    if found is None:
        name = work.inputs.name
        raise ConfigError(
            f"suites.{name}: nobody decides who wins; set suites.{name}.reward.name, or reward.name"
        )
    return replace(found, swap=suite.swap)


def _open(work: SuiteWork) -> tuple[_Sources, dict[str, InputRef]]:
    inputs, root, verify = work.inputs, work.root, work.config.verify
    if inputs.data is None:
        raise ConfigError(f"suites.{inputs.name} needs --data, the output of prepare")
    data = open_artifact(inputs.data, stages=("prepare",), verify=verify)
    refs = {"data": data.input_ref(root)}
    answers, against = (_open_answers(p, verify) for p in (inputs.answers, inputs.against))
    if against is not None:
        refs["against"] = against.input_ref(root)
    if answers is not None:
        exchange.check_model(work, answers)
        refs["model"] = exchange.model_of(answers, work.out)
        refs["answers"] = answers.input_ref(root)
        return _Sources(data, answers, None, against), refs
    if inputs.model is None:
        raise ConfigError(
            f"suites.{inputs.name} needs --answers, an evaluation of the model, or --model"
        )
    model = work.model()
    return _Sources(data, None, model, against), refs | {"model": model.ref}


def _warn_of_other_ways(work: SuiteWork, suite: WinRateSuiteConfig, sources: _Sources) -> None:
    """Tell which settings the two sides were asked with differ: those may win, not the model."""
    if sources.against is None:
        return
    answers = sources.answers
    ours = _ways(_asking(work) if answers is None else answers.manifest.config, suite)
    theirs = _ways(sources.against.manifest.config, suite)
    shown = exchange.shown
    differing = [
        f"{name} {shown(ours[name], 30)} and {shown(theirs[name], 30)}"
        for name in sorted(ours.keys() & theirs.keys())
        if ours[name] != theirs[name]
    ]
    if differing:
        _log.warning(
            "evaluate --suite %s: our answers and those of %s were asked for in different ways "
            "(%s), which the win rate tells too", work.inputs.name, sources.against.path,
            "; ".join(differing),
        )  # fmt: skip


def _ways(config: Mapping[str, Any], suite: WinRateSuiteConfig) -> dict[str, Any]:
    """Return those settings of an evaluation or a suite that decide its answers, by their names."""
    drawn = config.get("evaluate") or config.get("sampling") or config
    names = ["max_new_tokens"] if suite.answers == "greedy" else [*SamplingConfig.model_fields]
    chat = {f"chat.{name}": value for name, value in (config.get("chat") or {}).items()}
    return {name: drawn[name] for name in names if name in drawn} | chat


def _open_answers(path: Path | None, verify: bool) -> Artifact | None:
    if path is None:
        return None
    found = open_artifact(path, stages=("evaluate", STAGE), verify=verify)
    if "model" not in found.manifest.inputs:
        raise InputError(f"{path} does not say whose answers it holds; name an evaluation")
    return found


def _asking(work: SuiteWork) -> dict[str, Any]:
    """Return what decides a model's answers, which are drawn as `evaluate` draws them."""
    evaluate = work.config.evaluate.identity()
    return {
        "seed": work.config.seed,
        "sampling": {name: evaluate[name] for name in SamplingConfig.model_fields},
        "engine": work.config.answering_engine().identity(),
        "chat": work.config.chat.identity(),
    }


def _ask(
    work: SuiteWork,
    suite: WinRateSuiteConfig,
    model: ModelSource,
    rows: Sequence[Row],
    space: Workspace,
) -> dict[str, str]:
    """Return the model's answers by prompt id; prompts that it cannot be asked have none."""
    asker = work.asker(model, work.config.evaluate, space, None)
    asked, _ = asker.askable(model, rows)
    if not asked:
        return {}
    is_greedy = suite.answers == "greedy"
    found = asker.answers(model, asked, 0 if is_greedy else 1, greedy=is_greedy)
    tokens = {prompt_id: done.token_ids for prompt_id, _, done in found}
    return dict(zip(tokens, asker.renderer.texts(list(tokens.values())), strict=True))


def _pairs(
    name: str,
    sources: _Sources,
    suite: WinRateSuiteConfig,
    rows: Sequence[Row],
    ours: Mapping[str, str],
) -> tuple[list[_Pair], dict[str, int]]:
    """Return the prompts that both sides answered, and how many were not, by the side that lacks.

    Raises:
        InputError: there is none.
    """
    other = None if sources.against is None else answers_of(sources.against, suite.answers)
    pairs, counts = [], Counter[str]()
    for row in rows:
        prompt_id = row["prompt_id"]
        theirs = row["response"] if other is None else other.get(prompt_id)
        if prompt_id not in ours:
            counts["dropped_no_answer"] += 1
        elif theirs is None:
            counts["dropped_no_other_answer"] += 1
        else:
            asked = Asked(prompt_id, row["messages"], row["response"], [])
            pairs.append(_Pair(asked, ours[prompt_id], theirs))
    if not pairs:
        sides = f"{len(ours)} {suite.answers} answers of the model"
        if sources.against is not None and other is not None:
            sides += f", {len(other)} in {sources.against.path}"
        raise InputError(
            f"no prompt of {sources.data.path} was answered by both sides ({sides}); compare "
            "evaluations of the same data"
        )
    missing = counts["dropped_no_other_answer"]
    if missing:
        _log.warning(
            "evaluate --suite %s: %d of %d prompts have no answer to compare with; they are left "
            "out",
            name, missing, len(pairs) + missing,
        )  # fmt: skip
    return pairs, dict(counts)


def _fill(
    space: Workspace,
    name: str,
    suite: WinRateSuiteConfig,
    pairs: Sequence[_Pair],
    reward: RewardSource,
    counts: Mapping[str, int],
) -> Outcome:
    is_judge = reward.config.name == "judge"
    given = (Answers(pair.asked, {OURS: pair.ours, OTHER: pair.other}) for pair in pairs)
    scores = list(score_answers(space, f"suite {name}", reward, given))
    verdicts = [
        _Verdict(pair, (ours, other), ours if is_judge else _won(pair, ours, other))
        for pair, (ours, other) in zip(pairs, scores, strict=True)
        if ours is not None and other is not None
    ]
    if not verdicts:
        raise InputError(
            f"suite {name}: none of {len(pairs)} pairs has a score on both sides; is "
            f"reward.name={reward.config.name} right for this data?"
        )
    decider = f"judge {reward.config.judge.model}" if is_judge else reward.config.name
    with TableWriter(space.file("examples.parquet"), SUITE_EXAMPLES) as table:
        table.extend(_row(name, suite, verdict, f"win by {decider}") for verdict in verdicts)
    further = _flips(space.path) if is_judge else _rewards(verdicts)
    wins = [Win(v.prompt_id, v.win, v.pair.ours, v.pair.other) for v in verdicts]
    measures = [*measured_wins(wins), *further]
    metrics = write_measures(space, measures, {"prompts": len(verdicts)}, range_of_wins)
    unscored = len(pairs) - len(verdicts)
    kept = {"unscored": unscored} if unscored else {}
    return Outcome(counts={"prompts": len(verdicts), **counts, **kept}, metrics=metrics)


def _won(pair: _Pair, ours: float, other: float) -> float:
    """Return 1 where ours is the higher score, one half for a tie, which equal answers are.

    A reward model's logits of one text differ in their last bits with the batch it is in.
    """
    if pair.ours == pair.other:
        return 0.5
    return (ours > other) + 0.5 * (ours == other)


def _rewards(verdicts: Sequence[_Verdict]) -> Iterator[Measure]:
    for verdict in verdicts:
        for name, score in zip(("mean_reward", "other_mean_reward"), verdict.scores, strict=True):
            yield Measure(verdict.prompt_id, name, score)


def _flips(folder: Path) -> Iterator[Measure]:
    """Yield of each pair that a judge saw in both orders whether its verdict changed."""
    said: dict[str, list[str | None]] = {}
    for row in read_rows([folder / "judgements.parquet"], JUDGEMENTS):
        said.setdefault(row["prompt_id"], []).append(row["verdict"])
    for prompt_id, verdicts in said.items():
        if len(verdicts) == 2 and None not in verdicts:
            yield Measure(prompt_id, "position_flip_share", float(verdicts[0] != verdicts[1]))


def _row(name: str, suite: WinRateSuiteConfig, verdict: _Verdict, by: str) -> Row:
    pair = verdict.pair
    return dict.fromkeys(SUITE_EXAMPLES.names) | {
        "prompt_id": verdict.prompt_id,
        "task": name,
        "sample": SAMPLE[suite.answers],
        "prompt": conversation(pair.asked.messages),
        "human": pair.asked.human,
        "response": pair.ours,
        "score": verdict.win,
        "scored_by": by,
        "other": pair.other,
    }
