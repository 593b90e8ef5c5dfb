"""The shipped recipes: complete, reduced only where they may be, and played in their reduced form.

What a recipe says of an iteration is read back from the manifests of what was done.
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner, Result

from spin_cli.app import app
from spin_cli.recipes import find, load
from stages.artifacts import Manifest, read_manifest
from stages.config import RunConfig
from stages.recipe import known_keys

CONFIGS = Path(__file__).parents[2] / "configs"
FIRST = "demo-base"
"""How manifests name the model that reduced forms start from: it lies outside of the run."""
BIG = ("paper", "verl-gsm8k", "rlhflow", "sppo")
PLAYED_ITERATIONS = {"paper": 4, "verl-gsm8k": 10, "rlhflow": 3, "sppo": 3}
SHRINKABLE = (
    # model and data
    *("model.", "chat.", "prepare.", "generate.max_prompts", "reward.name"),
    # lengths
    *("generate.max_new_tokens", "evaluate.max_new_tokens", "pair.max_length", "train.max_length"),
    # what it runs on
    *("generate.engine.", "score.precision", "train.precision", "evaluate.precision"),
    *("score.processes", "train.processes"),
)
"""What a reduced form may change: these keys, or all whose names begin so."""


def shipped() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def flat(config: RunConfig) -> dict[str, Any]:
    """Every value of a resolved recipe by its dotted name."""

    def walk(values: dict[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, dict):
                found |= walk(value, f"{prefix}{name}.")
            else:
                found[f"{prefix}{name}"] = value
        return found

    return walk(config.model_dump(mode="json"), "")


def spin(*words: Any, expect: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == expect, result.output + result.stderr
    return result


def play(recipe: str, run: Path, iterations: int, *settings: str) -> Path:
    """Play a recipe's reduced form, on fewer rows still."""
    spin("run", recipe, "--run", run, "-n", iterations, "--shrink", "--quiet", *settings)
    return run


def stage(run: Path, iteration: int, name: str) -> Manifest:
    return read_manifest(run / f"iterations/{iteration:03d}/{name}")


def trained(run: Path, iterations: int, *names: str) -> list[tuple[Any, ...]]:
    """The settings of training that each iteration's manifest holds."""
    slices = [stage(run, t, "train").config["train"] for t in range(iterations)]
    return [tuple(config[name] for name in names) for config in slices]


def learning_rates(run: Path, iteration: int) -> list[float]:
    metrics = pq.read_table(run / f"iterations/{iteration:03d}/train/metrics.parquet")
    return metrics["learning_rate"].to_pylist()


def references(run: Path, iterations: int) -> list[str]:
    """The model that each iteration's pairs were scored under, as its path in the run."""
    return [stage(run, t, "score").inputs["model"].path for t in range(iterations)]


def player(iteration: int) -> str:
    return f"iterations/{iteration:03d}/train"


class TestTheFiles:
    @pytest.mark.parametrize("name", shipped())
    def test_a_recipe_resolves_for_all_its_iterations(self, name: str) -> None:
        recipe = load(name, [])
        assert recipe.for_iteration().name == name
        for iteration in range(12):
            recipe.for_iteration(iteration)

    @pytest.mark.parametrize("name", shipped())
    def test_every_key_is_commented_or_plain_and_known(self, name: str) -> None:
        text = find(name).read_text(encoding="utf-8")
        assert text.startswith("# "), f"{name}.yaml does not say what it is"
        content = yaml.safe_load(text)
        allowed = {key.split(".")[0] for key in known_keys()} | {"iterations", "shrink"}
        assert content.keys() <= allowed

    def test_the_big_ones_have_a_reduced_form_and_name_their_sources(self) -> None:
        for name in BIG:
            text = find(name).read_text(encoding="utf-8")
            assert "arXiv" in text or "github.com/volcengine/verl" in text
            load(name, [], shrink=True)

    @pytest.mark.parametrize("name", BIG)
    def test_a_reduced_form_changes_model_data_lengths_and_machine_alone(self, name: str) -> None:
        full, small = load(name, []), load(name, [], shrink=True)
        changed = set()
        for iteration in range(PLAYED_ITERATIONS[name]):
            before = flat(full.for_iteration(iteration))
            after = flat(small.for_iteration(iteration))
            assert before.keys() == after.keys()
            changed |= {key for key in before if before[key] != after[key]}
        assert "model.path" in changed
        assert "prepare.format" in changed
        assert not {key for key in changed if not key.startswith(SHRINKABLE)}

    def test_the_paper_is_what_its_table_says(self) -> None:
        """numerics.md, recipe "paper"."""
        rows = [load("paper", []).for_iteration(t) for t in range(4)]
        assert [c.train.learning_rate for c in rows] == [5e-7, 5e-7, 1e-7, 1e-7]
        assert [c.train.beta for c in rows] == [0.1, 0.1, 0.1, 5.0]
        assert [c.pair.replay.iterations for c in rows] == [0, 1, 1, 1]
        for config in rows:
            train = config.train
            assert (train.optimizer, train.weight_decay, train.batch_size) == ("rmsprop", 0.0, 64)
            assert (train.schedule, train.warmup_ratio, train.precision) == ("linear", 0.1, "bf16")
            assert (train.activation_checkpointing, config.seed) == ("full", 42)
            assert (config.generate.temperature, config.generate.max_new_tokens) == (1.0, 256)
            assert (config.reference.policy, config.reference.update_every) == ("opponent", 1)
            assert config.model.revision == "ac6e600eefcce74f5e8bae1035d4f66019e93190"

    def test_verl_is_what_it_means(self) -> None:
        """numerics.md, recipe "verl"."""
        config = load("verl-gsm8k", []).for_iteration(0)
        train, generate = config.train, config.generate
        assert (generate.num_samples, generate.temperature, generate.top_p) == (2, 1.0, 1.0)
        assert (generate.max_prompts, generate.max_new_tokens) == (1024, 1024)
        assert (train.max_steps, train.batch_size) == (1, 1024)
        assert (train.optimizer, train.betas, train.weight_decay) == ("adamw", (0.9, 0.999), 0.01)
        assert (train.learning_rate, train.schedule, train.warmup_steps) == (1e-6, "constant", 15)
        assert (train.max_grad_norm, train.beta, train.loss) == (1.0, 0.1, "sigmoid")
        assert (train.label_smoothing, train.carry_optimizer) == (0.0, True)
        assert (config.pair.policy, config.pair.tie_policy) == ("best_vs_worst", "drop")
        assert config.chat.prompt_suffix == (
            ' Let\'s think step by step and output the final answer after "####".'
        )


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return play("paper", tmp_path_factory.mktemp("paper") / "run", 4, *FEW)


