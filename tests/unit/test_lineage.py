"""What an artifact was made from, as far as the manifests can tell, and what they cannot."""

import contextlib
import importlib
import inspect
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from spin_cli.app import app
from spin_cli.lineage_views import dot_lines, put_tree, tree_lines
from stages.artifacts import (
    Outcome,
    Plan,
    open_artifact,
    produce,
    read_manifest,
    read_pointer,
)
from stages.artifacts.manifest import InputRef
from stages.errors import CorruptError, InputError
from stages.lineage import lineage, notable_settings, trace
from stages.model.source import resolve_model
from stages.subjects import find_subject
from tests import fake_stages

PRODUCE = importlib.import_module("stages.artifacts.produce")
RECIPE = """
name: example
sft: {init: random}
reward: {name: gsm8k}
promote: {metric: sampled_accuracy, min_gain: 0.05}
iterations: {1: {train: {beta: 5.0}}}
"""


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations, made by stages without a model, with its recipe beside it."""
    folder = tmp_path_factory.mktemp("played")
    (folder / "recipe.yaml").write_text(RECIPE)
    with fake_stages.installed(), contextlib.chdir(folder):
        spin("run", "recipe.yaml", "--run", "a", "--iterations", "2")
    return folder


@pytest.fixture
def run(played: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A copy of the run, in the current folder."""
    shutil.copytree(played, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    with fake_stages.installed():
        yield tmp_path / "a"


def spin(*words: str, expect: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words], prog_name="spin")
    assert result.exit_code == expect, f"{words}: {result.output}"
    return result


def places(name: str) -> list[str]:
    return [node.path for node in lineage(find_subject(name)).nodes.values()]


def make(out: Path, config: dict[str, Any], **inputs: InputRef) -> Path:
    """An artifact that names inputs, with a file that depends on its settings."""

    def fill(workspace: Any) -> Outcome:
        workspace.file("a.txt").write_text(json.dumps(config))
        return Outcome(counts={"rows": 3})

    produce(out, Plan("pair", 1, config, inputs), fill)
    return out


class TestSubjects:
    def test_names_mean_artifacts_iterations_and_runs(self, run: Path) -> None:
        kinds = {
            "a": ("run", None),
            "a:1": ("iteration", 1),
            "a/iterations/001": ("iteration", 1),
            "a/iterations/001/": ("iteration", 1),
            "a/iterations/001/train": ("artifact", None),
            "a/champion": ("artifact", None),
            "./a/../a/data": ("artifact", None),
            "a:start": ("iteration", None),
            "a/start": ("iteration", None),
        }
        for name, (kind, iteration) in kinds.items():
            found = find_subject(name)
            assert (found.kind, found.iteration) == (kind, iteration), name
            assert found.layout is not None
            assert found.layout.root.resolve() == run
        assert find_subject("a/champion").artifact == Path("a/iterations/001/train")

    @pytest.mark.parametrize("name", ["a:start", "a/start"])
    def test_the_start_is_the_first_opponent_and_its_evaluations(
        self, run: Path, name: str
    ) -> None:
        found = find_subject(name)
        assert found.is_start
        assert found.artifacts() == {
            "evaluate": Path("a/start/evaluate"),
            "sft": Path("a/models/sft"),
        }
        assert "start/evaluate" in spin("lineage", name).stdout
        assert "models/sft" in spin("show", name).stdout
        assert "evaluate: another key" in spin("diff", name, "a:0").stdout

    def test_places_begin_with_what_was_typed(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (run.parent / "link").symlink_to(run)
        for name in ("a", "./a", str(run), "link", "link/../a"):
            for more in ("", ":1", "/iterations/001", ":start", "/data"):
                subject = find_subject(name + more)
                assert subject.layout is not None
                for place in [subject.layout.root, *subject.artifacts().values()]:
                    assert place.is_relative_to(Path(name)), (name, more, place)
                    assert place.exists()
        monkeypatch.chdir(run / "iterations/001")
        for words in (("show", "."), ("lineage", ".")):
            text = spin(*words).stdout
            assert "train" in text
            assert str(run) not in text
        assert find_subject(".").iteration == 1

    def test_a_pointer_is_the_champion_of_a_run_alone(self, run: Path) -> None:
        shutil.copy("a/champion", "a/mine")
        shutil.copy("a/champion", "champion")
        for name in ("a/mine", "champion"):
            with pytest.raises(InputError, match="no champion pointer"):
                find_subject(name)
            with pytest.raises(InputError, match="no champion pointer"):
                resolve_model(name)
        Path("a/champion").write_text("{}")
        with pytest.raises(CorruptError, match="delete a/champion"):
            find_subject("a/champion")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("b", "b does not exist; name a folder"),
            ("b:1", "b:1 does not exist"),
            ("a:7", "a:7: the run has no iteration 7; it has 0, 1"),
            ("a:one", "a:one does not exist"),
            ("a/iterations", "is no artifact, no run and no iteration"),
            ("a/run.json", "a/run.json is a file, and no artifact and no champion pointer"),
            ("recipe.yaml", "recipe.yaml is a file, and no artifact and no champion pointer"),
            ("a/models", "is no artifact, no run and no iteration"),
            ("a/iterations/start", "does not exist"),
        ],
    )
    def test_what_names_nothing_is_refused(self, run: Path, name: str, message: str) -> None:
        with pytest.raises((InputError, CorruptError), match=re.escape(message)):
            find_subject(name)

    def test_a_run_of_another_name_with_a_colon_is_found(self, run: Path) -> None:
        shutil.copytree(run, run.parent / "b:1")
        assert find_subject("b:1").kind == "run"
        assert find_subject("b:1:1").iteration == 1


