"""The whole loop with real stages and the transformers engine, on a model of a few weights."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from spin_cli.app import app
from stages.artifacts import read_manifest
from stages.config import ChatConfig
from stages.data.chat import make_renderer
from tests.tiny_loop import RECIPE, hashes

ROOT = Path(__file__).parents[2]
MODEL_STAGES = ("models/sft", "iterations/000/train", "iterations/001/train")


def spin(*words: str, expect: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == expect, result.output + result.stderr
    return result


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations."""
    folder = tmp_path_factory.mktemp("loop")
    (folder / "tiny.yaml").write_text(RECIPE)
    spin("run", folder / "tiny.yaml", "--run", folder / "run", "--iterations", "2")
    return folder / "run"


def test_status_has_the_promised_form(played: Path) -> None:
    status = json.loads(spin("status", played, "--json").stdout)
    assert status["champion"].endswith("iterations/001/train")
    assert {"sampled_accuracy", "greedy_accuracy"} <= status["start"]["metrics"].keys()
    assert [i["index"] for i in status["iterations"]] == [0, 1]
    for iteration in status["iterations"]:
        states = {name: stage["state"] for name, stage in iteration["stages"].items()}
        assert states.pop("reward", "missing") == "missing"
        assert set(states.values()) == {"done"}
        wanted = {
            "sampled_accuracy",
            "greedy_accuracy",
            "identical_share",
            "heldout_reward_accuracy",
            "heldout_reward_margin",
        }
        assert wanted <= iteration["metrics"].keys()
        assert iteration["decision"]["promoted"] is True


def test_the_first_loss_is_ln_2_in_every_iteration(played: Path) -> None:
    for iteration in ("000", "001"):
        train = read_manifest(played / "iterations" / iteration / "train")
        assert train.metrics["first_loss"] == pytest.approx(0.693147, abs=1e-5)
        assert train.info["reference_is_opponent"] is True
        assert train.info["attention"] == "shared"


def test_training_metrics_have_a_row_a_step(played: Path) -> None:
    train = played / "iterations/000/train"
    steps = read_manifest(train).counts["steps"]
    metrics = pq.read_table(train / "metrics.parquet").to_pandas()
    assert list(metrics["step"]) == list(range(steps))
    assert metrics["loss"].iloc[-1] < metrics["loss"].iloc[0] == pytest.approx(0.693147, abs=1e-4)
    assert (metrics["grad_norm"] > 0).all()
    assert pq.read_table(train / "timings.parquet").num_rows == steps


def test_counts_add_up_along_the_chain(played: Path) -> None:
    prepare = read_manifest(played / "data").counts
    generate = read_manifest(played / "iterations/000/generate").counts
    pair = read_manifest(played / "iterations/000/pair").counts
    train = read_manifest(played / "iterations/000/train").counts
    dropped = sum(n for name, n in pair.items() if name.startswith("dropped_"))
    assert prepare["train"] == generate["prompts"] == generate["rows"] == pair["candidates"]
    assert pair["candidates"] == pair["pairs"] + dropped
    assert pair["pairs"] == train["pairs"]


def test_verify_holds_and_a_second_run_does_nothing(played: Path) -> None:
    spin("verify", played)
    before = {path: path.stat().st_mtime_ns for path in played.rglob("manifest.json")}
    again = spin("run", played.parent / "tiny.yaml", "--run", played, "--iterations", "2")
    assert "already done" in again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in played.rglob("manifest.json")}