FEW = ("prepare.word_sums.num_examples=176", "prepare.heldout_size=16")
"""160 prompts to train on."""


class TestThePaperPlayed:
    def test_each_iteration_trains_as_tabulated(self, paper: Path) -> None:
        names = ("learning_rate", "beta", "optimizer", "weight_decay", "batch_size", "loss")
        constant = ("rmsprop", 0.0, 64, "sigmoid")
        assert trained(paper, 4, *names) == [
            (5e-7, 0.1, *constant),
            (5e-7, 0.1, *constant),
            (1e-7, 0.1, *constant),
            (1e-7, 5.0, *constant),
        ]
        for t, (peak, *_) in enumerate(trained(paper, 4, "learning_rate")):
            rates = learning_rates(paper, t)
            assert max(rates) == pytest.approx(peak)
            assert rates[-1] < max(rates)

    def test_pairs_are_its_own_and_those_of_the_iteration_before(self, paper: Path) -> None:
        own: list[int] = []
        for t in range(4):
            rows = pq.read_table(
                sorted((paper / f"iterations/{t:03d}/pair").glob("part-*.parquet")),
                columns=["iteration", "weight"],
            )
            of = Counter(rows["iteration"].to_pylist())
            own.append(of[t])
            assert 0 < own[t] <= 160
            assert of.keys() == ({t, t - 1} if t else {0})
            assert t == 0 or 0.9 * own[t - 1] <= of[t - 1] <= own[t - 1]
            assert set(rows["weight"].to_pylist()) == {1.0}
            assert stage(paper, t, "train").counts["pairs"] == rows.num_rows

    def test_replayed_pairs_are_rescored_under_the_opponent(self, paper: Path) -> None:
        assert references(paper, 4) == [FIRST, player(0), player(1), player(2)]
        for t in range(4):
            train = stage(paper, t, "train")
            assert train.info["reference_is_opponent"] is True
            assert train.info["reference"] == references(paper, 4)[t]
            assert train.metrics["first_loss"] == pytest.approx(math.log(2), abs=1e-5)
            assert train.inputs["model"].path == (player(t - 1) if t else FIRST)

    def test_two_epochs_of_64(self, paper: Path) -> None:
        for t in range(4):
            counts = stage(paper, t, "train").counts
            assert counts["steps"] == 2 * math.ceil(counts["pairs"] / 64)

    def test_status_tells_reference_and_settings(self, paper: Path) -> None:
        status = json.loads(spin("status", paper, "--json").stdout)
        assert [i["index"] for i in status["iterations"]] == [0, 1, 2, 3]
        assert "heldout_reward_accuracy" in status["iterations"][3]["metrics"]


