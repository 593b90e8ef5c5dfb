"""Prompts asked and answers scored: what evaluate and the suites have in common."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from stages import engines
from stages.artifacts import TableWriter, Workspace, read_rows
from stages.artifacts.keys import row_seed
from stages.artifacts.tables import Row
from stages.config import EngineConfig, EvaluateConfig, SamplingConfig
from stages.data.chat import Renderer, RowRefusedError
from stages.data.draw import smallest_by_hash
from stages.data.rows import DROPPED, JUDGEMENTS, PROMPTS
from stages.engines import OpenEngine
from stages.engines.base import Completion, Engine, Request, Sampling
from stages.engines.prompts import askable_batch, model_room, model_vocab_size
from stages.errors import InputError
from stages.model.source import ModelSource
from stages.progress import progress
from stages.rewards import Question, RewardSource, Unscored, open_reward, shard_prompts
from stages.suites.kept import ANSWER_SHARD, AnswerShard, KeptScores, ask_for

_log = logging.getLogger("spin")

HELDOUT_ITERATION = -1
"""Stands for the iteration in held-out seeds: every model draws with the same seeds."""
GREEDY = -1
"""Stands for the sample's number in a greedy answer."""


@dataclass(frozen=True)
class Asked:
    """One prompt, rendered."""

    prompt_id: str
    messages: list[dict[str, str]]
    human: str
    prompt_token_ids: list[int]


