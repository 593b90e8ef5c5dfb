import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stages import suite
from stages.artifacts import Manifest, open_artifact, read_rows
from stages.config import EngineConfig, LmEvalSuiteConfig, RunConfig
from stages.config.suites import LEADERBOARD
from stages.data.measures import INTERVALS_FILE, read_measures
from stages.data.rows import SUITE_EXAMPLES
from stages.engines import gpus_used
from stages.errors import ConfigError, EngineError, InputError
from stages.suites import lm_eval, lm_eval_child
from stages.suites.base import SuiteInputs
from stages.suites.lm_eval_found import AVERAGE, HEADLINES, Found
from stages.suites.lm_eval_process import Library
from tests.lm_eval_tools import BOTH, CHOICE, WRITTEN, library_or_skip, make_tasks
from tests.lora_tools import make_adapter

ROOT = Path(__file__).parents[2]


def config_of(**settings: Any) -> LmEvalSuiteConfig:
    return LmEvalSuiteConfig.model_validate({"kind": "lm_eval", "tasks": ["choice"], **settings})


def ask(model: Path, out: Path, chat: dict[str, Any] | None = None, **settings: Any) -> Manifest:
    config = RunConfig.model_validate(
        {
            "name": "test",
            "chat": chat or {},
            "suites": {"bench": {"kind": "lm_eval", "tasks": ["choice"], **settings}},
        }
    )
    return suite.run(config, SuiteInputs("bench", model=os.fspath(model)), out)


# -- The recipe -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["/etc/task.yaml", "../choice", "tasks/choice", "choice.yaml", "x.py", "~/t", "*", ""]
)
def test_a_path_is_no_name_of_a_task(name: str) -> None:
    with pytest.raises(ValidationError, match="no name of a task; files of your own are reached"):
        config_of(tasks=[name])


@pytest.mark.parametrize(
    ("backend", "argument"),
    [
        *[
            ("transformers", name)
            for name in ("pretrained", "tokenizer", "trust_remote_code", "peft", "delta", "token",
                         "revision", "gguf_file", "use_safetensors", "config", "batch_size")
        ],
        *[
            ("vllm", name)
            for name in ("tokenizer", "trust_remote_code", "lora_local_path", "load_format",
                         "worker_cls", "hf_overrides", "speculative_config", "logits_processors")
        ],
    ],
)  # fmt: skip
def test_no_argument_of_the_model_class_names_files_or_code(backend: str, argument: str) -> None:
    with pytest.raises(ValidationError, match=f"model_args may not set '{argument}'; there are"):
        config_of(backend=backend, model_args={argument: "x"})


def test_an_attention_from_the_hub_is_refused() -> None:
    config_of(model_args={"attn_implementation": "eager"})
    with pytest.raises(ValidationError, match="choose one of eager, sdpa"):
        config_of(model_args={"attn_implementation": "kernels-community/flash-attn"})


@pytest.mark.parametrize(
    ("key", "value", "decides"),
    [
        ("tasks", ["other"], True),
        ("num_fewshot", 1, True),
        ("limit", 3, True),
        ("backend", "vllm", True),
        ("apply_chat_template", True, True),
        ("seed", 1, True),
        ("dtype", "float32", True),
        ("model_args", {"max_length": 9}, True),
        ("task_dir", "elsewhere", False),
        ("batch_size", 3, False),
        ("every", 2, False),
    ],
)
def test_what_decides_scores_is_in_the_key(key: str, value: Any, decides: bool) -> None:
    assert (config_of(**{key: value}).identity() != config_of().identity()) == decides


def test_the_leaderboard_keeps_its_few_shot_settings() -> None:
    with pytest.raises(ValidationError, match="few-shot settings of its own; leave num_fewshot"):
        config_of(tasks=[LEADERBOARD], num_fewshot=5)
    job = lm_eval.tasks_of(config_of(tasks=[LEADERBOARD, "piqa"]), Path("model"))
    assert job["tasks"] == [*HEADLINES, "piqa"]
    assert job["fewshot"] == {
        "arc_challenge": 25, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5, "hellaswag": 10,
        "mmlu": 5,
    }  # fmt: skip
    alone = lm_eval.tasks_of(config_of(tasks=["arc_challenge"], num_fewshot=3), Path("model"))
    assert (alone["fewshot"], alone["num_fewshot"]) == ({}, 3)


