"""Several engines side by side behind one `Engine`, with real processes of the small model."""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.config import EngineConfig
from stages.engines import open_engine, process
from stages.engines.base import Completion, Request, Sampling
from stages.engines.fleet import Fleet
from stages.engines.places import divide_cores, divide_gpus
from stages.errors import ConfigError, EngineError, InputError

PAD, MAX_LEN, VOCAB, BATCH = 2, 128, 259, 4
DRAWN = Sampling(1.0, 1.0, 0, 24, tuple(range(3, 12)))


def requests(count: int) -> list[Request]:
    return [
        Request(f"r{i}", [3 + (7 * i + 5 * j) % (VOCAB - 3) for j in range(1 + i % 40)], 1000 + i)
        for i in range(count)
    ]


def start(model_dir: Path, processes: int) -> Fleet:
    config = EngineConfig(batch_size=BATCH, dtype="float32", processes=processes)
    engine = open_engine(config, model_dir, max_model_len=MAX_LEN, pad_token_id=PAD)
    assert isinstance(engine, Fleet)
    return engine


def answers(completions: Iterator[Completion]) -> dict[str, Completion]:
    found = list(completions)
    assert len({c.request_id for c in found}) == len(found), "each answered once"
    return {c.request_id: c for c in found}


def assert_same(found: dict[str, Completion], expected: dict[str, Completion]) -> None:
    assert found.keys() == expected.keys()
    for name, completion in found.items():
        assert completion.token_ids == expected[name].token_ids
        assert completion.finish_reason == expected[name].finish_reason
        assert completion.token_logprobs == pytest.approx(expected[name].token_logprobs, abs=1e-5)


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def expected(tiny_model_dir: Path) -> dict[str, Completion]:
    """What one engine in this process answers."""
    config = EngineConfig(batch_size=BATCH, dtype="float32")
    engine = open_engine(config, tiny_model_dir, max_model_len=MAX_LEN, pad_token_id=PAD)
    found = answers(engine.generate(requests(300), DRAWN))
    engine.close()
    assert {c.finish_reason for c in found.values()} == {"stop", "length"}
    return found


@pytest.fixture(scope="module")
def fleet(tiny_model_dir: Path) -> Iterator[Fleet]:
    """Three engines; the tests that kill some come last."""
    engine = start(tiny_model_dir, 3)
    yield engine
    pids = engine.pids
    engine.close()
    assert not any(map(is_running, pids))
    for child in engine._processes:
        child.log_path.unlink(missing_ok=True)


def test_three_engines_answer_like_one(fleet: Fleet, expected: dict[str, Completion]) -> None:
    asked = dict.fromkeys(fleet._processes, 0)
    found = []
    for completion in fleet.generate(requests(300), DRAWN):
        found.append(completion)
        for child in asked:
            asked[child] = max(asked[child], len(child.pending))
    assert_same(answers(iter(found)), expected)
    assert min(asked.values()) > BATCH, "each had more than it decodes at once"
    assert fleet.whole


def test_a_call_that_is_left_takes_its_requests_back(
    fleet: Fleet, expected: dict[str, Completion]
) -> None:
    pulled = []

    def source() -> Iterator[Request]:
        for request in requests(300):
            pulled.append(request)
            yield request

    left = fleet.generate(source(), Sampling(1.0, 1.0, 0, 60, ()))
    next(left)
    window = fleet._processes[0].window
    assert len(pulled) <= 3 * window < 300, "a bounded number is in flight"
    left.close()
    assert_same(answers(fleet.generate(requests(300), DRAWN)), expected)
    with pytest.raises(ValueError, match="request bad: token id 999999 is not in"):
        list(fleet.generate([*requests(3), Request("bad", [999_999], 0)], DRAWN))
    assert len(answers(fleet.generate(requests(5), DRAWN))) == 5


def test_a_woken_fleet_answers_for_the_model_it_was_given(
    fleet: Fleet, tiny_model_dir: Path, expected: dict[str, Completion]
) -> None:
    left = fleet.generate(requests(300), DRAWN)
    next(left)
    fleet.sleep()
    fleet.wake(tiny_model_dir, max_model_len=MAX_LEN, reload=True)
    going_on = fleet.generate(requests(300), DRAWN)
    first = next(going_on)
    left.close()  # its end must not be that of the next call
    assert_same(answers(iter([first, *going_on])), expected)


