"""Suites in a run: asked at the start and after iterations, by the loop, a shell, and make."""

import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from spin_cli.app import app
from stages.artifacts import read_manifest
from stages.layout import RunLayout
from tests import fake_stages
from tests.pipeline.test_run_loop import ROOT, command, content  # noqa: F401

RECIPE = """
name: example
sft: {init: random}
promote: {metric: sampled_accuracy, min_gain: 0.05}
reward: {name: gsm8k}
suites:
  sums: {kind: task, num_samples: 4, k: [1, 4]}
  own: {kind: task, data: {source: questions.jsonl, format: gsm8k}, every: 2}
  duel: {kind: win_rate, against: champion}
  humans: {kind: win_rate, against: human}
"""


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    yield
    logging.getLogger("spin").handlers.clear()


@pytest.fixture
def fakes() -> Iterator[None]:
    with fake_stages.installed():
        yield


def spin(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def test_a_run_asks_its_suites_at_the_start_and_after_iterations(fakes: None) -> None:
    result = spin("run", "recipe.yaml", "--run", "r", "--iterations", "2")
    assert result.exit_code == 0, result.output
    asked = [call for call in fake_stages.calls if "suite-" in call or "evaluate" in call]
    assert asked == [
        *("start/evaluate", "start/suite-sums", "start/suite-own"),
        *("000/evaluate", "000/suite-sums", "000/suite-duel", "000/suite-humans"),
        *("001/evaluate", "001/suite-sums", "001/suite-own", "001/suite-duel", "001/suite-humans"),
    ]
    layout = RunLayout(Path("r"))
    assert fake_stages.calls.count("suites/prepare") == 1
    own = read_manifest(layout.suite(1, "own")).inputs
    assert own["data"].path == "suites/own"
    assert own["model"].path == "iterations/001/train"
    duel = read_manifest(layout.suite(1, "duel")).inputs
    assert duel["answers"].path == "iterations/001/evaluate"
    assert duel["against"].path == "iterations/000/evaluate"
    assert "against" not in read_manifest(layout.suite(1, "humans")).inputs
    assert read_manifest(layout.suite(0, "duel")).inputs["against"].path == "start/evaluate"


def test_the_printed_commands_and_make_do_the_same(
    fakes: None,
    command: Path,  # noqa: F811
) -> None:
    assert spin("run", "recipe.yaml", "--run", "a", "--iterations", "1").exit_code == 0
    printed = spin("run", "recipe.yaml", "--run", "b", "--iterations", "1", "--dry-run")
    assert printed.exit_code == 0, printed.output
    subprocess.run(["bash", "-e", "-c", printed.stdout], check=True, capture_output=True)
    assert content("b") == content("a")
    make = ["make", "-f", str(ROOT / "configs/pipeline.mk"), "CONFIG=recipe.yaml", "RUN=d"]
    subprocess.run([*make, "ITERATION=0"], check=True, capture_output=True)
    assert content("d") == content("a")
    rules = spin("run", "recipe.yaml", "--run", "c", "--iterations", "2", "--rules")
    assert rules.exit_code == 0, rules.output
    assert "c/iterations/001/suite-own/manifest.json: " in rules.stdout
    promote = "c/iterations/001/promote/manifest.json: c/iterations/001/evaluate/manifest.json "
    assert promote + "c/iterations/001/suite-sums/manifest.json" in rules.stdout


def test_a_suite_of_a_model_in_a_run_takes_the_runs_recipe_and_data(fakes: None) -> None:
    assert spin("run", "recipe.yaml", "--run", "r", "--iterations", "1").exit_code == 0
    for suite, data in (("sums", "data"), ("own", "own")):
        words = ("--suite", suite, "--model", "r/champion", "--out", f"e-{suite}")
        result = spin("evaluate", *words)
        assert result.exit_code == 0, result.output
        assert read_manifest(Path(f"e-{suite}")).inputs["data"].path == data


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "sumz"], "--suite sumz: recipe example has no such suite; it has sums, own"),
        (["--answers", "e"], "--answers goes with --suite"),
        (["--suite", "sums", "--opponent", "m"], "--opponent does not go with --suite"),
        ([], "give --data"),
    ],
)
def test_wrong_words_are_refused_with_a_remedy(
    words: list[str], message: str, tiny_model_dir: Path
) -> None:
    model = ("--model", str(tiny_model_dir), "--out", "e", "--config", "recipe.yaml")
    result = spin("evaluate", *model, *words)
    assert (result.exit_code, message in result.output) == (2, True), result.output
    assert not Path("e").exists()
