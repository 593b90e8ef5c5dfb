"""Answers from vLLM, which runs in a process of its own; several side by side if wanted."""

import contextlib
import dataclasses
import difflib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stages.config import (
    HIGHEST_TEMPERATURE,
    LOWEST_TEMPERATURE,
    OF_VLLM,
    EngineConfig,
    has_temperature,
)
from stages.engines.base import Request, Sampling
from stages.engines.fleet import Fleet
from stages.engines.places import divide_cores, divide_gpus
from stages.engines.process import VLLM, VLLM_SCORES
from stages.errors import ConfigError, EngineError, InputError

CPU_KV_CACHE_BYTES = 1 << 30  # vLLM would take 90% of the machine's memory
LEFT_TO_VLLM = ("quantization", "enable_prefix_caching", "max_num_seqs", "max_num_batched_tokens")
"""Keys of the recipe's `engine` that vLLM decides where they are not set."""
OWN_KEYS = {"dtype", "max_model_len", *OF_VLLM} - {"extra"}
"""Arguments of vLLM's that are keys of the recipe's `engine`, by the same names."""
NO_ARCHITECTURE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
"""Keys of a model's config.json that change nothing of what vLLM builds."""


class VllmEngine(Fleet):
    """See `KeptEngine`. Runs on the GPUs that vLLM sees, or on the CPU where its CPU build is."""

    def __init__(
        self, model_dir: Path, config: EngineConfig, *, max_model_len: int, keep: bool = False
    ) -> None:
        """Start the processes and wait until they have loaded the model.

        On a CPU nothing is compiled unless `enforce_eager` is false: on 2 cores a model of 4M
        parameters starts in 17 s against 61 s, then gives 3,700 tokens/s against 4,400.

        Args:
            max_model_len: longest prompt and answer together, in tokens.
            keep: it is to sleep and wake.

        Raises:
            InputError: vLLM is not installed or does not import.
            ConfigError: vLLM refuses the model or an argument, memory does not suffice, or there
                are too few GPUs.
            EngineError: a process died.
        """
        arguments = engine_arguments(model_dir, config, max_model_len)
        on_cpu, enforce_eager = is_cpu_build(), bool(arguments["enforce_eager"])
        # What discards weights while asleep; a CPU has no such thing.
        arguments["enable_sleep_mode"] = keep and not on_cpu
        # Reloading in place is tried for these alone: vLLM on a CPU packs weights, and compiled
        # code holds what was packed.
        self._can_reload = config.quantization is None and (
            (enforce_eager and config.tensor_parallel_size == 1) if on_cpu else keep
        )
        self._architecture = architecture(model_dir)
        super().__init__(
            VLLM,
            {"arguments": arguments, "extra": dict(config.extra)},
            divide_cores(config.processes)
            if on_cpu
            else divide_gpus("vllm", config.processes, config.tensor_parallel_size),
            child_environment(on_cpu, enforce_eager),
            model_dir=model_dir,
            max_model_len=max_model_len,
            check_sampling=lambda sampling: check_temperature(sampling.temperature),
        )

    def can_wake(self, model_dir: Path, *, max_model_len: int) -> bool:
        """See `KeptEngine.can_wake`: a model of the same architecture, no longer than now."""
        return (
            self.whole
            and self._can_reload
            and max_model_len <= self._max_model_len
            and self._architecture is not None
            and self._architecture == architecture(model_dir)
        )

    def wake(self, model_dir: Path, *, max_model_len: int, reload: bool) -> None:
        """See `KeptEngine.wake`. The limit stays what it was."""
        super().wake(model_dir, max_model_len=self._max_model_len, reload=reload)