def test_a_model_is_never_loaded_with_its_own_code_or_from_pickle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = lm_eval.model_arguments(config_of(dtype="bfloat16", batch_size=3), Path("m"))
    assert plain["trust_remote_code"] is False
    assert plain["use_safetensors"] is True
    assert (plain["pretrained"], plain["dtype"], plain["batch_size"]) == ("m", "bfloat16", 3)
    monkeypatch.setattr(lm_eval, "is_cpu_build", lambda: True)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    more = {"max_model_len": 64, "enforce_eager": False}
    vllm = lm_eval.model_arguments(config_of(backend="vllm", seed=5, model_args=more), Path("m"))
    assert vllm["trust_remote_code"] is False
    assert vllm["load_format"] == "safetensors"
    assert (vllm["batch_size"], vllm["seed"], vllm["max_model_len"]) == ("auto", 5, 64)
    assert vllm["enforce_eager"] is False, "the recipe's own word counts"
    assert vllm["kv_cache_memory_bytes"] > 0
    monkeypatch.setattr(lm_eval, "is_cpu_build", lambda: False)
    gpu = lm_eval.model_arguments(config_of(backend="vllm"), Path("m"))
    assert not {"enforce_eager", "kv_cache_memory_bytes"} & gpu.keys()


@pytest.mark.parametrize(
    ("settings", "gpus"),
    [
        ({}, 1),
        ({"model_args": {"device": "cpu"}}, 0),
        ({"model_args": {"parallelize": True}}, 8),
        ({"backend": "vllm"}, 1),
        (
            {
                "backend": "vllm",
                "model_args": {"tensor_parallel_size": 2, "data_parallel_size": 3},
            },
            6,
        ),
    ],
)
def test_the_gpus_of_a_suite_are_those_that_the_library_takes(
    settings: dict[str, Any], gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert lm_eval.gpus_of(config_of(**settings)) == gpus
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert lm_eval.gpus_of(config_of(**settings)) == 0


@pytest.mark.parametrize("made", ["nothing", "empty"])
def test_a_task_dir_without_tasks_is_refused(
    made: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tasks"
    if made == "empty":
        folder.mkdir()
    with pytest.raises(ConfigError, match=r"suites\.bench\.task_dir=.* (has no|is no)"):
        ask(tiny_model_dir, tmp_path / "out", task_dir=str(folder))


# -- What it found --------------------------------------------------------------------------------


def sample(task: str, number: int, rule: str = "none", **metrics: float) -> dict[str, Any]:
    return {
        "task": task,
        "document": number,
        "hash": f"{task}{number}".ljust(64, "0"),
        "filter": rule,
        "prompt": "p",
        "target": "t",
        "responses": ["r"],
        "drawn": False,
        "metrics": metrics,
    }


def test_the_average_is_that_of_six_headlines_and_the_mean_of_its_measures() -> None:
    sizes = {"arc_challenge": 3, "truthfulqa_mc2": 5, "winogrande": 2, "gsm8k": 4, "hellaswag": 7,
             "mmlu_law": 6, "mmlu_art": 2}  # fmt: skip
    samples, metrics, means = [], {}, {}
    for task, size in sizes.items():
        name, rule = HEADLINES[task if task in HEADLINES else "mmlu"][1].split(",")
        values = [(n * 7 + size) % 3 / 2 for n in range(size)]
        samples += [sample(task, n, rule, **{name: value}) for n, value in enumerate(values)]
        metrics[task] = {f"{name},{rule}": sum(values) / size}
        means[task] = [name]
    mmlu = [s["metrics"]["acc"] for s in samples if s["task"].startswith("mmlu")]
    metrics["mmlu"] = {"acc,none": sum(mmlu) / len(mmlu)}
    about = {"tasks": ["mmlu_law", "mmlu_art"], "by_document": ["acc"], "by_task": []}
    found = Found.of({"metrics": metrics, "means": means, "groups": {"mmlu": about}}, samples)
    measures = list(found.average())
    wanted = sum(metrics[name][key] for name, (_, key) in HEADLINES.items()) / 6
    assert {m.metric for m in measures} == {AVERAGE}
    assert sum(m.value * m.weight for m in measures) / sum(m.weight for m in measures) == (
        pytest.approx(wanted, abs=1e-12)
    )
    assert len(measures) == len({m.example_id for m in measures}) == sum(sizes.values())
    assert {m.metric: m.weight for m in found.of_groups()} == {"mmlu.acc": 1.0}

    metrics["mmlu_bio"] = {"acc,none": 0.25}  # its scores are not those of its own figure
    metrics["mmlu"] = {"acc,none": 0.375}
    about["tasks"] = ["mmlu_law", "mmlu_art", "mmlu_bio"]
    part = Found.of({"metrics": metrics, "means": means, "groups": {"mmlu": about}}, samples)
    assert not list(part.average()), "some of MMLU's tasks are not MMLU"


def test_a_headline_without_scores_leaves_no_average() -> None:
    assert not list(Found.of({"metrics": {}, "means": {}, "groups": {}}, []).average())


def test_a_group_that_weighs_tasks_alike_is_the_mean_of_its_measures() -> None:
    samples = [sample("a", n, acc=1.0) for n in range(3)] + [sample("b", 0, acc=0.0)]
    metrics = {"a": {"acc,none": 1.0}, "b": {"acc,none": 0.0}, "g": {"acc,none": 0.5}}
    about = {"tasks": ["a", "b"], "by_document": [], "by_task": ["acc"]}
    means = {"a": ["acc"], "b": ["acc"]}
    found = Found.of({"metrics": metrics, "means": means, "groups": {"g": about}}, samples)
    measures = list(found.of_groups())
    assert sum(m.value * m.weight for m in measures) / sum(m.weight for m in measures) == 0.5
    metrics["g"] = {"acc,none": 0.6}
    other = Found.of({"metrics": metrics, "means": means, "groups": {"g": about}}, samples)
    assert not list(other.of_groups()), "what is not the mean of its measures has none"
    assert other.exact([])["g.acc"] == 0.6


def test_only_metrics_that_are_no_means_tell_the_librarys_standard_errors() -> None:
    samples = [sample("a", n, acc=float(n), ppl=2.0) for n in range(2)]
    values = {"acc,none": 0.5, "acc_stderr,none": 0.1, "ppl,none": 2.0, "ppl_stderr,none": 0.2}
    found = Found.of({"metrics": {"a": values}, "means": {"a": ["acc"]}, "groups": {}}, samples)
    measures = list(found.of_tasks())
    assert {m.metric for m in measures} == {"a.acc"}
    assert found.exact(measures) == {"a.acc": 0.5, "a.ppl": 2.0, "a.ppl_stderr": 0.2}


def test_an_example_is_told_by_the_filter_of_the_headline_and_every_repetition_has_a_row() -> None:
    strict, flexible = "strict-match", "flexible-extract"
    samples = [
        sample("gsm8k", n, rule, exact_match=1.0) for rule in (flexible, strict) for n in (0, 1)
    ]
    samples[2]["responses"] = ["a", "b \ud800"]
    samples[2]["drawn"] = True
    metrics = {"gsm8k": {f"exact_match,{rule}": 1.0 for rule in (flexible, strict)}}
    results = {"metrics": metrics, "means": {"gsm8k": ["exact_match"]}, "groups": {}}
    rows = list(Found.of(results, samples).rows(samples))
    assert [(r["sample"], r["response"], r["scored_by"]) for r in rows] == [
        (0, "a", "exact_match.strict-match"),
        (1, "b ?", "exact_match.strict-match"),
        (-1, "r", "exact_match.strict-match"),
    ]


# -- The library's process ------------------------------------------------------------------------


def make_library(folder: Path, monkeypatch: pytest.MonkeyPatch, tasks: str) -> None:
    """Put a library of this name where processes find it; `tasks` is its module of tasks."""
    package = folder / "lm_eval"
    (package / "tasks").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "tasks" / "__init__.py").write_text(tasks)
    info = folder / "lm_eval-9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lm_eval\nVersion: 9\n")
    monkeypatch.setenv("PYTHONPATH", os.fspath(folder))


