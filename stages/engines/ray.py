"""Answers from vLLM on a Ray cluster: requests stream through Ray Data's vLLM processor.

Ray is driven from a process of its own (see `process`): it takes signals for itself, starts
servers, and ends with that process whatever happened. One execution of Ray Data lives as long as
the engine, since its workers, which hold the model, end with the execution:

    requests ─ queue ─ read ─ preprocess ─ workers (vLLM) ─ postprocess ─ answers

What it needs of every node: the same Python environment, and the model on a shared file system.
"""

import json
import logging
import os
import queue
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa

from stages.config import EngineConfig
from stages.engines.base import Sampling
from stages.engines.fleet import Fleet
from stages.engines.places import Place
from stages.engines.process import Kind
from stages.engines.serve import Answer, end_group
from stages.engines.vllm import (
    check_temperature,
    checked_extra,
    engine_arguments,
    is_cpu_build,
    sampling_arguments,
    vllm_variables,
)
from stages.errors import ConfigError, EngineError, InputError

BLOCK_ROWS = 32  # answered together by one task, so what a killed worker loses of each
TASKS_AT_ONCE = 32  # of a worker, and as many wait: 1,024 rows are what vLLM decodes at most
BLOCK_BYTES = 256 << 10
NUM_HELPERS = 2  # tasks that prepare blocks at a time, and as many that take answers apart
# Ray's own defaults are without end, also where memory never suffices.
MAX_RESTARTS = 5  # of a worker, in the life of the engine
MAX_TASK_RETRIES = 3
STALL_TIMEOUT_S = 3600  # without any answer; a worker may be starting again
CHECK_TIMEOUT_S = 300
CLOSE_TIMEOUT_S = 60
WAIT_S = 0.1
OBJECT_STORE_BYTES = 512 << 20  # of a cluster of our own; requests and answers are small

RAY = Kind(
    "ray",
    when_killed="lower generate.engine.processes",
    when_not_imported="reinstall it: pip install 'spin-selfplay[ray,vllm]'",
    when_not_started="correct the engine's settings, or the cluster",
)
REQUESTS = pa.schema(
    [
        ("call", pa.int64()),
        ("index", pa.int64()),
        ("tokens", pa.list_(pa.int32())),
        ("sampling", pa.string()),
    ]
)
FILLER = -1
"""Index of a request that only fills up a block."""
VAGUE = "Engine core initialization failed"
"""What vLLM says of any failure of its own process."""
WARM_UP = Sampling(temperature=0, top_p=1, top_k=0, max_new_tokens=1, stop_token_ids=())

_log = logging.getLogger("spin")


class RayEngine(Fleet):
    """See `KeptEngine`. Runs on the cluster that RAY_ADDRESS names, or one of its own here."""

    def __init__(self, model_dir: Path, config: EngineConfig, *, max_model_len: int) -> None:
        """Connect to the cluster, and wait until a worker has loaded the model.

        There are `processes` workers in the cluster, each on `tensor_parallel_size` GPUs of its
        own; with vLLM's build for CPUs, on one CPU.

        Args:
            max_model_len: longest prompt and answer together, in tokens.

        Raises:
            InputError: Ray or vLLM is not installed, or a node does not see the model.
            ConfigError: vLLM refuses the model or an argument, or the cluster is too small.
            EngineError: Ray failed.
        """
        if find_spec("ray") is None:
            raise InputError(
                "engine ray: Ray is not installed; pip install 'spin-selfplay[ray,vllm]'"
            )
        model_dir = model_dir.resolve()
        arguments = engine_arguments(model_dir, config, max_model_len)
        # Ours to delete: nobody else does when Ray's process is killed.
        self._folder = tempfile.TemporaryDirectory(prefix="spin-ray-", ignore_cleanup_errors=True)
        try:
            super().__init__(
                RAY,
                {
                    "arguments": arguments,
                    "extra": dict(config.extra),
                    "processes": config.processes,
                    "folder": self._folder.name,
                },
                [Place()],
                _environment(),
                model_dir=model_dir,
                max_model_len=max_model_len,
                check_sampling=lambda sampling: check_temperature(sampling.temperature),
            )
        except BaseException:
            self._folder.cleanup()
            raise

    def wake(self, model_dir: Path, *, max_model_len: int, reload: bool) -> None:
        """See `KeptEngine.wake`. The cluster was kept, the workers start anew."""
        super().wake(model_dir.resolve(), max_model_len=max_model_len, reload=reload)

    def close(self) -> None:
        """End the workers, and the cluster if it is ours."""
        super().close()
        self._folder.cleanup()