@pytest.mark.parametrize("update_every", [pytest.param(1, marks=pytest.mark.long), 4])
def test_verl_played_carries_its_optimizer_and_refreshes_its_reference(
    tmp_path: Path, update_every: int
) -> None:
    run = play(
        "verl-gsm8k", tmp_path / "run", 10, "prepare.heldout_size=8", "generate.max_prompts=24",
        "evaluate.greedy=true", f"reference.update_every={update_every}",
    )  # fmt: skip
    refreshed = [t - t % update_every for t in range(10)]
    assert references(run, 10) == [player(t - 1) if t else FIRST for t in refreshed]
    drawn: list[set[str]] = []
    for t in range(10):
        train = stage(run, t, "train")
        assert train.info["reference"] == references(run, 10)[t]
        assert train.counts["steps"] == 1
        assert train.info["steps_before"] == t
        assert (train.info["optimizer"] == "fresh") is (t == 0)
        assert learning_rates(run, t) == [pytest.approx(1e-6 * t / 15)]
        assert train.info["reference_is_opponent"] is (refreshed[t] == t)
        metrics = pq.read_table(run / f"iterations/{t:03d}/train/metrics.parquet")
        assert metrics["pairs"].to_pylist() == [train.counts["pairs"]]  # the whole batch
        rows = pq.read_table(
            sorted((run / f"iterations/{t:03d}/generate").glob("part-*.parquet")),
            columns=["prompt_id"],
        )["prompt_id"].to_pylist()
        assert set(Counter(rows).values()) == {2}
        drawn.append(set(rows))
    assert all(len(prompts) == 24 for prompts in drawn)
    assert not drawn[0] & drawn[1]
    # Validation before training and after each iteration, of the same prompts.
    status = json.loads(spin("status", run, "--json").stdout)
    assert "greedy_accuracy" in status["start"]["metrics"]
    assert all("greedy_accuracy" in i["metrics"] for i in status["iterations"])


def test_rlhflow_played_is_held_to_the_first_model(tmp_path: Path) -> None:
    run = play("rlhflow", tmp_path / "run", 2, "prepare.word_sums.num_examples=112",
               "prepare.heldout_size=16")  # fmt: skip
    assert references(run, 2) == [FIRST, FIRST]
    assert [stage(run, t, "train").info["reference_is_opponent"] for t in (0, 1)] == [True, False]
    prompts = []
    for t in (0, 1):
        rows = pq.read_table(sorted((run / f"iterations/{t:03d}/generate").glob("part-*.parquet")))
        ids = rows["prompt_id"].to_pylist()
        assert set(Counter(ids).values()) == {8}
        prompts.append(set(ids))
        pairs = pq.read_table(sorted((run / f"iterations/{t:03d}/pair").glob("part-*.parquet")))
        assert set(pairs["chosen_reward"].to_pylist()) == {1.0}
        assert set(pairs["rejected_reward"].to_pylist()) == {0.0}
    assert not prompts[0] & prompts[1]
    assert {len(drawn) for drawn in prompts} == {32}  # thirds of 96


def test_sppo_played_knows_how_surely_chosen_wins(tmp_path: Path) -> None:
    run = play("sppo", tmp_path / "run", 2, "prepare.word_sums.num_examples=112",
               "prepare.heldout_size=16")  # fmt: skip
    names = ("loss", "beta", "optimizer", "learning_rate")
    assert trained(run, 2, *names) == [("sppo", 1e-3, "rmsprop", 5e-7)] * 2
    for t in (0, 1):
        pairs = pq.read_table(sorted((run / f"iterations/{t:03d}/pair").glob("part-*.parquet")))
        won = 1 / (1 + math.exp(-1))
        assert pairs["win_probability"].to_pylist() == pytest.approx([won] * pairs.num_rows)
        # At the reference both log-ratios are 0: 2 * ((P - 1/2) / beta) ** 2.
        metrics = pq.read_table(run / f"iterations/{t:03d}/train/metrics.parquet")
        assert metrics["loss"][0].as_py() == pytest.approx(2 * ((won - 0.5) / 1e-3) ** 2, rel=1e-3)


@pytest.mark.long
def test_demo_ranked_rises(tmp_path: Path) -> None:
    spin("run", "demo-ranked", "--run", tmp_path / "run", "-n", 3, "--quiet")
    status = json.loads(spin("status", tmp_path / "run", "--json").stdout)
    places = [status["start"], *status["iterations"]]
    curve = [place["metrics"]["sampled_accuracy"] for place in places]
    assert curve[0] < 0.75
    assert curve == sorted(curve)
    assert curve[-1] > 0.9


def test_demo_ranked_rises_in_one_iteration_on_few_prompts(tmp_path: Path) -> None:
    """512 prompts and 200 held out are enough to see it."""
    run = tmp_path / "run"
    spin("run", "demo-ranked", "--run", run, "-n", 1, "--quiet", "generate.max_prompts=512",
         "prepare.heldout_size=200", "evaluate.greedy=false")  # fmt: skip
    status = json.loads(spin("status", run, "--json").stdout)
    start = status["start"]["metrics"]["sampled_accuracy"]
    assert status["iterations"][0]["metrics"]["sampled_accuracy"] > start + 0.03
