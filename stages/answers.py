"""The shards of a generate attempt: claimed, asked, answered, written; by one worker or many.

A shard is the samples of some consecutive prompts, and one row group of the file of rendered
prompts. Workers share nothing but the folder: what is done is read off the shards' notes, who
works on what off the claims.
"""

import logging
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.artifacts import TableWriter, Workspace
from stages.artifacts.claims import Claims
from stages.artifacts.keys import row_seed, sha256_text
from stages.artifacts.shards import CLAIMS
from stages.data.chat import Renderer
from stages.data.columns import list_column, lists_of
from stages.data.rows import GENERATIONS, RENDERED
from stages.engines.base import Completion, Engine, Request, Sampling
from stages.progress import Progress, progress

WAIT_S = 1.0
"""Between two looks at shards that other workers hold."""
POLL_S = 0.05
SAY_EVERY_S = 60.0
MOST_WRITING = 2
"""Shards that are complete and not on the disk yet."""
SAMPLE_CHARS = 300
BARS = "▁▂▃▄▅▆▇█"
_NUM_BINS = 12

log = logging.getLogger("spin")


@dataclass(frozen=True)
class Asked:
    """The prompts that are asked, and what decides their rows."""

    path: Path
    """Rows of RENDERED, one row group a shard."""
    sha256: str
    """Of the file."""
    num_samples: int
    seed: int
    iteration: int

    @cached_property
    def num_shards(self) -> int:
        """Number of shards."""
        return int(self._metadata.num_row_groups)

    @cached_property
    def num_prompts(self) -> int:
        """Number of prompts."""
        return int(self._metadata.num_rows)

    @property
    def num_rows(self) -> int:
        """Number of rows, one a sample."""
        return self.num_prompts * self.num_samples

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest prompt; 0 where there is none."""
        column = RENDERED.get_field_index("num_tokens")
        groups = (self._metadata.row_group(k) for k in range(self.num_shards))
        return max((int(group.column(column).statistics.max) for group in groups), default=0)

    def name(self, number: int) -> str:
        """Return the name of a shard's file."""
        return f"part-{number:05d}.parquet"

    def ids_hash(self, number: int) -> str:
        """Return what tells a shard's rows from those of any other shard of any division."""
        what = f"{self.sha256}/{number}/{self.num_samples}/{self.seed}/{self.iteration}"
        return sha256_text(what)

    def rows_of(self, number: int) -> int:
        """Return the number of rows of a shard."""
        return int(self._metadata.row_group(number).num_rows) * self.num_samples

    def open(self, number: int) -> "OpenShard":
        """Read a shard's prompts."""
        with pq.ParquetFile(self.path) as file:
            prompts = file.read_row_group(number).combine_chunks()
        return OpenShard(number, prompts.select(["prompt_id", "prompt_token_ids"]), self)

    @cached_property
    def _metadata(self) -> Any:
        return pq.read_metadata(self.path)


@dataclass
class OpenShard:
    """A shard that waits for answers; its rows are numbered prompt by prompt."""

    number: int
    prompts: pa.Table
    asked: Asked
    ids: list[str] = field(init=False)
    seeds: list[int] = field(init=False)
    answers: list[Completion | None] = field(init=False)
    missing: int = field(init=False)
    """Number of rows without an answer."""

    def __post_init__(self) -> None:
        self.ids = self.prompts["prompt_id"].to_pylist()
        seed, iteration = self.asked.seed, self.asked.iteration
        samples = range(self.asked.num_samples)
        self.seeds = [row_seed(seed, iteration, name, k) for name in self.ids for k in samples]
        self.missing = len(self.seeds)
        self.answers = [None] * self.missing

    def requests(self) -> Iterator[tuple[int, Request]]:
        """Yield the number of each row, and what to ask for it."""
        tokens = lists_of(self.prompts["prompt_token_ids"].combine_chunks())
        row = 0
        for name, prompt in zip(self.ids, tokens, strict=True):
            for sample in range(self.asked.num_samples):
                yield row, Request(f"{name}/{sample}", prompt, self.seeds[row])
                row += 1

    def take(self, row: int, answer: Completion) -> None:
        """Keep the answer of a row."""
        assert self.answers[row] is None, f"request {answer.request_id} was answered twice"
        self.answers[row] = answer
        self.missing -= 1

    def write(self, path: Path, renderer: Renderer) -> None:
        """Write all rows, answered as they are."""
        answers = [answer for answer in self.answers if answer is not None]
        assert not self.missing, f"{self.missing} rows have no answer"
        samples = self.asked.num_samples
        prompts = self.prompts.take(np.repeat(np.arange(len(self.ids)), samples)).combine_chunks()
        tokens = [answer.token_ids for answer in answers]
        columns = {
            "prompt_id": prompts["prompt_id"].combine_chunks(),
            "sample_index": pa.array(np.tile(np.arange(samples), len(self.ids)), pa.int32()),
            "seed": pa.array(self.seeds, pa.int64()),
            "prompt_token_ids": prompts["prompt_token_ids"].combine_chunks(),
            "response_token_ids": list_column(tokens, pa.int32()),
            "response": pa.array(renderer.texts(tokens), pa.string()),
            "finish_reason": pa.array([answer.finish_reason for answer in answers], pa.string()),
            "token_logprobs": list_column([a.token_logprobs for a in answers], pa.float32()),
        }
        with TableWriter(path, GENERATIONS) as table:
            table.append_batch(pa.record_batch(list(columns.values()), schema=GENERATIONS))


