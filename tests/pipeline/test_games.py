"""What iterations of a run have to do with each other: reference, replay, pool, carried state,
measured settings, convergence. The stages are fakes; the loop, a shell and make are true."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.artifacts import Manifest, read_manifest
from stages.layout import RunLayout
from tests import fake_stages
from tests.pipeline.test_run_loop import ROOT, command, content, fakes, run, spin

__all__ = ["command", "fakes"]  # fixtures
GAME = """
name: games
sft: {init: random}
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
        assert parts == ([[k, size] for k in range(size + 1)] if size else [None])
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
        run(*self.WORDS, iterations=4)
        assert self.betas() == pytest.approx([0.1, 0.2, 0.2, 0.2 / 3])
        assert (
            made(1, "evaluate").config["beta"] == 0.2 if "beta" in made(1, "evaluate").config else 1
        )
        assert spin("adapted", "a", "--iteration", "0").stdout == ""
        assert spin("adapted", "a", "--iteration", "1").stdout == "train.beta=0.2\n"

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

    def test_a_missing_measurement_is_named(
        self, fakes: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(fake_stages.divergence_by_model, player(0), float("inf"))
        monkeypatch.setattr(fake_stages, "evaluation", _without("heldout_kl"))
        text = run(*self.WORDS, expect=2).stderr
        assert re.search(r"adapt\.target_kl follows heldout_kl, which \S+evaluate does not", text)


class TestConvergence:
    def test_the_run_ends_when_the_two_cannot_be_told_apart(self, fakes: None) -> None:
        fake_stages.accuracy_of_discriminator[player(1)] = 0.515
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
            ("stop.discriminator_margin=0.3", "as good as guessing"),
            ("stop.confidence=0.999999999999999", ""),
            ("stop.min_gain=0.2", "gained less than stop.min_gain=0.2 in 2 iterations"),
            ("stop.min_gain=0.05", ""),
            ("stop={min_gain: 0.2, patience: 3}", "in 3 iterations in a row"),
        ],
    )
    def test_each_condition(self, word: str, says: str, fakes: None) -> None:
        found = run("--until-converged", word, iterations=3).stderr.splitlines()[-1]
        assert (says in found) if says else ("not converged after 3 iterations" in found)

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
        run(*words, iterations=3)
        script = run(*words, "--dry-run", iterations=3, run="b").stdout
        subprocess.run(["bash", "-e", "-c", script], check=True, capture_output=True)
        assert content("a") == content("b")
        assert not Path("b/iterations/001").exists()


def _without(name: str) -> Any:
    true = fake_stages.evaluation
    return lambda refs: {key: value for key, value in true(refs).items() if key != name}


def test_hidden_files_of_make_do_not_trouble_a_run(fakes: None, command: Path) -> None:
    make = ["make", "-f", str(ROOT / "configs/pipeline.mk"), "CONFIG=recipe.yaml", "RUN=b"]
    subprocess.run([*make, "ITERATION=0"], check=True, capture_output=True, env=os.environ)
    run(iterations=1, run="b")
    spin("verify", "b")
    assert [p.name for p in RunLayout(Path("b")).root.glob(".rules*")] == [".rules-0.mk"]