class VllmScorer(Fleet):
    """Scores of conversations by a sequence classifier with one label, in vLLM's processes."""

    def __init__(self, model_dir: Path, config: EngineConfig, *, max_model_len: int) -> None:
        """Start the processes; see `VllmEngine` for what can go wrong."""
        own = {"runner": "pooling"}
        _refuse_taken(config.extra, own.keys())
        arguments = engine_arguments(model_dir, config, max_model_len) | own
        on_cpu = is_cpu_build()
        super().__init__(
            VLLM_SCORES,
            {"arguments": arguments, "extra": dict(config.extra)},
            divide_cores(config.processes)
            if on_cpu
            else divide_gpus("vllm", config.processes, config.tensor_parallel_size),
            child_environment(on_cpu, bool(arguments["enforce_eager"])),
            model_dir=model_dir,
            max_model_len=max_model_len,
        )

    def scores(self, rows: Iterable[list[int]]) -> Iterator[tuple[int, float]]:
        """Yield the number of a row and its logit, in any order; NaN where there is none.

        Raises:
            EngineError: the last process died.
        """
        requests = (Request(str(number), row, 0) for number, row in enumerate(rows))
        # A score travels as the log-probability of the one token of an answer.
        for done in self.generate(requests, Sampling(0, 1, 0, 0, ())):
            [is_finite], [score] = done.token_ids, done.token_logprobs
            yield int(done.request_id), score if is_finite else math.nan


