"""generate: the opponent answers every prompt; one row a sample, in shards that survive a kill."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow.compute as pc

from stages import engines
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
from stages.artifacts.keys import row_seed, sha256_text
from stages.artifacts.tables import Row
from stages.config import RunConfig
from stages.data.chat import Renderer, RowRefusedError, chat_fingerprints, make_renderer
from stages.data.draw import smallest_by_hash
from stages.data.rows import DROPPED, GENERATIONS, PROMPTS, RENDERED
from stages.engines import OpenEngine
from stages.engines.base import Completion, Request, Sampling
from stages.engines.prompts import askable_tokens, model_room
from stages.errors import CorruptError, InputError
from stages.model.source import ModelSource, resolve_model
from stages.progress import progress

FORMAT_VERSION = 1


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

    Shards of one attempt are the restart unit: those that are finished when it ends, however it
    ends, are not made again.

    Returns:
        Its manifest; `counts` has prompts (those asked), rows, empty, finish_stop, finish_length,
        and dropped_REASON for every reason.

    Raises:
        InputError: inputs are missing, or no prompt can be asked.
    """
    data = open_artifact(inputs.data, stages=("prepare",), verify=config.verify)
    root = run_root(out)
    model = resolve_model(inputs.model, inputs.revision, root, config.verify)
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
        fingerprints=chat_fingerprints(model.path, config.chat),
    )

    def fill(space: Workspace) -> Outcome:
        renderer = make_renderer(model.verified(), config.chat)
        return _fill(space, _Work(config, inputs.iteration, data, model, renderer, open_engine))

    return produce(out, plan, fill, resumable=True)


@dataclass(frozen=True)
class _Work:
    """What was opened, and what decides the rows."""

    config: RunConfig
    iteration: int
    data: Artifact
    model: ModelSource
    renderer: Renderer
    open_engine: OpenEngine


@dataclass
class _Rendered:
    """The prompts that are asked, as tokens in a scratch file."""

    path: Path
    num_prompts: int = 0
    longest: int = 0
    """Tokens of the longest prompt."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of prompts that are not asked, by reason."""


@dataclass
class _Shard:
    """Rows of one file: complete but for their answers, and how many of these are missing."""

    name: str
    ids_hash: str
    rows: list[Row]
    missing: int


def _fill(space: Workspace, work: _Work) -> Outcome:
    generate = work.config.generate
    with TemporaryDirectory(prefix="spill-", dir=space.path) as spill:
        rendered = _render(space, Path(spill, "rendered.parquet"), work)
        max_model_len = generate.engine.max_model_len or rendered.longest + generate.max_new_tokens
        names, finished = [], dict[str, int]()
        for shard in _shards(rendered, work):
            names.append(shard.name)
            if space.shards.done(shard.name, shard.ids_hash):
                finished[shard.name] = len(shard.rows)
        if len(finished) < len(names):
            _answer(space, rendered, work, finished, max_model_len)
    counts, metrics, tokens = _summary([space.path / name for name in names])
    dropped = {f"dropped_{reason}": n for reason, n in sorted(rendered.dropped.items())}
    return Outcome(
        counts={"prompts": rendered.num_prompts, **counts, **dropped},
        metrics=metrics,
        info={
            "engine": generate.engine.name,
            "longest_prompt": rendered.longest,
            "max_model_len": max_model_len,
        },
        tokens=tokens,
    )


def _render(space: Workspace, scratch: Path, work: _Work) -> _Rendered:
    """Write the tokens of every prompt that can be asked, and the others with their reasons.

    Raises:
        InputError: none can be asked.
    """
    generate, drawn = work.config.generate, _drawn(work)
    room = model_room(work.model.path, generate.engine.max_model_len, generate.max_new_tokens)
    limit = room - generate.max_new_tokens
    rendered = _Rendered(scratch)
    with (
        TableWriter(scratch, RENDERED) as table,
        TableWriter(space.file("dropped.parquet"), DROPPED) as left_out,
    ):
        for row in _train_rows(work.data):
            prompt_id = row["prompt_id"]
            if drawn is not None and prompt_id not in drawn:
                continue
            try:
                tokens = askable_tokens(row["messages"], work.renderer, limit)
            except RowRefusedError as error:
                rendered.dropped[error.reason] += 1
                left_out.append(
                    {"prompt_id": prompt_id, "reason": error.reason, "detail": error.detail}
                )
                continue
            rendered.num_prompts += 1
            rendered.longest = max(rendered.longest, len(tokens))
            table.append({"prompt_id": prompt_id, "prompt_token_ids": tokens})
    if not rendered.num_prompts:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in sorted(rendered.dropped.items()))
        raise InputError(
            f"{work.data.path}: none of its training prompts can be asked "
            f"({reasons or 'it has none'}); mend the data or the chat and length settings"
        )
    return rendered


def _train_rows(data: Artifact) -> Iterator[Row]:
    """Stream the training rows.

    Raises:
        CorruptError: their ids do not rise, so that rows could not be joined by id later.
    """
    last = ""
    for row in read_rows(data.files("train-"), PROMPTS):
        if row["prompt_id"] <= last:
            raise CorruptError(
                f"{data.path} is not sorted by prompt_id ({row['prompt_id']} follows {last}); "
                f"delete {data.path} and run prepare again"
            )
        last = row["prompt_id"]
        yield row


