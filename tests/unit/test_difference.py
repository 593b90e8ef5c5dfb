"""How two artifacts, iterations and runs differ: what is named, and what is left out."""

import contextlib
import importlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from spin_cli.app import app
from stages.artifacts import Outcome, Plan, open_artifact, produce, read_manifest
from stages.artifacts.manifest import InputRef
from stages.difference import ABSENT, Change, difference
from stages.subjects import find_subject
from tests import fake_stages

PRODUCE = importlib.import_module("stages.artifacts.produce")
RECIPE = """
name: example
sft: {init: random}
reward: {name: gsm8k}
promote: {metric: sampled_accuracy, min_gain: 0.05}
"""


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations, made by stages without a model, with its recipe beside it."""
    folder = tmp_path_factory.mktemp("played")
    (folder / "recipe.yaml").write_text(RECIPE)
    with fake_stages.installed(), contextlib.chdir(folder):
        play("a")
    return folder


@pytest.fixture
def run(played: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A copy of the run, in the current folder."""
    shutil.copytree(played, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    with fake_stages.installed():
        yield tmp_path / "a"


def play(run: str, *words: str) -> None:
    spin("run", "recipe.yaml", "--run", run, "--iterations", "2", *words)


def spin(*words: str, expect: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words], prog_name="spin")
    assert result.exit_code == expect, f"{words}: {result.output}"
    return result


def make(out: Path, plan: Plan, text: str = "", **outcome: Any) -> Path:
    def fill(workspace: Any) -> Outcome:
        workspace.file("a.txt").write_text(text)
        workspace.file("timings.txt").write_text(str(out))
        values = {"counts": {}, **outcome}
        return Outcome(**values, volatile=frozenset({"timings.txt"}))

    produce(out, plan, fill)
    return out


def compared(one: Path, other: Path) -> dict[str, Any]:
    found = difference(find_subject(str(one)), find_subject(str(other)))
    [artifact] = found.to_json()["artifacts"]
    return artifact


def test_each_kind_of_difference_is_in_its_own_part(tmp_path: Path) -> None:
    ref = InputRef(path="data", inside_run=False, key="k", content="c")
    anew = ref.model_copy(update={"content": "d"})
    a = make(
        tmp_path / "a",
        Plan("pair", 1, {"pair": {"policy": "x"}, "seed": 0}, {"data": ref}, {"template": "t"}),
        counts={"pairs": 10},
        metrics={"share": 0.5, "same": 1},
        info={"threads": 1, "alarms": {"drift": {"action": "warn"}}, "same": [1]},
    )
    b = make(
        tmp_path / "b",
        Plan("pair", 2, {"pair": {"policy": "y"}, "seed": 0}, {"data": anew, "model": ref}),
        text="other",
        counts={"pairs": 12},
        metrics={"share": 0.25, "same": 1},
        info={"threads": 2, "alarms": {"drift": {"action": "refuse"}}, "same": [1]},
    )
    found = compared(a, b)
    assert not found["same_key"]
    assert not found["same_bytes"]
    assert found["stage"] == [{"name": "format_version", "a": 1, "b": 2, "delta": 1}]
    assert found["config"] == [{"name": "pair.policy", "a": "x", "b": "y"}]
    assert found["inputs"] == [
        {"name": "data", "a": "data (content c)", "b": "data (content d)"},
        {"name": "model", "a": ABSENT, "b": "data (key k)"},
    ]
    assert found["fingerprints"] == [{"name": "template", "a": "t", "b": ABSENT}]
    assert found["info"] == [
        {"name": "alarms.drift.action", "a": "warn", "b": "refuse"},
        {"name": "threads", "a": 1, "b": 2, "delta": 1},
    ]
    assert [change["name"] for change in found["files"]] == ["a.txt"]
    assert found["counts"] == [{"name": "pairs", "a": 10, "b": 12, "delta": 2}]
    assert found["metrics"] == [{"name": "share", "a": 0.5, "b": 0.25, "delta": -0.25}]
    assert found["code"] == []


def test_code_and_libraries_are_a_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan("pair", 1, {}, {})
    a = make(tmp_path / "a", plan)
    monkeypatch.setattr(PRODUCE, "library_versions", lambda: {"torch": "9.9"})
    monkeypatch.setattr(PRODUCE, "git_state", lambda: {"commit": "f" * 40, "dirty": True})
    found = compared(a, make(tmp_path / "b", plan))
    assert (found["same_key"], found["same_bytes"]) == (True, True)
    changes = {change["name"]: change["b"] for change in found["code"]}
    assert changes["torch"] == "9.9"
    assert changes["commit"] == "ffffffffffff with uncommitted changes"
    assert changes["python"] == ABSENT


def test_a_truth_value_has_no_delta() -> None:
    assert Change("a", True, 1).delta is None
    assert Change("a", None, 1).delta is None
    assert Change("a", 1, 2.5).delta == 1.5


