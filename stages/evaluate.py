"""evaluate: the player on held-out prompts, alone and against the opponent; one row an example."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages import engines
from stages.alarms import sound
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
    run_root,
)
from stages.artifacts.tables import Row
from stages.config import EvaluateConfig, RewardConfig, RunConfig
from stages.data.chat import Renderer, RowRefusedError, chat_fingerprints, make_renderer
from stages.data.measures import SHARE, Measure, RangeOf, usual_range, write_measures
from stages.data.repeats import repeated_share
from stages.data.rows import DROPPED, DROPPED_FILE, EXAMPLES
from stages.data.statistics import Interval
from stages.data.tokens import PairTokens
from stages.engines import OpenEngine
from stages.engines.base import Completion
from stages.errors import InputError
from stages.model.source import ModelSource, resolve_model
from stages.rewards import RewardSource, find_reward
from stages.suites.answering import GREEDY, Answers, Asked, Asker, chosen_rows, score_answers

_log = logging.getLogger("spin")

FORMAT_VERSION = 4


@dataclass(frozen=True)
class EvaluateInputs:
    """What evaluate reads."""

    model: str
    data: Path
    revision: str | None = None
    opponent: str | None = None
    """The model that the player is compared with; None evaluates the model alone."""
    opponent_revision: str | None = None
    opponent_evaluation: Path | None = None
    """The opponent's own evaluation, whose samples are then not drawn again."""


@dataclass(frozen=True)
class _Example(Asked):
    """One held-out prompt, rendered."""

    human_token_ids: list[int]


def run(
    config: RunConfig,
    inputs: EvaluateInputs,
    out: Path,
    *,
    open_engine: OpenEngine = engines.open_engine,
) -> Manifest:
    """Write examples.parquet, and its metrics; see data/measures.py.

    Held-out prompts that cannot be asked, or leave no room for the human response, are in
    dropped.parquet, which is there where any are.

    What the metrics are is told by `summarize`.

    Raises:
        InputError: inputs are missing or do not belong together, or no prompt is held out.
    """
    data = open_artifact(inputs.data, stages=("prepare",), verify=config.verify)
    root = run_root(out)
    model = resolve_model(inputs.model, inputs.revision, root, config.verify)
    refs = {"data": data.input_ref(root), "model": model.ref}
    reward = find_reward(config.reward, root, config.verify, heldout=True)
    refs |= reward.inputs if reward else {}
    fingerprints = chat_fingerprints(model.path, config.chat)
    opponent = None
    if inputs.opponent is not None:
        source = resolve_model(inputs.opponent, inputs.opponent_revision, root, config.verify)
        refs["opponent"] = source.ref
        _check_tokenizer(inputs, source, fingerprints, config)
        evaluation = _open_opponent_evaluation(inputs, source.ref, config, fingerprints)
        if evaluation is not None:
            refs["opponent_evaluation"] = evaluation.input_ref(root)
        same_reward = evaluation is not None and _is_scored_by(reward, evaluation.manifest)
        opponent = _Opponent(source, evaluation, same_reward)
    plan = Plan(
        stage="evaluate",
        format_version=FORMAT_VERSION,
        config={
            "seed": config.seed,
            "evaluate": config.evaluate.identity(),
            "engine": config.answering_engine().identity(),
            "reward": reward.identity if reward else config.reward.identity(),
            "beta": config.train.beta if opponent else None,
            "chat": config.chat.identity(),
        },
        inputs=refs,
        fingerprints=fingerprints,
    )

    def fill(space: Workspace) -> Outcome:
        renderer = make_renderer(model.verified(), config.chat)
        engine, settings = config.answering_engine(), config.evaluate
        asker = Asker("evaluate", open_engine, engine, settings, config.seed, renderer, space)
        return _fill(space, _Work(config, data, model, reward, asker), opponent)

    return produce(out, plan, fill, resumable=True, reuse=True)


@dataclass(frozen=True)
class _Opponent:
    source: ModelSource
    evaluation: Artifact | None
    same_reward: bool
    """Whether its answers were scored there as ours are here."""


