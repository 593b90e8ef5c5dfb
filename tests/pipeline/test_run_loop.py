"""The whole loop: resumed, refused, amended, and done by a shell or by make instead.

The stages are fakes where the subject is the loop; the last tests run the true ones.
"""

import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from spin_cli.app import app
from stages.artifacts import read_manifest
from stages.artifacts.pointer import read_pointer
from stages.layout import RunLayout
from tests import fake_stages

ROOT = Path(__file__).parents[2]
RECIPE = """
name: example
sft: {init: random}
reward: {name: gsm8k}
promote: {metric: sampled_accuracy, min_gain: 0.05}
iterations: {1: {train: {beta: 5.0}}}
"""
FIRST = ["000/generate", "000/pair", "000/score", "000/train", "000/evaluate"]


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


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command `spin` with fake stages, on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "spin"
    script.write_text(
        f'#!/bin/sh\nexport PYTHONPATH="{ROOT}"\n'
        f'exec "{sys.executable}" -m tests.fake_stages "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return script


def spin(*words: str, expect: int = 0) -> Result:
    result = CliRunner().invoke(app, list(words), prog_name="spin")
    assert result.exit_code == expect, f"{words}: {result.output}"
    return result


def run(*words: str, iterations: int = 2, run: str = "a", expect: int = 0) -> Result:
    words = ("run", "recipe.yaml", "--run", run, "--iterations", str(iterations), *words)
    return spin(*words, expect=expect)


def content(folder: str) -> dict[str, Any]:
    """What a run holds, without times: keys and hashes of all artifacts, and the pointer."""
    root = Path(folder)
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("manifest.json")):
        manifest = read_manifest(path.parent)
        refs = {name: ref.model_dump() for name, ref in manifest.inputs.items()}
        name = path.parent.relative_to(root).as_posix()
        found[name] = (manifest.key, manifest.content(), refs)
    pointer = read_pointer(RunLayout(root).champion)
    found["champion"] = (
        [(e.path, e.key, e.decision_key) for e in pointer.history] if pointer else []
    )
    return found


