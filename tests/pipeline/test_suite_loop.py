"""Suites in a run: asked at the start and after iterations, by the loop, a shell, and make."""

import logging
import re
import shlex
import shutil
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


def test_where_a_decision_was_made_without_a_champion_the_start_is_compared_with(
    fakes: None,
) -> None:
    """A player can be decided on before the start was evaluated, and asked for its wins later."""
    assert spin("run", "recipe.yaml", "--run", "r", "--iterations", "1").exit_code == 0
    layout = RunLayout(Path("r"))
    layout.champion.unlink()
    for place in (layout.start_evaluation, layout.suite(0, "duel"), layout.stage(0, "promote")):
        shutil.rmtree(place)
    assert spin("promote", "r", "--iteration", "0").exit_code == 0
    assert "champion_evaluation" not in read_manifest(layout.stage(0, "promote")).inputs
    told = spin("opponent", "r", "--iteration", "0", "--champion")
    assert told.stdout.strip() == str(layout.start_evaluation)
    result = spin("run", "recipe.yaml", "--run", "r", "--iterations", "1")
    assert result.exit_code == 0, result.output
    assert read_manifest(layout.suite(0, "duel")).inputs["against"].path == "start/evaluate"


def test_what_a_win_rate_does_not_measure_is_told_before_training(fakes: None) -> None:
    gate = "promote.gate={at_least: {metric: duel.wins, value: 0.5}}"
    result = spin("run", "recipe.yaml", "--run", "r", "--iterations", "1", gate)
    assert (result.exit_code, "asks for duel.wins, which is not measured" in result.output) == (
        2, True,
    ), result.output  # fmt: skip
    assert not RunLayout(Path("r")).iterations()


def asked(inner: re.Match[str]) -> str:
    """What a command prints that stands in another, as a shell would ask it."""
    return spin(*shlex.split(inner[1])[1:]).stdout.strip()


def test_the_printed_commands_do_the_same(fakes: None) -> None:
    assert spin("run", "recipe.yaml", "--run", "a", "--iterations", "1").exit_code == 0
    printed = spin("run", "recipe.yaml", "--run", "b", "--iterations", "1", "--dry-run")
    assert printed.exit_code == 0, printed.output
    for line in printed.stdout.splitlines():
        name, *words = shlex.split(re.sub(r"\$\((spin .*?)\)", asked, line))
        assert (name, spin(*words).exit_code) == ("spin", 0), line
    assert content("b") == content("a")


@pytest.mark.long
def test_a_shell_and_make_do_the_same(
    fakes: None,
    command: Path,  # noqa: F811
) -> None:
    assert spin("run", "recipe.yaml", "--run", "a", "--iterations", "1").exit_code == 0
    printed = spin("run", "recipe.yaml", "--run", "b", "--iterations", "1", "--dry-run")
    subprocess.run(["bash", "-e", "-c", printed.stdout], check=True, capture_output=True)
    assert content("b") == content("a")
    make = ["make", "-f", str(ROOT / "configs/pipeline.mk"), "CONFIG=recipe.yaml", "RUN=d"]
    subprocess.run([*make, "ITERATION=0"], check=True, capture_output=True)
    assert content("d") == content("a")


def test_rules_of_make_name_the_suites(fakes: None) -> None:
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


def test_a_win_rate_by_hand_compares_with_whom_the_run_does(fakes: None) -> None:
    assert spin("run", "recipe.yaml", "--run", "r", "--iterations", "2").exit_code == 0
    for number, (given, rivals) in enumerate(
        [
            (("--answers", "r/iterations/001/evaluate"), ("start", "000", "000")),
            (("--model", "r/iterations/001/train"), ("start", "000", "000")),
            (("--model", "r/iterations/000/train"), ("start", "start", "start")),
            (("--model", "r/champion"), ("start", "000", "000")),
        ]
    ):
        for against, rival in zip(("start", "opponent", "champion"), rivals, strict=True):
            out = f"w-{number}-{against}"
            words = ("--suite", "duel", *given, "--out", out, f"suites.duel.against={against}")
            result = spin("evaluate", *words)
            assert result.exit_code == 0, result.output
            assert read_manifest(Path(out)).inputs["against"].path == "evaluate"
            place = "r/start" if rival == "start" else f"r/iterations/{rival}"
            assert f"duel: against {Path(place).resolve()}/evaluate ({against})" in result.output


def test_a_win_rate_by_hand_says_where_nobody_but_humans_is_left(
    fakes: None, tiny_model_dir: Path
) -> None:
    words = ("--model", str(tiny_model_dir), "--out", "w", "--config", "recipe.yaml")
    result = spin("evaluate", "--suite", "duel", *words)
    assert result.exit_code == 0, result.output
    assert "suite duel: against the human answers (the recipe says champion" in result.output
    assert "name it by --against" in result.output
    assert "against" not in read_manifest(Path("w")).inputs
    words = ("--model", str(tiny_model_dir), "--out", "h", "--config", "recipe.yaml")
    assert "warning" not in spin("evaluate", "--suite", "humans", *words).output


def test_an_evaluation_of_a_model_in_a_run_takes_the_runs_recipe(fakes: None) -> None:
    long = "evaluate.max_new_tokens=77"
    assert spin("run", "recipe.yaml", "--run", "r", "--iterations", "1", long).exit_code == 0
    model = ("--model", "r/iterations/000/train")
    for out, words, length in (
        ("a", (), 77), ("b", ("--data", "r/data"), 77), ("c", ("--config", "recipe.yaml"), 256),
    ):  # fmt: skip
        given = words if out != "c" else (*words, "--data", "r/data")
        result = spin("evaluate", *model, "--out", out, *given)
        assert result.exit_code == 0, result.output
        assert read_manifest(Path(out)).config["evaluate"]["max_new_tokens"] == length
        assert ("settings: the recipe of" in result.output) == (out != "c")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["suites.sums.max_new_tokens=1024"], "suites.sums.max_new_tokens=1024"),
        (["evaluate.max_new_tokens=1024"], "evaluate.max_new_tokens=1024"),
        (["generate.max_new_tokens=1024"], "generate.max_new_tokens=1024"),
        (["sft.architecture.max_position_embeddings=256"], "evaluate.max_new_tokens=256"),
        (["sft=null", "model.path=M", "suites.sums.max_new_tokens=512"],
         "suites.sums.max_new_tokens=512"),
    ],
)  # fmt: skip
def test_answers_that_leave_no_room_are_told_before_the_first_stage(
    fakes: None, tiny_model_dir: Path, words: list[str], key: str
) -> None:
    words = [word.replace("=M", f"={tiny_model_dir}") for word in words]
    result = spin("run", "recipe.yaml", "--run", "r", "--iterations", "1", *words)
    assert result.exit_code == 2, result.output
    assert f"{key} leaves no room for a prompt" in result.output
    assert not fake_stages.calls
    assert not Path("r").exists()


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
