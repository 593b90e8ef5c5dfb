"""generate: the opponent answers every prompt; one row a sample, in shards that survive a kill."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from stages import engines
from stages.artifacts import (
    Artifact,
    Manifest,
    Outcome,
    Plan,
    TableWriter,
    Workspace,
    count_rows,
    open_artifact,
    produce,
    read_rows,
    run_root,
)
from stages.artifacts.keys import row_seed, sha256_text
from stages.artifacts.tables import Row
from stages.config import RunConfig
from stages.data.chat import Renderer, RowRefusedError, make_renderer
from stages.data.draw import smallest_by_hash
from stages.data.rows import DROPPED, GENERATIONS, PROMPTS, RENDERED
from stages.engines.base import Completion, Engine, Request, Sampling
from stages.errors import InputError
from stages.model.load import ModelSource, resolve_model
from stages.progress import Progress, progress

FORMAT_VERSION = 1

OpenEngine = Callable[..., Engine]


@dataclass(frozen=True)
class GenerateInputs:
    """What generate reads."""

    model: str
    data: Path
    revision: str | None = None
    iteration: int = 0
    """Enters the seeds, so that every iteration samples anew."""


def run(
    config: RunConfig,
    inputs: GenerateInputs,
    out: Path,
    *,
    open_engine: OpenEngine = engines.open_engine,
) -> Manifest:
    """Write the samples of every training prompt; prompts that cannot be asked are quarantined.

    Raises:
        InputError: inputs are missing, or no prompt can be asked.
    """
    data = open_artifact(inputs.data, stages=("prepare",), verify=config.verify)
    root = run_root(out)
    model = resolve_model(inputs.model, inputs.revision, root, config.verify)
    renderer = make_renderer(model.path, config.chat)
    plan = Plan(
        stage="generate",
        format_version=FORMAT_VERSION,
        config={
            "seed": config.seed,
            "iteration": inputs.iteration,
            "generate": config.generate.identity(),
            "chat": config.chat.identity(),
        },
        inputs={"data": data.input_ref(root), "model": model.ref},
        fingerprints={"chat": renderer.fingerprint},
    )
    work = _Work(config, inputs.iteration, data, model, renderer, open_engine)
    return produce(out, plan, lambda space: _fill(space, work), resumable=True)


@dataclass(frozen=True)
class _Work:
    config: RunConfig
    iteration: int
    data: Artifact
    model: ModelSource
    renderer: Renderer
    open_engine: OpenEngine


@dataclass
class _Shard:
    """A shard whose rows are being answered."""

    name: str
    ids_hash: str
    rows: list[Row]
    """Rows of GENERATIONS, to be completed by their answers."""
    missing: int = 0


@dataclass
class _Totals:
    rows: int = 0
    tokens: int = 0
    finish: Counter[str] = field(default_factory=Counter)
    empty: int = 0
    response_tokens: int = 0
    logprob: float = 0.0

    def add(self, row: Row) -> None:
        self.rows += 1
        self.tokens += len(row["prompt_token_ids"]) + len(row["response_token_ids"])
        self.response_tokens += len(row["response_token_ids"])
        self.finish[row["finish_reason"]] += 1
        self.empty += not row["response"].strip()
        self.logprob += sum(row["token_logprobs"])


def _fill(space: Workspace, work: _Work) -> Outcome:
    generate = work.config.generate
    rendered = space.path / "rendered.scratch.parquet"
    longest, dropped = _render(space, rendered, work)
    prompts = count_rows([rendered])
    if not prompts:
        raise InputError(
            f"{work.data.path}: none of its training prompts can be asked "
            f"({_reasons(dropped) or 'it has none'}); run prepare with other settings"
        )
    max_model_len = generate.engine.max_model_len or longest + generate.max_new_tokens
    totals = _Totals()
    with progress("generate", total=prompts * generate.num_samples, unit="rows") as bar:
        open_shards = list(_unfinished_shards(space, rendered, work, totals, bar))
        if open_shards:
            _answer(space, rendered, work, open_shards, max_model_len, totals, bar)
    rendered.unlink()
    return Outcome(
        counts={
            "prompts": prompts,
            "rows": totals.rows,
            "empty": totals.empty,
            **{f"finish_{reason}": n for reason, n in sorted(totals.finish.items())},
            **{f"dropped_{reason}": n for reason, n in sorted(dropped.items())},
        },
        metrics={
            "mean_response_tokens": totals.response_tokens / totals.rows,
            "cut_off_share": totals.finish["length"] / totals.rows,
            "mean_token_logprob": totals.logprob / max(1, totals.response_tokens),
        },
        info={
            "engine": generate.engine.name,
            "longest_prompt": longest,
            "max_model_len": max_model_len,
        },
        tokens=totals.tokens,
    )


def _render(space: Workspace, rendered: Path, work: _Work) -> tuple[int, Counter[str]]:
    """Write every prompt's tokens, and what was quarantined.

    Returns:
        The longest prompt in tokens, and the quarantined prompts by reason.
    """
    limit = _prompt_limit(work)
    drawn = _drawn(work)
    longest, dropped = 0, Counter[str]()
    with (
        TableWriter(rendered, RENDERED) as table,
        TableWriter(space.file("dropped.parquet"), DROPPED) as left_out,
    ):
        for row in read_rows(work.data.files("train-"), PROMPTS):
            if drawn is not None and row["prompt_id"] not in drawn:
                continue
            try:
                tokens = _prompt_tokens(row, work.renderer, limit)
            except RowRefusedError as error:
                dropped[error.reason] += 1
                left_out.append(
                    {
                        "prompt_id": row["prompt_id"],
                        "reason": error.reason,
                        "detail": error.detail,
                    }
                )
                continue
            longest = max(longest, len(tokens))
            table.append({"prompt_id": row["prompt_id"], "prompt_token_ids": tokens})
    return longest, dropped


def _prompt_tokens(row: Row, renderer: Renderer, limit: int) -> list[int]:
    """Return a prompt's tokens, or refuse the row."""
    if not row["messages"]:
        raise RowRefusedError("empty_prompt", "it has no message")
    tokens = renderer.prompt_tokens(row["messages"])
    if not tokens:
        raise RowRefusedError("empty_prompt", "it renders to no token")
    if len(tokens) > limit:
        raise RowRefusedError("prompt_too_long", f"{len(tokens)} tokens, at most {limit} fit")
    return tokens


