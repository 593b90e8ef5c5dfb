"""Making a chain again elsewhere: by what was decided then, and what is said of what comes of it.

The stages are fakes where the subject is the chain; the last tests run the true ones.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from spin_cli.app import app
from stages.artifacts import Manifest, Outcome, Plan, produce, read_manifest, read_pointer
from stages.artifacts.locks import hold
from stages.layout import RunLayout
from stages.lineage import trace
from stages.reproduce import MARK, compare, threads_of
from tests import fake_stages
from tests.tiny_loop import RECIPE as TINY
from tests.tiny_loop import hashes

RECIPE = """
name: example
sft: {init: random}
reward: {name: gsm8k}
promote: {metric: sampled_accuracy, min_gain: 0.05, on_refusal: champion}
"""


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    with fake_stages.installed():
        yield
    for table in (fake_stages.accuracy_by_model, fake_stages.divergence_by_model):
        table.clear()


def spin(*words: str | Path, expect: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words], prog_name="spin")
    assert result.exit_code == expect, f"{words}: {result.output}"
    return result


def play(*words: str, iterations: int = 3) -> None:
    spin("run", "recipe.yaml", "--run", "a", "--iterations", str(iterations), *words)


def again(artifact: str, *words: str, expect: int = 0) -> dict[str, Any]:
    result = spin("reproduce", artifact, "--in", "b", "--json", *words, expect=expect)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def verdicts(found: dict[str, Any]) -> dict[str, tuple[bool, bool, str | None]]:
    return {a["place"]: (a["agrees"], a["same_bytes"], a["other_key"]) for a in found["artifacts"]}


SAME = (True, True, None)


@pytest.mark.usefixtures("fakes")
class TestTheChain:
    def test_only_what_leads_to_the_artifact_is_made(self) -> None:
        play()
        found = again("a/iterations/001/train")
        assert set(verdicts(found).values()) == {SAME}
        assert found["agrees"]
        made = hashes(Path("b"))
        wanted = ["generate", "pair", "score", "train"]
        assert sorted(made) == sorted(
            ["data", "models/sft", *(f"iterations/00{t}/{s}" for t in (0, 1) for s in wanted)]
        )
        assert made == {name: hashes(Path("a"))[name] for name in made}

    def test_a_second_call_makes_nothing_and_a_further_artifact_only_what_is_missing(self) -> None:
        play()
        again("a/iterations/000/train")
        fake_stages.calls.clear()
        assert set(verdicts(again("a/iterations/000/train")).values()) == {SAME}
        assert fake_stages.calls == []
        again("a/iterations/001/pair")
        assert fake_stages.calls == ["001/generate", "001/pair"]

    def test_after_a_kill_it_goes_on_where_it_was(self) -> None:
        play()

        def stop(stage: str, out: Path) -> None:
            if out.as_posix().endswith("001/score"):
                raise KeyboardInterrupt

        fake_stages.before_fill.append(stop)
        try:
            spin("reproduce", "a", "--in", "b", expect=130)
        finally:
            fake_stages.before_fill.remove(stop)
        fake_stages.calls.clear()
        assert again("a")["agrees"]
        assert fake_stages.calls[0] == "001/score"

    def test_the_opponents_are_those_that_were_played_not_those_of_a_new_decision(self) -> None:
        fake_stages.accuracy_by_model["iterations/001/train"] = 0.1
        play(iterations=4)
        spin("promote", "a", "--rollback")
        opponent = read_manifest(Path("a/iterations/002/train")).inputs["model"].path
        assert opponent == "iterations/000/train", "the test needs a refusal"
        assert set(verdicts(again("a/iterations/003/train")).values()) == {SAME}
        assert read_manifest(Path("b/iterations/002/train")).inputs["model"].path == opponent
        assert not Path("b/iterations/001").exists()

    def test_a_decision_is_compared_with_whom_it_was_then(self) -> None:
        fake_stages.accuracy_by_model["iterations/001/train"] = 0.1
        play()
        spin("promote", "a", "--rollback")
        for iteration in (2, 1, 0):
            found = again(f"a/iterations/00{iteration}/promote")
            assert set(verdicts(found).values()) == {SAME}, iteration

    def test_settings_that_followed_a_measurement_are_those_that_were_used(self) -> None:
        fake_stages.divergence_by_model["iterations/000/train"] = 40.0
        play("adapt.target_kl=2.0", "adapt.highest=0.5")
        beta = read_manifest(Path("a/iterations/001/train")).config["train"]["beta"]
        assert beta != 0.1, "the test needs an adaptation"
        assert set(verdicts(again("a/iterations/001/train")).values()) == {SAME}
        assert not Path("b/iterations/000/evaluate").exists()

    def test_so_are_rates_that_refusals_lowered(self) -> None:
        fake_stages.accuracy_by_model["iterations/001/train"] = 0.1
        play("promote.on_refusal=retry")
        trained = [read_manifest(Path(f"a/iterations/00{t}/train")).config for t in (1, 2)]
        rates = [config["train"]["learning_rate"] for config in trained]
        assert rates[1] == rates[0] / 2, "the test needs a retry"
        assert set(verdicts(again("a/iterations/002/train")).values()) == {SAME}
        assert not Path("b/iterations/001").exists()

    def test_alarms_are_those_of_before_an_amendment(self) -> None:
        alarm = "alarms.identical_share"  # the fakes' is 0.5
        play(f"{alarm}.threshold=0.4", f"{alarm}.action=refuse", iterations=1)
        play("--amend", iterations=2)
        decision = Path("iterations/000/promote/decision.json")
        assert not json.loads(("a" / decision).read_bytes())["promoted"], "the test needs a refusal"
        assert set(verdicts(again("a/iterations/000/promote")).values()) == {SAME}

    def test_an_override_of_iterations_does_not_win_over_what_was_used(self) -> None:
        """Each name stands there already, and the wider one before the narrower."""
        fake_stages.divergence_by_model["iterations/000/train"] = 40.0
        play(
            "adapt.target_kl=2.0",
            "adapt.highest=0.5",
            "train.beta=0.2",
            "iterations.1.train.beta=0.3",
        )
        beta = read_manifest(Path("a/iterations/001/train")).config["train"]["beta"]
        assert beta not in (0.2, 0.3), "the test needs an adaptation"
        assert set(verdicts(again("a/iterations/001/train")).values()) == {SAME}

    def test_each_artifact_has_the_threads_that_it_was_made_with(self) -> None:
        play(iterations=2)
        found = trace([Path("a/iterations/001/train").resolve()], Path("a").resolve())
        threads = {"models/sft": 4, "iterations/000/score": 1}
        nodes = {
            name: replace(
                node, manifest=node.manifest and node.manifest.model_copy(
                    update={"info": {"threads": threads[node.path]} if node.path in threads else {}}
                )
            )
            for name, node in found.nodes.items()
        }  # fmt: skip
        known = threads_of(replace(found, nodes=nodes), 9)
        by_place = {found.nodes[name].path: count for name, count in known.items()}
        assert by_place["models/sft"] == by_place["iterations/000/generate"] == 4
        assert by_place["iterations/000/score"] == by_place["iterations/001/train"] == 1
        assert set(threads_of(found, 9).values()) == {9}

    def test_pools_and_replayed_pairs_are_given_again(self) -> None:
        play("generate.pool.size=1", "pair.replay.iterations=1")
        assert set(verdicts(again("a/iterations/002/train")).values()) == {SAME}
        inputs = read_manifest(Path("b/iterations/002/pair")).inputs
        assert {"generations", "generations_1", "replay_1"} <= inputs.keys()


@pytest.mark.usefixtures("fakes")
class TestWhatIsSaid:
    def test_another_metric_ends_with_5_and_names_it(self) -> None:
        play(iterations=1)
        fake_stages.accuracy_by_model["iterations/000/train"] = 0.2
        result = spin("reproduce", "a/iterations/000/evaluate", "--in", "b", expect=5)
        assert "iterations/000/evaluate: DIFFERS: sampled_accuracy 0.7 there, 0.2 here" in (
            result.stdout
        )
        assert "1 of 8 artifacts do not agree" in result.stderr
        assert "spin diff " in result.stderr

    def test_a_metric_within_the_tolerance_agrees_and_is_told_from_equal_bytes(self) -> None:
        play(iterations=1)
        fake_stages.accuracy_by_model["iterations/000/train"] = 0.71
        found = again("a/iterations/000/evaluate")
        assert verdicts(found)["iterations/000/evaluate"] == (True, False, None)
        assert not again("a/iterations/000/evaluate", "--tolerance", "0.001", expect=5)["agrees"]
        text = spin("reproduce", "a/iterations/000/evaluate", "--in", "b")
        most = "0.014 of it: sampled_accuracy 0.7 there, 0.71 here"
        line = f"same metrics, 1 not quite (at most {most}); other bytes in metrics.json"
        assert f"{line}, made by an earlier call" in text.stdout
        assert "7 of 8 in every byte, 1 in metrics (the largest deviation is 0.014" in text.stderr

    def test_other_code_is_told_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        play(iterations=1)
        monkeypatch.setattr("stages.reproduce.library_versions", lambda: {"torch": "9.9"})
        result = spin("reproduce", "a/data", "--in", "b")
        lines = result.stderr.splitlines()
        torch = next(i for i, line in enumerate(lines) if line.endswith("9.9 here"))
        assert lines[torch].startswith("made by other code than this: torch: ")
        assert torch < next(i for i, line in enumerate(lines) if "made again in b" in line)

    def test_a_key_that_differs_says_by_what(self) -> None:
        play(iterations=1)
        spin("run", "recipe.yaml", "--run", "b", "--iterations", "0")
        manifest = read_manifest(Path("a/data"))
        other = read_manifest(Path("b/data")).model_copy(
            update={"config": {**manifest.config, "seed": 9}, "key": "0"}
        )
        assert compare("data", manifest, other).other_key == "seed: 0 there, 9 now"


@pytest.mark.usefixtures("fakes")
class TestRefusals:
    def test_a_copy_of_the_original_is_not_taken_for_what_was_made_again(self) -> None:
        play(iterations=1)
        shutil.copytree("a", "b")
        result = spin("reproduce", "a", "--in", "b", expect=2)
        assert "b is a run that no reproduction began" in result.stderr
        assert result.stdout == ""
        spin("run", "recipe.yaml", "--run", "c", "--iterations", "0")
        assert "no reproduction began" in spin("reproduce", "a", "--in", "c", expect=2).stderr

    def test_a_reproduction_of_another_run_is_refused_and_a_damaged_mark_too(self) -> None:
        play(iterations=0)
        spin("run", "recipe.yaml", "--run", "other", "--iterations", "0")
        again("a/data")
        result = spin("reproduce", "other/data", "--in", "b", expect=2)
        assert f"b is a reproduction of {Path('a').resolve()}" in result.stderr
        (Path("b") / MARK).write_text("{}")
        assert "is damaged" in spin("reproduce", "a/data", "--in", "b", expect=4).stderr

    def test_what_is_there_already_is_hashed_before_it_is_called_the_same(self) -> None:
        play(iterations=1)
        again("a/iterations/000/pair")
        result = spin("reproduce", "a/iterations/000/score", "--in", "b")
        assert "1 made by this call, 4 by earlier ones" in result.stderr
        assert "data: same bytes, made by an earlier call" in result.stdout
        file = Path("b/iterations/000/pair/config.json")
        data = file.read_bytes()
        file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        result = spin("reproduce", "a/iterations/000/score", "--in", "b", expect=4)
        assert "b/iterations/000/pair/config.json is damaged" in result.stderr
        assert "iterations/000/pair: same" not in result.stdout

    def test_what_no_recipe_names_is_found_before_anything_is_made(self) -> None:
        play("suites.duel={kind: win_rate}", iterations=1)
        shutil.copytree("a/data", "elsewhere")
        place = "a/iterations/000/suite-duel"
        shutil.rmtree(place, ignore_errors=True)
        spin("evaluate", "--config", "recipe.yaml", "suites.duel={kind: win_rate}",
             "--suite", "duel", "--data", "a/data", "--model", "a/models/sft",
             "--against", "elsewhere", "--iteration", "0", "--out", place)  # fmt: skip
        assert not read_manifest(Path(place)).inputs["against"].inside_run
        result = spin("reproduce", place, "--in", "b", expect=3)
        assert "was made from elsewhere (its against), which lies outside of the run" in (
            result.stderr
        )
        assert not Path("b").exists()

    def test_a_champion_that_is_not_the_one_that_was_promoted_is_refused(self) -> None:
        play(iterations=1)
        pointer = read_pointer(Path("a/champion"))
        assert pointer is not None
        last = pointer.history[-1].model_copy(update={"key": "0" * 64})
        moved = pointer.model_copy(update={"key": last.key, "history": [last]})
        Path("a/champion").write_text(moved.to_text())
        for name in ("a", "a/champion"):
            result = spin("reproduce", name, "--in", "b", expect=3)
            assert "than was promoted (key 000000000000)" in result.stderr
        again("a/iterations/000/train")

    def test_a_place_in_a_run_or_one_that_is_taken_is_refused(self) -> None:
        play(iterations=1)
        spin("reproduce", "a", "--in", "a", expect=2)
        spin("reproduce", "a", "--in", "a/again", expect=2)
        Path("taken").mkdir()
        Path("taken/file").touch()
        spin("reproduce", "a", "--in", "taken", expect=2)
        spin("init", "other", "--config", "recipe.yaml", "seed=9")
        assert "another recipe: seed" in spin("reproduce", "a", "--in", "other", expect=2).stderr

    @pytest.mark.parametrize("place", ["taken", "file", "other", "elses", "a/again"])
    def test_a_refusal_names_its_own_option_and_nothing_is_announced_before_it(
        self, place: str
    ) -> None:
        play(iterations=1)
        Path("taken").mkdir()
        Path("taken/file").touch()
        Path("file").touch()
        spin("init", "other", "--config", "recipe.yaml", "seed=9")
        spin("run", "recipe.yaml", "--run", "elses", "--iterations", "0")
        message = spin("reproduce", "a", "--in", place, expect=2).stderr
        assert "--in DIR" in message
        assert "--run" not in message
        assert "--amend" not in message
        assert "made again in" not in message

    def test_the_run_may_be_the_folder_one_is_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        play(iterations=0)
        monkeypatch.chdir("a")
        spin("reproduce", "data")
        assert Path("../a-reproduced/data/manifest.json").is_file()

    def test_settings_may_name_other_places_and_decide_nothing(self) -> None:
        play(iterations=1)
        result = spin("reproduce", "a", "train.beta=9", "--in", "b", expect=2)
        assert "only places and speed may be others: train.beta: 0.1 there, 9.0 now" in (
            result.stderr
        )
        assert not Path("b").exists()
        again("a", "train.processes=1", "model.path=elsewhere")
        again("a")

    def test_without_a_place_it_is_beside_the_run(self) -> None:
        play(iterations=0)
        spin("reproduce", "a/data")
        assert Path("a-reproduced/data/manifest.json").is_file()

    def test_an_artifact_of_no_run_has_no_recipe(self) -> None:
        play(iterations=0)
        shutil.copytree("a/data", "alone")
        assert "lies in no run" in spin("reproduce", "alone", "--in", "b", expect=3).stderr

    def test_what_was_made_anew_cannot_be_made_again(self) -> None:
        play(iterations=1)
        shutil.rmtree("a/iterations/000/pair")
        result = spin("reproduce", "a", "--in", "b", expect=3)
        assert "iterations/000/pair: it is not in the run any more" in result.stderr
        assert not Path("b").exists()

    def test_two_at_once_are_refused(self) -> None:
        play(iterations=0)
        with hold(RunLayout(Path("b")).lock, "run b"):
            spin("reproduce", "a/data", "--in", "b", expect=75)

    def test_the_start_model_must_be_the_one_that_was_used(self, tiny_model_dir: Path) -> None:
        shutil.copytree(tiny_model_dir, "start")
        Path("recipe.yaml").write_text(RECIPE.replace("random", "pretrained"))
        play("model.path=start", iterations=0)
        # the fakes give a model from outside a key of its name, which is no hash of it
        result = spin("reproduce", "a/models/sft", "--in", "b", expect=3)
        assert "models/sft was made from the model start" in result.stderr
        assert "put it back, or name it: model.path=PATH" in result.stderr


def manifest_of(folder: Path, stage: str, text: str, **figures: Any) -> Manifest:
    def fill(workspace: Any) -> Outcome:
        workspace.file("a.txt").write_text(text)
        return Outcome(**{"counts": {}, **figures})

    return produce(folder, Plan(stage, 1, {}, {}), fill)


class TestTheVerdict:
    @pytest.mark.parametrize("stage", ["prepare", "pair", "promote"])
    def test_data_stages_must_agree_in_bytes_where_their_inputs_do(
        self, tmp_path: Path, stage: str
    ) -> None:
        one, other = (manifest_of(tmp_path / text, stage, text) for text in "ab")
        assert not compare("x", one, other).agrees
        assert "though its inputs are the same" in compare("x", one, other).text()
        assert compare("x", one, other, inputs_agree=False).agrees is None

    def test_other_bytes_without_any_metric_are_not_said_to_agree(self, tmp_path: Path) -> None:
        """Also where only the new version measures."""
        one = manifest_of(tmp_path / "a", "score", "a", counts={"pairs": 3})
        for name, metrics in (("b", {}), ("c", {"chosen_logprob_per_token": -1.0})):
            other = manifest_of(
                tmp_path / name, "score", name, counts={"pairs": 3}, metrics=metrics
            )
            found = compare("x", one, other)
            assert found.agrees is None
            assert found.text().startswith("not compared: other bytes in a.txt")
        same = manifest_of(tmp_path / "d", "score", "a", counts={"pairs": 3})
        assert compare("x", one, same).agrees

    @pytest.mark.parametrize(
        ("one", "other", "intervals", "agrees"),
        [
            ({"a": 0.5}, {"a": 0.54}, {"a": [0.45, 0.55]}, True),
            ({"a": 0.5}, {"a": 0.54}, {"a": [0.47, 0.53]}, False),
            ({"a": 1.0}, {"a": 0.99}, {"a": [1.0, 1.0]}, True),
            ({"a": 1.0}, {"a": 0.97}, {"a": [None, None]}, False),
            ({"a": 0.01}, {"a": 0.015}, {"b": [0.0, 1.0]}, False),
            ({"a": 0.01, "a_stderr": 0.004}, {"a": 0.015, "a_stderr": 0.005}, {}, True),
            ({"a": 0.01, "a_stderr": 0.001}, {"a": 0.015, "a_stderr": 0.001}, {}, False),
            ({"a": 0.01, "a_stderr": 0.004}, {"a": 0.01, "a_stderr": 0.04}, {}, False),
            ({"share": 0.0}, {"share": 0.0009}, {}, True),
            ({"share": 0.0}, {"share": 0.01}, {}, False),
        ],
    )
    def test_what_a_metric_is_uncertain_by_says_how_near_it_must_be(
        self, tmp_path: Path, one: Any, other: Any, intervals: Any, agrees: bool
    ) -> None:
        original = manifest_of(tmp_path / "a", "evaluate", "a", metrics=one)
        made = manifest_of(tmp_path / "b", "evaluate", "b", metrics=other)
        assert compare("x", original, made, intervals=intervals).agrees is agrees

    @pytest.mark.parametrize(
        ("figures", "others", "agrees"),
        [
            ({"metrics": {"a": 0.5}}, {"metrics": {"a": 0.51}}, True),
            ({"metrics": {"a": 0.5}}, {"metrics": {"a": 0.519}}, False),
            ({"metrics": {"a": 100.0}}, {"metrics": {"a": 101.9}}, True),
            ({"metrics": {"a": 100.0}}, {"metrics": {"a": 103.0}}, False),
            ({"metrics": {"a": 0.5}}, {"metrics": {}}, False),
            ({"metrics": {"a": 0.5}}, {"metrics": {"a": None}}, False),
            ({"metrics": {"a": True}}, {"metrics": {"a": False}}, False),
            ({"metrics": {"a": "x"}}, {"metrics": {"a": "y"}}, False),
            # a share of the largest count: 3 of 1,000 rows dropped, or 5
            (
                {"metrics": {"a": 1}, "counts": {"rows": 1000, "bad": 3}},
                {"metrics": {"a": 1}, "counts": {"rows": 1000, "bad": 5}},
                True,
            ),
            ({"counts": {"rows": 1000, "bad": 3}}, {"counts": {"rows": 1000, "bad": 40}}, False),
        ],
    )
    def test_metrics_decide_for_the_rest(
        self, tmp_path: Path, figures: Any, others: Any, agrees: bool
    ) -> None:
        one = manifest_of(tmp_path / "a", "generate", "a", **figures)
        other = manifest_of(tmp_path / "b", "generate", "b", **others)
        assert compare("x", one, other, tolerance=0.02).agrees is agrees


def test_the_true_loop_agrees_in_every_byte_whatever_the_threads_of_this_process(
    tmp_path: Path,
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    spin("run", tmp_path / "tiny.yaml", "--run", tmp_path / "a", "--iterations", "2")
    threads = torch.get_num_threads()
    assert read_manifest(tmp_path / "a/models/sft").info["threads"] == threads
    torch.set_num_threads(threads + 1)
    try:
        result = spin("reproduce", f"{tmp_path / 'a'}:1", "--in", tmp_path / "b")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads)
    lines = result.stdout.splitlines()
    assert len(lines) == 14
    assert all(line.endswith(": same bytes") for line in lines), result.stdout
    assert "all agree: 14 of 14 in every byte" in result.stderr
    made = hashes(tmp_path / "b")
    assert made == {name: hashes(tmp_path / "a")[name] for name in made}


def test_decisions_on_paired_examples_and_suites_are_made_again(tmp_path: Path) -> None:
    recipe = TINY.replace(
        "promote: {", "promote: {gate: {any: [{better: {metric: sums.greedy_accuracy}}, "
        "{not_worse: {metric: sums.greedy_accuracy, margin: 0.9, against: start}}]}, "
    )  # fmt: skip
    suites = "suites: {sums: {kind: task, num_samples: 0, max_new_tokens: 16}}\n"
    (tmp_path / "tiny.yaml").write_text(recipe + suites)
    spin("run", tmp_path / "tiny.yaml", "--run", tmp_path / "a", "--iterations", "1")
    out = "iterations/000/promote"
    inputs = read_manifest(tmp_path / "a" / out).inputs
    assert {"suite_sums", "champion_suite_sums", "start_suite_sums"} <= inputs.keys()
    result = spin("reproduce", tmp_path / "a" / out, "--in", tmp_path / "b")
    assert f"{out}: same bytes" in result.stdout
    assert "start/suite-sums: same bytes" in result.stdout
    assert "all agree" in result.stderr


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_demo_agrees_in_every_byte(tmp_path: Path) -> None:
    for words in (
        ("run", "demo", "--run", "a", "--iterations", "3"),
        ("reproduce", "a:2", "--in", "b"),
    ):
        command = [sys.executable, "-m", "spin_cli", *words]
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) >= 19  # data, SFT, the start, and three iterations
    assert all(line.endswith(": same bytes") for line in lines), done.stdout
    made = hashes(tmp_path / "b")
    assert made == {name: hashes(tmp_path / "a")[name] for name in made}