@dataclass(frozen=True)
class _OpponentSample:
    """What the opponent answered to a held-out prompt."""

    token_ids: list[int]
    finish_reason: str
    reward: float | None
    """As its own evaluation says; None where there is none, or no reward."""


@dataclass(frozen=True)
class _Work:
    config: RunConfig
    data: Artifact
    model: ModelSource
    reward: RewardSource | None
    asker: Asker

    @property
    def renderer(self) -> Renderer:
        """The one renderer of both models."""
        return self.asker.renderer


def _fill(space: Workspace, work: _Work, opponent: _Opponent | None) -> Outcome:
    config = work.config.evaluate
    examples, dropped = _render(work)
    theirs = _kept_samples(opponent, examples) if opponent else None  # before any engine starts
    sampled, greedy = _answer(
        work, "player", work.model, examples, with_greedy=work.reward is not None
    )
    rows = [_row(e, sampled[e.prompt_id], greedy.get(e.prompt_id), work) for e in examples]
    unscored = _add_rewards(space, rows, examples, work.reward) if work.reward else {}

    if theirs is None:
        theirs = _drawn_samples(work, opponent, examples) if opponent else {}
    pairs = [
        PairTokens(
            e.prompt_token_ids,
            e.human_token_ids,
            theirs[e.prompt_id].token_ids if opponent else [],
        )
        for e in examples
    ]
    player_logprobs = _logprobs(work.model, work.renderer, pairs, config)
    for row, (human, _) in zip(rows, player_logprobs, strict=True):
        row["human_logprob"] = human
    if opponent:
        opponent_logprobs = _logprobs(opponent.source, work.renderer, pairs, config)
        for row, player, other in zip(rows, player_logprobs, opponent_logprobs, strict=True):
            _compare(row, theirs[row["prompt_id"]], player, other, work)
    with TableWriter(space.file("examples.parquet"), EXAMPLES) as table:
        table.extend(rows)
    if dropped:
        with TableWriter(space.file(DROPPED_FILE), DROPPED) as table:
            table.extend(dropped)
    metrics = write_measures(space, measured(rows), summarize(rows), ranges(work.config.reward))
    sound("evaluate", metrics, work.config.alarms)
    return Outcome(
        counts={"prompts": len(rows), "dropped_refused": len(dropped), **unscored},
        metrics=metrics,
        info={"gpus": engines.gpus_used(work.config.answering_engine())},
        tokens=sum(len(row["sampled_token_ids"]) for row in rows),
    )


def _compare(
    row: Row,
    theirs: _OpponentSample,
    player: tuple[float, float],
    opponent: tuple[float, float],
    work: _Work,
) -> None:
    """Add to a row what the opponent is compared by; pairs are (human, opponent's sample)."""
    beta = work.config.train.beta
    same = list(row["human_token_ids"]) == list(theirs.token_ids)
    human_margin = beta * (player[0] - opponent[0])
    row |= {
        "opponent_human_logprob": opponent[0],
        "opponent_sample": work.renderer.text(theirs.token_ids),
        "opponent_sample_token_ids": theirs.token_ids,
        "opponent_sample_finish_reason": theirs.finish_reason,
        "opponent_sample_reward": theirs.reward,
        "opponent_sample_logprob": opponent[1],
        "player_opponent_sample_logprob": player[1],
        "human_margin": human_margin,
        # rounding must not break a tie
        "opponent_margin": human_margin if same else beta * (player[1] - opponent[1]),
    }