def _environment() -> dict[str, str]:
    """Return the environment of the process that drives Ray."""
    environment = dict(os.environ) | {"RAY_USAGE_STATS_ENABLED": "0"}
    if "PYTHONPATH" in environment:  # which Ray's own processes read in another folder
        paths = environment["PYTHONPATH"].split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in paths)
    if "RAY_ADDRESS" not in environment:
        _log.info("engine ray: RAY_ADDRESS is not set, so a cluster is started on this machine")
        # Its ports are open to the network, and whoever may talk to them may run code.
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return environment


class WorkerError(Exception):
    """What went wrong in a worker, as one line."""


class RayBackend:
    """See `serve.Backend`."""

    def __init__(self) -> None:
        self._stream: _Stream | None = None
        self._arguments: dict[str, Any] = {}
        self._processes = 1
        self._window = 0
        self._call = 0
        self._sampling: Sampling | None = None
        self._block: list[tuple[int, list[int], str]] = []
        """Requests that wait for their block to be full: index, tokens, sampling."""
        self._waiting = set[int]()
        """Indices of requests without an answer."""
        self._num_sent = 0
        """Requests that Ray has, those of earlier calls too."""
        self._heard_at = 0.0
        self._room = 0.0
        """What the cluster had free before the workers."""

    def load_library(self) -> None:
        """Import Ray and vLLM."""
        os.chdir("/")  # workers import from the current directory too
        import ray.data.llm  # noqa: F401

        checked_extra({})  # vLLM's one importer

    def start(self, arguments: Mapping[str, Any]) -> dict[str, int]:
        """Connect to the cluster and start the workers.

        Raises:
            InputError: a node lacks the model or the environment.
            ConfigError: a wrong argument, no cluster, or one that is too small.
            WorkerError: a worker did not start.
        """
        from transformers import AutoConfig

        self._arguments = arguments["arguments"] | checked_extra(arguments["extra"])
        self._processes = arguments["processes"]
        self._window = 2 * TASKS_AT_ONCE * BLOCK_ROWS * self._processes
        model = self._arguments["model"]
        config = AutoConfig.from_pretrained(model, trust_remote_code=False, local_files_only=True)
        _connect(self._processes, arguments["folder"])
        _check_size(self._processes, self._arguments["tensor_parallel_size"])
        self._open(model)
        return {"vocab_size": config.get_text_config().vocab_size, "window": self._window}

    def begin(self, sampling: Sampling) -> None:
        """Hold this for the requests to come."""
        self._sampling = sampling
        self._call += 1

    def add(self, index: int, seed: int, prompt: list[int]) -> None:
        """Take a request."""
        assert self._sampling is not None, "requests follow their sampling"
        if not self._waiting:
            self._heard_at = time.monotonic()
        self._waiting.add(index)
        self._block.append((index, prompt, json.dumps(sampling_arguments(self._sampling, seed))))
        if len(self._block) == BLOCK_ROWS:
            self._send()

    def drop_all(self) -> None:
        """Forget all requests; those that Ray has it answers all the same, unread."""
        self._block.clear()
        self._waiting.clear()

    @property
    def busy(self) -> bool:
        """Whether there is a request left to answer."""
        return bool(self._waiting)

    def step(self) -> list[Answer]:
        """Wait a moment for answers."""
        assert self._stream is not None, "the engine sleeps"
        if self._block and self._num_sent < self._window // 2:
            self._send()
        answers: list[Answer] = []
        for table in self._stream.receive():
            answers += self._take(table)
        if time.monotonic() - self._heard_at > STALL_TIMEOUT_S:
            raise EngineError(f"Ray gave no answer for {STALL_TIMEOUT_S} s")
        return answers

    def sleep(self) -> None:
        """End the workers, once they have answered what they have; the cluster stays."""
        if self._stream is None:
            return
        self._stream.close()
        self._stream = None
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        while _room() < self._room and time.monotonic() < deadline:
            time.sleep(WAIT_S)

    def wake(self, arguments: Mapping[str, Any]) -> None:
        """Start workers anew, with another model."""
        self._arguments["max_model_len"] = arguments["max_model_len"]
        self._open(arguments["model_dir"])

    def end(self) -> None:
        """Leave the cluster, which ends the workers; one of our own ends too."""
        import ray

        ray.shutdown()
        end_group()  # some of Ray's servers would stay for minutes

    def _open(self, model: str) -> None:
        """Start the workers, and wait until one of them answers."""
        _check_nodes(model)
        self._num_sent, self._room = 0, _room()
        self._stream = stream = _Stream(
            self._arguments | {"model": model}, self._processes, is_cpu_build()
        )
        deadline = time.monotonic() + STALL_TIMEOUT_S
        stream.send(_block([], self._call))
        while not stream.receive():
            if time.monotonic() > deadline:
                raise EngineError(f"no worker of Ray's was ready after {STALL_TIMEOUT_S} s")

    def _send(self) -> None:
        assert self._stream is not None, "the engine sleeps"
        self._stream.send(_block(self._block, self._call))
        self._num_sent += len(self._block)
        self._block.clear()

    def _take(self, table: pa.Table) -> Iterator[Answer]:
        sampling = self._sampling
        assert sampling is not None, "answers follow their sampling"
        self._heard_at = time.monotonic()
        for row in table.to_pylist():
            index = row["index"]
            if index == FILLER:
                continue
            self._num_sent -= 1
            if row["call"] != self._call or not self._waiting:
                continue  # of a call that was left
            if index not in self._waiting:
                raise EngineError(f"Ray answered request {index} twice")
            self._waiting.remove(index)
            reason = finish_reason(row["tokens"], sampling)
            yield index, row["tokens"], row["logprobs"], reason