class TestTheLoop:
    @pytest.fixture(autouse=True)
    def _fakes(self, fakes: None) -> None:
        pass

    def test_the_stages_come_in_order_each_once(self) -> None:
        run()
        second = [call.replace("000", "001") for call in FIRST]
        start = ["a/prepare", "models/sft", "start/evaluate"]
        assert fake_stages.calls == [*start, *FIRST, *second]

    def test_each_player_is_the_next_opponent(self) -> None:
        run(iterations=3)
        for iteration in range(3):
            before = "models/sft" if iteration == 0 else f"iterations/{iteration - 1:03d}/train"
            samples = "start/evaluate" if iteration == 0 else f"{before[:-5]}evaluate"
            for stage in ("generate", "pair", "score", "train"):
                inputs = read_manifest(Path(f"a/iterations/{iteration:03d}/{stage}")).inputs
                assert inputs["model"].path == before
            inputs = read_manifest(Path(f"a/iterations/{iteration:03d}/evaluate")).inputs
            assert inputs["model"].path == f"iterations/{iteration:03d}/train"
            assert inputs["opponent"].path == before
            assert inputs["opponent_evaluation"].path == samples

    def test_an_iteration_has_its_own_settings(self) -> None:
        run()
        assert read_manifest(Path("a/iterations/000/train")).config["train"]["beta"] == 0.1
        assert read_manifest(Path("a/iterations/001/train")).config["train"]["beta"] == 5.0

    def test_a_ranked_game_has_rewards(self) -> None:
        words = ["pair.policy=best_vs_worst", "reward.name=gsm8k", "generate.num_samples=2"]
        run(*words, iterations=1)
        assert "000/reward" in fake_stages.calls
        assert read_manifest(Path("a/iterations/000/pair")).inputs["rewards"].inside_run

    def test_without_sft_the_recipes_model_begins(self) -> None:
        run("sft=null", "model.path=org/base", "model.revision=r1", iterations=1)
        assert "models/sft" not in fake_stages.calls
        assert not read_manifest(Path("a/iterations/000/train")).inputs["model"].inside_run

    def test_a_table_comes_at_the_end_on_stdout(self) -> None:
        lines = run().stdout.splitlines()
        assert lines[0].split() == [
            "iteration", "sampled", "greedy", "identical", "held-out", "accuracy", "margin",
            "seconds", "decision",
        ]  # fmt: skip
        assert lines[1].split()[:3] == ["start", "60.0%", "100.0%"]
        assert lines[2].split()[:6] == ["0", "70.0%", "100.0%", "50.0%", "75.0%", "1.500"]
        assert [line.split()[-1] for line in lines[2:]] == ["promoted", "champion"]

    def test_every_stage_is_one_line_on_stderr(self) -> None:
        lines = run(iterations=1).stderr.splitlines()
        assert lines[0].startswith("prepare: 0.")
        assert lines[4].startswith("iteration 0 pair: 0.")
        assert lines[4].endswith(", identical_share 0.5, rows 3")
        assert run("--quiet", iterations=1).stderr == ""

    def test_a_finished_run_does_nothing(self) -> None:
        run()
        before = content("a")
        fake_stages.calls.clear()
        result = run()
        assert fake_stages.calls == []
        assert content("a") == before
        assert result.stderr.splitlines() == [
            "15 stages are already done",
            "the whole story: spin report a --out report.html",
        ]

    def test_more_iterations_go_on(self) -> None:
        run(iterations=1)
        run(iterations=3)
        run(iterations=3, run="b")
        assert content("a") == content("b")

    @pytest.mark.parametrize("stage", ["a/prepare", "models/sft", "000/train", "001/evaluate"])
    def test_it_goes_on_after_any_failure(
        self, stage: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(name: str, out: Path) -> None:
            if f"{out.parent.name}/{name}" == stage:
                raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(fake_stages, "before_fill", [fail])
            run(expect=1)
        run()
        run(run="b")
        assert content("a") == content("b")

    def test_any_missing_artifact_is_made_again(self) -> None:
        run()
        before = content("a")
        for name in ("data", "models/sft", "iterations/000/train", "iterations/001/promote"):
            shutil.rmtree(Path("a") / name)
            run()
            assert content("a") == before

    def test_a_control_arm_has_a_run_of_its_own(self) -> None:
        run(iterations=1)
        run("--control", iterations=1)
        manifest = read_manifest(Path("a-control/iterations/000/train"))
        assert manifest.config["train"]["control"] is True
        assert read_manifest(Path("a/iterations/000/train")).config["train"]["control"] is False
        assert "--control" not in spin("status", "a-control").stdout

    def test_no_verify_is_passed_to_stages_but_not_recorded(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[bool] = []
        true_run = fake_stages.run_stage
        monkeypatch.setattr(
            fake_stages,
            "run_stage",
            lambda stage, config, *rest: (
                seen.append(config.verify) or true_run(stage, config, *rest)
            ),
        )
        run("--no-verify", iterations=1)
        assert set(seen) == {False}
        overrides = json.loads(Path("a/run.json").read_text())["recipe"]["overrides"]
        assert "verify" not in dict(overrides)


class TestAnotherRecipe:
    @pytest.fixture(autouse=True)
    def _fakes(self, fakes: None) -> None:
        run(iterations=1)

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("train.beta=0.2", "train.beta: 0.1 there, 0.2 now"),
            ("seed=5", "seed: 0 there, 5 now"),
            ("sft=null", "sft: set there, null now"),
            ("sft.epochs=2", "sft.epochs: 1.0 there, 2.0 now"),
        ],
    )
    def test_is_refused_with_the_setting_named(self, override: str, message: str) -> None:
        before = content("a")
        words = [override, *(["model.path=x"] if "null" in override else [])]
        text = run(*words, expect=2).stderr
        assert message in text
        assert "--amend" in text
        assert content("a") == before

    def test_a_difference_in_one_iteration_is_found(self) -> None:
        Path("recipe.yaml").write_text(RECIPE.replace("5.0", "6.0"))
        assert "train.beta: 5.0 there, 6.0 now (iteration 1)" in run(expect=2).stderr

    def test_places_and_speed_may_change(self) -> None:
        run("threads=1", "generate.shard_rows=7", "prepare.source=elsewhere", iterations=1)

    def test_amend_takes_it_for_what_is_not_done(self) -> None:
        Path("recipe.yaml").write_text(RECIPE.replace("5.0", "6.0"))
        run("--amend")
        assert read_manifest(Path("a/iterations/001/train")).config["train"]["beta"] == 6.0
        run()

    def test_amend_does_not_redo_what_is_done(self) -> None:
        text = run("--amend", "train.beta=0.2", expect=2).stderr
        assert "train is finished with other settings: train.beta: 0.1 there, 0.2 now" in text
        assert "give it as iterations.1+.train.beta=…, or in the recipe under iterations" in text
        assert "delete" not in text
        run("--amend", "iterations.1+.train.beta=0.2")
        assert read_manifest(Path("a/iterations/001/train")).config["train"]["beta"] == 0.2

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (
                "promote.gate={at_least: {metric: sampled_accuracy, value: 0.1}}",
                "000/promote is finished with other settings: promote.gate",
            ),
            ("generate.temperature=0.5", "give it as iterations.1+.generate.temperature=…"),
            ("evaluate.max_new_tokens=7", "evaluate.max_new_tokens holds for the whole run"),
            ("sft.epochs=2", "sft.epochs holds for the whole run: leave it as it was"),
        ],
    )
    def test_what_is_done_tells_where_a_setting_still_holds(self, words: str, message: str) -> None:
        text = run("--amend", words, expect=2).stderr
        assert message in text
        assert ("iterations.1+.promote.gate=…" in text) == words.startswith("promote.gate")


