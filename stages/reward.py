"""reward: one score a sample, kept apart so that it can be made again without generating."""

import logging
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from heapq import merge
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.artifacts import (
    Artifact,
    Manifest,
    Outcome,
    Plan,
    TableWriter,
    Workspace,
    count_rows,
    open_artifact,
    produce,
    read_rows,
    run_root,
)
from stages.artifacts.keys import sha256_text
from stages.artifacts.shards import ASIDE
from stages.artifacts.tables import Row
from stages.config import RewardConfig, RunConfig
from stages.data.join import grouped, inner_join
from stages.data.rows import (
    DROPPED,
    DROPPED_FILE,
    GENERATIONS,
    JUDGEMENTS,
    PROMPTS,
    REWARDS,
    SCORES,
)
from stages.errors import ConfigError, InputError
from stages.progress import Progress, progress
from stages.rewards import (
    REASONS,
    Question,
    RewardSource,
    Score,
    Scored,
    Unscored,
    find_reward,
    open_reward,
    shard_prompts,
)

_log = logging.getLogger("spin")

FORMAT_VERSION = 1
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class RewardInputs:
    """What reward reads."""

    data: Path
    generations: tuple[Path, ...]
    """The opponent's, then those of pool members, which answer other prompts."""


def run(config: RunConfig, inputs: RewardInputs, out: Path) -> Manifest:
    """Score every sample; a sample that cannot be scored goes to dropped.parquet.

    Finished shards of a stage that was cut off are kept: a judge is not asked twice.

    Raises:
        ConfigError: the recipe names no reward, or one that cannot be opened.
        InputError: inputs are missing, do not belong together, or no sample can be scored; or
            one cannot, and `reward.on_error` is to stop.
    """
    data = open_artifact(inputs.data, stages=("prepare",), verify=config.verify)
    generations = [
        open_artifact(place, stages=("generate",), verify=config.verify)
        for place in inputs.generations
    ]
    for artifact in generations:
        if artifact.manifest.inputs["data"].key != data.manifest.key:
            raise InputError(
                f"{artifact.path} was made from another data than {data.path}; give the data that "
                "it was made from, or run generate again"
            )
    root = run_root(out)
    source = find_reward(config.reward, root, config.verify)
    if source is None:
        raise ConfigError("reward.name=none scores nothing; choose one of those in docs/rewards.md")
    refs = {"data": data.input_ref(root)}
    for number, artifact in enumerate(generations):
        refs[f"generations_{number}" if number else "generations"] = artifact.input_ref(root)
    plan = Plan(
        stage="reward",
        format_version=FORMAT_VERSION,
        config={"reward": source.identity},
        inputs=refs | dict(source.inputs),
    )
    return produce(out, plan, lambda space: _fill(space, source, data, generations), resumable=True)


def _fill(
    space: Workspace, source: RewardSource, data: Artifact, generations: Sequence[Artifact]
) -> Outcome:
    total = sum(count_rows(artifact.files("part-")) for artifact in generations)
    with progress("reward", total=total, unit="samples") as bar:
        shards = _Shards(space, source.config, bar)
        with ExitStack() as opened:
            unscored = shards.unscored(_asked(data, generations))
            if (first := next(unscored, None)) is not None:  # else all was done before a kill
                reward = opened.enter_context(open_reward(source))
                shards.take(reward.score, first, unscored)
    outcome = _assemble(space, shards.names, source)
    if outcome.counts["samples"] != total:
        raise InputError(
            f"reward: {total - outcome.counts['samples']} of {total} samples answer prompts that "
            f"{data.path} does not hold; give the data that they were generated from"
        )
    return outcome


@dataclass(frozen=True)
class _Asked:
    """A question, and which samples its responses are."""

    question: Question
    sample_indexes: tuple[int, ...]


def _asked(data: Artifact, generations: Sequence[Artifact]) -> Iterator[_Asked]:
    """Yield the questions in order of their ids.

    Raises:
        InputError: two of the artifacts answer the same prompt.
    """
    columns = ["prompt_id", "messages", "response"]
    prompts = grouped(read_rows(data.files("train-"), PROMPTS, columns=columns), data.path)
    columns = ["prompt_id", "sample_index", "response"]
    streams = [
        grouped(read_rows(artifact.files("part-"), GENERATIONS, columns=columns), artifact.path)
        for artifact in generations
    ]
    for prompt_id, (prompt,), group in inner_join(prompts, _disjoint(streams)):
        responses = tuple(sample["response"] for sample in group)
        yield _Asked(
            Question(prompt_id, prompt["messages"], prompt["response"], responses),
            tuple(sample["sample_index"] for sample in group),
        )


def _disjoint(streams: Sequence[Iterator[tuple[str, list[Row]]]]) -> Iterator[tuple[str, Any]]:
    merged = merge(*streams, key=lambda item: item[0])
    for prompt_id, found in groupby(merged, key=lambda item: item[0]):
        first, *others = found
        if others:
            raise InputError(
                f"reward: prompt {prompt_id} is answered in {1 + len(others)} of the artifacts "
                "given as --generations; give those of one iteration, each once"
            )
        yield first