def finish_reason(tokens: Sequence[int], sampling: Sampling) -> str:
    """Return why an answer ended, which Ray's processor does not pass on; "abort" if unclear."""
    if tokens and tokens[-1] in sampling.stop_token_ids:
        return "stop"
    return "length" if len(tokens) == sampling.max_new_tokens else "abort"


def _block(requests: Sequence[tuple[int, list[int], str]], call: int) -> pa.Table:
    """Return a block of requests, filled up: Ray Data holds back what is no whole batch.

    All are alike in what is None: Ray Data makes floats of whole numbers beside a None.
    """
    example = json.loads(requests[0][2]) if requests else sampling_arguments(WARM_UP, seed=0)
    filler = json.dumps(example | {"max_tokens": 1})
    rows = [*requests, *[(FILLER, [0], filler)] * (BLOCK_ROWS - len(requests))]
    indices, tokens, samplings = zip(*rows, strict=True)
    return pa.table([[call] * len(rows), indices, tokens, samplings], schema=REQUESTS)


def preprocess(row: dict[str, Any]) -> dict[str, Any]:
    """Return what the processor asks of a row."""
    del row["padding"]
    return {
        "tokenized_prompt": row.pop("tokens"),
        "sampling_params": json.loads(row.pop("sampling")),
    }


def postprocess(row: dict[str, Any]) -> dict[str, Any]:
    """Return what is wanted of an answer."""
    tokens = [int(token) for token in row["generated_tokens"]]
    return {
        "call": row["call"],
        "index": row["index"],
        "tokens": tokens,
        "logprobs": [
            entry[token]["logprob"] for entry, token in zip(row["logprobs"], tokens, strict=True)
        ],
    }