def answer_all(
    space: Workspace,
    asked: Asked,
    renderer: Renderer,
    sampling: Sampling,
    open_engine: Callable[[], AbstractContextManager[Engine]],
    show_samples_every_s: float | None = None,
) -> None:
    """Return when all rows of all shards are there: answered here, earlier, or by other workers.

    One engine is fed across shards, so that none has to wait for another's longest answer; it is
    opened only when there is a shard that nobody works on.

    Raises:
        KeyboardInterrupt: the user stopped it: once, and the open shards were finished first.
    """
    with (
        Claims(space.path / CLAIMS) as claims,
        progress("generate", total=asked.num_rows, unit="rows") as bar,
        _Interruption() as interruption,
    ):
        with _Desk(space, asked, renderer, claims, bar, interruption, show_samples_every_s) as desk:
            if desk.wait():
                with open_engine() as engine:
                    while desk.wait():
                        for answer in engine.generate(desk.requests(), sampling):
                            desk.settle(answer)
                        desk.check_settled()
        interruption.leave()


class _Desk:
    """What one worker has claimed, has asked, and has got."""

    def __init__(
        self,
        space: Workspace,
        asked: Asked,
        renderer: Renderer,
        claims: Claims,
        bar: Progress,
        interruption: "_Interruption",
        show_samples_every_s: float | None,
    ) -> None:
        self._store, self._asked, self._renderer = space.shards, asked, renderer
        self._claims, self._bar, self._interruption = claims, bar, interruption
        self._todo = deque(range(asked.num_shards))
        """Shards that are not known to be done, and that we do not hold."""
        self._claimed = deque[int]()
        """Shards that we hold and have not begun."""
        self._in_flight = dict[str, tuple[OpenShard, int]]()
        # In a thread: while a disk flushes, the engine must not wait for its next request.
        self._writer = ThreadPoolExecutor(1, "shards")
        self._writing = deque[Future[None]]()
        self._tally = _Tally()
        self._show_every_s, self._shown_s = show_samples_every_s, time.monotonic()
        self._say_s = time.monotonic() + SAY_EVERY_S
        self._num_open = 0
        """Rows without an answer in the shards that were begun."""
        bar.note(self._tally.line)
        interruption.on_first = self._say_what_is_open

    def wait(self) -> bool:
        """Wait until there is a shard for us, True; or all are done, or the user stops us."""
        while not self._interruption.asked:
            if self._claimed or self._claim():
                return True
            if not self._todo:
                return False
            self._bar.show()
            self._say_what_is_missing()
            self._interruption.wait(WAIT_S)
        return False

    def requests(self) -> Iterator[Request]:
        """Yield the requests of all shards that can be had, each claimed when it is come to."""
        while self._claimed or (not self._interruption.asked and self._claim()):
            shard = self._asked.open(self._claimed.popleft())
            self._num_open += shard.missing
            for row, request in shard.requests():
                self._in_flight[request.request_id] = shard, row
                yield request

    def settle(self, answer: Completion) -> None:
        """Keep an answer; with a shard's last one, write the shard."""
        shard, row = self._in_flight.pop(answer.request_id)
        shard.take(row, answer)
        self._num_open -= 1
        self._tally.count(answer)
        if not shard.missing:
            self._await_writes(MOST_WRITING - 1)
            self._writing.append(self._writer.submit(self._write, shard))
        self._bar.advance(1, len(answer.token_ids))
        self._show(shard, row, answer)

    def check_settled(self) -> None:
        """Check that the engine answered all it was asked, and that all of it is on the disk."""
        assert not self._in_flight, f"{len(self._in_flight)} requests were not answered"
        self._await_writes(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.shutdown()  # what is complete is kept, whatever happened

    def _say_what_is_missing(self) -> None:
        now_s = time.monotonic()
        if now_s >= self._say_s:
            self._say_s = now_s + SAY_EVERY_S
            name = self._asked.name(self._todo[0])
            log.info(
                "%d shards are others' work; %s is held by %s",
                len(self._todo), name, self._claims.holder(name),
            )  # fmt: skip

    def _say_what_is_open(self) -> None:
        log.warning(
            "finishing the open shards first, %d rows; Ctrl-C again stops at once and loses them",
            self._num_open,
        )

    def _claim(self) -> bool:
        """Claim the first shard that is neither done nor somebody else's."""
        for _ in range(len(self._todo)):
            number = self._todo.popleft()
            if self._is_done(number):
                continue
            name = self._asked.name(number)
            if not self._claims.take(name):
                self._todo.append(number)
                continue
            if self._is_done(number):  # by one who has let go of it since
                self._claims.release(name)
                continue
            self._claimed.append(number)
            return True
        return False

    def _is_done(self, number: int) -> bool:
        done = self._store.done(self._asked.name(number), self._asked.ids_hash(number))
        if done:
            self._bar.skip(self._asked.rows_of(number))
        return done

    def _await_writes(self, most: int) -> None:
        """Wait until at most so many shards are being written; raise what the disk refused."""
        while len(self._writing) > most:
            self._writing.popleft().result()

    def _write(self, shard: OpenShard) -> None:
        name = self._asked.name(shard.number)
        if self._claims.still_holds(name):
            self._store.write(
                name,
                self._asked.ids_hash(shard.number),
                lambda path: shard.write(path, self._renderer),
            )
        else:
            log.warning("%s was taken over while this machine hung; it is left to them", name)
            self._todo.append(shard.number)
        self._claims.release(name)

    def _show(self, shard: OpenShard, row: int, answer: Completion) -> None:
        now_s = time.monotonic()
        if self._show_every_s is None or now_s - self._shown_s < self._show_every_s:
            return
        self._shown_s = now_s
        prompt = shard.prompts["prompt_token_ids"][row // self._asked.num_samples].as_py()
        question, text = self._renderer.texts([prompt, answer.token_ids])
        log.info(
            "sample %s (%s, %d tokens): %s → %s",
            answer.request_id, answer.finish_reason, len(answer.token_ids),
            _end_of(question), _start_of(text),
        )  # fmt: skip


class _Tally:
    """Running finish reasons and lengths, for the line of progress."""

    def __init__(self) -> None:
        self._reasons = Counter[str]()
        self._lengths = Counter[int]()

    def count(self, answer: Completion) -> None:
        """Count one more answer."""
        self._reasons[answer.finish_reason] += 1
        self._lengths[len(answer.token_ids)] += 1

    def line(self) -> str:
        """Return the share of answers cut off, and a histogram of lengths with its ends."""
        total = self._reasons.total()
        if not total:
            return ""
        low, high = min(self._lengths), max(self._lengths)
        width = max(1, -(-(high - low + 1) // _NUM_BINS))
        bins = [0] * ((high - low) // width + 1)
        for length, number in self._lengths.items():
            bins[(length - low) // width] += number
        most = max(bins)
        drawn = "".join(BARS[(len(BARS) - 1) * n // most] if n else " " for n in bins)
        cut_off = self._reasons["length"] / total
        return f"{cut_off:.0%} cut off, tokens {low} {drawn} {high}"


class _Interruption:
    """Ctrl-C while it lasts: once asks to finish what is open, twice stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self.on_first: Callable[[], None] = lambda: None
        """What is done when Ctrl-C comes for the first time."""
        self._before: Any = None

    def wait(self, seconds: float) -> None:
        """Sleep, or less when Ctrl-C comes."""
        end_s = time.monotonic() + seconds
        while not self.asked and time.monotonic() < end_s:
            time.sleep(POLL_S)  # no Event: its lock may be held where the signal comes

    def leave(self) -> None:
        """Raise the KeyboardInterrupt that was asked for, if any."""
        if self.asked:
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.on_first()


def _start_of(text: str) -> str:
    return text if len(text) <= SAMPLE_CHARS else f"{text[:SAMPLE_CHARS]}…"


def _end_of(text: str) -> str:
    return text if len(text) <= SAMPLE_CHARS else f"…{text[-SAMPLE_CHARS:]}"
