"""task: prompts answered and scored by a reward; accuracy, pass@k and majority@k."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from stages.artifacts import (
    Artifact,
    Manifest,
    Outcome,
    Plan,
    TableWriter,
    Workspace,
    open_artifact,
    produce,
)
from stages.artifacts.produce import first_difference
from stages.artifacts.tables import Row
from stages.config import EngineConfig, RewardConfig, TaskSuiteConfig
from stages.data.chat import chat_fingerprints
from stages.data.inputs import other_source
from stages.data.measures import SHARE, Measure, RangeOf, usual_range, write_measures
from stages.data.rows import SUITE_EXAMPLES
from stages.data.statistics import Interval
from stages.engines import gpus_used
from stages.errors import ConfigError, InputError
from stages.model.source import ModelSource
from stages.rewards import RewardSource, find_reward
from stages.rewards.judge import conversation
from stages.rewards.votes import vote_of
from stages.suites.answering import GREEDY, Answers, Asked, Asker, chosen_rows, score_answers
from stages.suites.base import STAGE, SuiteWork
from stages.suites.estimates import majority_at, pass_at

FORMAT_VERSION = 1


def run(work: SuiteWork, suite: TaskSuiteConfig) -> Manifest:
    """Ask the model, score its answers, and measure them; see `measured`.

    Where the suite has a `data` section all rows of the data are asked, otherwise those held out.

    Raises:
        ConfigError: no reward is named, or an input that is needed; or one that is not needed is.
        InputError: inputs are missing or do not belong together, or there is no prompt to ask.
    """
    work.refuse_all_but("model", "revision", "data")
    name, config = work.inputs.name, work.config
    data, model, reward = _open_data(work, suite), work.model(), _find_reward(work, suite)
    engine = config.answering_engine(suite.engine)
    plan = Plan(
        stage=STAGE,
        format_version=FORMAT_VERSION,
        config={
            "suite": name,
            **suite.identity(),
            "asks": "all" if suite.data else "heldout",
            "seed": config.seed,
            "engine": engine.identity(),
            "reward": dict(reward.identity),
            "chat": config.chat.identity(),
        },
        inputs={"data": data.input_ref(work.root), "model": model.ref, **reward.inputs},
        fingerprints=chat_fingerprints(model.path, config.chat),
    )
    fill = partial(_fill, work, _Task(name, suite, data, model, reward, engine))
    return produce(work.out, plan, fill, resumable=True, reuse=True)


@dataclass(frozen=True)
class _Task:
    name: str
    suite: TaskSuiteConfig
    data: Artifact
    model: ModelSource
    reward: RewardSource
    engine: EngineConfig


def _open_data(work: SuiteWork, suite: TaskSuiteConfig) -> Artifact:
    name, path = work.inputs.name, work.inputs.data
    own = suite.prepares()
    how = f"spin prepare --suite {name} --out DIR" if own else "the run's output of spin prepare"
    if path is None:
        raise ConfigError(f"suites.{name} asks prompts; name them by --data ({how})")
    data = open_artifact(path, stages=("prepare",), verify=work.config.verify)
    if own is not None:
        manifest = data.manifest
        theirs, ours = manifest.key_fields(), manifest.key_fields()
        ours["config"] = {"prepare": own.identity()}
        if theirs != ours:
            raise ConfigError(
                f"{path} is not the data of suites.{name}: {first_difference(theirs, ours)}; "
                f"make it by {how}"
            )
        other = other_source(own, manifest.fingerprints, manifest.info.get("commits", {}))
        if other is not None:
            named = getattr(own, other)
            raise ConfigError(
                f"{path} is not the data of suites.{name}: it was made of another {other}"
                f"{f' than {named}' if named else ''}, or of what that held before; make it by "
                f"{how}"
            )
    return data


def _find_reward(work: SuiteWork, suite: TaskSuiteConfig) -> RewardSource:
    config = suite.reward or work.config.reward
    found = find_reward(config, work.root, work.config.verify, heldout=True)
    if found is None:
        name = work.inputs.name
        raise ConfigError(
            f"suites.{name}: reward.name=none scores nothing; set suites.{name}.reward.name, or "
            "reward.name"
        )
    return found


@dataclass(frozen=True)
class _Answer:
    """What is kept of an answer until it is scored."""

    sample: int
    text: str
    num_tokens: int
    finish_reason: str

    @property
    def name(self) -> str:
        """What it is called in messages and in unscored.parquet."""
        return "greedy" if self.sample == GREEDY else f"sample {self.sample}"


def _fill(work: SuiteWork, task: _Task, space: Workspace) -> Outcome:
    stage, asker = f"suite {task.name}", work.asker(task.model, task.suite, space, task.engine)
    asked, refused = _asked(task, asker)
    answers = _answers(task, asker, asked)
    measures: list[Measure] = []
    unscored = num_tokens = 0
    given = (
        Answers(one, {answer.name: answer.text for answer in answers[one.prompt_id]})
        for one in asked
    )
    with TableWriter(space.file("examples.parquet"), SUITE_EXAMPLES) as table:
        scored = score_answers(space, stage, task.reward, given)
        for one, scores in zip(asked, scored, strict=True):
            both = list(zip(answers.pop(one.prompt_id), scores, strict=True))
            rows = [_row(task, asker, one, answer, score) for answer, score in both]
            table.extend(sorted(rows, key=lambda row: row["sample"]))
            measures += measured(rows, task.suite, task.reward.config)
            num_tokens += sum(row["response_tokens"] for row in rows)
            unscored += scores.count(None)
    ranges = _ranges(task.reward.config)
    metrics = write_measures(space, measures, {"prompts": len(asked)}, ranges)
    return Outcome(
        counts={"prompts": len(asked), "answers": table.num_rows, "dropped_refused": refused}
        | ({"unscored": unscored} if unscored else {}),
        metrics=metrics,
        info={"gpus": gpus_used(task.engine)},
        tokens=num_tokens,
    )


def _asked(task: _Task, asker: Asker) -> tuple[list[Asked], int]:
    """Render the prompts; return them, and how many cannot be asked.

    Raises:
        InputError: there is none.
    """
    parts = ("heldout-", "train-") if task.suite.data else ("heldout-",)
    files = [file for part in parts for file in task.data.files(part)]
    rows = chosen_rows(files, task.suite.max_prompts)
    asked, refused = asker.askable(task.model, rows)
    if not rows:
        remedy = (
            f"look at suites.{task.name}.data"
            if task.suite.data
            else "set prepare.heldout_size or prepare.heldout_source, or give the suite prompts of "
            f"its own by suites.{task.name}.data,"
        )
        what = "prompt" if task.suite.data else "held-out prompt"
        raise InputError(f"{task.data.path} has no {what} to ask; {remedy} and run prepare again")
    if not asked:
        raise InputError(
            f"none of the {refused} prompts of {task.data.path} can be asked with "
            f"suites.{task.name}.max_new_tokens={task.suite.max_new_tokens}; lower it, or take "
            "shorter prompts"
        )
    return asked, refused


def _answers(task: _Task, asker: Asker, asked: Sequence[Asked]) -> dict[str, list[_Answer]]:
    """Return the answers to each prompt: the samples in order, then the greedy one.

    Of an answer its text is kept and not its tokens, of which there are far more bytes.
    """
    found: dict[str, list[_Answer]] = {one.prompt_id: [] for one in asked}
    suite = task.suite
    for prompt_id, sample, done in asker.answers(
        task.model, asked, suite.num_samples, greedy=suite.greedy
    ):
        text = asker.renderer.text(done.token_ids)
        found[prompt_id].append(_Answer(sample, text, len(done.token_ids), done.finish_reason))
    for answers in found.values():
        answers.sort(key=lambda answer: (answer.sample == GREEDY, answer.sample))
    return found


def _row(task: _Task, asker: Asker, asked: Asked, answer: _Answer, score: float | None) -> Row:
    seed = None if answer.sample == GREEDY else asker.sample_seed(asked.prompt_id, answer.sample)
    return dict.fromkeys(SUITE_EXAMPLES.names) | {
        "prompt_id": asked.prompt_id,
        "task": task.name,
        "sample": answer.sample,
        "prompt": conversation(asked.messages),
        "human": asked.human,
        "response": answer.text,
        "response_tokens": answer.num_tokens,
        "finish_reason": answer.finish_reason,
        "seed": seed,
        "score": score,
        "scored_by": task.reward.config.name,
    }


def measured(rows: Sequence[Row], suite: TaskSuiteConfig, reward: RewardConfig) -> list[Measure]:
    """Return what the answers to one prompt measure; the metrics are the means over prompts.

    Of the samples:
    `accuracy`: their mean score.
    `pass@k`: the chance that one of k samples passes, which is to say has a score of at least
    `pass_reward`; see `pass_at`.
    `majority@k`: the chance that the answer that most of k samples give passes; see `majority_at`
    for ties, and `vote_of` for what an answer is.
    `unscored_share`: share of them that have no score; the metrics above leave these out, and
    pass@k and majority@k leave out a prompt of which fewer than k samples have a score.
    `cut_off_share`, and `mean_tokens`, the end token included.
    Of the greedy answer likewise `greedy_accuracy`, `greedy_unscored_share`,
    `greedy_cut_off_share` and `greedy_mean_tokens`.

    Args:
        rows: of SUITE_EXAMPLES.
    """
    samples = [row for row in rows if row["sample"] != GREEDY]
    values = {
        **_of_answers("", samples),
        **_of_answers("greedy_", [row for row in rows if row["sample"] == GREEDY]),
        **_of_subsets([row for row in samples if row["score"] is not None], suite, reward),
    }
    return [Measure(rows[0]["prompt_id"], name, value) for name, value in values.items()]


def _ranges(reward: RewardConfig) -> RangeOf:
    """Return the range of each metric, by name; a mean reward has the reward's."""

    def range_of(name: str) -> Interval | None:
        is_share = reward.is_a_share and name.endswith("accuracy")
        return SHARE if is_share or "@" in name else usual_range(name)

    return range_of