def engine_arguments(
    model_dir: Path, config: EngineConfig, max_model_len: int
) -> dict[str, object]:
    """Return the arguments of every engine of vLLM's, by its names, those of `extra` aside.

    A CPU's cache of keys and values is 1 GiB unless `extra.kv_cache_memory_bytes` or
    `VLLM_CPU_KVCACHE_SPACE` says otherwise.

    Raises:
        InputError: vLLM is not installed, or there is no model.
        ConfigError: `extra` has a name that is not for it.
    """
    if find_spec("vllm") is None:
        raise InputError(
            "engine vllm: vLLM is not installed; make vllm-cpu, or with a GPU "
            "pip install 'spin-selfplay[vllm]'"
        )
    if not (model_dir / "config.json").is_file():
        raise InputError(f"engine vllm: {model_dir} is no model folder, it has no config.json")
    on_cpu, dtype, extra = is_cpu_build(), config.dtype, config.extra
    if dtype == "auto":
        dtype = "float32" if on_cpu else "bfloat16"
    arguments: dict[str, object] = {
        "model": os.fspath(model_dir),
        "dtype": dtype,
        "max_model_len": max_model_len,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "tensor_parallel_size": config.tensor_parallel_size,
        "enforce_eager": on_cpu if config.enforce_eager is None else config.enforce_eager,
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
    choices = {name: getattr(config, name) for name in LEFT_TO_VLLM}
    arguments |= {name: choice for name, choice in choices.items() if choice is not None}
    _refuse_taken(extra, {*arguments, "enable_sleep_mode"})
    if (
        on_cpu
        and "VLLM_CPU_KVCACHE_SPACE" not in os.environ
        and "kv_cache_memory_bytes" not in extra
    ):
        arguments["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
    return arguments


def sampling_arguments(sampling: Sampling, seed: int) -> dict[str, Any]:
    """Return how a request's tokens are drawn, by the names of vLLM's `SamplingParams`."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": None if sampling.temperature == 0 else seed,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,  # the model's own list would be added to our stop tokens
        "logprobs": 0,  # of the sampled token alone
        "detokenize": False,
    }


def architecture(model_dir: Path) -> object:
    """Return what two models share whose weights vLLM can exchange in place.

    None for a model where that is not known to work: one with weights that are quantized, or
    with positions that depend on the engine's length limit.
    """
    from safetensors import safe_open

    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # vLLM says what is wrong with it
    words = json.dumps(config)
    if "quantization_config" in config or "longrope" in words or '"dynamic"' in words:
        return None
    shapes: dict[str, list[int]] = {}
    for file in sorted(model_dir.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            shapes |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    return {name: value for name, value in config.items() if name not in NO_ARCHITECTURE}, shapes


def _refuse_taken(extra: Mapping[str, object], taken: Any) -> None:
    if names := sorted(OWN_KEYS & extra.keys()):
        raise ConfigError(
            f"engine vllm: extra may not set {', '.join(names)}; set engine.{names[0]} instead"
        )
    if names := sorted(taken & extra.keys()):
        raise ConfigError(
            f"engine vllm: extra may not set {', '.join(names)}; spin sets these itself"
        )


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that vLLM would refuse, or change on its own."""
    if not has_temperature(temperature):
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
    return dict(os.environ) | vllm_variables(on_cpu, eager)


def vllm_variables(on_cpu: bool, eager: bool) -> dict[str, str]:
    """Return the variables that are ours in the environment of vLLM; see `child_environment`."""
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no third process, and no timing in the schedule
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    }
    if on_cpu:
        openmp = Path(sys.prefix, "lib", "libiomp5.so")
        if openmp.is_file():
            variables["LD_PRELOAD"] = f"{openmp} {os.environ.get('LD_PRELOAD', '')}".strip()
        if eager:
            variables["TORCHDYNAMO_DISABLE"] = "1"
    return variables


class VllmBackend:
    """See `serve.Backend`."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._sampling: Sampling | None = None
        self._num_calls = 0
        self._in_flight = dict[str, int]()
        """vLLM's request id → index."""
        self._on_cpu = False
        self._is_asleep = False

    def load_library(self) -> None:
        """Import vLLM."""
        from vllm import LLMEngine, SamplingParams, TokensPrompt  # noqa: F401
        from vllm.platforms import current_platform

        current_platform.import_kernels()
        self._on_cpu = current_platform.is_cpu()

    def start(self, arguments: Mapping[str, Any]) -> dict[str, int]:
        """Start vLLM's engine.

        Raises:
            ConfigError: one of the extra arguments is none of vLLM's, or has a wrong type.
        """
        from vllm import EngineArgs, LLMEngine
        from vllm.usage.usage_lib import UsageContext

        extra = checked_extra(arguments["extra"])
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(**arguments["arguments"], **extra),
            usage_context=UsageContext.LLM_CLASS,  # the defaults of offline use
        )
        config = self._engine.vllm_config
        return {
            "vocab_size": config.model_config.get_vocab_size(),
            # Twice, so that a row that ends is followed by one that is already there.
            "window": 2 * config.scheduler_config.max_num_seqs,
        }

    def begin(self, sampling: Sampling) -> None:
        """Hold this for the requests to come."""
        self._sampling = sampling
        self._num_calls += 1

    def add(self, index: int, seed: int, prompt: list[int]) -> None:
        """Take a request."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        sampling = self._sampling
        assert sampling is not None, "requests follow their sampling"
        params = SamplingParams(
            **sampling_arguments(sampling, seed), output_kind=RequestOutputKind.FINAL_ONLY
        )
        name = f"{self._num_calls}-{index}"
        self._engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), params)
        self._in_flight[name] = index

    def drop_all(self) -> None:
        """Take all requests back."""
        self._engine.abort_request(list(self._in_flight))
        self._in_flight.clear()

    @property
    def busy(self) -> bool:
        """Whether there is a request left to answer."""
        return bool(self._in_flight)

    def step(self) -> list[tuple[int, list[int], list[float], str]]:
        """Let vLLM make a step."""
        answers = []
        for output in self._engine.step():
            index = self._in_flight.pop(output.request_id, None)
            if index is not None:
                [answer] = output.outputs
                tokens = list(answer.token_ids)
                logprobs = [
                    entry[token].logprob
                    for entry, token in zip(answer.logprobs, tokens, strict=True)
                ]
                answers.append((index, tokens, logprobs, answer.finish_reason))
        return answers

    def sleep(self) -> None:
        """Give weights and cache back to the GPU; on a CPU, only wait."""
        if self._engine.vllm_config.model_config.enable_sleep_mode:
            self._engine.sleep(level=2)  # discards the weights: they are read again
            self._is_asleep = True

    def wake(self, arguments: Mapping[str, Any]) -> None:
        """Read the weights of another model into the place of the last one's."""
        discarded = self._is_asleep
        if discarded:
            self._engine.wake_up(["weights"])
        if discarded or arguments["reload"]:
            self._engine.collective_rpc(
                "reload_weights", kwargs={"weights_path": arguments["model_dir"]}
            )
            if self._on_cpu:
                self._engine.apply_model(_pack_tied_heads)
        if discarded:
            self._engine.wake_up(["kv_cache"])
            self._is_asleep = False
        if not self._engine.reset_prefix_cache():
            raise EngineError("engine vllm: its cache of prompts cannot be emptied")

    def end(self) -> None:
        """End vLLM's own workers, where it has some."""
        if self._engine.vllm_config.parallel_config.world_size > 1:
            with contextlib.suppress(Exception):
                self._engine.engine_core.shutdown()  # its workers are processes


