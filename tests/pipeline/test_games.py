"""What iterations of a run have to do with each other: reference, replay, pool, carried state,
measured settings, convergence. The stages are fakes; the loop, a shell and make are true."""

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.adaptation import change
from stages.artifacts import Manifest, read_manifest
from stages.artifacts.pointer import PointerEntry, move_pointer
from stages.config import AdaptConfig
from stages.layout import RunLayout
from tests import fake_stages
from tests.pipeline.test_run_loop import ROOT, command, content, fakes, run, spin

__all__ = ["command", "fakes"]  # fixtures
GAME = """
name: games
sft: {init: random}
reward: {name: gsm8k}
promote: {metric: sampled_accuracy, min_gain: 0.05}
"""


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(GAME)
    yield
    for table in (fake_stages.accuracy_of_discriminator, fake_stages.divergence_by_model):
        table.clear()


def made(iteration: int, stage: str, folder: str = "a") -> Manifest:
    return read_manifest(Path(folder) / f"iterations/{iteration:03d}/{stage}")


def inputs(iteration: int, stage: str, *names: str) -> list[str]:
    refs = made(iteration, stage).inputs
    return [refs[name].path if name in refs else "" for name in names]


def player(iteration: int) -> str:
    return "models/sft" if iteration < 0 else f"iterations/{iteration:03d}/train"


@pytest.mark.parametrize(
    ("words", "references"),
    [
        ([], [-1, 0, 1, 2, 3]),
        (["reference.policy=first"], [-1] * 5),
        (["reference.update_every=2"], [-1, -1, 1, 1, 3]),
        (["reference.update_every=4"], [-1, -1, -1, -1, 3]),
    ],
)
def test_pairs_are_scored_under_the_reference(
    words: list[str], references: list[int], fakes: None
) -> None:
    run(*words, iterations=5)
    assert [inputs(t, "score", "model")[0] for t in range(5)] == [player(r) for r in references]
    assert [inputs(t, "train", "model")[0] for t in range(5)] == [player(t - 1) for t in range(5)]
    shown = [
        spin("opponent", "a", "--iteration", str(t), "--reference").stdout.strip() for t in range(5)
    ]
    assert shown == [f"a/{player(r)}" for r in references]


def test_replay_takes_the_pairs_of_the_iterations_before(fakes: None) -> None:
    run("pair.replay.iterations=2", iterations=4)
    names = ("replay_1", "replay_2", "replay_3")
    assert [inputs(t, "pair", *names) for t in range(4)] == [
        ["", "", ""],
        ["iterations/000/pair", "", ""],
        ["iterations/001/pair", "iterations/000/pair", ""],
        ["iterations/002/pair", "iterations/001/pair", ""],
    ]


def test_older_opponents_answer_beside_the_newest(fakes: None) -> None:
    words = ["pair.policy=best_vs_worst", "reward.name=gsm8k", "generate.num_samples=2"]
    run("generate.pool.size=2", *words, iterations=4)
    for t, size in enumerate([0, 1, 2, 2]):
        asked = [inputs(t, f"pool-{k}", "model")[0] for k in range(1, size + 1)]
        assert asked == [player(t - 1 - k) for k in range(1, size + 1)]
        assert not Path(f"a/iterations/{t:03d}/pool-{size + 1}").exists()
        parts = [
            made(t, n).config.get("part") for n in ("generate", "pool-1", "pool-2")[: size + 1]
        ]
        found = [part and (part["member"], part["members"]) for part in parts]
        assert found == ([(k, size) for k in range(size + 1)] if size else [None])
        names = ["generations", *(f"generations_{k}" for k in range(1, size + 1))]
        places = ["generate", *(f"pool-{k}" for k in range(1, size + 1))]
        for stage in ("reward", "pair"):
            assert inputs(t, stage, *names) == [f"iterations/{t:03d}/{place}" for place in places]