def test_a_finished_run_says_so_within_2_s_and_loads_no_torch(played: Path) -> None:
    code = (
        "import sys; from spin_cli.app import app; "
        "app(sys.argv[1:], standalone_mode=False); "
        "print('torch' in sys.modules, 'transformers' in sys.modules, file=sys.stderr)"
    )
    words = ["run", played.parent / "tiny.yaml", "--run", played, "--iterations", "2"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr.strip().endswith("False False")
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 2


def test_models_open_in_transformers_and_keep_their_template(played: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for place in MODEL_STAGES:
        model, info = AutoModelForCausalLM.from_pretrained(played / place, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(played / place))
        assert AutoTokenizer.from_pretrained(played / place).chat_template


def test_same_seed_same_bytes_and_another_seed_other_bytes(played: Path, tmp_path: Path) -> None:
    recipe = played.parent / "tiny.yaml"
    # With the engine kept too: it changes nothing.
    spin("run", recipe, "--run", tmp_path / "again", "--iterations", "1", "--keep-engine")
    spin("run", recipe, "--run", tmp_path / "other", "--iterations", "1", "seed=1")
    mine, again, other = hashes(played), hashes(tmp_path / "again"), hashes(tmp_path / "other")
    assert again == {name: mine[name] for name in again}
    assert other["data"] == mine["data"]
    assert other["iterations/000/generate"] != mine["iterations/000/generate"]


def test_every_attention_way_trains_to_the_same(played: Path, tmp_path: Path) -> None:
    pairs, model = played / "iterations/000/score", played / "models/sft"
    losses: dict[str, Any] = {}
    for mode in ("shared", "packed", "padded", "single"):
        out = tmp_path / mode
        words = ["train", "--pairs", pairs, "--model", model, "--out", out]
        spin(*words, "--config", played.parent / "tiny.yaml", f"train.attention={mode}")
        losses[mode] = pq.read_table(out / "metrics.parquet")["loss"].to_pylist()
    for mode in ("packed", "padded", "single"):
        assert losses[mode] == pytest.approx(losses["shared"], rel=1e-4)


def test_stages_by_hand_make_what_the_run_made(played: Path, tmp_path: Path) -> None:
    recipe, data, opponent = played.parent / "tiny.yaml", played / "data", played / "models/sft"
    common = ["--config", recipe, "--iteration", "0"]
    made = tmp_path / "generate"
    spin("generate", "--model", opponent, "--prompts", data, "--out", made, *common)
    words = ["pair", "--data", data, "--generations", made, "--model", opponent]
    spin(*words, "--out", tmp_path / "pair", *common)
    mine = hashes(played)
    assert hashes(tmp_path)["generate"] == mine["iterations/000/generate"]
    assert hashes(tmp_path)["pair"] == mine["iterations/000/pair"]


def test_the_ranked_game_goes_through(played: Path, tmp_path: Path) -> None:
    settings = [
        "pair.policy=best_vs_worst",
        "pair.tie_policy=first",
        "generate.num_samples=2",
        "promote.min_value=null",
    ]
    run = tmp_path / "ranked"
    recipe = played.parent / "tiny.yaml"
    spin("run", recipe, "--run", run, "--iterations", "1", *settings)
    rewards = read_manifest(run / "iterations/000/reward").counts
    assert rewards["rows"] == read_manifest(run / "iterations/000/generate").counts["rows"]
    pairs = pq.read_table(run / "iterations/000/pair/part-00000.parquet").to_pylist()
    assert pairs
    for pair in pairs:
        assert {pair["chosen_source"], pair["rejected_source"]} == {"sample 0", "sample 1"}
        assert pair["chosen"] != pair["rejected"]


def test_the_control_arm_takes_as_many_steps(played: Path, tmp_path: Path) -> None:
    pairs, model = played / "iterations/000/score", played / "models/sft"
    words = ["train", "--pairs", pairs, "--model", model, "--out", tmp_path / "control"]
    spin(*words, "--config", played.parent / "tiny.yaml", "train.control=true")
    control = read_manifest(tmp_path / "control")
    assert control.counts["steps"] == read_manifest(played / "iterations/000/train").counts["steps"]
    metrics = pq.read_table(tmp_path / "control/metrics.parquet").to_pandas()
    assert metrics["chosen_logratio"].iloc[-1] > 0
    assert metrics["loss"].iloc[0] > 1  # a negative log-likelihood a token, not ln 2


def test_held_out_prompts_that_do_not_fit_are_left_out_and_counted(
    played: Path, tmp_path: Path
) -> None:
    out = tmp_path / "evaluate"
    words = ["evaluate", "--model", played / "models/sft", "--data", played / "data", "--out", out]
    recipe = ["--config", played.parent / "tiny.yaml"]
    renderer = make_renderer(played / "models/sft", ChatConfig())
    lengths = sorted(
        len(renderer.prompt_tokens(row["messages"]))
        + max(16, len(renderer.response_tokens(row["response"])))
        for row in pq.read_table(played / "data/heldout-00000.parquet").to_pylist()
    )
    limit = lengths[len(lengths) // 2]
    spin(*words, *recipe, f"generate.engine.max_model_len={limit}")
    fitting = sum(length <= limit for length in lengths)
    counts = read_manifest(out).counts
    assert counts == {"prompts": fitting, "dropped_refused": len(lengths) - fitting}
    told = json.loads(spin("show", out, "--dropped", "--rows", len(lengths), "--json").stdout)
    assert len(told["rows"]) == len(lengths) - fitting
    assert {row["reason"] for row in told["rows"]} <= {"prompt_too_long", "response_too_long"}
    assert 0 < fitting < len(lengths)


class TestBadInput:
    """One clear line, the right exit code, nothing lost."""

    def fails(self, code: int, match: str, *words: Any) -> None:
        result = spin(*words, expect=code)
        line = result.stderr.strip().splitlines()[-1]
        assert line.startswith("spin: ")
        assert match in line, line
        assert "Traceback" not in result.stderr

    def test_a_reference_that_is_another_model_than_the_scores_is_no_ln_2(
        self, played: Path, tmp_path: Path
    ) -> None:
        """Scores of one model, made to look like another's: the step-0 check sees it."""
        from stages.artifacts.keys import canonical_json, sha256_text, stage_key

        score = tmp_path / "score"
        shutil.copytree(played / "iterations/001/score", score)
        manifest = json.loads((score / "manifest.json").read_text())
        wrong = read_manifest(played / "models/sft").key
        manifest["inputs"]["model"]["key"] = wrong
        del manifest["manifest_sha256"]
        fields = {
            name: manifest[name] for name in ("stage", "format_version", "config", "fingerprints")
        }
        keys = {name: ref["key"] for name, ref in manifest["inputs"].items()}
        manifest["key"] = stage_key({**fields, "inputs": keys})
        manifest["manifest_sha256"] = sha256_text(canonical_json(manifest))
        (score / "manifest.json").write_text(canonical_json(manifest) + "\n")
        words = ["train", "--pairs", score, "--model", played / "models/sft"]
        recipe = ["--config", played.parent / "tiny.yaml"]
        self.fails(5, "not ln 2", *words, "--out", tmp_path / "out", *recipe)
        assert not (tmp_path / "out").exists()

    def test_a_loss_that_overflows_stops_before_the_update(
        self, played: Path, tmp_path: Path
    ) -> None:
        pairs, model = played / "iterations/000/score", played / "models/sft"
        words = ["train", "--pairs", pairs, "--model", model, "--out", tmp_path / "out"]
        settings = ["train.learning_rate=1e30", "train.warmup_ratio=0", "train.max_grad_norm=1e30"]
        recipe = ["--config", played.parent / "tiny.yaml"]
        self.fails(5, "stopped before the update", *words, *recipe, *settings)
        assert not (tmp_path / "out").exists()

    def test_a_model_without_tokenizer(self, played: Path, tmp_path: Path) -> None:
        bare = tmp_path / "bare"
        bare.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(played / "models/sft" / name, bare)
        words = ["generate", "--model", bare, "--data", played / "data", "--out", tmp_path / "g"]
        self.fails(3, "has no tokenizer", *words)

    def test_a_template_that_is_none(self, played: Path, tmp_path: Path) -> None:
        words = ["generate", "--model", played / "models/sft", "--data", played / "data"]
        words += ["--out", tmp_path / "g"]
        self.fails(2, "fails on a plain question", *words, "chat.template='{% for %}'")
        self.fails(2, "plain question: it takes", *words, "chat.template='{{ 9 ** (9 ** 9) }}'")
        self.fails(2, "cannot be read (No such file", *words, "chat.template=none.jinja")

    def test_a_model_with_code_of_its_own(self, played: Path, tmp_path: Path) -> None:
        evil = tmp_path / "evil"
        shutil.copytree(played / "models/sft", evil)
        (evil / "manifest.json").unlink()
        config = json.loads((evil / "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
        (evil / "config.json").write_text(json.dumps(config))
        words = ["generate", "--model", evil, "--data", played / "data", "--out", tmp_path / "g"]
        self.fails(3, "auto_map", *words)

    def test_a_model_that_is_not_there(self, played: Path, tmp_path: Path) -> None:
        words = ["generate", "--model", "./nowhere", "--data", played / "data"]
        self.fails(3, "./nowhere", *words, "--out", tmp_path / "g")

    def test_pairs_that_were_not_scored(self, played: Path, tmp_path: Path) -> None:
        pairs = played / "iterations/000/pair"
        words = ["train", "--pairs", pairs, "--model", played / "models/sft"]
        self.fails(3, "score is needed", *words, "--out", tmp_path / "t")

    def test_generations_of_other_data(self, played: Path, tmp_path: Path) -> None:
        recipe = ["--config", played.parent / "tiny.yaml"]
        other = tmp_path / "data"
        spin("prepare", "--out", other, *recipe, "prepare.word_sums.seed=7")
        made = played / "iterations/000/generate"
        words = ["pair", "--data", other, "--generations", made, "--model", played / "models/sft"]
        self.fails(3, "made from another data", *words, "--out", tmp_path / "p", *recipe)

    def test_a_flipped_bit_in_the_weights(self, played: Path, tmp_path: Path) -> None:
        model = tmp_path / "model"
        shutil.copytree(played / "models/sft", model)
        data = bytearray((model / "model.safetensors").read_bytes())
        data[-5] ^= 1
        (model / "model.safetensors").write_bytes(data)
        words = ["generate", "--model", model, "--data", played / "data", "--out", tmp_path / "g"]
        self.fails(4, "model.safetensors is damaged", *words)

    def test_no_pair_is_left(self, played: Path, tmp_path: Path) -> None:
        pairs, model = played / "iterations/000/score", played / "models/sft"
        words = ["train", "--pairs", pairs, "--model", model, "--out", tmp_path / "out"]
        recipe = ["--config", played.parent / "tiny.yaml", "train.max_length=3"]
        self.fails(3, "has no pair to train on", *words, *recipe)
