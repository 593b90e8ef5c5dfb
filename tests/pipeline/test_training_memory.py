"""Peak memory of training does not grow with the data."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.artifacts import InputRef, Outcome, Plan, Workspace, produce, read_manifest
from stages.data.rows import SCORED_PAIRS

ROW_TOKENS = 200


def scored(folder: Path, num_rows: int) -> Path:
    """An artifact of score with rows of 3 x 200 tokens; its reference is some other model."""
    tokens = np.random.default_rng(0).integers(3, 250, (num_rows, ROW_TOKENS), dtype=np.int32)
    offsets = np.arange(0, num_rows * ROW_TOKENS + 1, ROW_TOKENS, dtype=np.int32)
    lists = pa.ListArray.from_arrays(offsets, tokens.ravel())
    text = pa.array([""] * num_rows)
    columns = {
        "prompt_id": pa.array([f"{i:032x}" for i in range(num_rows)]),
        "pair_index": pa.array([0] * num_rows, pa.int32()),
        **dict.fromkeys(("prompt_token_ids", "chosen_token_ids", "rejected_token_ids"), lists),
        **dict.fromkeys(("chosen", "rejected", "chosen_source", "rejected_source"), text),
        **dict.fromkeys(
            ("chosen_reward", "rejected_reward", "win_probability"),
            pa.nulls(num_rows, pa.float64()),
        ),
        "iteration": pa.array([0] * num_rows),
        "weight": pa.array([1.0] * num_rows),
        **dict.fromkeys(
            ("reference_chosen_logprob", "reference_rejected_logprob"),
            pa.array([-100.0] * num_rows),
        ),
    }
    table = pa.table({f.name: columns[f.name].cast(f.type) for f in SCORED_PAIRS})

    def fill(space: Workspace) -> Outcome:
        pq.write_table(table.cast(SCORED_PAIRS), space.file("part-00000.parquet"))
        return Outcome(counts={"pairs": num_rows})

    other = InputRef(path="other", inside_run=False, key="k", content="c")
    produce(folder, Plan("score", 1, {}, {"model": other}), fill)
    return folder


@pytest.mark.parametrize("rows", [3_000])
def test_peak_memory_is_flat_when_the_data_grows_tenfold(
    tiny_model_dir: Path, tmp_path: Path, rows: int
) -> None:
    peaks = []
    for size in (rows, 10 * rows):
        out = tmp_path / f"train-{size}"
        settings = "train.max_length=500 train.batch_size=2 train.precision=fp32 train.max_steps=4"
        command = [sys.executable, "-m", "spin_cli", "train", "--out", str(out), "--model",
                   str(tiny_model_dir), "--pairs", str(scored(tmp_path / f"score-{size}", size)),
                   *settings.split()]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(read_manifest(out).cost.peak_memory_bytes)
    grown = 10 * rows * 3 * ROW_TOKENS * 4
    assert grown > 70e6
    assert peaks[1] - peaks[0] < 0.4 * grown, peaks
