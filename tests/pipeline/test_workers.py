"""Several workers make one generate artifact: the same rows for any number, whoever dies."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from stages.artifacts import read_manifest, read_rows
from stages.artifacts.keys import canonical_json, sha256_text
from stages.artifacts.manifest import MANIFEST_NAME
from stages.data.rows import GENERATIONS
from tests.artifact_tools import hashes
from tests.pipeline.generate_worker import work
from tests.pipeline.test_generate import make_data, questions

PROMPTS, SAMPLES, SHARD_ROWS = 150, 2, 20
ROWS = PROMPTS * SAMPLES
WAIT_S = 120


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("workers") / "data", questions(PROMPTS))


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    """Starts processes that have torch and all else imported already, which takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.pipeline.generate_worker"])
    return context


@dataclass
class Worker:
    """A process, and where it tells what."""

    process: ForkServerProcess
    log: Path
    answers: Path

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        """Return its exit status."""
        self.process.join(WAIT_S)
        assert self.process.exitcode is not None, f"it still runs: {self.log.read_text()}"
        return self.process.exitcode

    def answered(self) -> int:
        """Return the number of rows it answered, 0 if it was killed."""
        assert self.wait() in (0, -signal.SIGKILL), self.log.read_text()
        return int(self.answers.read_text()) if self.process.exitcode == 0 else 0


class Workers:
    """Starts workers for one artifact."""

    def __init__(self, context: ForkServerContext, model: Path, data: Path, out: Path) -> None:
        self.context, self.model, self.data, self.out = context, model, data, out
        self.started: list[Worker] = []

    def start(
        self,
        kill_after: int | None = None,
        delay_s: float = 0.01,
        gate_after: int | None = None,
        **settings: Any,
    ) -> Worker:
        """Start one; with `gate_after` it answers no more than so many rows until `open_gate`."""
        generate = {
            "max_new_tokens": 12, "num_samples": SAMPLES, "shard_rows": SHARD_ROWS, "join": True,
            "parity": {"rows": 0},
        } | settings  # fmt: skip
        name = f"{self.out.name}-{len(self.started)}"
        log, answers = self.out.parent / f"{name}.log", self.out.parent / f"{name}.answered"
        job = {
            "model": str(self.model), "data": str(self.data), "out": str(self.out),
            "kill_after": kill_after, "delay_s": delay_s, "config": {"generate": generate},
            "log": str(log), "answered": str(answers),
            "gate": None if gate_after is None else str(self.gate), "gate_after": gate_after or 0,
        }  # fmt: skip
        worker = Worker(self.context.Process(target=work, args=(job,)), log, answers)
        worker.process.start()
        self.started.append(worker)
        return worker

    @property
    def gate(self) -> Path:
        return self.out.parent / f"{self.out.name}.gate"

    def open_gate(self) -> None:
        self.gate.touch()

    def wait_at_gate(self, worker: Worker) -> None:
        """Wait until a worker has answered all that it may before the gate is opened."""
        here = self.gate.with_name(f"{self.gate.name}.{worker.process.pid}")
        wait_until(here.exists, worker.log)

    def holders(self) -> set[int]:
        found = set()
        for claim in self.out.parent.glob(f".{self.out.name}.*.partial/.shards/claims/*.claim"):
            with suppress(OSError, ValueError):
                found.add(int(json.loads(claim.read_text())["pid"]))
        return found

    def answered(self) -> int:
        """Wait for all; return how many rows were answered by those that ended well."""
        return sum(worker.answered() for worker in self.started)

    def codes(self) -> list[int]:
        return [worker.wait() for worker in self.started]

    def shards(self) -> list[Path]:
        return list(self.out.parent.glob(f".{self.out.name}.*.partial/part-*.parquet"))

    def wait_for_shards(self, count: int) -> None:
        wait_until(lambda: len(self.shards()) >= count, self.started[0].log)


