"""What was paid for is kept: answers and scores survive an attempt that fails or is killed.

Both are committed in shards of some prompts each (`Workspace.shards`), aside: they never become
part of the artifact. At most the shards that are open are made again.
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from stages.artifacts import TableWriter, Workspace, read_rows
from stages.artifacts.keys import canonical_json, sha256_text
from stages.artifacts.shards import ASIDE
from stages.data.rows import ANSWERS
from stages.engines.base import Completion, Engine, Request, Sampling
from stages.rewards import Question, Reward, Scored, Unscored

ANSWER_SHARD = 128
"""Answers that are kept together."""


@dataclass
class AnswerShard:
    """Answers that are kept together; those of one are in flight until it is whole."""

    space: Workspace
    name: str
    requests: Sequence[Request]
    _answers: dict[str, Completion] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        """Whether all are there, of this attempt or of one that was cut off."""
        return self.space.shards.done(self._file, self._ids_hash)

    def take(self, answer: Completion) -> None:
        """Keep an answer; the last one commits them all."""
        assert answer.request_id not in self._answers, f"{answer.request_id} was answered twice"
        self._answers[answer.request_id] = answer
        if len(self._answers) == len(self.requests):
            self.space.shards.write(self._file, self._ids_hash, self._write)
            self._answers = {}

    def read(self) -> Iterator[Completion]:
        """Yield the answers of a shard that is done.

        Raises:
            CorruptError: its file is damaged.
        """
        for row in read_rows([self.space.path / self._file], ANSWERS):
            yield Completion(**row)

    @property
    def _file(self) -> str:
        return f"{ASIDE}/{self.name}.parquet"

    @property
    def _ids_hash(self) -> str:
        """What the key of the attempt does not say of the requests."""
        return sha256_text("\n".join(one.request_id for one in self.requests))

    def _write(self, path: Path) -> None:
        with TableWriter(path, ANSWERS) as table:
            table.extend(vars(self._answers[one.request_id]) for one in self.requests)


def ask_for(
    shards: Sequence[AnswerShard], engine: Engine, sampling: Sampling
) -> Iterator[Completion]:
    """Yield the answers of some shards as they come, each shard committed with its last one.

    The engine is fed across shards, so that none has to wait for another's longest answer.
    """
    shard_of: dict[str, AnswerShard] = {}

    def requests() -> Iterator[Request]:
        for shard in shards:
            for request in shard.requests:
                shard_of[request.request_id] = shard
                yield request

    for done in engine.generate(requests(), sampling):
        shard_of.pop(done.request_id).take(done)
        yield done
    assert not shard_of, f"{len(shard_of)} requests were not answered"


class KeptScores:
    """Scores of questions, so many at a time; see the module's text."""

    def __init__(self, space: Workspace, size: int) -> None:
        self._space, self._size = space, size
        self._shards: list[tuple[str, str]] = []
        """Of all, in order: the file, and the hash of what was asked."""
        self._waiting = deque[tuple[int, bool]]()
        """What the reward has been given: the number of its shard, and whether it is its last."""
        self._open: list[Scored] = []

    def unscored(self, questions: Iterable[Question]) -> Iterator[Question]:
        """Yield what is in no finished shard, one after the other."""
        source = iter(questions)
        while shard := list(islice(source, self._size)):
            number = len(self._shards)
            name = f"{ASIDE}/scores-{number:05d}.json"
            self._shards.append((name, _asked_hash(shard)))
            if self._space.shards.done(*self._shards[-1]):
                continue
            for question in shard:
                self._waiting.append((number, question is shard[-1]))
                yield question

    def take(self, reward: Reward, questions: Iterator[Question]) -> None:
        """Score what `unscored` yields, and commit each shard when it is whole.

        Raises:
            SpinError: see `Reward.score`; what is committed stays.
        """
        for scored in reward.score(questions):
            number, is_last = self._waiting.popleft()
            self._open.append(scored)
            if is_last:
                self._space.shards.write(*self._shards[number], self._write)
                self._open = []
        assert not self._waiting, f"{len(self._waiting)} prompts were not scored"

    def _write(self, path: Path) -> None:
        path.write_text(json.dumps([_to_json(one) for one in self._open]), encoding="utf-8")

    def read(self) -> Iterator[Scored]:
        """Yield what is said of each question, in order, when all are scored."""
        for name, _ in self._shards:
            for one in json.loads((self._space.path / name).read_bytes()):
                yield _from_json(one)


def _asked_hash(questions: Sequence[Question]) -> str:
    """Return the hash of ids and answers: an answer that was drawn anew may be another one."""
    return sha256_text(canonical_json([[one.prompt_id, one.responses] for one in questions]))


def _to_json(scored: Scored) -> dict[str, Any]:
    scores = [vars(s) if isinstance(s, Unscored) else float(s) for s in scored.scores]
    return {"scores": scores, "judgements": scored.judgements}


def _from_json(value: dict[str, Any]) -> Scored:
    scores = (Unscored(**s) if isinstance(s, dict) else s for s in value["scores"])
    return Scored(tuple(scores), tuple(value["judgements"]))