class TestTheChain:
    def test_it_leads_down_to_the_data_each_after_its_inputs(self, run: Path) -> None:
        found = lineage(find_subject("a/iterations/001/train"))
        order = list(found.nodes)
        for node in found.nodes.values():
            assert all(order.index(i) < order.index(node.id) for i in node.inputs.values())
        iterations = [f"iterations/{t:03d}/{s}" for t in (0, 1) for s in
                      ("generate", "pair", "score", "train")]  # fmt: skip
        assert sorted(node.path for node in found.nodes.values()) == sorted(
            ["data", "models/sft", *iterations]
        )

    def test_a_run_means_its_champion_and_an_iteration_what_ends_in_it(self, run: Path) -> None:
        assert places("a") == places("a/iterations/001/train")
        assert places("a:1")[-1] == "iterations/001/promote"
        assert set(places("a:1")) >= {"iterations/001/train", "start/evaluate", "data"}
        (run / "champion").unlink()
        assert {"iterations/000/promote", "iterations/001/promote"} <= set(places("a"))

    def test_json_tells_of_each_what_made_it(self, run: Path) -> None:
        found = json.loads(spin("lineage", "a", "--json").stdout)
        [end] = found["ends"]
        node = found["nodes"][end]
        manifest = read_manifest(run / "iterations/001/train")
        assert (node["stage"], node["key"]) == ("train", manifest.key)
        assert node["settings"] == {"train.beta": 5.0}
        assert node["versions"] == manifest.versions
        assert node["git"] == manifest.git
        assert node["inputs"].keys() == manifest.inputs.keys()
        assert set(node["inputs"].values()) <= found["nodes"].keys()
        assert found["problems"] == []
        assert found["seconds"] == pytest.approx(
            sum(n["cost"]["wall_s"] for n in found["nodes"].values()), abs=1e-3
        )

    def test_what_is_shared_is_printed_once(self, run: Path) -> None:
        lines = spin("lineage", "a").stdout.splitlines()
        of_data = [line for line in lines if re.search(r"data: data  prepare", line)]
        assert len(of_data) > 3
        assert sum("(above)" not in line for line in of_data) == 1

    def test_on_a_terminal_lines_break_between_words_and_in_a_pipe_never(
        self, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = lineage(find_subject("a"))
        put_tree(found)
        piped = capsys.readouterr().out
        assert piped.splitlines() == list(tree_lines(found))
        assert max(map(len, piped.splitlines())) > 150
        monkeypatch.setattr("spin_cli.lineage_views.terminal_width", lambda: 60)
        put_tree(found)
        lines = capsys.readouterr().out.splitlines()
        words = [re.sub("[│├└─]", " ", text).split() for text in ("\n".join(lines), piped)]
        assert words[0] == words[1]
        too_long = [line for line in lines if len(line) > 60]
        # A word longer than the line is whole, such as a list of settings.
        assert all(len(re.sub("[│├└─]", " ", line).split()) <= 2 for line in too_long)

    def test_a_long_chain_is_no_recursion(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("os.fsync", lambda _: None)  # hundreds of them take their time
        (tmp_path / "run.json").write_text("{}")
        before = make(tmp_path / "0", {"number": 0})
        for number in range(1, 300):
            ref = open_artifact(before).input_ref(tmp_path)
            before = make(tmp_path / str(number), {"number": number}, model=ref)
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(len(inspect.stack()) + 150)
        try:
            found = trace([before], tmp_path)
            lines = list(tree_lines(found))
        finally:
            sys.setrecursionlimit(limit)
        assert len(found.nodes) == 300
        assert sum("pair, key" in line for line in lines) == 300

    def test_settings_are_those_that_are_no_defaults(self) -> None:
        config = {"train": {"beta": 0.1, "learning_rate": 1.0, "unknown": None}, "iteration": 0}
        assert notable_settings(config) == {"train.learning_rate": 1.0, "iteration": 0}


class TestProblems:
    def test_an_input_that_is_gone_ends_the_chain_there(self, run: Path) -> None:
        shutil.rmtree(run / "iterations/000/score")
        found = lineage(find_subject("a"))
        assert found.problems() == [
            "iterations/000/score: it is not in the run any more; what made it is not known"
        ]
        assert "iterations/000/train" in [n.path for n in found.nodes.values()]

    def test_another_artifact_in_its_place_is_not_taken_for_it(self, run: Path) -> None:
        shutil.rmtree(run / "iterations/000/pair")
        make(run / "iterations/000/pair", {"other": True})
        [problem] = lineage(find_subject("a")).problems()
        assert problem.startswith("iterations/000/pair: another artifact is there now (key ")
        result = spin("lineage", "a")
        assert "PROBLEM: another artifact is there now" in result.stdout
        assert "a: 1 problem on the way, named" in result.stderr

    def test_other_bytes_under_the_same_key_are_told(self, run: Path) -> None:
        place = run / "iterations/000/pair"
        manifest = read_manifest(place)
        shutil.rmtree(place)

        def fill(workspace: Any) -> Outcome:
            workspace.file("config.json").write_text("other bytes")
            return Outcome(counts={})

        plan = Plan(manifest.stage, manifest.format_version, manifest.config, manifest.inputs)
        assert produce(place, plan, fill).key == manifest.key
        [problem] = lineage(find_subject("a")).problems()
        assert "was made anew with other bytes since it was used" in problem

    def test_a_damaged_manifest_on_the_way_is_a_problem_and_one_at_the_end_an_error(
        self, run: Path
    ) -> None:
        for stage in ("pair", "train"):
            (run / f"iterations/000/{stage}/manifest.json").write_text("{}")
        [problem, *_] = lineage(find_subject("a/iterations/001/train")).problems()
        assert "manifest.json is damaged" in problem
        spin("lineage", "a/iterations/000/train", expect=4)

    def test_a_damaged_manifest_in_an_iteration_hides_nothing_else(self, run: Path) -> None:
        (run / "iterations/001/evaluate/manifest.json").write_text("{}")
        for words in ((), ("--json",), ("--dot",)):
            result = spin("lineage", "a:1", *words, expect=4)
            assert "iterations/001/train" in result.stdout
            assert "evaluate/manifest.json is damaged" in result.stderr
        on_the_way = r"evaluation: iterations/001/evaluate  damaged\n[│ ]*PROBLEM: "
        assert re.search(on_the_way, spin("lineage", "a:1", expect=4).stdout)
        (run / "iterations/001/promote/manifest.json").write_text("{}")
        text = spin("lineage", "a:1", expect=4).stdout
        assert re.search(r"^iterations/001/promote  damaged\n[│ ]*PROBLEM: ", text, re.MULTILINE)
        assert "data  prepare" in text

    def test_an_input_that_is_gone_is_no_damage(self, run: Path) -> None:
        shutil.rmtree(run / "iterations/000/score")
        assert "PROBLEM: it is not in the run" in spin("lineage", "a").stdout

    def test_a_champion_that_is_not_the_one_that_was_promoted_is_a_problem(self, run: Path) -> None:
        pointer = read_pointer(run / "champion")
        assert pointer is not None
        last = pointer.history[-1].model_copy(update={"key": "0" * 64})
        moved = pointer.model_copy(update={"key": last.key, "history": [last]})
        (run / "champion").write_text(moved.to_text())
        for name in ("a", "a/champion"):
            [problem] = lineage(find_subject(name)).problems()
            assert re.fullmatch(
                r"iterations/001/train: another artifact is there now \(key \w{12}\) than was "
                r"promoted \(key 000000000000\)", problem,
            )  # fmt: skip
        assert lineage(find_subject(f"a/{pointer.path}")).problems() == []

    def test_no_path_of_this_machine_is_in_the_json(self, run: Path) -> None:
        (run / "iterations/000/pair/manifest.json").write_text("{}")
        for place in (run, run.relative_to(run.parent)):
            found = lineage(find_subject(f"{place}/iterations/001/train")).to_json()
            assert str(run.parent) not in json.dumps(found)
            assert found["problems"] == [
                "iterations/000/pair: iterations/000/pair/manifest.json is damaged (its hash does "
                "not match); delete iterations/000/pair and run its stage again"
            ]

    def test_a_path_that_leaves_the_run_is_not_followed(self, tmp_path: Path) -> None:
        root = tmp_path / "run"
        make(tmp_path / "outside", {})
        (root / "run.json").parent.mkdir()
        (root / "run.json").write_text("{}")
        real = open_artifact(tmp_path / "outside").input_ref(None)
        ref = InputRef(path="../outside", inside_run=True, key=real.key, content=real.content)
        end = make(root / "data", {}, model=ref)
        [problem] = trace([end], root).problems()
        assert "no plain path inside it" in problem


def test_versions_that_differ_along_the_chain_are_told_where_they_do(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PRODUCE, "library_versions", lambda: {"python": "3.11", "torch": "9.9"})
    shutil.rmtree(run / "iterations/001/train")
    shutil.rmtree(run / "iterations/001/evaluate")
    shutil.rmtree(run / "iterations/001/promote")
    (run / "champion").unlink()
    spin("run", "recipe.yaml", "--run", "a", "--iterations", "2")
    lines = spin("lineage", "a:1").stdout.splitlines()
    assert "torch" not in lines[0]
    assert any("made with " in line and "torch 9.9" in line for line in lines[1:])
    assert lineage(find_subject("a/iterations/001/train")).versions()["torch"]["9.9"] == 1


def test_hostile_names_reach_no_terminal_and_no_graph(tmp_path: Path) -> None:
    evil = 'x\x1b[31m"]; evil [label="\n\u202eend'
    ref = InputRef(path=evil, inside_run=False, key="folder:0", content="c")
    end = make(tmp_path / "a", {"name": evil}, **{evil: ref})
    found = trace([end], None)
    for line in [*tree_lines(found), *dot_lines(found)]:
        assert not re.search(r"[\x00-\x1f\u202e]", line), repr(line)
    graph = [line for line in dot_lines(found) if "evil" in line]
    assert all(len(re.findall(r'(?<!\\)"', line)) % 2 == 0 for line in graph)
    assert not any(re.search(r'(?<!\\)"\]; evil', line) for line in graph)
    json.dumps(found.to_json())


def test_json_and_dot_exclude_each_other(run: Path) -> None:
    spin("lineage", "a", "--json", "--dot", expect=2)
    assert spin("lineage", "a", "--dot").stdout.startswith("digraph lineage {")