def summarize(rows: Sequence[Row]) -> dict[str, float | None]:
    """Return the flat metrics of some rows of EXAMPLES.

    Of the player, and where it was compared of the opponent, whose names begin with `opponent_`
    instead of `sampled_`:
    `sampled_accuracy`, `greedy_accuracy`: mean reward of the answers that have one, where any has;
    `sampled_unscored_share`, `greedy_unscored_share`: share of those that have none.
    `sampled_cut_off_share`, `sampled_empty_share` (nothing but white space), `sampled_mean_tokens`
    (the end token included).
    `sampled_repeated_share`: share of a response's 4-grams of tokens that stood earlier in it, mean
    over responses; `human_repeated_share` of the human ones.
    `sampled_entropy`: minus the mean log-probability of a token that the model drew, in nats. It
    estimates the entropy of a token where samples are drawn at temperature 1 with top_p 1; drawn in
    another way it is comparable only with what was drawn in that way.
    `sampled_identical_share`: share of samples that equal the human response.
    `human_logprob_per_token`, `human_mean_tokens`.

    Of the player against the opponent:
    `heldout_reward_accuracy`: how often the human response has a higher implicit reward than the
    opponent's own sample; a tie counts one half, so that 0.5 means that the two cannot be told
    apart. `heldout_reward_accuracy_stderr` is its standard error.
    `heldout_reward_margin`: the mean difference of these rewards.
    `sampled_gain`, `sampled_gain_stderr`: by how much the player's samples have a higher reward
    than the opponent's to the same prompts, and its standard error.
    `heldout_kl`: mean of log π_opponent − log π_player over the opponent's samples, an estimate of
    KL(opponent ‖ player) in nats a response, where samples are drawn plainly (temperature 1).
    `heldout_kl_stderr` is its standard error.
    `heldout_human_logratio`: mean of log π_player − log π_opponent over the human responses.
    `heldout_identical_share`: share of the opponent's samples that equal the human response.
    `heldout_length_accuracy`: how often length alone tells the two apart: the accuracy of "the
    longer one is human" or of "the shorter one is", whichever is better, with the same rule for
    ties. `heldout_length_explained` is (it − ½) / (`heldout_reward_accuracy` − ½), None where the
    player does not tell them apart either.
    """
    metrics: dict[str, float | None] = {"prompts": len(rows)}
    for name in ("sampled", "greedy"):
        metrics |= _accuracy(name, [r[f"{name}_reward"] for r in rows])
    metrics |= _of_samples("sampled", rows, "sampled")
    metrics["sampled_identical_share"] = _mean([r["sampled"] == r["human"] for r in rows])
    human_tokens = [len(r["human_token_ids"]) for r in rows]
    metrics["human_logprob_per_token"] = sum(r["human_logprob"] for r in rows) / sum(human_tokens)
    metrics["human_mean_tokens"] = _mean(human_tokens)
    metrics["human_repeated_share"] = _mean([repeated_share(r["human_token_ids"]) for r in rows])
    compared = [r for r in rows if r["human_margin"] is not None]
    if compared:
        metrics |= _accuracy("opponent", [r["opponent_sample_reward"] for r in compared])
        metrics |= _gain(compared)
        metrics |= _of_samples("opponent", compared, "opponent_sample")
        metrics |= _of_comparison(compared)
    return metrics


def measured(rows: Sequence[Row]) -> Iterator[Measure]:
    """Yield those metrics of `summarize` that are means over examples, example by example."""
    for row in rows:
        values: dict[str, float | None] = {
            "sampled_accuracy": row["sampled_reward"],
            "greedy_accuracy": row["greedy_reward"],
            "sampled_identical_share": row["sampled"] == row["human"],
            **_measured_sample("sampled", row, "sampled"),
        }
        if row["human_margin"] is not None:
            margin = row["human_margin"] - row["opponent_margin"]
            values |= {
                "opponent_accuracy": row["opponent_sample_reward"],
                "sampled_gain": _difference(row["sampled_reward"], row["opponent_sample_reward"]),
                "heldout_reward_accuracy": _told(margin),
                "heldout_reward_margin": margin,
                "heldout_kl": row["opponent_sample_logprob"]
                - row["player_opponent_sample_logprob"],
                "heldout_human_logratio": row["human_logprob"] - row["opponent_human_logprob"],
                "heldout_identical_share": row["opponent_sample"] == row["human"],
                **_measured_sample("opponent", row, "opponent_sample"),
            }
        for name, value in values.items():
            if value is not None:
                yield Measure(row["prompt_id"], name, float(value))
        num_tokens = len(row["human_token_ids"])
        per_token = row["human_logprob"] / num_tokens
        yield Measure(row["prompt_id"], "human_logprob_per_token", per_token, num_tokens)
        yield Measure(row["prompt_id"], "human_mean_tokens", num_tokens)