def _drawn(work: _Work) -> set[str] | None:
    """Return the prompt ids that are asked in this iteration, or None for all."""
    max_prompts = work.config.generate.max_prompts
    if max_prompts is None:
        return None
    rows = read_rows(work.data.files("train-"), PROMPTS, columns=["prompt_id"])
    salt = f"generate/{work.config.seed}/{work.iteration}"
    return smallest_by_hash((row["prompt_id"] for row in rows), max_prompts, salt)


def _shards(rendered: _Rendered, work: _Work) -> Iterator[_Shard]:
    """Yield all shards in order, with rows that wait for their answers."""
    rows = _waiting_rows(rendered, work)
    for number in count():
        part = list(islice(rows, work.config.generate.shard_rows))
        if not part:
            return
        ids = "\n".join(_request_id(row) for row in part)
        yield _Shard(f"part-{number:05d}.parquet", sha256_text(ids), part, len(part))


def _waiting_rows(rendered: _Rendered, work: _Work) -> Iterator[Row]:
    seed, iteration = work.config.seed, work.iteration
    for prompt in read_rows([rendered.path], RENDERED):
        for index in range(work.config.generate.num_samples):
            yield {
                **prompt,
                "sample_index": index,
                "seed": row_seed(seed, iteration, prompt["prompt_id"], index),
            }


def _request_id(row: Row) -> str:
    return f"{row['prompt_id']}/{row['sample_index']}"


def _answer(
    space: Workspace,
    rendered: _Rendered,
    work: _Work,
    finished: Mapping[str, int],
    max_model_len: int,
) -> None:
    """Answer the rows of all unfinished shards; each is written when its last answer is there.

    One engine is fed across shards, so that none has to wait for another's longest answer.
    """
    generate = work.config.generate
    in_flight: dict[str, tuple[_Shard, Row]] = {}

    def requests() -> Iterator[Request]:
        for shard in _shards(rendered, work):
            if shard.name in finished:
                continue
            for row in shard.rows:
                in_flight[_request_id(row)] = shard, row
                yield Request(_request_id(row), row["prompt_token_ids"], row["seed"])

    total = rendered.num_prompts * generate.num_samples
    with (
        engines.running(
            work.open_engine,
            generate.engine,
            work.model.path,
            space.path,
            max_model_len=max_model_len,
            pad_token_id=work.renderer.pad_token_id,
        ) as engine,
        progress("generate", total=total, unit="rows", done=sum(finished.values())) as bar,
    ):
        for answer in engine.generate(requests(), _sampling(work)):
            shard, row = in_flight.pop(answer.request_id)
            row |= _answer_columns(answer, work.renderer)
            shard.missing -= 1
            if not shard.missing:
                write = partial(_write, rows=shard.rows)
                space.shards.write(shard.name, shard.ids_hash, write)
            bar.advance(1, len(answer.token_ids))
    assert not in_flight, f"{len(in_flight)} requests were not answered"


def _sampling(work: _Work) -> Sampling:
    generate = work.config.generate
    return Sampling(
        temperature=generate.temperature,
        top_p=generate.top_p,
        top_k=generate.top_k,
        max_new_tokens=generate.max_new_tokens,
        stop_token_ids=work.renderer.stop_token_ids,
    )


def _answer_columns(answer: Completion, renderer: Renderer) -> Row:
    return {
        "response_token_ids": answer.token_ids,
        "response": renderer.text(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "token_logprobs": answer.token_logprobs,
    }


def _write(path: Path, rows: list[Row]) -> None:
    with TableWriter(path, GENERATIONS) as table:
        table.extend(rows)


def _summary(shards: Sequence[Path]) -> tuple[dict[str, int], dict[str, float], int]:
    """Return counts, metrics and tokens, read off the shards in order.

    Not added up as answers come: sums would differ in their last bits after a resume.
    """
    finish = Counter[str](stop=0, length=0)
    rows = empty = prompt_tokens = response_tokens = 0
    logprob = 0.0
    columns = [
        "prompt_token_ids", "response_token_ids", "response", "finish_reason", "token_logprobs",
    ]  # fmt: skip
    for batch in read_batches(shards, GENERATIONS, columns=columns):
        rows += batch.num_rows
        prompt_tokens += len(batch["prompt_token_ids"].flatten())
        response_tokens += len(batch["response_token_ids"].flatten())
        empty += pc.sum(pc.equal(pc.utf8_trim_whitespace(batch["response"]), "")).as_py()
        finish.update(batch["finish_reason"].to_pylist())
        logprob += batch["token_logprobs"].flatten().to_numpy().sum(dtype=np.float64)
    return (
        {"rows": rows, "empty": empty, **{f"finish_{why}": n for why, n in finish.items()}},
        {
            "mean_response_tokens": response_tokens / rows,
            "cut_off_share": finish["length"] / rows,
            "mean_token_logprob": float(logprob) / response_tokens,
        },
        prompt_tokens + response_tokens,
    )
