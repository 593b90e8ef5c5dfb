"""What an engine answered and a judge said in an evaluation survives an attempt that fails."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.artifacts import Outcome, Workspace, open_artifact, produce
from stages.artifacts.shards import ASIDE
from stages.engines.base import Completion, Request, Sampling
from stages.errors import EngineError
from stages.suites.kept import AnswerShard, ask_for
from tests.artifact_tools import fill_shards, hashes, plan
from tests.evaluations import make_data
from tests.fakes import FakeEngine, answer
from tests.faults.script_evaluate import SHARD_PROMPTS, make
from tests.judge_server import Answer, longer_wins, running_judge

PROMPTS = 30
REQUESTS = 2 * PROMPTS
"""One pair in both orders: the fake engine answers greedily as it draws."""
ANSWERS = {"quiz": 2 * PROMPTS, "duel": PROMPTS, "main": 2 * PROMPTS}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    humans = dict.fromkeys(range(PROMPTS), "x" * 40)
    return make_data(tmp_path_factory.mktemp("data") / "data", humans)


def failing_from(number: int) -> Answer:
    def reply(body: dict[str, Any], before: int) -> tuple[int, dict[str, str], bytes]:
        return longer_wins(body, before) if before < number else (503, {}, b"down")

    return reply


def fail(what: str, out: Path, model: Path, data: Path, engine: FakeEngine) -> None:
    """Have the judge go down when it has answered half of what it is asked."""
    with (
        running_judge(failing_from(REQUESTS // 2)) as judge,
        pytest.raises(EngineError, match="kept"),
    ):
        make(what, out, model, data, engine, judge.url)


@pytest.mark.parametrize("what", ["quiz", "duel", "main"])
def test_after_a_judge_went_down_only_the_rest_is_asked(
    tmp_path: Path, tiny_model_dir: Path, data: Path, what: str
) -> None:
    whole, out, engine = tmp_path / "unbroken", tmp_path / "out", FakeEngine()
    with running_judge(longer_wins) as judge:
        unbroken = make(what, whole, tiny_model_dir, data, FakeEngine(), judge.url)
        assert len(judge.requests) == REQUESTS
    fail(what, out, tiny_model_dir, data, engine)
    assert engine.answered == ANSWERS[what]
    with running_judge(longer_wins) as judge:
        made = make(what, out, tiny_model_dir, data, engine, judge.url)
        # Of the one shard that was open all is asked again.
        kept = REQUESTS // 2 // (2 * SHARD_PROMPTS) * (2 * SHARD_PROMPTS)
        assert len(judge.requests) == REQUESTS - kept
    assert engine.answered == ANSWERS[what], "the engine was asked again"
    assert hashes(out) == hashes(whole)
    assert (made.counts, made.metrics) == (unbroken.counts, unbroken.metrics)
    assert [path.name for path in tmp_path.glob(".out.*partial")] == []


def test_other_settings_use_nothing_of_it(tmp_path: Path, tiny_model_dir: Path, data: Path) -> None:
    out, engine = tmp_path / "out", FakeEngine()
    fail("quiz", out, tiny_model_dir, data, engine)
    with running_judge(longer_wins) as judge:
        make("quiz", out, tiny_model_dir, data, engine, judge.url, seed=1)
        assert len(judge.requests) == REQUESTS
    assert engine.answered == 2 * ANSWERS["quiz"]


def test_an_answer_that_was_lost_and_drawn_otherwise_is_judged_again(
    tmp_path: Path, tiny_model_dir: Path, data: Path
) -> None:
    class Other(FakeEngine):
        def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
            for request in requests:
                yield answer(Request(request.request_id, [], request.seed + 1), sampling)

    out = tmp_path / "out"
    fail("duel", out, tiny_model_dir, data, FakeEngine())
    [partial] = tmp_path.glob(".out.*.partial")
    [lost] = (partial / ASIDE).glob("answers-*.parquet")
    lost.unlink()
    with running_judge(longer_wins) as judge:
        make("duel", out, tiny_model_dir, data, Other(), judge.url)
        assert len(judge.requests) == REQUESTS


def test_an_answer_is_kept_to_its_last_bit(tmp_path: Path) -> None:
    class One(FakeEngine):
        def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
            yield from (Completion(r.request_id, [5], [-0.1], "length") for r in requests)

    found: list[Completion] = []

    def fill(space: Workspace) -> Outcome:
        shard = AnswerShard(space, "answers", [Request("p/0", [1], 0)])
        assert not shard.is_done
        list(ask_for([shard], One(), Sampling(1.0, 1.0, 0, 1, ())))
        assert AnswerShard(space, "answers", shard.requests).is_done
        assert not AnswerShard(space, "answers", [Request("p/1", [1], 0)]).is_done
        found.extend(shard.read())
        return Outcome(counts={})

    made = produce(tmp_path / "out", plan(), fill, resumable=True)
    assert found == [Completion("p/0", [5], [-0.1], "length")]
    assert made.files == [], "what is kept is no part of the artifact"


def test_an_equal_artifact_is_copied_though_there_are_shards(tmp_path: Path) -> None:
    """Those that are files of the artifact, and those that another division made."""
    (tmp_path / "run.json").write_text("{}")
    whole = produce(tmp_path / "whole", plan(), fill_shards(3), resumable=True)

    def stop(shard: int) -> None:
        if shard == 4:
            raise EngineError("stopped")

    hidden = tmp_path / "whole" / "manifest.json"
    aside = hidden.rename(tmp_path / "aside.json")
    with pytest.raises(EngineError):
        produce(tmp_path / "copy", plan(), fill_shards(5, begun=stop), resumable=True, reuse=True)
    assert len(list(tmp_path.glob(".copy.*.partial/part-*.parquet"))) == 4
    aside.rename(hidden)

    def never(space: Workspace) -> Outcome:
        raise AssertionError("made anew")

    assert produce(tmp_path / "copy", plan(), never, resumable=True, reuse=True) == whole
    open_artifact(tmp_path / "copy").files()
    assert hashes(tmp_path / "copy") == hashes(tmp_path / "whole")
    assert not list(tmp_path.glob(".copy.*.partial"))