def _prompt_limit(work: _Work) -> int:
    """Return the most tokens a prompt may have so that a whole answer still fits."""
    generate = work.config.generate
    config = AutoConfig.from_pretrained(work.model.path, trust_remote_code=False)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    limit = min(positions, generate.engine.max_model_len or positions) - generate.max_new_tokens
    if limit < 1:
        raise InputError(
            f"generate.max_new_tokens={generate.max_new_tokens} leaves no room for a prompt: "
            f"{work.model.path} has {positions} positions; lower it"
        )
    return int(limit)


def _drawn(work: _Work) -> set[str] | None:
    """Return the prompt ids that are asked in this iteration, or None for all."""
    if work.config.generate.max_prompts is None:
        return None
    ids = read_rows(work.data.files("train-"), PROMPTS, columns=["prompt_id"])
    salt = f"generate/{work.config.seed}/{work.iteration}"
    return smallest_by_hash(
        (row["prompt_id"] for row in ids), work.config.generate.max_prompts, salt
    )


def _shards(rendered: Path, work: _Work) -> Iterator[_Shard]:
    """Yield all shards in order, with rows that wait for their answers."""
    rows = _waiting_rows(rendered, work)
    for number in count():
        part = list(islice(rows, work.config.generate.shard_rows))
        if not part:
            return
        ids = "\n".join(f"{r['prompt_id']}/{r['sample_index']}/{r['seed']}" for r in part)
        yield _Shard(f"part-{number:05d}.parquet", sha256_text(ids), part, len(part))


def _waiting_rows(rendered: Path, work: _Work) -> Iterator[Row]:
    for prompt in read_rows([rendered], RENDERED):
        for sample_index in range(work.config.generate.num_samples):
            yield {
                **prompt,
                "sample_index": sample_index,
                "seed": row_seed(
                    work.config.seed, work.iteration, prompt["prompt_id"], sample_index
                ),
            }


def _unfinished_shards(
    space: Workspace, rendered: Path, work: _Work, totals: _Totals, bar: Progress
) -> Iterator[str]:
    """Yield the names of the shards to be made; count those that an earlier attempt finished."""
    for shard in _shards(rendered, work):
        if not space.shards.done(shard.name, shard.ids_hash):
            yield shard.name
            continue
        for row in read_rows([space.path / shard.name], GENERATIONS):
            totals.add(row)
        bar.advance(len(shard.rows))


def _answer(
    space: Workspace,
    rendered: Path,
    work: _Work,
    names: Sequence[str],
    max_model_len: int,
    totals: _Totals,
    bar: Progress,
) -> None:
    """Answer the rows of some shards; one engine is fed across them, each is closed when full."""
    generate = work.config.generate
    wanted = set(names)
    in_flight: dict[str, tuple[_Shard, int]] = {}

    def requests() -> Iterator[Request]:
        for shard in _shards(rendered, work):
            if shard.name not in wanted:
                continue
            for index, row in enumerate(shard.rows):
                request_id = f"{row['prompt_id']}/{row['sample_index']}"
                in_flight[request_id] = (shard, index)
                yield Request(request_id, row["prompt_token_ids"], row["seed"])

    sampling = Sampling(
        temperature=generate.temperature,
        top_p=generate.top_p,
        top_k=generate.top_k,
        max_new_tokens=generate.max_new_tokens,
        stop_token_ids=work.renderer.stop_token_ids,
    )
    engine = work.open_engine(
        generate.engine,
        work.model.path,
        max_model_len=max_model_len,
        pad_token_id=work.renderer.pad_token_id,
    )
    try:
        for done in engine.generate(requests(), sampling):
            shard, index = in_flight.pop(done.request_id)
            shard.rows[index] |= _answer_columns(done, work.renderer)
            totals.add(shard.rows[index])
            shard.missing -= 1
            bar.advance(1, len(done.token_ids))
            if not shard.missing:
                write = partial(_write, rows=shard.rows)
                space.shards.write(shard.name, shard.ids_hash, write)
    finally:
        engine.close()
    assert not in_flight, f"{len(in_flight)} requests were not answered"


def _answer_columns(done: Completion, renderer: Renderer) -> dict[str, Any]:
    return {
        "response_token_ids": done.token_ids,
        "response": renderer.text(done.token_ids),
        "finish_reason": done.finish_reason,
        "token_logprobs": done.token_logprobs,
    }


def _write(path: Path, rows: list[Row]) -> None:
    with TableWriter(path, GENERATIONS) as table:
        table.extend(rows)


def _reasons(dropped: Counter[str]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items()))
