"""kill -9 while an evaluation is answered, and while it is judged."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.suites import answering
from tests.artifact_tools import hashes
from tests.evaluations import make_data
from tests.fakes import FakeEngine
from tests.faults.script_evaluate import SHARD_PROMPTS, make
from tests.faults.strace_tools import ROOT
from tests.judge_server import longer_wins, running_judge

PROMPTS = 30
ANSWERS = 2 * PROMPTS
KILL_AT = 37
NEVER = 10_000


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "ANSWER_SHARD", 8)
    monkeypatch.setenv("no_proxy", "*")


def start(*words: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.faults.script_evaluate", *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_kill_then_rerun_asks_the_rest_and_equals_an_unbroken_run(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    data = make_data(tmp_path / "data", dict.fromkeys(range(PROMPTS), "x" * 40))
    of_all = tiny_model_dir, data
    with running_judge(longer_wins) as judge:
        make("quiz", tmp_path / "unbroken", *of_all, FakeEngine(), judge.url)
        unbroken, asked = hashes(tmp_path / "unbroken"), len(judge.requests)

    out, engine = tmp_path / "answering", FakeEngine(window=6)
    with running_judge(longer_wins) as judge:
        process = start("quiz", out, *of_all, judge.url, KILL_AT)
        assert process.wait() == -signal.SIGKILL
        assert judge.requests == []
        make("quiz", out, *of_all, engine, judge.url)
    # At most a window of the engine and the shards that it lies in are answered again.
    assert ANSWERS - KILL_AT <= engine.answered <= ANSWERS - KILL_AT + 8 + 6
    assert hashes(out) == unbroken

    out, engine = tmp_path / "judging", FakeEngine()
    half, processes = asked // 2, list[subprocess.Popen[bytes]]()

    def kill(body: dict[str, Any], before: int) -> tuple[int, dict[str, str], bytes]:
        if before == half:
            processes[0].kill()
        return longer_wins(body, before)

    with running_judge(kill) as judge:
        processes.append(start("quiz", out, *of_all, judge.url, NEVER))
        assert processes[0].wait() == -signal.SIGKILL
    with running_judge(longer_wins) as judge:
        make("quiz", out, *of_all, engine, judge.url)
        kept = half // 2 // SHARD_PROMPTS * SHARD_PROMPTS * 2
        assert len(judge.requests) <= asked - kept + 2 * SHARD_PROMPTS
    assert engine.answered == 0
    assert hashes(out) == unbroken
    assert [path.name for path in tmp_path.glob(".*.partial")] == []