class _Shards:
    """The scores of some prompts each, committed as they are made; see `Workspace.shards`."""

    def __init__(self, space: Workspace, config: RewardConfig, bar: Progress) -> None:
        self._space, self._config, self._bar = space, config, bar
        self._size = shard_prompts(config)
        self._waiting = deque[tuple[str, list[_Asked], _Asked]]()
        """What the reward has been given: shard, all of the shard, and the question."""
        self._scores: list[Row] = []
        self._judgements: list[Row] = []
        self.names: list[str] = []
        """Of all shards, in order."""

    def unscored(self, questions: Iterator[_Asked]) -> Iterator[Question]:
        """Yield what is in no finished shard, one after the other."""
        while shard := list(islice(questions, self._size)):
            name = f"{len(self.names):05d}.parquet"
            self.names.append(name)
            if self._is_done(name, shard):
                self._bar.skip(sum(len(asked.sample_indexes) for asked in shard))
                continue
            for asked in shard:
                self._waiting.append((name, shard, asked))
                yield asked.question

    def take(self, score: Any, first: Question, others: Iterator[Question]) -> None:
        """Score what is given, and commit each shard when it is whole."""

        def given() -> Iterator[Question]:
            yield first
            yield from others

        for scored in score(given()):
            name, shard, asked = self._waiting.popleft()
            self._add(asked, scored)
            self._bar.advance(len(asked.sample_indexes))
            if asked is shard[-1]:
                self._commit(name, shard)

    def _is_done(self, name: str, shard: Sequence[_Asked]) -> bool:
        files = [_scores_name(name)]
        if self._config.name == "judge":
            files.append(_judgements_name(name))
        return all(self._space.shards.done(file, _ids_hash(shard)) for file in files)

    def _add(self, asked: _Asked, scored: Scored) -> None:
        prompt_id = asked.question.prompt_id
        for index, score in zip(asked.sample_indexes, scored.scores, strict=True):
            if isinstance(score, Unscored) and self._config.on_error == "stop":
                raise InputError(
                    f"reward: sample {index} of prompt {prompt_id} cannot be scored "
                    f"({score.reason}): {score.detail}; mend it, or set "
                    "reward.on_error=quarantine to leave such samples out"
                )
            self._scores.append({"prompt_id": prompt_id, "sample_index": index, **_columns(score)})
        for row in scored.judgements:
            both = {n: asked.sample_indexes[row[n]] if row[n] >= 0 else -1 for n in ("a", "b")}
            self._judgements.append({"prompt_id": prompt_id, **row, **both})

    def _commit(self, name: str, shard: Sequence[_Asked]) -> None:
        if self._config.name == "judge":
            write = partial(_write, schema=JUDGEMENTS, rows=self._judgements)
            self._space.shards.write(_judgements_name(name), _ids_hash(shard), write)
        write = partial(_write, schema=SCORES, rows=self._scores)
        self._space.shards.write(_scores_name(name), _ids_hash(shard), write)
        self._scores, self._judgements = [], []


def _columns(score: Score) -> Row:
    if isinstance(score, Unscored):
        return {"reward": None, "reason": score.reason, "detail": score.detail}
    return {"reward": score, "reason": None, "detail": None}


def _scores_name(name: str) -> str:
    return f"{ASIDE}/scores-{name}"


def _judgements_name(name: str) -> str:
    return f"judgements-{name}"


def _ids_hash(shard: Sequence[_Asked]) -> str:
    ids = (f"{a.question.prompt_id}/{a.sample_indexes}" for a in shard)
    return sha256_text("\n".join(ids))


def _write(path: Path, schema: pa.Schema, rows: Sequence[Row]) -> None:
    with TableWriter(path, schema) as table:
        table.extend(rows)


def _assemble(space: Workspace, shards: Sequence[str], source: RewardSource) -> Outcome:
    """Make the two tables of all shards.

    Raises:
        InputError: there is no score at all.
    """
    paths = [space.path / _scores_name(name) for name in shards]
    rewards, reasons, first = array("d"), Counter[str](), ""
    decided, prompts = 0, 0
    with (
        TableWriter(space.file("rewards.parquet"), REWARDS) as table,
        TableWriter(space.file(DROPPED_FILE), DROPPED) as left_out,
    ):
        for _, group in groupby(read_rows(paths, SCORES), key=lambda row: row["prompt_id"]):
            found = []
            for row in group:
                if row["reward"] is None:
                    detail = f"sample {row['sample_index']}: {row['detail']}"
                    first = first or f"{row['reason']}: {detail}"
                    reasons[row["reason"]] += 1
                    dropped = {"prompt_id": row["prompt_id"], "reason": row["reason"]}
                    left_out.append(dropped | {"detail": detail})
                    continue
                found.append(row["reward"])
                table.append({name: row[name] for name in REWARDS.names})
            rewards.extend(found)
            prompts += 1
            decided += len(set(found)) > 1
    if not rewards:
        raise InputError(
            f"reward: none of {sum(reasons.values())} samples can be scored ({first}); is "
            f"reward.name={source.config.name} right for this data?"
        )
    if reasons:
        total = len(rewards) + sum(reasons.values())
        _log.warning("reward: %d of %d samples have no score and are left out, such as: %s",
                     sum(reasons.values()), total, first)  # fmt: skip
    dropped_counts = {f"dropped_{reason}": reasons[reason] for reason in REASONS}
    return Outcome(
        counts={
            "samples": len(rewards) + sum(reasons.values()),
            "rows": len(rewards),
            **{name: count for name, count in dropped_counts.items() if count},
        },
        metrics={**summary(rewards), "decided_share": decided / prompts},
    )


def summary(rewards: Sequence[float]) -> dict[str, float]:
    """Return the mean of some rewards, and how they are distributed."""
    import numpy as np

    values = np.asarray(rewards)
    quantiles = np.quantile(values, QUANTILES, method="inverted_cdf").tolist()
    named = {f"reward_p{round(100 * q)}": v for q, v in zip(QUANTILES, quantiles, strict=True)}
    return {
        "mean_reward": float(values.mean()),
        "reward_min": float(values.min()),
        **named,
        "reward_max": float(values.max()),
    }