@dataclass(frozen=True)
class Asker:
    """How prompts are asked, whatever the model."""

    stage: str
    """Who asks, in messages."""
    open_engine: OpenEngine
    engine: EngineConfig
    sampling: SamplingConfig
    seed: int
    """The run's."""
    renderer: Renderer
    space: Workspace

    @property
    def scratch(self) -> Path:
        """A folder for what is gone when the stage is done."""
        return self.space.path

    def room(self, model: ModelSource) -> int:
        """Return the most tokens that a prompt and its answer may have together.

        Raises:
            ConfigError: see `model_room`.
        """
        is_suite = not isinstance(self.sampling, EvaluateConfig)
        section = f"suites.{self.stage.removeprefix('suite ')}" if is_suite else "evaluate"
        limit, length = self.engine.max_model_len, self.sampling.max_new_tokens
        return model_room(model.path, limit, length, section)

    def askable(self, model: ModelSource, rows: Sequence[Row]) -> tuple[list[Asked], int]:
        """Render rows of PROMPTS; return them, and how many cannot be asked."""
        asked = [one for one in self.rendered(model, rows) if isinstance(one, Asked)]
        return asked, len(rows) - len(asked)

    def rendered(self, model: ModelSource, rows: Sequence[Row]) -> list[Asked | RowRefusedError]:
        """Render rows of PROMPTS; return each, or why it cannot be asked."""
        prompts = askable_batch(
            [row["messages"] for row in rows],
            self.renderer,
            self.room(model) - self.sampling.max_new_tokens,
            model_vocab_size(model.path),
        )
        return [
            prompt
            if isinstance(prompt, RowRefusedError)
            else Asked(row["prompt_id"], row["messages"], row["response"], prompt)
            for row, prompt in zip(rows, prompts, strict=True)
        ]

    def sample_seed(self, prompt_id: str, sample: int) -> int:
        """Return the seed that a sample is drawn with; a greedy answer needs none."""
        return row_seed(self.seed, HELDOUT_ITERATION, prompt_id, max(sample, 0))

    def answers(
        self,
        model: ModelSource,
        asked: Sequence[Asked],
        num_samples: int,
        *,
        greedy: bool,
        who: str = "model",
    ) -> Iterator[tuple[str, int, Completion]]:
        """Yield (prompt id, sample, answer), in any order: those kept of a cut-off attempt too.

        Samples are numbered from 0; that of a greedy answer is GREEDY.

        Args:
            who: what the model is called, where an attempt asks several.
        """
        passes = [("samples", self.sampling.temperature, range(num_samples))]
        if greedy:
            passes.append(("greedy", 0.0, range(GREEDY, GREEDY + 1)))
        total = (num_samples + greedy) * len(asked)
        with progress(self.stage, total=total, unit="answers") as bar, ExitStack() as opened:
            engine: Engine | None = None
            for name, temperature, numbers in passes:
                missing = []
                for shard in self._shards(f"{who}-{name}", asked, numbers):
                    if not shard.is_done:
                        missing.append(shard)
                        continue
                    bar.skip(len(shard.requests))
                    yield from map(_numbered, shard.read())
                if missing and engine is None:
                    engine = opened.enter_context(self._running(model, asked))
                if missing and engine is not None:
                    for done in ask_for(missing, engine, self.sampling_at(temperature)):
                        yield _numbered(done)
                        bar.advance(1, len(done.token_ids))

    def _running(
        self, model: ModelSource, asked: Sequence[Asked]
    ) -> AbstractContextManager[Engine]:
        longest = max(len(one.prompt_token_ids) for one in asked) + self.sampling.max_new_tokens
        return engines.running(
            self.open_engine,
            self.engine,
            model.path,
            self.scratch,
            max_model_len=self.engine.max_model_len or longest,
            pad_token_id=self.renderer.pad_token_id,
        )

    def _shards(
        self, name: str, asked: Sequence[Asked], samples: Sequence[int]
    ) -> Iterator[AnswerShard]:
        """Yield the requests in the order in which they are asked."""
        size = max(1, ANSWER_SHARD // max(1, len(samples)))
        for number, start in enumerate(range(0, len(asked), size)):
            requests = [
                Request(
                    f"{one.prompt_id}/{sample}",
                    one.prompt_token_ids,
                    self.sample_seed(one.prompt_id, sample),
                )
                for one in asked[start : start + size]
                for sample in samples
            ]
            if requests:
                yield AnswerShard(self.space, f"answers-{name}-{number:05d}", requests)

    def sampling_at(self, temperature: float) -> Sampling:
        """Return how answers are drawn, at a temperature; 0: greedily."""
        return Sampling(
            temperature=temperature,
            top_p=self.sampling.top_p,
            top_k=self.sampling.top_k,
            max_new_tokens=self.sampling.max_new_tokens,
            stop_token_ids=self.renderer.stop_token_ids,
        )


def _numbered(done: Completion) -> tuple[str, int, Completion]:
    prompt_id, _, sample = done.request_id.rpartition("/")
    return prompt_id, int(sample), done


def chosen_rows(files: Sequence[Path], max_prompts: int | None) -> list[Row]:
    """Return the rows of some files of PROMPTS in order of their ids, or a part drawn by hash.

    Every evaluation draws the same part: one of more prompts holds one of fewer.
    """
    drawn = None
    if max_prompts is not None:
        ids = (row["prompt_id"] for row in read_rows(files, PROMPTS, columns=["prompt_id"]))
        drawn = smallest_by_hash(ids, max_prompts, "evaluate")
    rows = (r for r in read_rows(files, PROMPTS) if drawn is None or r["prompt_id"] in drawn)
    return sorted(rows, key=lambda row: row["prompt_id"])


@dataclass(frozen=True)
class Answers:
    """The answers to one prompt that are to be scored."""

    asked: Asked
    responses: Mapping[str, str]
    """From what an answer is called in messages and in unscored.parquet to its text."""


def score_answers(
    space: Workspace, stage: str, source: RewardSource, given: Iterable[Answers]
) -> Iterator[list[float | None]]:
    """Yield the scores of the answers to each prompt, in order; None where there is none.

    All are scored before the first is yielded, and survive a cut-off attempt. When all are
    yielded, those without a score are told in unscored.parquet, and what a judge said
    in judgements.parquet, whose `a` numbers the answers to a prompt from 0.

    Args:
        stage: who asks, in messages.

    Raises:
        InputError: an answer has no score and `reward.on_error` is to stop, or none has one.
    """
    names: list[tuple[str, ...]] = []
    without: list[Row] = []
    judgements: list[Row] = []
    total = 0

    def questions() -> Iterator[Question]:
        for one in given:
            names.append((one.asked.prompt_id, *one.responses))
            texts = tuple(one.responses.values())
            yield Question(one.asked.prompt_id, one.asked.messages, one.asked.human, texts)

    kept = KeptScores(space, shard_prompts(source.config))
    unscored = kept.unscored(questions())
    if (first := next(unscored, None)) is not None:  # else all was done by a cut-off attempt
        with open_reward(source) as reward:
            kept.take(reward, chain([first], unscored))
    for (prompt_id, *called), scored in zip(names, kept.read(), strict=True):
        total += len(scored.scores)
        without += [
            {"prompt_id": prompt_id, "reason": s.reason, "detail": f"{name}: {s.detail}"}
            for name, s in zip(called, scored.scores, strict=True)
            if isinstance(s, Unscored)
        ]
        judgements += [{"prompt_id": prompt_id, **said} for said in scored.judgements]
        yield [None if isinstance(score, Unscored) else score for score in scored.scores]
    _tell_unscored(stage, without, total, source)
    for name, schema, found in (
        ("unscored.parquet", DROPPED, without),
        ("judgements.parquet", JUDGEMENTS, judgements),
    ):
        if found:
            with TableWriter(space.file(name), schema) as table:
                table.extend(found)


def _tell_unscored(stage: str, without: Sequence[Row], total: int, source: RewardSource) -> None:
    if not without:
        return
    first = without[0]
    told = (
        f"{stage}: {len(without)} of {total} answers cannot be scored, such as to prompt "
        f"{first['prompt_id']} ({first['reason']}): {first['detail']}"
    )
    if len(without) == total or source.config.on_error == "stop":
        raise InputError(
            f"{told}; is reward.name={source.config.name} right for this data? "
            "reward.on_error=quarantine leaves some out"
        )
    _log.warning("%s; they are left out", told)
