"""Tasks of lm-evaluation-harness that need no network, and where the tests' copy of it lies."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / ".venv" / "lm-eval"

CHOICE = """\
task: choice
dataset_path: json
dataset_kwargs: {data_files: {train: train.jsonl, test: test.jsonl}}
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.5}
"""
WRITTEN = """\
task: written
dataset_path: json
dataset_kwargs: {data_files: {train: train.jsonl, test: test.jsonl}}
training_split: train
test_split: test
output_type: generate_until
num_fewshot: 2
doc_to_text: "{{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
filter_list:
  - {name: whole, filter: [{function: take_first}]}
  - name: letter
    filter: [{function: regex, regex_pattern: "([a-z])"}, {function: take_first}]
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 2.0}
"""
BOTH = """\
group: both
task: [choice, second]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
  - {metric: acc_norm, weight_by_size: false}
"""


def library_or_skip(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Let processes see the library, and keep what they download or convert in `home`.

    Raises:
        Skipped: it is not installed.
    """
    if not LIBRARY.is_dir():
        pytest.skip("needs lm-evaluation-harness: make .venv/lm-eval")
    monkeypatch.setenv("PYTHONPATH", os.fspath(LIBRARY))
    # It is installed uncompiled, and every process would spend half of its start on compiling.
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("HF_HOME", os.fspath(home))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


def documents(start: int, stop: int) -> str:
    rows = [
        {
            "question": f"Ann has {n} cups, buys {n % 7}. How many?",
            "choices": [str(n + n % 7), f"{n}{n % 5}", "a cup"][: 2 + n % 2],
            "label": n % 2,
            "answer": "abc"[n % 3],
        }
        for n in range(start, stop)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_tasks(folder: Path, **more: str) -> Path:
    """Write the tasks `choice` and `written`, and further files, by their names without .yaml."""
    folder.mkdir(parents=True)
    for name, text in {"choice": CHOICE, "written": WRITTEN, **more}.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "train.jsonl").write_text(documents(100, 140))
    (folder / "test.jsonl").write_text(documents(0, 12))
    return folder