def load(**job: Any) -> tuple[str, dict[str, Any]]:
    whole = {
        "tasks": ["choice"],
        "task_dir": None,
        "num_fewshot": None,
        "fewshot": {},
        "metadata": {},
    }
    folder = job.get("task_dir")
    with Library("bench", folder and Path(folder), {}) as library:
        return library.load(whole | job)


def test_a_missing_library_is_named_with_its_extra(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.fspath(tmp_path))
    probe = [sys.executable, "-P", "-c", "import lm_eval"]
    if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
        pytest.skip("the library is installed beside spin")
    with pytest.raises(ConfigError, match=r"pip install 'spin-selfplay\[lm-eval\]'"):
        ask(tiny_model_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_death_of_its_process_is_an_error_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_library(
        tmp_path / "lib",
        monkeypatch,
        "import os, sys\nprint('out of luck', file=sys.stderr, flush=True)\n"
        "os.kill(os.getpid(), 9)\n",
    )
    with pytest.raises(EngineError, match="ended with SIGKILL; its last words: out of luck"):
        load()


def test_what_it_prints_is_no_message_and_where_it_runs_no_local_file_is_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make_library(
        tmp_path / "lib",
        monkeypatch,
        "import os, sys\nprint('chatter')\nos.system('echo more')\n"
        "def TaskManager(**_): raise OSError(f'in it: {os.listdir()} {\"\" in sys.path}')\n",
    )
    (tmp_path / "gsm8k").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"\(OSError: in it: \[\] False\)"):
        load()
    assert "chatter" not in "".join(capfd.readouterr())


