"""score: the log-probabilities of both responses under the reference, stored as columns."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path

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
from stages.artifacts.tables import Row
from stages.config import RunConfig
from stages.data.chat import make_renderer
from stages.data.rows import PAIRS, SCORED_PAIRS
from stages.data.tokens import pair_tokens
from stages.model.source import ModelSource, resolve_model
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
    from stages.model.scoring import Scorer

    pad_token_id = make_renderer(source.path, config.chat).pad_token_id
    longest = pairs.manifest.config["pair"]["max_length"]
    scorer = Scorer(source.verified(), config.score, pad_token_id, longest)
    total, tokens = pairs.manifest.counts["pairs"], 0
    with progress("score", total=total, unit="pairs") as bar:
        for name, rows in _shards(pairs, config.score.shard_rows):
            ids_hash = sha256_text("\n".join(f"{r['prompt_id']}/{r['pair_index']}" for r in rows))
            if not space.shards.done(name, ids_hash):
                logprobs = scorer.logprobs([pair_tokens(row) for row in rows])
                scored = with_reference(rows, logprobs)
                space.shards.write(name, ids_hash, partial(_write, rows=scored))
            shard_tokens = sum(_row_tokens(row) for row in rows)
            tokens += shard_tokens
            bar.advance(len(rows), shard_tokens)
    return Outcome(counts={"pairs": total}, info={"attention": scorer.mode}, tokens=tokens)


def with_reference(rows: list[Row], logprobs: list[tuple[float, float]]) -> list[Row]:
    """Return rows of PAIRS as rows of SCORED_PAIRS, with (chosen, rejected) log-probabilities."""
    return [
        {**row, "reference_chosen_logprob": chosen, "reference_rejected_logprob": rejected}
        for row, (chosen, rejected) in zip(rows, logprobs, strict=True)
    ]


def _shards(pairs: Artifact, shard_rows: int) -> Iterator[tuple[str, list[Row]]]:
    rows = read_rows(pairs.files("part-"), PAIRS)
    for number in count():
        shard = list(islice(rows, shard_rows))
        if not shard:
            return
        yield f"part-{number:05d}.parquet", shard


def _write(path: Path, rows: list[Row]) -> None:
    with TableWriter(path, SCORED_PAIRS) as table:
        table.extend(rows)


def _row_tokens(row: Row) -> int:
    columns = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
    return sum(len(row[name]) for name in columns)
