"""score: the log-probabilities of both responses under the reference, stored as columns."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from stages.artifacts import (
    Artifact,
    Manifest,
    Outcome,
    Plan,
    TableWriter,
    Workspace,
    open_artifact,
    produce,
    read_rows,
    run_root,
)
from stages.artifacts.keys import sha256_text
from stages.config import RunConfig, ScoreConfig
from stages.data.chat import make_renderer
from stages.data.rows import PAIRS, SCORED_PAIRS
from stages.model.load import ModelSource, best_device, load_model, resolve_model
from stages.model.pairs import PairForward, autocast, pair_tokens
from stages.progress import progress

FORMAT_VERSION = 1


@dataclass(frozen=True)
class ScoreInputs:
    """What score reads."""

    pairs: Path
    model: str
    """The reference: the opponent, or the model of an earlier iteration."""
    revision: str | None = None


def run(config: RunConfig, inputs: ScoreInputs, out: Path) -> Manifest:
    """Write pairs with the reference's log-probabilities.

    Raises:
        InputError: the pairs or the model are missing, or of another kind.
    """
    pairs = open_artifact(inputs.pairs, stages=("pair",), verify=config.verify)
    root = run_root(out)
    model = resolve_model(inputs.model, inputs.revision, root, config.verify)
    plan = Plan(
        stage="score",
        format_version=FORMAT_VERSION,
        config={"score": config.score.identity()},
        inputs={"pairs": pairs.input_ref(root), "model": model.ref},
    )
    return produce(out, plan, lambda space: _fill(space, config, pairs, model), resumable=True)


def _fill(space: Workspace, config: RunConfig, pairs: Artifact, source: ModelSource) -> Outcome:
    model = load_model(source.path).to(best_device())
    pad_token_id = make_renderer(source.path, config.chat).pad_token_id
    forward = PairForward(model, config.score.attention, pad_token_id)
    total, tokens = pairs.manifest.counts["pairs"], 0
    with progress("score", total=total, unit="pairs") as bar:
        for name, rows in _shards(pairs, config.score.shard_rows):
            ids_hash = sha256_text("\n".join(f"{r['prompt_id']}/{r['pair_index']}" for r in rows))
            if not space.shards.done(name, ids_hash):
                scored = score_rows(rows, forward, config.score)
                space.shards.write(name, ids_hash, partial(_write, rows=scored))
            shard_tokens = sum(_row_tokens(row) for row in rows)
            tokens += shard_tokens
            bar.advance(len(rows), shard_tokens)
    return Outcome(counts={"pairs": total}, info={"attention": forward.mode}, tokens=tokens)


def score_rows(
    rows: list[dict[str, Any]], forward: PairForward, config: ScoreConfig
) -> list[dict[str, Any]]:
    """Return rows of PAIRS as rows of SCORED_PAIRS, in their order."""
    pairs = [pair_tokens(row) for row in rows]
    scored: list[dict[str, Any]] = [{}] * len(rows)
    for group in forward.micro_batches(pairs, config.token_budget, config.micro_batch_size):
        with torch.inference_mode(), autocast(forward.model.device, config.precision):
            logprobs = forward([pairs[i] for i in group])
        columns = zip(group, logprobs.chosen_B.tolist(), logprobs.rejected_B.tolist(), strict=True)
        for i, chosen, rejected in columns:
            scored[i] = {
                **rows[i],
                "reference_chosen_logprob": chosen,
                "reference_rejected_logprob": rejected,
            }
    return scored


def _shards(pairs: Artifact, shard_rows: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    rows = read_rows(pairs.files("part-"), PAIRS)
    for number in count():
        shard = list(islice(rows, shard_rows))
        if not shard:
            return
        yield f"part-{number:05d}.parquet", shard


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with TableWriter(path, SCORED_PAIRS) as table:
        table.extend(rows)


def _row_tokens(row: dict[str, Any]) -> int:
    columns = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
    return sum(len(row[name]) for name in columns)
