"""Pairs of random tokens, as rows, as an artifact, and as what training reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench._traces import NO_TEXT
from stages import score, train
from stages.artifacts import Outcome, Plan, TableWriter, produce
from stages.config import RunConfig, ScoreConfig
from stages.data.rows import PAIRS, SCORED_PAIRS
from stages.data.store import RowStore, build_store
from stages.data.tokens import pair_tokens
from stages.model.pairs import PairForward
from stages.model.scoring import score_pairs
from stages.score import with_reference
from stages.train import STORED_COLUMNS


def random_rows(count: int, seed: int = 0, longest: int = 12) -> list[dict[str, Any]]:
    """Rows of PAIRS with prompts and responses of up to `longest` tokens."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int) -> list[int]:
        length = int(torch.randint(low, longest, (1,), generator=generator))
        return torch.randint(3, 250, (length,), generator=generator).tolist()

    return [
        {
            **NO_TEXT,
            "prompt_id": f"{index:032x}",
            "prompt_token_ids": tokens(2),
            "chosen_token_ids": [*tokens(1), 1],
            "rejected_token_ids": [*tokens(1), 1],
        }
        for index in range(count)
    ]


def scored_store(
    rows: Sequence[dict[str, Any]],
    forward: PairForward,
    folder: Path,
    precision: Any = "fp32",
    scale: float = 1.0,
) -> RowStore:
    """Rows with their log-probabilities under a model, those of chosen responses times `scale`."""
    logprobs = score_pairs(
        forward, [pair_tokens(row) for row in rows], ScoreConfig(precision=precision)
    )
    scored = with_reference(list(rows), [(chosen * scale, other) for chosen, other in logprobs])
    file = folder / f"pairs-{len(list(folder.iterdir()))}.parquet"
    with TableWriter(file, SCORED_PAIRS) as table:
        table.extend(scored)
    store, _ = build_store(
        [file], SCORED_PAIRS, STORED_COLUMNS, file.with_suffix(".scratch"), keep=lambda _: True
    )
    return store


def scored_artifact(
    rows: Sequence[dict[str, Any]], model_dir: Path, folder: Path, config: RunConfig
) -> Path:
    """The artifact of score for rows of PAIRS, made by the stage itself."""

    def fill(space: Any) -> Outcome:
        with TableWriter(space.file("part-00000.parquet"), PAIRS) as table:
            table.extend(rows)
        return Outcome(counts={"pairs": len(rows)})

    settings = {"pair": config.pair.identity()}
    produce(folder / "pair", Plan("pair", 1, settings, inputs={}), fill)
    score.run(config, score.ScoreInputs(folder / "pair", str(model_dir)), folder / "score")
    return folder / "score"


def train_inputs(scored: Path, model_dir: Path) -> train.TrainInputs:
    return train.TrainInputs(scored, str(model_dir))