def wait_until(condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


Gather = Callable[[Path], AbstractContextManager[Workers]]


@pytest.fixture(scope="module")
def workers(context: ForkServerContext, tiny_model_dir: Path, data: Path) -> Gather:
    """Gives workers for a place, of which none outlives its test."""

    @contextmanager
    def gather(out: Path) -> Iterator[Workers]:
        group = Workers(context, tiny_model_dir, data, out)
        try:
            yield group
        finally:
            for worker in group.started:
                worker.process.kill()
                worker.process.join()

    return gather


@pytest.fixture(scope="module")
def alone(workers: Gather, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one worker makes, without interruption."""
    out = tmp_path_factory.mktemp("alone") / "out"
    with workers(out) as group:
        group.start(delay_s=0)
        assert group.answered() == ROWS
    return out


def row_set_hash(out: Path) -> str:
    """Of ids, seeds, prompts and answers, in the order of ids."""
    rows = list(read_rows(sorted(out.glob("part-*.parquet")), GENERATIONS))
    assert len({(row["prompt_id"], row["sample_index"]) for row in rows}) == len(rows) == ROWS
    return sha256_text(canonical_json(rows))


@pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.long)])
def test_any_number_of_workers_makes_the_same_artifact(
    workers: Gather, tmp_path: Path, alone: Path, count: int
) -> None:
    out = tmp_path / "out"
    with workers(out) as group:
        # Each waits after one answer until two at least have begun.
        started = [group.start(gate_after=1) for _ in range(count)]
        wait_until(lambda: len(group.holders()) >= 2, started[0].log)
        group.open_gate()
        assert group.answered() == ROWS, "each row was asked once"
        assert sum(worker.answered() > 0 for worker in started) >= 2
    assert row_set_hash(out) == row_set_hash(alone)
    assert hashes(out) == hashes(alone)
    assert not list(tmp_path.glob(".out.*.partial"))


@pytest.mark.parametrize("victim", [0, 1], ids=["whoever began", "whoever joined"])
def test_a_killed_worker_s_shards_are_taken_over(
    workers: Gather, tmp_path: Path, alone: Path, victim: int
) -> None:
    out = tmp_path / "out"
    with workers(out) as group:
        for number in range(2):
            worker = group.start(gate_after=25, kill_after=30 if number == victim else None)
            group.wait_at_gate(worker)
        group.open_gate()
        assert group.codes() == [-signal.SIGKILL if number == victim else 0 for number in range(2)]
    assert row_set_hash(out) == row_set_hash(alone)
    assert hashes(out) == hashes(alone)


def test_when_all_workers_are_killed_the_next_one_goes_on(
    workers: Gather, tmp_path: Path, alone: Path
) -> None:
    out = tmp_path / "out"
    with workers(out) as group:
        for _ in range(2):
            group.start(kill_after=60)
        assert group.codes() == [-signal.SIGKILL] * 2
        assert not (out / MANIFEST_NAME).exists()
        kept = len(group.shards())
        assert kept > 0
        assert group.start().answered() == ROWS - kept * SHARD_ROWS
    assert hashes(out) == hashes(alone)


def test_one_who_does_not_join_is_told_that_the_place_is_taken(
    workers: Gather, tmp_path: Path
) -> None:
    with workers(tmp_path / "out") as group:
        group.wait_at_gate(group.start(gate_after=0))
        late = group.start(join=False)
        assert late.wait() == 75
        assert "is in use by process" in late.log.read_text()


def test_one_who_would_join_with_other_settings_is_refused(workers: Gather, tmp_path: Path) -> None:
    with workers(tmp_path / "out") as group:
        group.wait_at_gate(group.start(gate_after=0))
        other = group.start(temperature=0.5)
        assert other.wait() == 2
        told = other.log.read_text()
        assert "is being made with other settings or inputs by process" in told


@pytest.mark.parametrize("shard_rows", [7, pytest.param(60, marks=pytest.mark.long)])
def test_the_division_into_shards_is_the_attempt_s_whoever_goes_on(
    workers: Gather, tmp_path: Path, alone: Path, shard_rows: int
) -> None:
    """`shard_rows` decides no row, so it is no other setting; but the shards must stay the same."""
    out = tmp_path / "out"
    with workers(out) as group:
        first = group.start(gate_after=25)
        group.wait_at_gate(first)
        second = group.start(gate_after=25)
        group.wait_at_gate(second)
        first.signal(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
        third = group.start(shard_rows=shard_rows, gate_after=0)
        group.wait_at_gate(third)
        group.open_gate()
        assert (second.wait(), third.wait()) == (0, 0)
    assert row_set_hash(out) == row_set_hash(alone)
    assert hashes(out) == hashes(alone)


def test_ctrl_c_once_finishes_the_open_shards(workers: Gather, tmp_path: Path, alone: Path) -> None:
    out = tmp_path / "out"
    with workers(out) as group:
        worker = group.start(gate_after=2 * SHARD_ROWS)
        group.wait_for_shards(1)
        worker.signal(signal.SIGINT)
        wait_until(lambda: "finishing the open shards first" in worker.log.read_text(), worker.log)
        group.open_gate()
        assert worker.wait() == 130
        kept = len(group.shards())
        assert 0 < kept < ROWS // SHARD_ROWS
        last = group.start(delay_s=0)
        assert last.answered() == ROWS - kept * SHARD_ROWS, "no row was answered for nothing"
    assert hashes(out) == hashes(alone)


def test_ctrl_c_twice_stops_at_once(workers: Gather, tmp_path: Path) -> None:
    with workers(tmp_path / "out") as group:
        worker = group.start(gate_after=5)
        group.wait_at_gate(worker)
        worker.signal(signal.SIGINT)
        wait_until(lambda: "finishing the open shards first" in worker.log.read_text(), worker.log)
        worker.signal(signal.SIGINT)
        assert worker.wait() == 130, worker.log.read_text()


def test_a_worker_joins_what_a_manifest_already_ends(workers: Gather, alone: Path) -> None:
    before = read_manifest(alone)
    with workers(alone) as group:
        assert group.start().answered() == 0
    assert read_manifest(alone) == before