class TestRuns:
    def test_a_copy_is_the_same(self, run: Path) -> None:
        shutil.copytree(run, run.parent / "b")
        found = json.loads(spin("diff", "a", "b", "--json").stdout)
        assert found["same_bytes"]
        assert found["recipe"] == []
        assert len(found["artifacts"]) == 15
        text = spin("diff", "a", "b").stdout
        assert text.count("same key, same bytes") == 15

    def test_settings_champion_and_metrics_differ(self, run: Path) -> None:
        fake_stages.accuracy_by_model["iterations/001/train"] = 0.1
        try:
            play("b", "train.beta=0.5", "promote.on_refusal=champion")
        finally:
            fake_stages.accuracy_by_model.clear()
        found = json.loads(spin("diff", "a", "b", "--json").stdout)
        recipe = {change["name"]: (change["a"], change["b"]) for change in found["recipe"]}
        assert recipe["train.beta"] == (0.1, 0.5)
        assert recipe["champion"] == ("iterations/001/train", "iterations/000/train")
        artifacts = {each["name"]: each for each in found["artifacts"]}
        assert artifacts["data"]["same_bytes"]
        [change] = artifacts["iterations/001/evaluate"]["metrics"]
        assert change["name"] == "sampled_accuracy"
        assert change["delta"] == pytest.approx(-0.7)
        lines = spin("diff", "a", "b").stdout.splitlines()
        assert "  iterations/001/evaluate  sampled_accuracy -0.7" in lines
        assert "  train.beta: 0.1 → 0.5 (+0.4)" in lines

    def test_champions_at_one_place_differ_by_their_key(self, run: Path) -> None:
        play("b", "train.beta=0.5")
        changes = json.loads(spin("diff", "a", "b", "--json").stdout)["recipe"]
        [change] = [c for c in changes if c["name"].startswith("champion")]
        keys = [read_manifest(Path(name) / "iterations/001/train").key for name in "ab"]
        assert (change["name"], change["a"], change["b"]) == ("champion's key", *keys)

    def test_what_only_one_has_is_named(self, run: Path) -> None:
        shutil.copytree(run, run.parent / "b")
        shutil.rmtree(run / "iterations/001/promote")
        found = json.loads(spin("diff", "a", "b", "--json").stdout)
        assert (found["only_a"], found["only_b"]) == ([], ["iterations/001/promote"])
        assert not found["same_bytes"]
        assert "iterations/001/promote: only in B" in spin("diff", "a", "b").stdout

    def test_iterations_are_compared_stage_by_stage(self, run: Path) -> None:
        found = json.loads(spin("diff", "a:0", "a/iterations/001", "--json").stdout)
        names = {each["name"] for each in found["artifacts"]}
        assert names == {"generate", "pair", "score", "train", "evaluate", "promote"}
        assert found["kind"] == "iteration"

    def test_a_damaged_manifest_is_told_at_its_place_and_the_rest_compared(self, run: Path) -> None:
        shutil.copytree(run, run.parent / "b")
        (run / "iterations/001/pair/manifest.json").write_text("{}")
        result = spin("diff", "a", "b", expect=4)
        assert "iterations/001/pair: PROBLEM: a/iterations/001/pair/manifest.json" in result.stdout
        assert result.stdout.count("same key, same bytes") == 14
        found = json.loads(spin("diff", "a", "b", "--json", expect=4).stdout)
        assert list(found["problems"]) == ["iterations/001/pair"]
        assert not found["same_bytes"]
        spin("diff", "a/iterations/001/pair", "b/iterations/001/pair", expect=4)

    def test_keys_are_short_and_whole_to_their_bracket(self, run: Path) -> None:
        text = spin("diff", "a:0", "a:1").stdout
        keys = re.findall(r"\((?:key|content) .*", text)
        assert keys
        for line in keys:
            assert re.fullmatch(
                r"\(key \w{12}\) → [^ ]+ \(key \w{12}\)", line
            ), line  # fmt: skip
        found = json.loads(spin("diff", "a:0", "a:1", "--json").stdout)
        inputs = [c for each in found["artifacts"] for c in each["inputs"]]
        assert any(re.search(r"key [0-9a-f]{64}\)", change["a"]) for change in inputs)

    def test_a_section_that_only_one_has_is_told_without_its_defaults(self, run: Path) -> None:
        words = ("suites.quiz.kind=task", "suites.quiz.temperature=0.5", "suites.quiz.greedy=true",
                 "promote.gate.better.metric=quiz.greedy_accuracy", "train.lora.rank=16",
                 "evaluate.engine.name=transformers")  # fmt: skip
        spin("init", "b", "--config", "recipe.yaml", *words)
        for one, other in (("a", "b"), ("b", "a")):
            found = json.loads(spin("diff", one, other, "--json").stdout)["recipe"]
            there = "b" if other == "b" else "a"
            assert {change["name"]: change[there] for change in found} == {
                "suites.quiz.kind": "task",
                "suites.quiz.temperature": 0.5,
                "promote.gate.better.metric": "quiz.greedy_accuracy",
                "train.lora": "(set)",
                "evaluate.engine": "(set)",
                "champion": None,
                **{n: v for n, v in {c["name"]: c[there] for c in found}.items() if "key" in n},
            }

    def test_two_of_a_kind_are_needed(self, run: Path) -> None:
        result = spin("diff", "a", "a:1", expect=2)
        assert "a is a run, and a:1 an iteration: name two of a kind" in result.stderr


def test_an_artifact_of_another_name_is_compared_with_its_like(tmp_path: Path) -> None:
    plan = Plan("pair", 1, {}, {})
    a, b = make(tmp_path / "a", plan, text="x"), make(tmp_path / "b", plan, text="x")
    assert open_artifact(a).manifest.files != open_artifact(b).manifest.files  # timings differ
    text = spin("diff", str(a), str(b)).stdout
    assert "same key, same bytes" in text
    assert "timings.txt" not in text


def test_hostile_values_stay_on_their_line(tmp_path: Path) -> None:
    a = make(tmp_path / "a", Plan("pair", 1, {"x": "\x1b[2J\u202eone\ntwo"}, {}))
    b = make(tmp_path / "b", Plan("pair", 1, {"x": "three"}, {}))
    [line] = [line for line in spin("diff", str(a), str(b)).stdout.split("\n") if "three" in line]
    assert line == "    x: one two → three"