def test_its_process_ends_with_ours_however_we_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_library(
        tmp_path / "lib",
        monkeypatch,
        "import os, time\nfrom pathlib import Path\n"
        f"Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\ntime.sleep(600)\n",
    )
    script = (
        "from stages.suites.lm_eval_process import Library\n"
        "with Library('bench', None, {}) as library: library.load({})"
    )
    ours = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pid = int((tmp_path / "pid").read_text())
    ours.kill()
    ours.wait()
    while _runs(pid):
        assert time.monotonic() < deadline, "it outlives us"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


def test_a_metric_that_would_be_downloaded_is_refused_whatever_the_library_suppresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_library(
        tmp_path / "lib",
        monkeypatch,
        "def TaskManager(**_):\n    import evaluate\n    try:\n        evaluate.load('rouge')\n"
        "    except Exception:\n        pass\n",
    )
    with pytest.raises(ConfigError, match="metric 'rouge' of the library evaluate, which is"):
        load()


@pytest.mark.parametrize("has_own_class", [True, False])
def test_a_task_that_trusts_the_models_code_runs_none(
    has_own_class: bool, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the library's ruler and babilong tasks load the tokenizer they make documents by."""
    model, marker = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_model_dir, model)
    (model / "theirs.py").write_text(
        "from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\n"
        f"Path({str(marker)!r}).touch()\n"
        "class Theirs(PreTrainedTokenizerFast):\n    pass\n"
    )
    file = model / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {
        "auto_map": {"AutoTokenizer": [None, "theirs.Theirs"]}
    }
    if not has_own_class:
        settings["tokenizer_class"] = "Theirs"
    file.write_text(json.dumps(settings))
    monkeypatch.setenv("HF_HOME", os.fspath(tmp_path / "home"))
    make_library(
        tmp_path / "lib",
        monkeypatch,
        "def TaskManager(**_):\n    from transformers import AutoTokenizer\n"
        f"    AutoTokenizer.from_pretrained({str(model)!r}, trust_remote_code=True)\n"
        "    raise OSError('loaded')\n",
    )
    with pytest.raises(InputError, match="loaded|custom code"):
        load()
    assert not marker.exists()


# -- The library itself ---------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.getbasetemp() / "lm-eval-home"
    library_or_skip(monkeypatch, folder)
    return folder


SECOND = (
    CHOICE.replace("task: choice", "task: second")
    .replace('"{{question}}\\nAnswer:"', "!function rules.text")
    .replace(
        "  - {metric: acc, ",
        "  - {metric: f1, aggregation: f1, higher_is_better: true}\n  - {metric: acc, ",
    )
)
RULES = "def text(doc):\n    return doc['question'].upper()\n"