def ranges(reward: RewardConfig) -> RangeOf:
    """Return the range of each metric, by name; mean rewards have the reward's."""

    def range_of(name: str) -> Interval | None:
        is_share = name.endswith("accuracy") and (name.startswith("heldout") or reward.is_a_share)
        return SHARE if is_share else usual_range(name)

    return range_of


def _measured_sample(name: str, row: Row, column: str) -> dict[str, float | None]:
    token_ids = row[f"{column}_token_ids"]
    return {
        f"{name}_cut_off_share": row[f"{column}_finish_reason"] == "length",
        f"{name}_empty_share": not row[column].strip(),
        f"{name}_mean_tokens": len(token_ids),
        f"{name}_repeated_share": repeated_share(token_ids),
    }


def _difference(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _accuracy(name: str, rewards: Sequence[float | None]) -> dict[str, float | None]:
    known = [reward for reward in rewards if reward is not None]
    if not known:
        return {}
    return {
        f"{name}_accuracy": _mean(known),
        f"{name}_unscored_share": 1 - len(known) / len(rewards),
    }


def _gain(rows: Sequence[Row]) -> dict[str, float | None]:
    both = [(r["sampled_reward"], r["opponent_sample_reward"]) for r in rows]
    gains = [own - other for own, other in both if own is not None and other is not None]
    if len(gains) < 2:
        return {}
    return {"sampled_gain": _mean(gains), "sampled_gain_stderr": _standard_error(gains)}


def _of_samples(name: str, rows: Sequence[Row], column: str) -> dict[str, float | None]:
    """Return what samples are like; `column` begins the names of their columns."""
    token_ids = [r[f"{column}_token_ids"] for r in rows]
    num_tokens = sum(map(len, token_ids))
    logprob = sum(r[f"{column}_logprob"] for r in rows)
    return {
        f"{name}_cut_off_share": _mean([r[f"{column}_finish_reason"] == "length" for r in rows]),
        f"{name}_empty_share": _mean([not r[column].strip() for r in rows]),
        f"{name}_mean_tokens": num_tokens / len(rows),
        f"{name}_repeated_share": _mean([repeated_share(ids) for ids in token_ids]),
        f"{name}_entropy": -logprob / num_tokens if num_tokens else None,
    }


def _of_comparison(rows: Sequence[Row]) -> dict[str, float | None]:
    margins = [r["human_margin"] - r["opponent_margin"] for r in rows]
    told_apart = [_told(margin) for margin in margins]
    accuracy = _mean(told_apart)
    longer = [_told(len(r["human_token_ids"]) - len(r["opponent_sample_token_ids"])) for r in rows]
    by_length = max(_mean(longer), 1 - _mean(longer))
    fall = [r["opponent_sample_logprob"] - r["player_opponent_sample_logprob"] for r in rows]
    return {
        "heldout_reward_accuracy": accuracy,
        "heldout_reward_accuracy_stderr": _standard_error(told_apart),
        "heldout_reward_margin": _mean(margins),
        "heldout_kl": _mean(fall),
        "heldout_kl_stderr": _standard_error(fall) if len(fall) > 1 else None,
        "heldout_human_logratio": _mean(
            [r["human_logprob"] - r["opponent_human_logprob"] for r in rows]
        ),
        "heldout_identical_share": _mean([r["opponent_sample"] == r["human"] for r in rows]),
        "heldout_length_accuracy": by_length,
        "heldout_length_explained": (
            (by_length - 0.5) / (accuracy - 0.5) if accuracy > 0.5 else None
        ),
    }


def _told(difference: float) -> float:
    """Return 1 for a positive difference, 0 for a negative one, one half for a tie."""
    return (difference > 0) + 0.5 * (difference == 0)


def _render(work: _Work) -> tuple[list[_Example], list[Row]]:
    """Render the held-out prompts; return them, and rows of DROPPED of those that are left out."""
    rows = chosen_rows(work.data.files("heldout-"), work.config.evaluate.max_prompts)
    rendered = work.asker.rendered(work.model, rows)
    asked = [one for one in rendered if isinstance(one, Asked)]
    humans = iter(work.renderer.responses_tokens([one.human for one in asked]))
    room = work.asker.room(work.model)
    examples: list[_Example] = []
    dropped: list[Row] = []
    for row, one in zip(rows, rendered, strict=True):
        found = _example(one, next(humans), room) if isinstance(one, Asked) else one
        if isinstance(found, _Example):
            examples.append(found)
        else:
            why = {"reason": found.reason, "detail": found.detail}
            dropped.append({"prompt_id": row["prompt_id"], **why})
    if not examples:
        raise InputError(
            f"{work.data.path} has no held-out prompt to evaluate on; set prepare.heldout_size "
            "or prepare.heldout_source and run prepare again"
        )
    return examples, dropped


def _example(
    one: Asked, human: list[int] | RowRefusedError, room: int
) -> _Example | RowRefusedError:
    if isinstance(human, RowRefusedError):
        return human
    size = len(one.prompt_token_ids) + len(human)
    if size > room:
        detail = f"{size} tokens with its prompt, at most {room} fit"
        return RowRefusedError("response_too_long", detail)
    return _Example(**vars(one), human_token_ids=human)


def _answer(
    work: _Work, who: str, source: ModelSource, examples: Sequence[_Example], *, with_greedy: bool
) -> tuple[dict[str, Completion], dict[str, Completion]]:
    """Return sampled and greedy answers by prompt id; greedy ones only where they are wanted."""
    sampled: dict[str, Completion] = {}
    greedy: dict[str, Completion] = {}
    wanted = with_greedy and work.config.evaluate.greedy
    for prompt_id, sample, done in work.asker.answers(source, examples, 1, greedy=wanted, who=who):
        (greedy if sample == GREEDY else sampled)[prompt_id] = done
    return sampled, greedy


def _row(example: _Example, sampled: Completion, greedy: Completion | None, work: _Work) -> Row:
    text = work.renderer.text
    return dict.fromkeys(EXAMPLES.names) | {
        "prompt_id": example.prompt_id,
        "human": example.human,
        "human_token_ids": example.human_token_ids,
        "sampled": text(sampled.token_ids),
        "sampled_seed": work.asker.sample_seed(example.prompt_id, 0),
        "sampled_finish_reason": sampled.finish_reason,
        "sampled_token_ids": sampled.token_ids,
        "sampled_logprob": math.fsum(sampled.token_logprobs),
        "greedy": text(greedy.token_ids) if greedy else None,
        "greedy_finish_reason": greedy.finish_reason if greedy else None,
    }


def _add_rewards(
    space: Workspace, rows: Sequence[Row], examples: Sequence[_Example], source: RewardSource
) -> dict[str, int]:
    """Score the answers in place; count those without a score.

    Raises:
        InputError: see `score_answers`.
    """
    given = [
        Answers(e, {n: row[n] for n in ("sampled", "greedy") if row[n] is not None})
        for e, row in zip(examples, rows, strict=True)
    ]
    unscored = 0
    for row, answers, scores in zip(
        rows, given, score_answers(space, "evaluate", source, given), strict=True
    ):
        row |= {f"{n}_reward": s for n, s in zip(answers.responses, scores, strict=True)}
        unscored += scores.count(None)
    return {"unscored": unscored} if unscored else {}


def _drawn_samples(
    work: _Work, opponent: _Opponent, examples: Sequence[_Example]
) -> dict[str, _OpponentSample]:
    """Return the opponent's own sample for each prompt, drawn now."""
    sampled, _ = _answer(work, "opponent", opponent.source, examples, with_greedy=False)
    return {
        prompt_id: _OpponentSample(done.token_ids, done.finish_reason, None)
        for prompt_id, done in sampled.items()
    }


def _kept_samples(
    opponent: _Opponent, examples: Sequence[_Example]
) -> dict[str, _OpponentSample] | None:
    """Return the opponent's own sample for each prompt, from its evaluation; None without one.

    Raises:
        InputError: the evaluation lacks prompts.
    """
    if opponent.evaluation is None:
        return None
    names = ["sampled_token_ids", "sampled_finish_reason", "sampled_reward"]
    file = opponent.evaluation.file("examples.parquet")
    found = {
        row["prompt_id"]: _OpponentSample(
            row["sampled_token_ids"],
            row["sampled_finish_reason"],
            row["sampled_reward"] if opponent.same_reward else None,
        )
        for row in read_rows([file], EXAMPLES, columns=["prompt_id", *names])
    }
    missing = sum(e.prompt_id not in found for e in examples)
    if missing:
        raise InputError(
            f"{opponent.evaluation.path} lacks {missing} of {len(examples)} held-out prompts; "
            "evaluate the opponent on the same data, or leave out --opponent-evaluation"
        )
    return found


def _logprobs(
    source: ModelSource, renderer: Renderer, pairs: Sequence[PairTokens], config: EvaluateConfig
) -> list[tuple[float, float]]:
    """Return (human, opponent's sample) log-probabilities of every pair under one model."""
    from stages.model.scoring import Scorer

    longest = max((len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs), default=0)
    return Scorer(source.verified(), config, renderer.pad_token_id, longest).logprobs(pairs)


def _check_tokenizer(
    inputs: EvaluateInputs,
    opponent: ModelSource,
    fingerprints: Mapping[str, str],
    config: RunConfig,
) -> None:
    """Check that the opponent reads and writes the player's tokens.

    Another template of its own is none of its hindrances: both are asked with the player's.

    Raises:
        InputError: it does not.
    """
    theirs = chat_fingerprints(opponent.path, config.chat)
    if theirs["tokenizer"] != fingerprints["tokenizer"]:
        raise InputError(
            f"evaluate: {inputs.opponent} has another tokenizer or other stop tokens than "
            f"{inputs.model}, so that neither can score what the other says; name an opponent with "
            "the same tokenizer, or compare both by a suite of kind win_rate"
        )


def _open_opponent_evaluation(
    inputs: EvaluateInputs,
    opponent: InputRef,
    config: RunConfig,
    fingerprints: Mapping[str, str],
) -> Artifact | None:
    """Open the opponent's evaluation, if there is one whose samples were drawn as ours are."""
    if inputs.opponent_evaluation is None:
        return None
    found = open_artifact(inputs.opponent_evaluation, stages=("evaluate",), verify=config.verify)
    if found.manifest.inputs["model"].key != opponent.key:
        raise InputError(
            f"{found.path} evaluates another model than {inputs.opponent}; "
            "give the opponent's own evaluation, or leave out --opponent-evaluation"
        )
    theirs = found.manifest.config
    ours = {
        "seed": config.seed,
        "evaluate": config.evaluate.identity() | {"engine": None},
        "chat": config.chat.identity(),
        "chat template": fingerprints["template"],
    }
    drawn = {
        **theirs,
        "evaluate": theirs["evaluate"] | {"engine": None},
        "chat template": found.manifest.fingerprints.get("template"),
    }
    differing = [name for name, mine in ours.items() if drawn.get(name) != mine]
    if differing:
        _log.warning(
            "%s was made with other settings (%s): the opponent answers anew, and its answers have "
            "no reward to compare with (alarm accuracy_drop)", found.path, " and ".join(differing),
        )  # fmt: skip
        return None
    engine, their_engine = config.answering_engine().identity(), theirs["engine"]
    others = sorted(name for name, mine in engine.items() if their_engine.get(name) != mine)
    if others:
        _log.warning(
            "%s was drawn by another engine (%s): the same seeds give other samples, so look at "
            "intervals, not at single prompts", found.path, ", ".join(others),
        )  # fmt: skip
    return found


def _is_scored_by(reward: RewardSource | None, evaluation: Manifest) -> bool:
    """Tell whether an evaluation's answers were scored by this very reward."""
    if reward is None or evaluation.config["reward"] != reward.identity:
        return False
    theirs = {name: evaluation.inputs.get(name) for name in reward.inputs}
    ours = {name: (ref.key, ref.content) for name, ref in reward.inputs.items()}
    return ours == {name: ref and (ref.key, ref.content) for name, ref in theirs.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float:
    """Return the standard error of a mean; of one value in 0..1, the largest possible."""
    if len(values) < 2:
        return 0.5
    mean = _mean(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))
