"""Held-out prompts that evaluate leaves out: which, why, and who says so."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spin_cli.app import app
from stages import evaluate
from stages.artifacts import Manifest, open_artifact, read_rows
from stages.config import RunConfig
from stages.data.rows import DROPPED
from stages.evaluate import EvaluateInputs
from stages.reporting.collect import collect
from stages.reporting.page import render
from tests import made_runs
from tests.evaluations import make_data, prompt_id
from tests.fakes import FakeEngine

LONG = "a word " * 400


def ask(out: Path, model: Path, humans: dict[int, str], **settings: Any) -> Manifest:
    values = {"evaluate": {"max_new_tokens": 8, "precision": "fp32"}, **settings}
    data = make_data(out.with_name(f"{out.name}-data"), humans)
    inputs = EvaluateInputs(str(model), data)
    return evaluate.run(
        RunConfig.model_validate(values), inputs, out, open_engine=FakeEngine().open
    )


@pytest.fixture
def asked(tmp_path: Path, tiny_model_dir: Path) -> Path:
    ask(tmp_path / "evaluate", tiny_model_dir, {1: "short", 2: LONG, 3: "short", 4: LONG})
    return tmp_path / "evaluate"


def test_what_is_left_out_has_a_row_with_its_reason(asked: Path) -> None:
    artifact = open_artifact(asked)
    assert artifact.manifest.counts == {"prompts": 2, "dropped_refused": 2}
    rows = list(read_rows([artifact.file("dropped.parquet")], DROPPED))
    assert [(row["prompt_id"], row["reason"]) for row in rows] == [
        (prompt_id(2), "response_too_long"), (prompt_id(4), "response_too_long"),
    ]  # fmt: skip
    assert all("tokens with its prompt, at most " in row["detail"] for row in rows)


def test_show_has_these_rows(asked: Path) -> None:
    told = CliRunner().invoke(app, ["show", str(asked), "--dropped", "--json"])
    assert told.exit_code == 0, told.output
    rows = json.loads(told.stdout)["rows"]
    assert {row["prompt_id"] for row in rows} == {prompt_id(2), prompt_id(4)}


def test_what_has_no_reward_hides_no_prompt_that_was_left_out(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "none.py").write_text(
        "def score(prompt, response, human):\n    return None if human == 'one' else 1.0\n"
    )
    reward = {"name": "python", "python": {"file": str(tmp_path / "none.py"), "function": "score"}}
    humans = {1: "one", 2: LONG, 3: "short"}
    manifest = ask(tmp_path / "evaluate", tiny_model_dir, humans, reward=reward)
    assert {"unscored.parquet", "dropped.parquet"} <= {file.path for file in manifest.files}
    told = CliRunner().invoke(app, ["show", str(tmp_path / "evaluate"), "--dropped", "--json"])
    assert [row["prompt_id"] for row in json.loads(told.stdout)["rows"]] == [prompt_id(2)]


def test_where_nothing_is_left_out_there_is_no_table(tmp_path: Path, tiny_model_dir: Path) -> None:
    manifest = ask(tmp_path / "evaluate", tiny_model_dir, {1: "short", 2: "short"})
    assert manifest.counts == {"prompts": 2, "dropped_refused": 0}
    assert "dropped.parquet" not in {entry.path for entry in manifest.files}


def test_the_report_says_how_many_and_why(asked: Path, tmp_path: Path) -> None:
    layout = made_runs.write_run(tmp_path / "run", 2)
    assert "held-out prompts were left out" not in render(collect(layout.root))
    for place in (layout.start_evaluation, layout.stage(1, "evaluate")):
        shutil.rmtree(place)
        shutil.copytree(asked, place)
    told = "2 of 4 held-out prompts were left out (response too long: 2) in the evaluation of "
    assert f"{told}the start and iteration 1." in render(collect(layout.root))
    dropped = layout.start_evaluation / "dropped.parquet"
    dropped.write_bytes(dropped.read_bytes()[:-1])
    view = collect(layout.root)
    assert f"{told}iteration 1." in render(view)
    assert any("start/evaluate/dropped.parquet" in problem for problem in view.problems)


def test_an_evaluation_of_before_there_was_a_table_says_how_many(tmp_path: Path) -> None:
    layout = made_runs.write_run(tmp_path / "run", 1)
    shutil.rmtree(layout.stage(0, "evaluate"))
    refs = made_runs.inputs(layout, 0, model="train")
    made_runs.make(layout, 0, "evaluate", refs, counts={"prompts": 2, "dropped_refused": 2})
    told = "2 of the held-out prompts were left out (refused: 2) in the evaluation of iteration 0."
    assert told in render(collect(layout.root))