class _Stream:
    """One execution of Ray Data: blocks of requests in, blocks of answers out, in any order."""

    def __init__(self, arguments: Mapping[str, Any], processes: int, on_cpu: bool) -> None:
        """Start the workers; does not wait for them."""
        from ray.util.queue import Queue

        self._requests = Queue(actor_options={"num_cpus": 0})
        self._requests.put("begin")
        self._answers = queue.SimpleQueue[pa.Table | Exception | None]()
        dataset = _dataset(self._requests, arguments, processes, on_cpu)
        threading.Thread(target=self._run, args=(dataset,), daemon=True).start()

    def send(self, block: pa.Table) -> None:
        """Add a block of requests; never waits."""
        self._requests.put(block)

    def receive(self) -> list[pa.Table]:
        """Return the blocks of answers that there are, after a moment where there are none.

        Raises:
            WorkerError: the execution failed.
        """
        blocks = []
        try:
            blocks.append(self._answers.get(timeout=WAIT_S))
            while True:
                blocks.append(self._answers.get_nowait())
        except queue.Empty:
            pass
        for block in blocks:
            if isinstance(block, Exception):
                _raise_cause(block)
            if block is None:
                raise WorkerError("Ray Data ended before its time")
        return blocks

    def close(self) -> None:
        """End the workers, once they have answered what they have.

        Raises:
            WorkerError: the execution failed.
        """
        self._requests.put(None)
        while (block := self._answers.get()) is not None:
            if isinstance(block, Exception):
                _raise_cause(block)
        self._requests.shutdown()

    def _run(self, dataset: Any) -> None:
        try:
            for block in dataset.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            ):
                self._answers.put(block)
            self._answers.put(None)
        except Exception as error:  # noqa: BLE001 - raised by receive, in the other thread
            self._answers.put(error)


def _dataset(requests: Any, arguments: Mapping[str, Any], processes: int, on_cpu: bool) -> Any:
    """Return the stream from the queue of requests, not yet started."""
    import ray.data
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    context = ray.data.DataContext.get_current()
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    # Ray Data's own warnings are of work that takes long, which this does.
    context.issue_detectors_config.detectors = []
    config = vLLMEngineProcessorConfig(
        model_source=arguments["model"],
        engine_kwargs={name: value for name, value in arguments.items() if name != "model"},
        batch_size=BLOCK_ROWS,
        concurrency=(processes, processes),
        max_concurrent_batches=TASKS_AT_ONCE,
        # An empty entry would be read as "no placement": then it takes a GPU.
        placement_group_config={"bundle_per_worker": {"CPU": 1}} if on_cpu else None,
        runtime_env={"env_vars": vllm_variables(on_cpu, bool(arguments["enforce_eager"]))},
        log_engine_metrics=False,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )
    # No CPU of their own: a cluster for CPUs has given all to the workers.
    helpers = {"num_cpus": 0, "compute": ray.data.TaskPoolStrategy(size=NUM_HELPERS)}
    processor = build_processor(
        config,
        preprocess=preprocess,
        postprocess=postprocess,
        preprocess_map_kwargs=helpers,
        postprocess_map_kwargs=helpers,
    )
    workers = processor.get_stage_by_name("vLLMEngineStage")
    # Not assigned, which would make the stage forget the placement and ask for GPUs.
    workers.map_batches_kwargs.update(max_restarts=MAX_RESTARTS, max_task_retries=MAX_TASK_RETRIES)
    source = ray.data.read_datasource(_make_source(requests), num_cpus=0, override_num_blocks=1)
    return processor(source)


def _make_source(requests: Any) -> Any:
    """Return a source of Ray Data's whose one task passes on the blocks of a queue."""
    from ray.data import Datasource
    from ray.data.block import BlockMetadata
    from ray.data.datasource import ReadTask

    class Source(Datasource):  # type: ignore[misc]
        @property
        def supports_distributed_reads(self) -> bool:
            return False  # beside us, so that no other node's end takes requests with it

        def estimate_inmemory_data_size(self) -> None:
            return None

        def get_read_tasks(self, *_: Any, **__: Any) -> list[Any]:
            unknown = BlockMetadata(
                num_rows=None, size_bytes=None, input_files=None, exec_stats=None
            )
            return [ReadTask(lambda: _read(requests), unknown)]

    return Source()