class TestRefusals:
    @pytest.fixture(autouse=True)
    def _fakes(self, fakes: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(fake_stages.accuracy_by_model, "iterations/001/train", 0.7)

    def test_a_refusal_ends_the_run_with_6(self) -> None:
        result = run(iterations=3, expect=6)
        assert "iteration 1 was not promoted" in result.stderr
        assert result.stdout.splitlines()[-1].startswith("iteration 1 was refused: ")
        assert not Path("a/iterations/002").exists()
        run(iterations=3, expect=6)
        run(iterations=2, expect=6)
        run(iterations=1)
        assert spin("opponent", "a", "--iteration", "2", expect=6).stdout == ""
        assert "is not promoted" in spin("promote", "a", "--iteration", "1", expect=6).stderr

    @pytest.mark.parametrize(("policy", "iteration"), [("champion", 0), ("player", 1)])
    def test_or_the_run_plays_on(self, policy: str, iteration: int) -> None:
        run(f"promote.on_refusal={policy}", iterations=3)
        opponent = f"iterations/{iteration:03d}/train"
        assert read_manifest(Path("a/iterations/002/train")).inputs["model"].path == opponent
        assert (
            json.loads(spin("status", "a", "--json").stdout)["champion"] == "iterations/002/train"
        )

    @pytest.mark.parametrize(
        ("policy", "accuracies", "opponents", "rates", "code"),
        [
            ("stop", [0.7, 0.7], ["sft", "000"], [1.0, 1.0], 6),
            ("champion", [0.7, 0.7, 0.7, 0.8], ["sft", "000", "000", "000"], [1.0] * 4, 0),
            ("player", [0.7, 0.7, 0.7, 0.8], ["sft", "000", "001", "002"], [1.0] * 4, 0),
            # twice at lower rates, then no more
            ("retry", [0.7, 0.7, 0.7, 0.7], ["sft", "000", "000", "000"], [1, 1, 0.5, 0.25], 6),
            # a player that is promoted puts an end to it: the next one learns at the full rate
            (
                "retry",
                [0.7, 0.7, 0.8, 0.9, 0.9],
                ["sft", "000", "000", "002", "003"],
                [1, 1, 0.5, 1, 1],
                0,
            ),
            # before there is a champion, the start is played again
            ("retry", [0.6, 0.7], ["sft", "sft"], [1, 0.5], 0),
        ],
    )
    def test_what_comes_after_a_refusal(
        self,
        policy: str,
        accuracies: list[float],
        opponents: list[str],
        rates: list[float],
        code: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for iteration, accuracy in enumerate(accuracies):
            place = f"iterations/{iteration:03d}/train"
            monkeypatch.setitem(fake_stages.accuracy_by_model, place, accuracy)
        words = [f"promote.on_refusal={policy}", "train.learning_rate=0.01"]
        total = len(accuracies) + (code == 6)
        run(*words, iterations=total, expect=code)
        trained = [read_manifest(p) for p in sorted(Path("a/iterations").glob("*/train"))]
        models = [manifest.inputs["model"].path for manifest in trained]
        wanted = [f"iterations/{o}/train" if o != "sft" else "models/sft" for o in opponents]
        assert models == wanted, "and the refused players are kept"
        learned = [manifest.config["train"]["learning_rate"] for manifest in trained]
        assert learned == pytest.approx([0.01 * rate for rate in rates])
        done = content("a")
        run(*words, iterations=total, expect=code)
        assert content("a") == done

    @pytest.mark.parametrize("policy", ["player", "champion", "retry"])
    def test_a_run_of_refusals_alone_says_that_there_is_no_champion(
        self, policy: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said = "no player was promoted: the champion is still the start"
        monkeypatch.setitem(fake_stages.accuracy_by_model, "iterations/000/train", 0.6)
        words = [f"promote.on_refusal={policy}", "--quiet"]
        assert run(*words, iterations=1).stderr.splitlines() == [said]
        monkeypatch.setitem(fake_stages.accuracy_by_model, "iterations/001/train", 0.9)
        assert said not in run(*words, iterations=2).stderr

    def test_retries_at_an_end_say_so_and_can_be_played_on_from(self) -> None:
        fake_stages.accuracy_by_model.update({f"iterations/{t:03d}/train": 0.7 for t in range(4)})
        once = "promote.retry={times: 1, factor: 0.1}"
        said = run("promote.on_refusal=retry", once, iterations=4, expect=6).stderr
        assert "iteration 2 was not promoted, after 1 retry with a lower learning rate:" in said
        assert "iteration 2: train.learning_rate=" in said
        assert ", by promote.retry" in said
        assert spin("adapted", "a", "--iteration", "2").stdout.startswith("train.learning_rate=")
        run("--amend", "promote.on_refusal=champion", once, iterations=4)
        trained = [read_manifest(Path(f"a/iterations/{t:03d}/train")) for t in range(4)]
        rates = [manifest.config["train"]["learning_rate"] for manifest in trained]
        assert rates == pytest.approx([rates[0], rates[0], rates[0] / 10, rates[0]])
        assert trained[3].inputs["model"].path == "iterations/000/train"
        for t in range(4):
            del fake_stages.accuracy_by_model[f"iterations/{t:03d}/train"]

    def test_amending_the_policy_plays_on_later(self) -> None:
        run(iterations=3, expect=6)
        run("--amend", "promote.on_refusal=champion", iterations=3)
        run("promote.on_refusal=champion", iterations=3, run="b")
        assert content("a") == content("b")

    def test_a_roll_back_is_kept_and_played_on_from(self) -> None:
        policy = "promote.on_refusal=champion"
        fake_stages.accuracy_by_model["iterations/001/train"] = 0.9
        run(policy, iterations=2)
        text = spin("promote", "a", "--rollback")
        assert "champion was iterations/001/train, is iterations/000/train again" in text.stderr
        assert len(text.stdout.splitlines()) == 3
        run(policy, iterations=2)
        assert (
            json.loads(spin("status", "a", "--json").stdout)["champion"] == "iterations/000/train"
        )
        run(policy, iterations=3)
        inputs = read_manifest(Path("a/iterations/002/train")).inputs
        assert inputs["model"].path == "iterations/000/train"
        run(policy, iterations=3)


class TestByOtherMeans:
    """A shell, make, and processes that are killed."""

    def test_the_commands_of_a_dry_run_do_the_same(self, fakes: None) -> None:
        run()
        script = run("--dry-run", run="b").stdout
        assert not Path("b").exists()
        for line in script.splitlines():
            name, *words = shlex.split(line)
            assert name == "spin"
            spin(*words)
        assert content("a") == content("b")
        run(run="b")

    def test_they_are_quoted(self, fakes: None) -> None:
        lines = run("name=a b", "--dry-run", "--no-verify", run="my run", iterations=1).stdout
        assert lines.splitlines()[1] == (
            "spin prepare --out 'my run/data' --config recipe.yaml 'name=a b'"
        )
        assert lines.splitlines()[2] == (
            "spin sft --data 'my run/data' --out 'my run/models/sft' --no-verify "
            "--config recipe.yaml 'name=a b'"
        )

    @pytest.mark.parametrize(
        ("policy", "code"),
        [
            ("stop", 6),
            pytest.param("retry", 0, marks=pytest.mark.long),
            pytest.param("champion", 0, marks=pytest.mark.long),
        ],
    )
    def test_a_shell_does_the_same_after_a_refusal(
        self,
        policy: str,
        code: int,
        fakes: None,
        command: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        override = f"promote.on_refusal={policy}"
        monkeypatch.setitem(fake_stages.accuracy_by_model, "iterations/000/train", 0.6)
        monkeypatch.setenv("ACCURACY", json.dumps(fake_stages.accuracy_by_model))
        run(override, expect=code)
        script = run(override, "--dry-run", run="b").stdout
        done = subprocess.run(["bash", "-e", "-c", script], check=False, capture_output=True)
        assert done.returncode == code
        assert content("a") == content("b")

    def test_make_does_the_same(self, fakes: None, command: Path) -> None:
        run(iterations=1)
        make = ["make", "-f", str(ROOT / "configs/pipeline.mk"), "CONFIG=recipe.yaml", "RUN=b"]
        subprocess.run([*make, "ITERATION=0"], check=True, capture_output=True)
        assert content("a") == content("b")
        done = subprocess.run([*make, "ITERATION=0"], check=True, capture_output=True, text=True)
        assert done.stdout == ""

    def test_make_makes_what_is_missing_and_no_more(self, fakes: None, command: Path) -> None:
        run(iterations=1)
        shutil.rmtree("a/iterations/000/promote")
        make = ["make", "-f", str(ROOT / "configs/pipeline.mk"), "CONFIG=recipe.yaml", "RUN=a"]
        done = subprocess.run([*make, "-n", "ITERATION=1"], check=True, capture_output=True,
                              text=True)  # fmt: skip
        lines = done.stdout.splitlines()
        assert lines[0].startswith("spin promote a --iteration 0 --config recipe.yaml")
        assert re.match("spin promote a --iteration 0 .* --quiet", lines[1])  # if it was cut off
        assert lines[2] == "spin opponent a --iteration 1 > /dev/null"
        stages = [re.search(r"spin (\w+) ", line) for line in lines[3:9]]
        names = ["generate", "pair", "score", "train", "evaluate", "promote"]
        assert [s and s[1] for s in stages] == names
        assert len(lines) == 11

    @pytest.mark.long
    def test_make_does_the_same_over_two_iterations(self, fakes: None, command: Path) -> None:
        run()
        make = ["make", "-f", str(ROOT / "configs/pipeline.mk"), "CONFIG=recipe.yaml", "RUN=b"]
        subprocess.run([*make, "ITERATION=1"], check=True, capture_output=True)
        assert content("a") == content("b")
        run(run="b")

    def test_make_stops_at_a_refusal_each_time(
        self, fakes: None, command: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(fake_stages.accuracy_by_model, "iterations/000/train", 0.6)
        make = ["make", "-f", str(ROOT / "configs/pipeline.mk"), "CONFIG=recipe.yaml", "RUN=b"]
        run(iterations=1, run="b", expect=6)
        for iteration in (0, 1):
            done = subprocess.run(
                [*make, f"ITERATION={iteration}"], check=False, capture_output=True, text=True
            )
            assert done.returncode != 0
            assert "Error 6" in done.stderr
            assert "iteration 0 was not promoted" in done.stderr
        assert not Path("b/iterations/001/generate").exists()

    @pytest.mark.parametrize(
        ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)]
    )
    def test_a_stopped_run_resumes_to_the_same(
        self, number: signal.Signals, code: int, fakes: None, command: Path
    ) -> None:
        with paused(command, "001/train") as process:
            stages = json.loads(spin("status", "b", "--json").stdout)["iterations"][1]["stages"]
            assert (stages["score"]["state"], stages["train"]["state"]) == ("done", "running")
            run(run="b", expect=75)
            process.send_signal(number)
            _, messages = process.communicate(timeout=25)
        assert process.returncode == code
        if number != signal.SIGKILL:
            assert "what was finished is kept" in messages
            assert "Traceback" not in messages
        stages = json.loads(spin("status", "b", "--json").stdout)["iterations"][1]["stages"]
        assert stages["train"]["state"] in ("partial", "missing")
        run(run="b")
        run()
        assert content("a") == content("b")


def _heed_interrupts() -> None:
    """A shell that starts tests in the background makes them ignore SIGINT; this one must not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class paused:
    """A `spin run` in a process of its own that waits in one stage."""

    def __init__(self, command: Path, stage: str) -> None:
        mark = Path(f"paused-{stage.replace('/', '-')}").absolute()
        self.mark = mark
        self.process = subprocess.Popen(
            [command, "run", "recipe.yaml", "--run", "b", "--iterations", "2"],
            env={**os.environ, "PAUSE_IN": stage, "PAUSED": str(mark)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_heed_interrupts,  # noqa: PLW1509 - the test has no threads
        )

    def __enter__(self) -> "subprocess.Popen[str]":
        deadline = time.monotonic() + 60
        while not self.mark.exists():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


class TestTrueStages:
    """A random model of 2 layers, the transformers engine, on the CPU."""

    SETTINGS = """
    name: tiny
    prepare: {format: word_sums, word_sums: {num_examples: 24}, heldout_size: 6}
    generate: {max_new_tokens: 6, shard_rows: 8}
    reward: {name: gsm8k}
    pair: {drop_cut_off: false}
    score: {precision: fp32}
    train: {max_steps: 2, batch_size: 8, micro_batch_size: 4, precision: fp32,
            learning_rate: 1e-4, warmup_ratio: 0}
    evaluate: {max_new_tokens: 6, precision: fp32}
    promote: {metric: heldout_reward_accuracy, on_refusal: player}
    """

    @pytest.fixture(autouse=True)
    def _recipe(self, tiny_model_dir: Path) -> None:
        recipe = textwrap.dedent(self.SETTINGS) + f"model: {{path: {tiny_model_dir}}}\n"
        Path("recipe.yaml").write_text(recipe)

    def test_the_whole_loop_twice_gives_the_same(self) -> None:
        run()
        found = json.loads(spin("status", "a", "--json").stdout)
        assert found["champion"] == "iterations/001/train"
        for row in found["iterations"]:
            assert {stage["state"] for stage in row["stages"].values()} == {"done"}
            for name in ("sampled_accuracy", "greedy_accuracy", "identical_share",
                         "heldout_reward_accuracy", "heldout_reward_margin"):  # fmt: skip
                assert isinstance(row["metrics"][name], float)
        assert spin("verify", "a").stdout == ""
        assert "14 stages are already done\n" in run().stderr
        run(run="b")
        assert content("a") == content("b")

    def test_a_ranked_game_from_a_random_start(self) -> None:
        sft = "sft={init: random, max_steps: 2, batch_size: 8, precision: fp32}"
        settings = [
            sft,
            "sft.architecture={num_layers: 1, hidden_size: 32, intermediate_size: 64}",
            "chat.template=plain",
            "pair={policy: best_vs_worst, tie_policy: first, drop_cut_off: false}",
            "generate.num_samples=2",
        ]
        run(*settings, iterations=1)
        pairs = read_manifest(Path("a/iterations/000/pair"))
        assert pairs.inputs["rewards"].path == "iterations/000/reward"
        assert read_manifest(Path("a/iterations/000/train")).inputs["model"].path == "models/sft"

    @pytest.mark.parametrize(
        "seen",
        [
            "iterations/000/score",
            pytest.param("data", marks=pytest.mark.long),
            pytest.param("iterations/000/.train.lock", marks=pytest.mark.long),
            pytest.param("iterations/000/promote", marks=pytest.mark.long),
            pytest.param("iterations/001/generate", marks=pytest.mark.long),
        ],
    )
    def test_a_killed_run_ends_in_the_same_metrics(self, seen: str) -> None:
        words = ["run", "recipe.yaml", "--run", "b", "--iterations", "2"]
        process = subprocess.Popen(
            [sys.executable, "-m", "spin_cli", *words],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 200
        while not (Path("b") / seen).exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert json.loads(spin("status", "b", "--json").stdout)["iterations"] is not None
        run(run="b")
        run()
        assert content("a") == content("b")
        assert spin("verify", "b").stdout == ""