def test_groups_functions_and_metrics_that_are_no_means(
    home: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    tasks = make_tasks(tmp_path / "tasks", second=SECOND, both=BOTH)
    (tasks / "rules.py").write_text(RULES)
    out = tmp_path / "out"
    done = ask(
        tiny_model_dir,
        out,
        chat={"template": "plain", "system": "Be brief."},
        tasks=["both"],
        task_dir=str(tasks),
        num_fewshot=1,
        limit=5,
        apply_chat_template=True,
    )
    assert done.info["gpus"] == gpus_used(EngineConfig())
    measures = read_measures(open_artifact(out))
    assert sorted(measures) == [
        f"{task}.{metric}"
        for task in ("both", "choice", "second")
        for metric in ("acc", "acc_norm")
    ]
    for name, column in measures.items():
        assert column.mean() == pytest.approx(done.metrics[name], abs=1e-12)
        assert len(column.values) == (10 if name.startswith("both.") else 5)
    assert {"second.f1", "second.f1_stderr"} <= done.metrics.keys()
    assert "second.f1" not in json.loads((out / INTERVALS_FILE).read_text())

    rows = list(read_rows([out / "examples.parquet"], SUITE_EXAMPLES))
    assert [(r["prompt_id"], r["task"]) for r in rows] == sorted(
        (r["prompt_id"], r["task"]) for r in rows
    )
    assert done.counts == {"examples": 10, "tasks": 2}
    for row in rows:
        assert row["prompt"].startswith("<s>Be brief.\n"), "the recipe's template and system prompt"
        assert ("ANN HAS" in row["prompt"]) == (row["task"] == "second")
    assert done.inputs["model"].path == tiny_model_dir.name
    assert done.config["suite"] == "bench"
    assert set(done.config["asked"]) == {"choice", "second"}
    assert done.config["asked"]["choice"]["version"] == "1.5"
    assert done.fingerprints.keys() == {"template", "tokenizer"}


def test_the_leaderboard_is_asked_with_its_few_shot_settings(
    home: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    def named(name: str, text: str = CHOICE) -> str:
        return text.replace("task: choice", f"task: {name}")

    def group(name: str, *members: str) -> str:
        rule = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]"
        return f"group: {name}\ntask: [{', '.join(members)}]\n{rule}\n"

    gsm8k = WRITTEN.replace("task: written", "task: gsm8k").replace("num_fewshot: 2\n", "")
    fixed = CHOICE + "num_fewshot: 0\n"
    few = CHOICE.replace("test.jsonl", "few.jsonl")
    tasks = make_tasks(
        tmp_path / "tasks",
        **{name: named(name) for name in ("arc_challenge", "hellaswag", "winogrande")},
        # As the library's: a group of groups, whose tasks are not of one size.
        mmlu_law=named("mmlu_law"),
        mmlu_bio=named("mmlu_bio", few),
        mmlu_art=named("mmlu_art"),
        mmlu_humanities=group("mmlu_humanities", "mmlu_law", "mmlu_bio"),
        mmlu_other=group("mmlu_other", "mmlu_art"),
        mmlu=group("mmlu", "mmlu_humanities", "mmlu_other"),
        truthfulqa=named("truthfulqa_mc2", fixed),
        gsm8k=gsm8k.replace("name: whole", "name: strict-match"),
    )
    (tasks / "few.jsonl").write_text((tasks / "test.jsonl").read_text().partition("\n")[0])
    out = tmp_path / "out"
    done = ask(tiny_model_dir, out, tasks=[LEADERBOARD], task_dir=str(tasks), limit=2)
    shots = {"arc_challenge": 25, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5, "hellaswag": 10,
             "mmlu_law": 5, "mmlu_art": 5, "mmlu_bio": 5}  # fmt: skip
    assert {task: about["num_fewshot"] for task, about in done.config["asked"].items()} == shots
    for row in read_rows([out / "examples.parquet"], SUITE_EXAMPLES):
        assert row["prompt"].count("Answer:") == shots[row["task"]] + 1
    headlines = [
        "arc_challenge.acc_norm", "truthfulqa_mc2.acc", "winogrande.acc",
        "gsm8k.exact_match.strict-match", "hellaswag.acc_norm", "mmlu.acc",
    ]  # fmt: skip
    average = sum(float(done.metrics[name] or 0) for name in headlines) / 6
    assert done.metrics[AVERAGE] == pytest.approx(average, abs=1e-12)
    measures = read_measures(open_artifact(out))
    assert measures[AVERAGE].mean() == pytest.approx(average, abs=1e-12)
    questions = [n for n in measures["mmlu.acc"].example_ids if not n.startswith("mmlu_bio/")]
    assert (len(questions), len(measures["mmlu.acc"].values)) == (4, 5), "each question, once"
    assert {"mmlu_humanities.acc", "mmlu_other.acc"} <= measures.keys()
    law, bio = (measures[f"mmlu_{name}.acc"].mean() for name in ("law", "bio"))
    assert law != bio, "else it would not matter what weighs alike"


def test_the_leaderboards_tasks_metrics_and_filters_are_the_librarys_own(home: Path) -> None:
    """From its files alone: no task is made, which would fetch its documents."""
    program = textwrap.dedent("""
        import json
        from pathlib import Path
        import lm_eval.tasks
        folders = ("arc", "truthfulqa", "winogrande", "gsm8k", "hellaswag", "mmlu")
        paths = [Path(lm_eval.tasks.__file__).with_name(name) for name in folders]
        # Of 14,000 files, which take long to read.
        index = lm_eval.tasks.TaskManager(include_path=paths, include_defaults=False).task_index
        def about(name):
            cfg = index[name].cfg or {}
            members = cfg["task"] if "group" in cfg else index[name].tags if not cfg else []
            return {**cfg, "members": [about(each) for each in members]}
        print(json.dumps({name: about(name) for name in json.loads(input())}, default=str))
    """)
    asked = subprocess.run(
        [sys.executable, "-P", "-c", program], input=json.dumps(list(HEADLINES)),
        capture_output=True, text=True, check=True,
    )  # fmt: skip

    def tasks(about: dict[str, Any]) -> list[dict[str, Any]]:
        return [task for each in about["members"] for task in tasks(each)] or [about]

    found = json.loads(asked.stdout)
    for name, (shots, key) in HEADLINES.items():
        metric, rule = key.split(",")
        for task in tasks(found[name]):
            assert metric in [each["metric"] for each in task["metric_list"]], name
            rules = [each["name"] for each in task.get("filter_list") or [{"name": "none"}]]
            assert rule in rules, name
            assert task.get("num_fewshot") != 0 or shots == 0, "a task's own 0 stays"
    [weighed] = found["mmlu"]["aggregate_metric_list"]
    assert weighed == {"metric": "acc", "weight_by_size": True}
    assert len({task["task"] for task in tasks(found["mmlu"])}) == 57


def test_another_task_file_function_document_or_few_shot_example_is_another_artifact(
    home: Path, tmp_path: Path
) -> None:
    tasks = make_tasks(tmp_path / "tasks", second=SECOND)
    (tasks / "rules.py").write_text(RULES)

    def asked() -> dict[str, Any]:
        _, found = load(tasks=["second"], task_dir=str(tasks), num_fewshot=1)
        return dict(found["second"])

    before = asked()
    elsewhere = make_tasks(tmp_path / "elsewhere", second=SECOND)
    (elsewhere / "rules.py").write_text(RULES)
    tasks = elsewhere
    assert asked() == before, "the place decides nothing"
    (elsewhere / "rules.py").write_text(RULES.replace("upper", "lower"))
    (elsewhere / "train.jsonl").write_text((elsewhere / "train.jsonl").read_text() * 2)
    after = asked()
    assert {name for name in before if before[name] != after[name]} == {"config", "examples"}


@pytest.mark.parametrize(
    ("more", "job", "message"),
    [
        ({}, {"tasks": ["choise"]}, "task 'choise' is not in lm-evaluation-harness .*did you mean"),
        ({}, {"tasks": ["choice", "choice"]}, "task choice is asked for twice"),
        (
            {"choice": f"{CHOICE}unsafe_code: true\n"},
            {},
            "task choice runs code that the model writes, which spin does not",
        ),
        (
            {"choice": CHOICE.replace("{metric: acc,", "{metric: rouge, hf_evaluate: true,")},
            {},
            "metric 'rouge' of the library evaluate",
        ),
    ],
    ids=["unknown", "twice", "unsafe code", "downloaded metric"],
)
def test_tasks_that_are_refused(
    home: Path, tmp_path: Path, more: dict[str, str], job: dict[str, Any], message: str
) -> None:
    tasks = make_tasks(tmp_path / "tasks", **more)
    with pytest.raises(ConfigError, match=message):
        load(task_dir=str(tasks), **job)


def test_documents_that_cannot_be_had_are_a_missing_input(
    home: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    tasks = make_tasks(tmp_path / "tasks")
    (tasks / "test.jsonl").unlink()
    with pytest.raises(InputError, match=r"a task or the model cannot be loaded \(FileNotFoundErr"):
        ask(tiny_model_dir, tmp_path / "out", task_dir=str(tasks))
    assert not (tmp_path / "out").exists()


# -- Adapters -------------------------------------------------------------------------------------


def test_an_adapter_is_asked_as_its_whole_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stages.model.load import load_model
    from stages.model.source import resolve_model

    adapter = make_adapter(tiny_model_dir, tmp_path / "adapter")
    source = resolve_model(str(adapter))
    with lm_eval.whole_model(source, None, tmp_path) as folder:
        whole = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert AutoTokenizer.from_pretrained(folder).encode("Ann has 12 cups")
    merged = load_model(adapter).state_dict()
    assert all(torch.equal(whole[name], merged[name]) for name in merged)
    base = load_model(tiny_model_dir).state_dict()
    assert any(not torch.equal(base[name], merged[name]) for name in merged)
    assert not folder.exists()


def test_a_template_of_the_recipes_goes_before_the_models_own(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    from stages.model.source import resolve_model

    source = resolve_model(str(tiny_model_dir))
    with lm_eval.whole_model(source, "{{ messages[0].content }}!", tmp_path) as folder:
        asked = [{"role": "user", "content": "hi"}]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.apply_chat_template(asked, tokenize=False) == "hi!"
        assert (folder / "model.safetensors").samefile(tiny_model_dir / "model.safetensors")
    with lm_eval.whole_model(source, None, tmp_path) as folder:
        assert folder == tiny_model_dir.resolve()


# -- Samples --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ([("q", " a"), ("q", " b")], " b"),
        ([("The cat is", " wet"), ("The dog is", " wet")], "The dog is"),
        ([("q", " a"), ("q", " b"), ("", " a"), ("", " b")], " b"),
    ],
    ids=["endings differ", "questions differ", "asked again without the question"],
)
def test_the_answer_to_a_choice_is_what_differs(
    arguments: list[tuple[str, str]], answer: str
) -> None:
    logprobs = [(-2.0, False), (-1.0, False), (-0.5, False), (-0.1, False)][: len(arguments)]
    found, best = lm_eval_child._choices({"arguments": arguments, "filtered_resps": logprobs})
    assert best is not None
    assert found[best] == answer


def test_hashes_of_tasks_hold_no_address_or_order() -> None:
    one, other = {"a": 1, "b": [lambda doc: doc]}, {"b": [lambda doc: doc], "a": 1}
    assert "0x" not in json.dumps(lm_eval_child.plain(one | {"c": object(), "d": float("nan")}))
    assert lm_eval_child._hash([one]) == lm_eval_child._hash([other])
    assert lm_eval_child._hash([one]) != lm_eval_child._hash([one | {"a": 2}])


def test_hashes_of_tasks_are_the_same_in_every_process() -> None:
    """The order of a set is that of its elements' hashes, which Python draws anew."""
    program = (
        "from stages.suites.lm_eval_child import _hash\n"
        "words = [f'word {n}' for n in range(20)]\n"
        "print(_hash([{'until': set(words), 'inner': [frozenset(words)], 'sets': {frozenset('ab'),"
        " frozenset('cd'), 1, None}}]))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(found) == 1
