"""score: the log-probabilities of both responses under the reference, stored as columns."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path

import pyarrow.compute as pc

from stages.artifacts import (
    Artifact,
    Manifest,
    Outcome,
    Plan,
    TableWriter,
    Workspace,
    open_artifact,
    produce,
    read_batches,
    read_rows,
    run_root,
)
from stages.artifacts.keys import sha256_text
from stages.artifacts.tables import Row
from stages.config import ChatConfig, RunConfig, ScoreConfig
from stages.data.chat import make_renderer
from stages.data.rows import PAIRS, SCORED_PAIRS
from stages.data.tokens import pair_tokens
from stages.model.group import Group, Resources, led, open_group, resources, together
from stages.model.source import ModelSource, resolve_model
from stages.progress import Progress, progress

FORMAT_VERSION = 1
SIDES = ("chosen", "rejected")
"""The two responses of a pair."""


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
    return led(config.score, _work, out, lambda: _lead(config, inputs, out))


def _lead(config: RunConfig, inputs: ScoreInputs, out: Path) -> Manifest:
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


@dataclass(frozen=True)
class _Job:
    """What every rank is told."""

    space: Workspace
    pairs: Artifact
    model_dir: Path
    config: ScoreConfig
    chat: ChatConfig


@dataclass(frozen=True)
class _Report:
    """What rank 0 tells of the work of all."""

    attention: str
    tokens: int
    shards: frozenset[str]
    used: Resources


def _fill(space: Workspace, config: RunConfig, pairs: Artifact, source: ModelSource) -> Outcome:
    job = _Job(space, pairs, source.verified(), config.score, config.chat)
    report = together(_work, job, config.score)
    space.shards.named.update(report.shards)
    return Outcome(
        counts={"pairs": pairs.manifest.counts["pairs"]},
        metrics=_means([space.path / name for name in sorted(report.shards)]),
        info={"attention": report.attention, **report.used.info()},
        tokens=report.tokens,
        peak_memory_bytes=report.used.peak_memory_bytes,
    )


def _work(job: _Job) -> _Report:
    """Score every n-th shard as one of n ranks, each of which has the whole model."""
    from stages.model.scoring import Scorer

    group = open_group(job.config)
    pad_token_id = make_renderer(job.model_dir, job.chat).pad_token_id
    longest = job.pairs.manifest.config["pair"]["max_length"]
    scorer = Scorer(job.model_dir, job.config, pad_token_id, longest, group.device)
    tokens, names = 0, set()
    with _progress(group, job.pairs.manifest.counts["pairs"]) as bar:
        for number, (name, rows) in enumerate(_shards(job.pairs, job.config.shard_rows)):
            ids_hash = sha256_text("\n".join(f"{r['prompt_id']}/{r['pair_index']}" for r in rows))
            pairs = [pair_tokens(row) for row in rows]
            is_mine = number % group.num_ranks == group.rank
            if is_mine and not job.space.shards.done(name, ids_hash):
                scored = with_reference(rows, scorer.logprobs(pairs))
                job.space.shards.write(name, ids_hash, partial(_write, rows=scored))
            shard_tokens = sum(len(ids) for pair in pairs for ids in pair)
            tokens += shard_tokens
            names.add(name)
            bar.advance(len(rows), shard_tokens)
    group.wait_for_all()
    return _Report(scorer.mode, tokens, frozenset(names), resources(group))


def _progress(group: Group, total: int) -> AbstractContextManager[Progress]:
    if group.rank > 0:
        return nullcontext(Progress("score", total, "pairs", clock=lambda: 0.0))  # says nothing
    return progress("score", total=total, unit="pairs")


def with_reference(rows: list[Row], logprobs: list[tuple[float, float]]) -> list[Row]:
    """Return rows of PAIRS as rows of SCORED_PAIRS, with (chosen, rejected) log-probabilities."""
    return [
        {**row, "reference_chosen_logprob": chosen, "reference_rejected_logprob": rejected}
        for row, (chosen, rejected) in zip(rows, logprobs, strict=True)
    ]


def _means(shards: list[Path]) -> dict[str, float]:
    """Return the mean log-probability of a token of all chosen and of all rejected responses.

    Nothing where there is no token. Shards may be of other processes or of before a kill, so it is
    read off the files.
    """
    sides = {side: (f"{side}_token_ids", f"reference_{side}_logprob") for side in SIDES}
    columns = [name for pair in sides.values() for name in pair]
    sums, tokens = dict.fromkeys(SIDES, 0.0), dict.fromkeys(SIDES, 0)
    for batch in read_batches(shards, SCORED_PAIRS, columns=columns):
        for side, (ids, logprobs) in sides.items():
            sums[side] += pc.sum(batch[logprobs]).as_py() or 0.0
            tokens[side] += pc.sum(pc.list_value_length(batch[ids])).as_py() or 0
    return {f"{side}_logprob_per_token": sums[side] / n for side, n in tokens.items() if n}


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