def _read(requests: Any) -> Iterator[pa.Table]:
    """Pass on the blocks of a queue until it says None.

    Each with a padding that makes it a little larger than the size at which Ray Data passes a
    block on: smaller ones it would hold until more come.

    Raises:
        RuntimeError: it is Ray's second try, which has lost what the first had read.
    """
    if requests.get() != "begin":
        raise RuntimeError("the task that reads the requests died")
    while (block := requests.get()) is not None:
        padding = [bytes(BLOCK_BYTES), *[b""] * (block.num_rows - 1)]
        yield block.append_column("padding", pa.array(padding, pa.large_binary()))


def _connect(processes: int, folder: str) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one in a folder.

    Raises:
        ConfigError: there is none.
    """
    import ray

    # Workers' words go to our own log, which nobody sees unless something fails.
    options: dict[str, Any] = {"log_to_driver": True}
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        options |= {
            "address": "local",
            "num_cpus": max(len(os.sched_getaffinity(0)), processes if is_cpu_build() else 1),
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
            "_temp_dir": folder,
        }
    try:
        ray.init(**options)
    except ConnectionError as error:
        raise ConfigError(
            f"engine ray: no cluster answers at RAY_ADDRESS={address}: {_first_line(error)}; "
            "start it, unset RAY_ADDRESS, or set RAY_AUTH_MODE=token if it asks for one"
        ) from error


def _check_size(processes: int, gpus_each: int) -> None:
    """Raise a `ConfigError` where the cluster has no room for the workers."""
    import ray

    what, each = ("CPU", 1) if is_cpu_build() else ("GPU", gpus_each)
    found = int(ray.cluster_resources().get(what, 0))
    if processes * each > found:
        of = f" of tensor_parallel_size={each}" if each > 1 else ""
        raise ConfigError(
            f"engine ray: processes={processes}{of} need {processes * each} {what}s, and the "
            f"cluster has {found}; lower generate.engine.processes or add nodes"
        )


def _room() -> float:
    """Return the free GPUs of the cluster, or its CPUs where these do the work."""
    import ray

    return float(ray.available_resources().get("CPU" if is_cpu_build() else "GPU", 0))


def _check_nodes(model: str) -> None:
    """Raise an `InputError` where a node lacks the model or what is to be imported."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(lacks)
    looks = {
        node["NodeManagerAddress"]: look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(model)
        for node in ray.nodes()
        if node["Alive"]
    }
    for address, answer in looks.items():
        try:
            lacking = ray.get(answer, timeout=CHECK_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            lacking = f"does not run our code ({cause_of(str(error))}); install the same there"
        if lacking is not None:
            raise InputError(f"engine ray: node {address} {lacking}")


def lacks(model: str) -> str | None:
    """Return what a node lacks, and the remedy; None where all is there."""
    if not Path(model, "config.json").is_file():
        return f"sees no model at {model}; keep the run on a file system that all nodes share"
    if find_spec("vllm") is None:
        return "has no vLLM; install the same environment on every node"
    return None


def _raise_cause(error: Exception) -> NoReturn:
    cause = cause_of(str(error))
    if VAGUE in cause:  # the reason is said in the log of a worker's process
        time.sleep(2.0)  # until it has come
        log = Path("/proc/self/fd/2").resolve()
        cause = cause_of(log.read_text(errors="replace") if log.is_file() else "") or cause
    if not cause and "died unexpectedly" in str(error):
        cause = (
            "a worker died again and again, as it does when memory runs out; free some, or lower "
            "generate.engine.max_num_seqs"
        )
    raise WorkerError(cause or f"{type(error).__name__}: {_first_line(error)}") from error


def cause_of(text: str) -> str:
    """Return the error with which a text of nested tracebacks begins, or nothing."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    errors = [
        f"{name}: {' '.join(words.split())[:500]}"
        for name, words in re.findall(
            r"(?m)(?:^|[\s.])([A-Z]\w*(?:Error|Exception)): *(\S.*)$", text
        )
        if name not in ("RayTaskError", "ActorDiedError", "RayActorError", "UserCodeException")
    ]
    telling = (error for error in errors if VAGUE not in error)
    return next(telling, errors[0] if errors else "")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason")
