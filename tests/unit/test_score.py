"""What score tells of the log-probabilities that it writes."""

from pathlib import Path

import pytest

from stages import score
from stages.artifacts import Outcome, Plan, TableWriter, produce, read_rows
from stages.artifacts.produce import Workspace
from stages.config import RunConfig
from stages.data.rows import PAIRS, SCORED_PAIRS
from stages.score import ScoreInputs
from tests.scored_pairs import random_rows


def make_pairs(out: Path, count: int) -> Path:
    def fill(space: Workspace) -> Outcome:
        with TableWriter(space.file("part-00000.parquet"), PAIRS) as table:
            table.extend(random_rows(count))
        return Outcome(counts={"pairs": count})

    produce(out, Plan("pair", 1, {"pair": {"max_length": 64}}, {}), fill)
    return out


@pytest.mark.parametrize("count", [0, 7])
def test_its_metrics_are_the_means_of_its_rows_by_token(
    tmp_path: Path, tiny_model_dir: Path, count: int
) -> None:
    """So that a reproduction has something to judge it by; also over several shards."""
    pairs = make_pairs(tmp_path / "pair", count)
    config = RunConfig.model_validate({"score": {"precision": "fp32", "shard_rows": 3}})
    made = score.run(config, ScoreInputs(pairs, str(tiny_model_dir)), tmp_path / "score")
    files = sorted((tmp_path / "score").glob("part-*.parquet"))
    assert len(files) == -(-count // 3)
    rows = list(read_rows(files, SCORED_PAIRS))
    expected = {
        f"{side}_logprob_per_token": sum(row[f"reference_{side}_logprob"] for row in rows)
        / sum(len(row[f"{side}_token_ids"]) for row in rows)
        for side in ("chosen", "rejected")
        if rows
    }
    assert made.metrics == pytest.approx(expected)
    assert all(value < 0 for value in made.metrics.values() if isinstance(value, float))