class VllmScoresBackend(VllmBackend):
    """Scores instead of answers; see `VllmScorer`."""

    def add(self, index: int, seed: int, prompt: list[int]) -> None:
        """Take a conversation."""
        from vllm import PoolingParams, TokensPrompt

        # The logit itself, not what makes a probability of it.
        params = PoolingParams(task="classify", use_activation=False)
        name = f"{self._num_calls}-{index}"
        self._engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), params)
        self._in_flight[name] = index

    def step(self) -> list[tuple[int, list[int], list[float], str]]:
        """Let vLLM make a step."""
        answers = []
        for output in self._engine.step():
            index = self._in_flight.pop(output.request_id, None)
            if index is not None:
                [score] = output.outputs.data.float().tolist()
                is_finite = math.isfinite(score)
                answers.append((index, [int(is_finite)], [score if is_finite else 0.0], "stop"))
        return answers


def _pack_tied_heads(model: Any) -> None:
    """Pack embeddings anew, after `reload_weights` on a CPU.

    vLLM 0.32 packs a copy of a tied head for its CPU kernels, and does not when it reloads: the
    head of the last model stays, without a word. Log-probabilities were off by up to 4.6.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedEmbeddingMethod):
            method.process_weights_after_loading(module)


def checked_extra(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return engine arguments as vLLM takes them; only where vLLM may be imported.

    Raises:
        ConfigError: a name that is no argument, or a value of a wrong type.
    """
    from pydantic import ValidationError
    from vllm import EngineArgs

    fields = {field.name: field.type for field in dataclasses.fields(EngineArgs)}
    checked = {}
    for name, value in extra.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"engine vllm: extra.{name} is no engine argument of vLLM {version_of_vllm()}{hint}"
            )
        try:
            read = _read(fields[name], value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            inner = "".join(f".{part}" for part in first["loc"])
            wanted = str(getattr(fields[name], "__name__", fields[name])).replace("typing.", "")
            raise ConfigError(
                f"engine vllm: extra.{name}={json.dumps(value)}: "
                f"{f'{name}{inner}: ' if inner else ''}{first['msg']}; vLLM wants {wanted}"
            ) from None
        # Maps go as they are: vLLM makes its own objects of them.
        checked[name] = value if isinstance(value, dict) else read
    return checked


def _read(wanted: Any, value: Any) -> Any:
    """Return a JSON value as the type that is wanted."""
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter

    try:
        adapter: TypeAdapter[Any] = TypeAdapter(wanted, config=ConfigDict(
            arbitrary_types_allowed=True))  # fmt: skip
    except PydanticUserError:  # a type with a configuration of its own
        adapter = TypeAdapter(wanted)
    try:
        return adapter.validate_json(json.dumps(value), strict=True)
    except PydanticUserError:  # a type that names what cannot be found: vLLM checks it itself
        return value


def version_of_vllm() -> str:
    """Return the version that is installed, or nothing."""
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return ""