def _of_answers(prefix: str, rows: Sequence[Row]) -> dict[str, float]:
    if not rows:
        return {}
    scores = [row["score"] for row in rows if row["score"] is not None]
    accuracy = {f"{prefix}accuracy": sum(scores) / len(scores)} if scores else {}
    total = len(rows)
    return accuracy | {
        f"{prefix}unscored_share": 1 - len(scores) / total,
        f"{prefix}cut_off_share": sum(row["finish_reason"] == "length" for row in rows) / total,
        f"{prefix}mean_tokens": sum(row["response_tokens"] for row in rows) / total,
    }


def _of_subsets(
    rows: Sequence[Row], suite: TaskSuiteConfig, reward: RewardConfig
) -> dict[str, float]:
    passed = [row["score"] >= suite.pass_reward for row in rows]
    voters: dict[str | None, list[bool]] = defaultdict(list)
    for row, has_passed in zip(rows, passed, strict=True) if suite.k else ():
        voters[vote_of(row["response"], reward)].append(has_passed)
    abstained = len(voters.pop(None, []))
    votes = tuple(sorted((len(each), sum(each) / len(each)) for each in voters.values()))
    values: dict[str, float] = {}
    for k in sorted(set(suite.k)):
        if k <= len(rows):
            values[f"pass@{k}"] = pass_at(len(rows), sum(passed), k)
            values[f"majority@{k}"] = majority_at(votes, abstained, k)
    return values