def test_a_hung_engine_is_found_and_its_requests_are_given_away(
    fleet: Fleet,
    expected: dict[str, Completion],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(process, "STALL_TIMEOUT_S", 3)
    found = []
    for number, completion in enumerate(fleet.generate(requests(300), DRAWN)):
        found.append(completion)
        if number == 20:
            os.kill(fleet.pids[1], signal.SIGSTOP)
    assert_same(answers(iter(found)), expected)
    [warning] = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert re.search(r"made no step for 3 s and was killed .*2 of 3 go on", warning)
    assert_same(answers(fleet.generate(requests(300), DRAWN)), expected)  # two, from the start


def test_a_killed_engine_costs_no_answer_and_repeats_none(
    fleet: Fleet, expected: dict[str, Completion], caplog: pytest.LogCaptureFixture
) -> None:
    found, victim = [], fleet.pids[0]
    for number, completion in enumerate(fleet.generate(requests(300), DRAWN)):
        found.append(completion)
        if number == 20:
            os.kill(victim, signal.SIGKILL)
    assert_same(answers(iter(found)), expected)
    [warning] = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert re.search(r"was killed, as the kernel does when memory runs out.*1 of 3 go on", warning)
    assert not fleet.whole


def test_the_death_of_the_last_engine_is_an_error(fleet: Fleet) -> None:
    left = fleet.generate(requests(300), DRAWN)
    next(left)
    for pid in fleet.pids:
        os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(EngineError, match="was killed.*it was the last of 3"):
        list(left)
    with pytest.raises(EngineError, match="has ended"):
        list(fleet.generate(requests(1), DRAWN))
    assert time.monotonic() - began < 30


def test_an_error_that_a_user_can_mend_ends_the_start_at_once(tmp_path: Path) -> None:
    before = set(Path("/proc").glob("[0-9]*"))
    with pytest.raises(InputError, match="model"):
        start(tmp_path, 2)
    children = [
        path for path in set(Path("/proc").glob("[0-9]*")) - before
        if f"\nPPid:\t{os.getpid()}\n" in (path / "status").read_text()
    ]  # fmt: skip
    assert not children


LEFT_BEHIND = """if True:
    import sys
    from pathlib import Path
    from stages.config import EngineConfig
    from stages.engines import Keeper, open_engine
    from stages.engines.base import Request, Sampling

    config = EngineConfig(batch_size=4, processes=2)
    with Keeper(open_engine) as keeper:
        engine = keeper.open(config, Path(sys.argv[1]), max_model_len=500, pad_token_id=2)
        answers = engine.generate(
            (Request(str(i), [5, 6], i) for i in range(10**9)), Sampling(1.0, 1.0, 0, 400, ())
        )
        print(*keeper._engine.pids, flush=True)
        for _ in answers:
            pass
"""


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.long)]
)
def test_no_engine_outlives_the_command(tiny_model_dir: Path, how: signal.Signals) -> None:
    root = Path(__file__).parents[2]
    words = [sys.executable, "-c", LEFT_BEHIND, str(tiny_model_dir)]
    with subprocess.Popen(
        words, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as command:
        assert command.stdout is not None
        pids = [int(word) for word in command.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(is_running, pids))
        command.send_signal(how)
        assert command.wait(30) != 0
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, "an engine goes on"
        time.sleep(0.1)


# places


def test_cores_are_divided_and_no_core_has_two_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [place.cores for place in divide_cores(1)] == [()]
    mine = os.sched_getaffinity(0)
    places = divide_cores(2)
    if len(mine) >= 2 and all(place.cores for place in places):
        assert not set(places[0].cores) & set(places[1].cores)
        assert set(places[0].cores) | set(places[1].cores) == mine
    crowded = divide_cores(len(mine) + 1)
    assert {place.cores for place in crowded} == {()}
    assert {place.environment["OMP_NUM_THREADS"] for place in crowded} == {"1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert divide_cores(2)[0].environment == {"OMP_NUM_THREADS": "1"}


def test_each_engine_gets_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,GPU-7")
    given = [p.environment["CUDA_VISIBLE_DEVICES"] for p in divide_gpus("vllm", 2, 2)]
    assert given == ["4,5", "6,GPU-7"]
    assert divide_gpus("vllm", 1, 2)[0].environment == {}, "one alone sees what it is given"
    with pytest.raises(
        ConfigError,
        match="processes=3 of tensor_parallel_size=2 need 6 GPUs, and 4 are visible; lower",
    ):
        divide_gpus("vllm", 3, 2)
