"""Suites of a run with a real tiny model, asked through the stage and through the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from spin_cli.app import app
from stages import suite
from stages.artifacts import open_artifact, read_rows
from stages.data.measures import read_measures
from stages.data.rows import EXAMPLES, SUITE_EXAMPLES
from stages.layout import RunLayout
from stages.recipe import load_recipe
from stages.suites.base import SuiteInputs
from tests.tiny_loop import RECIPE

SUITES = """
suites:
  sums: {kind: task, num_samples: 3, k: [1, 3], max_new_tokens: 16}
  others:
    kind: task
    data: {format: word_sums, word_sums: {num_examples: 12, seed: 5}}
    reward: {name: exact}
    max_new_tokens: 16
"""


def spin(*words: object, expect: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == expect, result.output + result.stderr
    return result


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a run whose first opponent was made and evaluated, beside that run."""
    folder = tmp_path_factory.mktemp("suites")
    path = folder / "tiny.yaml"
    path.write_text(RECIPE + SUITES)
    layout = RunLayout(folder / "run")
    layout.root.mkdir()
    layout.record.write_text("{}")
    spin("prepare", "--config", path, "--out", layout.data)
    spin("sft", "--config", path, "--data", layout.data, "--out", layout.sft)
    spin("evaluate", "--config", path, "--model", layout.sft, "--data", layout.data,
         "--out", layout.start_evaluation)  # fmt: skip
    return path


@pytest.fixture(scope="module")
def layout(recipe: Path) -> RunLayout:
    return RunLayout(recipe.parent / "run")


def rows_of(place: Path) -> list[dict[str, Any]]:
    return list(read_rows([open_artifact(place).file("examples.parquet")], SUITE_EXAMPLES))


def test_a_suite_agrees_with_the_main_evaluation(recipe: Path, layout: RunLayout) -> None:
    out = layout.suite(None, "sums")
    inputs = SuiteInputs("sums", str(layout.sft), data=layout.data)
    made = suite.run(load_recipe(recipe).for_iteration(), inputs, out)
    main = open_artifact(layout.start_evaluation)
    theirs = {r["prompt_id"]: r for r in read_rows([main.file("examples.parquet")], EXAMPLES)}
    rows = rows_of(out)
    assert len(rows) == 4 * len(theirs) == 40
    for row in rows:
        their = theirs[row["prompt_id"]]
        name = {-1: "greedy", 0: "sampled"}.get(row["sample"])
        if name is not None:
            assert row["response"] == their[name]
            assert row["score"] == their[f"{name}_reward"]
            assert row["finish_reason"] == their[f"{name}_finish_reason"]
    assert made.metrics["greedy_accuracy"] == main.manifest.metrics["greedy_accuracy"]
    assert made.metrics["pass@1"] == pytest.approx(made.metrics["accuracy"])
    columns = read_measures(open_artifact(out))
    assert {"majority@3", "pass@3", "mean_tokens", "unscored_share"} <= columns.keys()
    assert all(len(column.values) == len(theirs) for column in columns.values())
    assert made.inputs["model"].key == main.manifest.inputs["model"].key


def test_the_command_asks_the_same_and_takes_what_the_run_has(
    recipe: Path, layout: RunLayout
) -> None:
    asked = ["--config", recipe, "--model", layout.sft, "--data", layout.data]
    place = layout.root / "by-hand" / "sums"
    spin("evaluate", "--suite", "sums", *asked, "--out", place)
    first = layout.suite(None, "sums")
    # its cost too: nobody was asked again
    assert (place / "manifest.json").read_bytes() == (first / "manifest.json").read_bytes()
    outside = layout.root.parent / "outside"
    spin("evaluate", "--suite", "sums", *asked, "--out", outside)
    assert json.loads((outside / "metrics.json").read_text()) == json.loads(
        (first / "metrics.json").read_text()
    )
    assert rows_of(outside) == rows_of(first)


def test_a_suite_with_prompts_of_its_own(recipe: Path, layout: RunLayout) -> None:
    data = layout.suite_data("others")
    spin("prepare", "--config", recipe, "--suite", "others", "--out", data)
    place = layout.suite(None, "others")
    asked = ["--config", recipe, "--suite", "others", "--model", layout.sft]
    spin("evaluate", *asked, "--data", data, "--out", place)
    rows = rows_of(place)
    assert len(rows) == 2 * 12
    assert {row["scored_by"] for row in rows} == {"exact"}
    of_the_run = {row["prompt_id"] for row in rows_of(layout.suite(None, "sums"))}
    assert not of_the_run & {row["prompt_id"] for row in rows}
    refused = spin("evaluate", *asked, "--data", layout.data, "--out", place.parent / "x", expect=2)
    assert "is not the data of suites.others" in " ".join(refused.stderr.split())