def test_the_optimizer_goes_on_from_the_opponents(
    fakes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a refusal too: the state of a player that was refused fits no other weights."""
    monkeypatch.setitem(fake_stages.accuracy_by_model, "iterations/001/train", 0.6)
    words = ["train.carry_optimizer=true", "train.schedule=constant", "train.warmup_steps=3"]
    run(*words, "promote.on_refusal=champion", iterations=4)
    carried = [inputs(t, "train", "optimizer_from")[0] for t in range(4)]
    assert carried == ["", player(0), player(0), player(2)]


class TestMeasuredSettings:
    WORDS = ("adapt.target_kl=4", "adapt.tolerance=1.5", "adapt.factor=3")

    def betas(self, folder: str = "a") -> list[float]:
        return [made(t, "train", folder).config["train"]["beta"] for t in range(4)]

    def test_beta_follows_the_divergence(self, fakes: None) -> None:
        fake_stages.divergence_by_model |= {player(0): 16.0, player(1): 5.0, player(2): 0.0}
        said = run(*self.WORDS, iterations=4).stderr
        assert self.betas() == pytest.approx([0.1, 0.2, 0.2, 0.2 / 3])
        assert (
            made(1, "evaluate").config["beta"] == 0.2 if "beta" in made(1, "evaluate").config else 1
        )
        assert spin("adapted", "a", "--iteration", "0").stdout == ""
        assert spin("adapted", "a", "--iteration", "1").stdout == "train.beta=0.2\n"
        assert "iteration 1: train.beta=0.2, by adapt" in said

    def test_so_does_the_learning_rate_the_other_way(self, fakes: None) -> None:
        fake_stages.divergence_by_model |= {player(0): 16.0}
        words = ["adapt.key=train.learning_rate", "train.learning_rate=1e-4"]
        run(*self.WORDS, *words, iterations=2)
        assert made(1, "train").config["train"]["learning_rate"] == pytest.approx(5e-5)

    def test_it_multiplies_what_the_iteration_has_and_keeps_its_bounds(self, fakes: None) -> None:
        Path("recipe.yaml").write_text(GAME + "iterations: {2+: {train: {beta: 5.0}}}")
        fake_stages.divergence_by_model |= {player(t): 16.0 for t in range(3)}
        run(*self.WORDS, "adapt.highest=25", iterations=4)
        assert self.betas() == pytest.approx([0.1, 0.2, 20.0, 25.0])

    def test_bounds_hold_what_adds_up_too(self, fakes: None) -> None:
        """After years at the bound one step leads away from it again."""
        fake_stages.divergence_by_model |= {player(t): 0.5 for t in range(3)} | {player(3): 64.0}
        run(*self.WORDS, "adapt.lowest=0.1", iterations=5)
        assert self.betas() == pytest.approx([0.1] * 4)
        assert made(4, "train").config["train"]["beta"] == pytest.approx(0.3)

    def test_what_moved_one_setting_moves_no_other(self, fakes: None) -> None:
        Path("recipe.yaml").write_text(
            GAME + "iterations: {2+: {adapt: {key: train.learning_rate}}}"
        )
        fake_stages.divergence_by_model |= {player(t): 16.0 for t in range(4)}
        run(*self.WORDS, "train.learning_rate=1e-4", iterations=4)
        rates = [made(t, "train").config["train"]["learning_rate"] for t in range(4)]
        assert self.betas() == pytest.approx([0.1, 0.2, 0.1, 0.1])
        assert rates == pytest.approx([1e-4, 1e-4, 1e-4, 5e-5])

    @pytest.mark.parametrize(("measured", "stderr", "factor"), [
        (16.0, 0.0, 2.0), (16.0, 4.0, math.sqrt(2)), (16.0, 6.0, 1.0), (0.0, 1.0, math.sqrt(0.5)),
        (-1.0, 2.0, 1.0), (400.0, 1.0, 3.0), (5.9, 0.0, 1.0), (2.7, 0.0, 1.0),
    ])  # fmt: skip
    def test_noise_changes_nothing(self, measured: float, stderr: float, factor: float) -> None:
        adapt = AdaptConfig(target_kl=4.0, tolerance=1.5, factor=3.0)
        assert change(adapt, measured, stderr) == pytest.approx(factor)
        inverse = adapt.model_copy(update={"key": "train.learning_rate"})
        assert change(inverse, measured, stderr) == pytest.approx(1 / factor)

    def test_a_missing_measurement_is_named(
        self, fakes: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(fake_stages.divergence_by_model, player(0), float("inf"))
        monkeypatch.setattr(fake_stages, "evaluation", _without("heldout_kl"))
        text = run(*self.WORDS, expect=2).stderr
        assert re.search(r"adapt\.target_kl follows heldout_kl, which \S+evaluate does not", text)


class TestConvergence:
    def test_the_run_ends_when_the_two_cannot_be_told_apart(self, fakes: None) -> None:
        fake_stages.accuracy_of_discriminator |= {player(0): 0.54, player(1): 0.515}
        result = run("--until-converged", iterations=5)
        assert not Path("a/iterations/002").exists()
        assert "a: converged: the player tells the data from its opponent in 51.5%" in result.stderr
        assert spin("converged", "a", "--iteration", "0").stdout == ""
        assert "51.5%" in spin("converged", "a", "--iteration", "1").stdout
        before = content("a")
        run("--until-converged", iterations=5)
        assert content("a") == before
        run(iterations=3)  # and goes on when it is told to

    @pytest.mark.parametrize(
        ("word", "says"),
        [
            ("stop.discriminator_margin=0.3", "within 30.0% of guessing"),
            ("stop.discriminator_margin=0.26", ""),  # 0.75 and its interval are not within
            ("stop.identical_share=0.5", "50.0% of the opponent's held-out answers are"),
            ("stop.identical_share=0.51", ""),
            ("stop.min_gain=0.2", "gained less than stop.min_gain=0.2 in 2 iterations"),
            ("stop.min_gain=0.05", ""),
            ("stop={min_gain: 0.2, patience: 3}", "in 3 iterations in a row"),
        ],
    )
    def test_each_condition(self, word: str, says: str, fakes: None) -> None:
        found = run("--until-converged", word, iterations=3).stderr.splitlines()[-1]
        assert (says in found) if says else ("not converged after 3 iterations" in found)

    @pytest.mark.parametrize("accuracy", [0.3, 0.0])
    def test_a_discriminator_that_is_wrong_is_not_one_that_guesses(
        self, accuracy: float, fakes: None
    ) -> None:
        fake_stages.accuracy_of_discriminator[player(0)] = accuracy
        assert "not converged" in run("--until-converged", iterations=1).stderr

    def test_a_player_that_has_not_moved_says_nothing(
        self, fakes: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        still = {"heldout_reward_accuracy": 0.5, "heldout_kl": 0, "heldout_reward_margin": 0}
        true = fake_stages.evaluation
        monkeypatch.setattr(fake_stages, "evaluation", lambda refs: {**true(refs), **still})
        assert "not converged" in run("--until-converged", iterations=1).stderr

    def test_a_player_that_alarms_refused_says_nothing(
        self, fakes: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        words = ["stop={discriminator_margin: null, min_gain: 0.05}", "promote.on_refusal=champion"]
        monkeypatch.setitem(fake_stages.accuracy_by_model, player(1), 0.1)
        true = fake_stages.evaluation
        alarming = {"sampled_gain": -0.7, "sampled_gain_stderr": 0.01}
        monkeypatch.setattr(
            fake_stages,
            "evaluation",
            lambda refs: {**true(refs), **(alarming if "001" in refs["model"].path else {})},
        )
        monkeypatch.setitem(fake_stages.accuracy_by_model, player(2), 0.7)
        found = run("--until-converged", *words, iterations=3).stderr
        assert "accuracy_drop" in json.dumps(json.loads(Path(
            "a/iterations/001/promote/decision.json").read_text())["alarms"])  # fmt: skip
        assert "not converged after 3 iterations" in found

    def test_a_stop_that_cannot_come_is_refused(self, fakes: None) -> None:
        words = ["pair.policy=best_vs_worst", "reward.name=gsm8k", "generate.num_samples=2"]
        text = run("--until-converged", *words, expect=2).stderr
        assert "no condition of `stop` can be met" in text

    def test_it_asks_for_no_more_iterations_than_the_recipe_has(self, fakes: None) -> None:
        spin("run", "recipe.yaml", "--run", "a", "--until-converged", "stop.max_iterations=2")
        assert Path("a/iterations/001").exists()
        assert not Path("a/iterations/002").exists()

    def test_a_refusal_at_the_end_is_no_failure_of_a_converged_run(
        self, fakes: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(fake_stages.accuracy_by_model, player(1), 0.7)
        fake_stages.accuracy_of_discriminator[player(1)] = 0.5
        run("--until-converged", iterations=4)
        assert json.loads(spin("status", "a", "--json").stdout)["champion"] == player(0)
        fake_stages.accuracy_of_discriminator[player(1)] = 0.75
        run("--until-converged", run="b", iterations=4, expect=6)


class TestByOtherMeans:
    WORDS = (
        "pair={policy: best_vs_worst, replay: {iterations: 1}}", "reward.name=gsm8k",
        "generate={num_samples: 2, pool: {size: 1}}", "reference.update_every=2",
        "train={carry_optimizer: true, schedule: constant, warmup_steps: 2}", "adapt.target_kl=1",
    )  # fmt: skip

    def test_a_shell_plays_the_same_games(self, fakes: None, command: Path) -> None:
        run(*self.WORDS, iterations=3)
        script = run(*self.WORDS, "--dry-run", iterations=3, run="b").stdout
        subprocess.run(["bash", "-e", "-c", script], check=True, capture_output=True)
        assert content("a") == content("b")
        assert made(2, "train").config["train"]["beta"] == pytest.approx(0.4)

    @pytest.mark.long
    def test_make_plays_the_same_games(self, fakes: None, command: Path) -> None:
        run(*self.WORDS, iterations=3)
        words = " ".join(f"'{word}'" for word in self.WORDS)
        make = ["make", "-f", str(ROOT / "configs/pipeline.mk"), "CONFIG=recipe.yaml", "RUN=b"]
        subprocess.run([*make, "ITERATION=2", f"SET={words}"], check=True, capture_output=True)
        assert content("a") == content("b")

    def test_a_shell_stops_when_the_run_has_converged(
        self, fakes: None, command: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        words = ["--until-converged", "stop.discriminator_margin=0.3"]
        assert "--until-converged" in run(*words, "--rules", expect=2).stderr
        run(*words, iterations=3)
        script = run(*words, "--dry-run", iterations=3, run="b").stdout
        subprocess.run(["bash", "-e", "-c", script], check=True, capture_output=True)
        assert content("a") == content("b")
        assert not Path("b/iterations/001").exists()


class TestWhatIsLost:
    """An iteration's opponent stays who it was, whatever became of artifacts and pointer."""

    @pytest.mark.parametrize("policy", ["stop", "champion", "player"])
    @pytest.mark.parametrize("lost", [["generate"], ["generate", "pair", "score", "train"]])
    def test_a_lost_artifact_is_made_again_by_the_same_opponent(
        self, policy: str, lost: list[str], fakes: None
    ) -> None:
        words = [f"promote.on_refusal={policy}", "reference.update_every=2"]
        run(*words, iterations=4)
        before = content("a")
        for t in (1, 2):
            for stage in lost:
                shutil.rmtree(f"a/iterations/{t:03d}/{stage}")
            run(*words, iterations=4)
            assert content("a") == before

    def test_a_promotion_that_was_cut_off_is_completed(self, fakes: None, command: Path) -> None:
        run(iterations=2)
        whole = content("a")
        champion = Path("a/champion")
        first = json.loads(champion.read_text())["history"][:1]
        champion.unlink()
        move_pointer(champion, PointerEntry(**first[0]))
        assert spin("opponent", "a", "--iteration", "2").stdout == f"a/{player(1)}\n"
        make = ["make", "-f", str(ROOT / "configs/pipeline.mk"), "CONFIG=recipe.yaml", "RUN=a"]
        subprocess.run([*make, "ITERATION=1"], check=True, capture_output=True)
        assert content("a") == whole

    def test_make_refuses_other_settings(self, fakes: None, command: Path) -> None:
        make = ["make", "-f", str(ROOT / "configs/pipeline.mk"), "CONFIG=recipe.yaml", "RUN=a"]
        subprocess.run([*make, "ITERATION=0"], check=True, capture_output=True)
        again = [*make, "ITERATION=1", "SET=train.beta=0.5"]
        done = subprocess.run(again, check=False, capture_output=True, text=True)
        assert done.returncode == 2
        assert "train.beta: 0.1 there, 0.5 now" in done.stderr
        assert not Path("a/iterations/001").exists()
        subprocess.run([*make, "ITERATION=1"], check=True, capture_output=True)
        shutil.rmtree("a/iterations/001/train")
        again = [*make, "ITERATION=1", "SET=train.beta=0.5"]  # its rules are there
        assert subprocess.run(again, check=False, capture_output=True).returncode == 2
        assert not Path("a/iterations/001/train").exists()

    def test_an_amendment_that_is_refused_leaves_the_run_as_it_was(self, fakes: None) -> None:
        run(iterations=1)
        assert "finished with other settings" in run("train.beta=0.5", "--amend", expect=2).stderr
        run(iterations=2)

    def test_a_metric_that_no_evaluation_has_is_refused_at_once(self, fakes: None) -> None:
        Path("recipe.yaml").write_text(GAME.replace("sampled_accuracy", "nosuch"))
        assert "promote.metric=nosuch: evaluations of this run" in run(expect=2).stderr
        assert not Path("a/iterations").exists()


class TestAfterARefusal:
    WORDS = (
        "promote.on_refusal=champion",
        "train={carry_optimizer: true, schedule: constant, warmup_steps: 2}",
    )

    @pytest.fixture(autouse=True)
    def _refuse_the_first(self, fakes: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(fake_stages.accuracy_by_model, player(0), 0.5)
        monkeypatch.setenv("ACCURACY", json.dumps(fake_stages.accuracy_by_model))

    def test_a_shell_begins_anew_as_the_run_does(self, command: Path) -> None:
        run(*self.WORDS, iterations=3)
        assert [inputs(t, "train", "optimizer_from")[0] for t in range(3)] == ["", "", player(1)]
        script = run(*self.WORDS, "--dry-run", iterations=3, run="b").stdout
        subprocess.run(["bash", "-e", "-c", script], check=True, capture_output=True)
        assert content("a") == content("b")

    def test_the_recipes_model_keeps_its_revision(self, command: Path) -> None:
        words = ["promote.on_refusal=champion", "sft=null", "model={path: org/x, revision: r1}"]
        run(*words, iterations=2)
        script = run(*words, "--dry-run", iterations=2, run="b").stdout
        subprocess.run(["bash", "-e", "-c", script], check=True, capture_output=True)
        assert content("a") == content("b")


def test_a_state_that_was_not_kept_is_not_gone_on_from(fakes: None) -> None:
    carry = "{carry_optimizer: true, schedule: constant, warmup_steps: 2}"
    Path("recipe.yaml").write_text(GAME + f"iterations: {{1+: {{train: {carry}}}}}")
    run(iterations=3)
    assert [inputs(t, "train", "optimizer_from")[0] for t in range(3)] == ["", "", player(1)]


def test_names_that_make_cannot_read_are_refused(fakes: None) -> None:
    assert "a name without spaces" in run("--rules", run="my run", expect=2).stderr


def _without(name: str) -> Any:
    true = fake_stages.evaluation
    return lambda refs: {key: value for key, value in true(refs).items() if key != name}


def test_hidden_files_of_make_do_not_trouble_a_run(fakes: None, command: Path) -> None:
    make = ["make", "-f", str(ROOT / "configs/pipeline.mk"), "CONFIG=recipe.yaml", "RUN=b"]
    subprocess.run([*make, "ITERATION=0"], check=True, capture_output=True, env=os.environ)
    run(iterations=1, run="b")
    spin("verify", "b")
    assert [p.name for p in RunLayout(Path("b")).root.glob(".rules*")] == [".rules-0.mk"]
