"""Collapse: training's own metrics look better than ever, alarms fire, the champion stays."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from spin_cli.app import app
from stages.artifacts import read_manifest
from tests.tiny_loop import RECIPE

# The demo with less data, a quarter of the batch and eight times the learning rate. Its gate is
# blind: it asks for no more than that human answers are told from the opponent's.
HOT = (
    "prepare.word_sums.num_examples=1400", "prepare.heldout_size=200", "train.batch_size=16",
    "train.learning_rate=8e-4", "promote.metric=heldout_reward_accuracy", "promote.gate=null",
    "promote.min_value=0.5",
)  # fmt: skip
ITERATIONS = "iterations"


def spin(*words: object, expect: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == expect, result.output + result.stderr
    return result


def stage(run: Path, iteration: int, name: str) -> Path:
    return run / ITERATIONS / f"{iteration:03d}" / name


class TestCollapse:
    """One run of two iterations, 33 s of one core: the first rises, the second collapses."""

    @pytest.fixture(scope="class")
    def collapsed(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
        run = tmp_path_factory.mktemp("collapse") / "run"
        done = spin("run", "demo", "--run", run, "--iterations", "3", *HOT, expect=6)
        return run, done.stderr

    def metrics(self, run: Path, iteration: int, name: str) -> Any:
        return read_manifest(stage(run, iteration, name)).metrics

    def test_the_classical_training_metrics_look_good(self, collapsed: tuple[Path, str]) -> None:
        for iteration in (0, 1):
            train = self.metrics(collapsed[0], iteration, "train")
            assert train["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
            assert train["last_loss"] < 0.3
            assert train["last_accuracy"] > 0.9
            assert train["last_margin"] > 1

    def test_while_answers_collapse(self, collapsed: tuple[Path, str]) -> None:
        accuracies = [self.metrics(collapsed[0], t, "evaluate")["sampled_accuracy"] for t in (0, 1)]
        assert accuracies[1] < accuracies[0] / 2

    def test_alarms_alone_refuse_it(self, collapsed: tuple[Path, str]) -> None:
        decision = json.loads((stage(collapsed[0], 1, "promote") / "decision.json").read_text())
        assert not decision["promoted"]
        assert decision["value"] >= decision["min_value"], "the metric itself would have passed"
        fired = {alarm["name"]: alarm["action"] for alarm in decision["alarms"]}
        # human_fall needs no reward, accuracy_drop no log-probability.
        assert fired["human_fall"] == fired["accuracy_drop"] == "refuse"
        assert fired["chosen_fall"] == "note"
        text = next(a["text"] for a in decision["alarms"] if a["name"] == "human_fall")
        assert f"alarm human_fall: {text}" in decision["reasons"]

    def test_the_divergence_is_noted_an_iteration_ahead(self, collapsed: tuple[Path, str]) -> None:
        decision = json.loads((stage(collapsed[0], 0, "promote") / "decision.json").read_text())
        assert decision["promoted"]
        assert [a["name"] for a in decision["alarms"] if a["stage"] == "evaluate"] == ["divergence"]

    def test_the_champion_is_the_one_before_and_better_than_the_start(
        self, collapsed: tuple[Path, str]
    ) -> None:
        run, _ = collapsed
        status = json.loads(spin("status", run, "--json").stdout)
        assert status["champion"].endswith("iterations/000/train")
        start = status["start"]["metrics"]["sampled_accuracy"]
        assert self.metrics(run, 0, "evaluate")["sampled_accuracy"] >= start
        assert not stage(run, 2, "generate").exists()

    def test_it_is_said_when_it_happens(self, collapsed: tuple[Path, str]) -> None:
        said = " ".join(collapsed[1].split())
        assert "train: alarm chosen_fall: step " in said
        assert "evaluate: alarm human_fall: held-out human responses lost" in said
        assert "the player will not be promoted" in said


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one iteration that no alarm disturbs."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.yaml").write_text(RECIPE)
    quiet = "alarms.accuracy_drop.action=note", "alarms.human_fall.action=note"
    spin("run", folder / "tiny.yaml", "--run", folder / "run", "--iterations", "1", *quiet)
    return folder / "run"


SATURATED = "alarms.accuracy_saturated.threshold=0"
STOP = "alarms.accuracy_saturated.action=stop"


def train(tiny: Path, out: Path, *words: str, expect: int = 0) -> Result:
    recipe = ["--config", tiny.parent / "tiny.yaml", *words]
    pairs, model = stage(tiny, 0, "score"), tiny / "models/sft"
    where = ["--pairs", pairs, "--model", model, "--out", out]
    return spin("train", *where, *recipe, expect=expect)


def test_a_stop_in_training_ends_it_at_its_step_and_leaves_no_artifact(
    tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "player"
    words = SATURATED, STOP, "train.max_steps=20", "train.checkpoint.every_steps=2"
    done = train(tiny, out, *words, expect=5)
    said = " ".join(done.stderr.split())
    assert "train: step 4: reward accuracy is saturated at" in said  # the first whole window
    assert "stopped by alarms.accuracy_saturated" in said
    assert not out.exists()
    # The same again, from the last checkpoint; nothing is gained by trying.
    again = train(tiny, out, *words, expect=5)
    assert "train: step 4: reward accuracy is saturated at" in " ".join(again.stderr.split())


def test_after_a_stop_another_threshold_goes_on_and_changes_no_number(
    tiny: Path, tmp_path: Path
) -> None:
    out, straight = tmp_path / "player", tmp_path / "straight"
    steps = "train.max_steps=20", "train.checkpoint.every_steps=2"
    train(tiny, out, SATURATED, STOP, *steps, expect=5)
    went_on = train(tiny, out, *steps)
    assert "going on after step 4 of 20" in " ".join(went_on.stderr.split())
    train(tiny, straight, *steps)
    first, second = read_manifest(out), read_manifest(straight)
    assert (first.key, first.metrics) == (second.key, second.metrics)
    assert first.content() == second.content()


def test_thresholds_are_in_no_key(tiny: Path, tmp_path: Path) -> None:
    for name in ("generate", "pair", "score", "train", "evaluate", "promote"):
        assert "alarms" not in read_manifest(stage(tiny, 0, name)).config
    assert "alarms" in read_manifest(stage(tiny, 0, "promote")).info
    out = tmp_path / "train"
    shutil.copytree(stage(tiny, 0, "train"), out)
    assert "already done" in train(tiny, out, SATURATED, STOP).stderr


def test_manifests_hold_what_alarms_look_at(tiny: Path) -> None:
    figures = read_manifest(stage(tiny, 0, "train")).metrics
    rows = pq.read_table(stage(tiny, 0, "train") / "metrics.parquet").to_pandas()
    assert figures["highest_accuracy"] == pytest.approx(rows["accuracy"].rolling(5).mean().max())
    pairs = pq.read_table(stage(tiny, 0, "pair") / "part-00000.parquet")
    mean_tokens = sum(map(len, pairs["chosen_token_ids"].to_pylist())) / pairs.num_rows
    lowest = rows["chosen_logratio"].rolling(5).mean().min()
    assert figures["chosen_fall"] == pytest.approx(-lowest / mean_tokens)
    generated = read_manifest(stage(tiny, 0, "generate"))
    assert generated.metrics["empty_share"] == generated.counts["empty"] / generated.counts["rows"]


def test_evaluate_takes_the_opponents_figures_from_its_own_evaluation(tiny: Path) -> None:
    start = read_manifest(tiny / "start" / "evaluate").metrics
    player = read_manifest(stage(tiny, 0, "evaluate")).metrics
    for name in ("accuracy", "cut_off_share", "empty_share", "mean_tokens", "repeated_share"):
        assert player[f"opponent_{name}"] == start[f"sampled_{name}"], name
    # By the trainer's forward there, by the engine here.
    assert player["opponent_entropy"] == pytest.approx(start["sampled_entropy"], rel=1e-4)
    gain = player["sampled_accuracy"] - player["opponent_accuracy"]
    assert player["sampled_gain"] == pytest.approx(gain)
