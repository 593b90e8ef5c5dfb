"""generate: the opponent answers every prompt; one row a sample, in shards that survive a kill."""

import gc
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages import engines
from stages.alarms import sound
from stages.answers import Asked, answer_all
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
    read_batches,
    run_root,
)
from stages.artifacts.keys import sha256_text
from stages.artifacts.shards import ASIDE
from stages.config import GenerateConfig, RunConfig
from stages.data import draw
from stages.data.chat import Renderer, RowRefusedError, chat_fingerprints, make_renderer
from stages.data.columns import conversations, list_column
from stages.data.rows import DROPPED, DROPPED_FILE, GENERATIONS, PROMPTS, RENDERED
from stages.engines import OpenEngine
from stages.engines.base import Engine, Sampling
from stages.engines.prompts import askable_batch, model_room, model_vocab_size
from stages.errors import ConfigError, CorruptError, InputError
from stages.model.source import ModelSource, resolve_model

if TYPE_CHECKING:
    from stages.model.parity import ParityReport

FORMAT_VERSION = 1
RENDERED_NAME = f"{ASIDE}/prompts.parquet"
RENDERED_IDS = sha256_text("all prompts")
MOST_SHARD_ROWS = 2048
LEAST_SHARD_ROWS = 128
WANTED_SHARDS = 32
"""Enough for many workers to share; the number of workers itself must not decide the shards."""

log = logging.getLogger("spin")


@dataclass(frozen=True)
class GenerateInputs:
    """What generate reads."""

    model: str
    data: Path
    revision: str | None = None
    iteration: int = 0
    """Enters the seeds, so that every iteration samples anew, and the draw of prompts."""
    part: tuple[int, int] | None = None
    """Of the drawn prompts those of pool member k, as (k, M): k from 1 to M. (0, M) are those that
    the newest opponent keeps when M members share `generate.pool.share`; None: all."""


def run(
    config: RunConfig,
    inputs: GenerateInputs,
    out: Path,
    *,
    open_engine: OpenEngine = engines.open_engine,
) -> Manifest:
    """Write the samples of every training prompt; prompts that cannot be asked are quarantined.

    Shards of one attempt are the restart unit: those that are finished when it ends, however it
    ends, are not made again. With `generate.join` several processes, perhaps on several machines
    that share the folder, make one artifact together: each claims shards, and whichever is there
    at the end commits it.

    Returns:
        Its manifest; `counts` has prompts (those asked), rows, empty, finish_stop, finish_length,
        dropped_REASON for every reason, train_prompts (those in the data), drawn (of them, in this
        iteration) and, with a part, in_part (of those drawn). A part may be empty: it has no rows.

    Raises:
        ConfigError: the part is none of the pool's.
        InputError: inputs are missing, or no prompt can be asked.
    """
    _check_part(inputs.part, config.generate.pool.size)
    data = open_artifact(inputs.data, stages=("prepare",), verify=config.verify)
    root = run_root(out)
    model = resolve_model(inputs.model, inputs.revision, root, config.verify)
    plan = Plan(
        stage="generate",
        format_version=FORMAT_VERSION,
        config={
            "seed": config.seed,
            "iteration": inputs.iteration,
            "generate": _what_decides(config.generate),
            "chat": config.chat.identity(),
            **_part_fields(inputs.part, config.generate.pool.share),
        },
        inputs={"data": data.input_ref(root), "model": model.ref},
        fingerprints=chat_fingerprints(model.path, config.chat),
    )
    work = _Work(config, inputs.iteration, inputs.part, data, model, open_engine)
    with _rare_collections():
        return produce(
            out,
            plan,
            lambda space: _fill(space, work),
            resumable=True,
            assist=_Assistant(work).assist if config.generate.join else None,
        )


def _check_part(part: tuple[int, int] | None, pool_size: int) -> None:
    if part is None:
        return
    member, members = part
    if members < 1 or not 0 <= member <= members:
        raise ConfigError(
            f"generate: there is no part {member}/{members}; K/M is 0/M for the newest opponent, "
            "or one of 1/M to M/M for a member of the pool"
        )
    if members > pool_size:
        raise ConfigError(
            f"generate: part {member}/{members} is of a pool of {members}, and "
            f"generate.pool.size={pool_size}; set it to {members} at least, or ask for no part"
        )


def _what_decides(config: GenerateConfig) -> dict[str, Any]:
    """Return the settings that decide the rows; those that decide nothing as they stand are out.

    Thus what was made before there was a pool or a draw in slices has the key that it had.
    """
    settings = config.identity()
    del settings["pool"]  # it decides by the part alone
    if config.prompt_share is None:
        del settings["prompt_share"]
    if config.draw == "independent":
        del settings["draw"]
    return settings


def _part_fields(part: tuple[int, int] | None, share: float) -> dict[str, Any]:
    if part is None:
        return {}
    return {"part": {"member": part[0], "members": part[1], "share": share}}


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Let Python look for cycles less often while millions of rows without any pass through.

    It would walk all that torch and transformers hold again and again: a fifth of the stage's time.
    """
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@dataclass(frozen=True)
class _Work:
    """What was opened, and what decides the rows."""

    config: RunConfig
    iteration: int
    part: tuple[int, int] | None
    data: Artifact
    model: ModelSource
    open_engine: OpenEngine

    @property
    def generate(self) -> GenerateConfig:
        return self.config.generate

    @cached_property
    def renderer(self) -> Renderer:
        return make_renderer(self.model.verified(), self.config.chat)

    @cached_property
    def num_prompts(self) -> int:
        """Number of training prompts in the data."""
        return count_rows(self.data.files("train-"))

    @property
    def num_drawn(self) -> int:
        """Number of them that this iteration draws."""
        return draw.wanted(self.num_prompts, self.generate.max_prompts, self.generate.prompt_share)

    @property
    def part_share(self) -> float:
        """Share of the drawn prompts that are of our part; about, since hashes divide them."""
        if self.part is None:
            return 1.0
        member, members = self.part
        share = self.generate.pool.share
        return share / members if member else 1 - share

    @cached_property
    def prompts_per_shard(self) -> int:
        """Number of prompts a shard; what whoever renders them decides, holds for the attempt."""
        planned = math.ceil(self.num_drawn * self.part_share)
        rows = -(-planned * self.generate.num_samples // WANTED_SHARDS)
        rows = min(max(rows, LEAST_SHARD_ROWS), MOST_SHARD_ROWS)
        return max(1, (self.generate.shard_rows or rows) // self.generate.num_samples)


def _fill(space: Workspace, work: _Work) -> Outcome:
    if not _is_rendered(space):
        _render(space, work)
    asked = _asked(space, work)
    _answer(space, asked, work)
    dropped = _dropped(space.path / DROPPED_FILE)
    shards = [space.path / asked.name(number) for number in range(asked.num_shards)]
    if not shards:
        shards = [_write_empty(space.path / asked.name(0))]
    counts, metrics, info, tokens = _summary(shards)
    assert counts["rows"] == asked.num_rows, f"{counts['rows']} of {asked.num_rows} rows"
    parity = _check_parity(shards, work)
    sound("generate", metrics, work.config.alarms)
    return Outcome(
        counts={
            "prompts": asked.num_prompts,
            **counts,
            **dropped,
            "train_prompts": work.num_prompts,
            "drawn": work.num_drawn,
            **({"in_part": asked.num_prompts + sum(dropped.values())} if work.part else {}),
        },
        metrics={**metrics, **(parity.metrics() if parity else {})},
        info={
            **info,
            "parity": parity.info() if parity else None,
            "engine": work.generate.engine.name,
            "gpus": engines.gpus_used(work.generate.engine),
            "longest_prompt": asked.longest,
            "max_model_len": _max_model_len(asked, work),
        },
        tokens=tokens,
    )


def _write_empty(path: Path) -> Path:
    """Write the one file of a part without prompts, so that its columns are known all the same."""
    with TableWriter(path, GENERATIONS):
        return path


@dataclass
class _Assistant:
    """Answers what another process has rendered and nobody has answered."""

    work: _Work
    is_done: bool = False

    def assist(self, space: Workspace) -> None:
        """Return when all is answered; the next time at once."""
        if not self.is_done and _is_rendered(space):
            _answer(space, _asked(space, self.work), self.work)
            self.is_done = True


def _is_rendered(space: Workspace) -> bool:
    """Tell whether prompts are rendered, in whatever division into shards."""
    return all(space.shards.done(name, RENDERED_IDS) for name in (RENDERED_NAME, DROPPED_FILE))


def _asked(space: Workspace, work: _Work) -> Asked:
    return Asked(
        space.path / RENDERED_NAME,
        space.shards.digest(RENDERED_NAME),
        work.generate.num_samples,
        work.config.seed,
        work.iteration,
    )


def _render(space: Workspace, work: _Work) -> None:
    """Write the tokens of every prompt that can be asked, and the others with their reasons.

    Raises:
        InputError: none can be asked. With a part this is only warned of: the part may be tiny.
    """

    def write_both(rendered: Path) -> None:
        def write_dropped(dropped: Path) -> None:
            with (
                TableWriter(rendered, RENDERED, group_rows=work.prompts_per_shard) as table,
                TableWriter(dropped, DROPPED) as left_out,
            ):
                _render_all(work, table, left_out)

        space.shards.write(DROPPED_FILE, RENDERED_IDS, write_dropped)

    space.shards.write(RENDERED_NAME, RENDERED_IDS, write_both)


def _render_all(work: _Work, table: TableWriter, left_out: TableWriter) -> None:
    room = model_room(
        work.model.path, work.generate.engine.max_model_len, work.generate.max_new_tokens
    )
    vocab_size, reasons = model_vocab_size(work.model.path), Counter[str]()
    for ids, messages in _train_prompts(work):
        limit = room - work.generate.max_new_tokens
        tokens = askable_batch(messages, work.renderer, limit, vocab_size)
        good = [i for i, found in enumerate(tokens) if not isinstance(found, RowRefusedError)]
        for i, found in enumerate(tokens):
            if isinstance(found, RowRefusedError):
                reasons[found.reason] += 1
                left_out.append(
                    {"prompt_id": ids[i], "reason": found.reason, "detail": found.detail}
                )
        asked = [t for t in tokens if not isinstance(t, RowRefusedError)]
        columns = [
            pa.array([ids[i] for i in good], pa.string()),
            pa.array(list(map(len, asked)), pa.int32()),
            list_column(asked, pa.int32()),
        ]
        table.append_batch(pa.record_batch(columns, schema=RENDERED))
    if not table.num_rows:
        _say_none(work, ", ".join(f"{reason}: {n}" for reason, n in sorted(reasons.items())))


def _say_none(work: _Work, reasons: str) -> None:
    if work.part is None or not work.num_prompts:
        raise InputError(
            f"{work.data.path}: none of its training prompts can be asked "
            f"({reasons or 'it has none'}); mend the data or the chat and length settings"
        )
    member, members = work.part
    log.warning(
        "generate: part %d/%d of the %d prompts drawn has none that can be asked (%s); it has no "
        "rows", member, members, work.num_drawn, reasons or "none fell to it",
    )  # fmt: skip


def _train_prompts(work: _Work) -> Iterator[tuple[list[str], list[list[dict[str, str]]]]]:
    """Stream ids and messages of the training prompts that are drawn, some at a time.

    Raises:
        CorruptError: their ids do not rise, so that rows could not be joined by id later.
    """
    drawn, last, start = _drawn(work), "", 0
    for batch in read_batches(
        work.data.files("train-"), PROMPTS, columns=["prompt_id", "messages"]
    ):
        ids = batch["prompt_id"].to_pylist()
        for name in ids:
            if name <= last:
                raise CorruptError(
                    f"{work.data.path} is not sorted by prompt_id ({name} follows {last}); "
                    f"delete {work.data.path} and run prepare again"
                )
            last = name
        if drawn is not None:
            chosen = batch.filter(pa.array(drawn[start : start + len(ids)]))
            start += len(ids)
        else:
            chosen = batch
        yield chosen["prompt_id"].to_pylist(), conversations(chosen["messages"])


def _drawn(work: _Work) -> np.ndarray | None:
    """Return the mask of the prompts that are asked, in the order of the data; None for all."""
    config, seed, iteration = work.generate, work.config.seed, work.iteration
    mask = None
    if config.draw == "slices":
        hashes = draw.salted_hashes(_train_ids(work), f"generate/slices/{seed}")
        mask = draw.circular_slice(hashes, work.num_drawn, iteration)
    elif not config.draws_all:
        hashes = draw.salted_hashes(_train_ids(work), f"generate/{seed}/{iteration}")
        mask = draw.smallest(hashes, work.num_drawn)
    if mask is not None:
        log.info("generate: %d of %d prompts are drawn", work.num_drawn, work.num_prompts)
    if work.part is not None:
        member, members = work.part
        hashes = draw.salted_hashes(_train_ids(work), f"pool/{seed}/{iteration}")
        ours = draw.parts(hashes, config.pool.share, members) == member
        mask = ours if mask is None else mask & ours
    return mask


def _train_ids(work: _Work) -> Iterator[str]:
    for batch in read_batches(work.data.files("train-"), PROMPTS, columns=["prompt_id"]):
        yield from batch["prompt_id"].to_pylist()


def _max_model_len(asked: Asked, work: _Work) -> int:
    limit = work.generate.engine.max_model_len
    return limit or asked.longest + work.generate.max_new_tokens


def _answer(space: Workspace, asked: Asked, work: _Work) -> None:
    def open_engine() -> AbstractContextManager[Engine]:
        return engines.running(
            work.open_engine,
            work.generate.engine,
            work.model.verified(),
            space.scratch,
            max_model_len=_max_model_len(asked, work),
            pad_token_id=work.renderer.pad_token_id,
        )

    sampling = Sampling(
        temperature=work.generate.temperature,
        top_p=work.generate.top_p,
        top_k=work.generate.top_k,
        max_new_tokens=work.generate.max_new_tokens,
        stop_token_ids=work.renderer.stop_token_ids,
    )
    answer_all(
        space, asked, work.renderer, sampling, open_engine, work.generate.show_samples_every_s
    )


def _check_parity(shards: Sequence[Path], work: _Work) -> "ParityReport | None":
    """Compute some of the answers' log-probabilities again; see `check_parity`."""
    config = work.generate.parity
    if not config.rows or not count_rows(shards):
        return None
    from stages.model.parity import check_parity, draw_rows  # torch, which vLLM needs not here

    return check_parity(
        work.model.verified(),
        draw_rows(shards, config.rows, f"parity/{work.config.seed}/{work.iteration}"),
        config,
        work.generate.engine,
        forward=work.config.score,
        pad_token_id=work.renderer.pad_token_id,
        where=str(shards[0].parent),
        sampling=work.generate,
        rendered=lambda prompt_id: _rendered_anew(prompt_id, work),
    )


def _rendered_anew(prompt_id: str, work: _Work) -> list[int]:
    for batch in read_batches(
        work.data.files("train-"), PROMPTS, columns=["prompt_id", "messages"]
    ):
        at = pc.index(batch["prompt_id"], prompt_id).as_py()
        if at >= 0:
            [messages] = conversations(batch["messages"].slice(at, 1))
            return work.renderer.prompt_tokens(messages)
    raise AssertionError(f"prompt {prompt_id} was answered, so the data has it")


def _dropped(path: Path) -> dict[str, int]:
    """Return how many prompts were left out, by reason."""
    reasons = Counter[str]()
    for batch in read_batches([path], DROPPED, columns=["reason"]):
        reasons.update(batch["reason"].to_pylist())
    return {f"dropped_{reason}": n for reason, n in sorted(reasons.items())}


def _summary(
    shards: Sequence[Path],
) -> tuple[dict[str, int], dict[str, float | None], dict[str, object], int]:
    """Return counts, metrics, info and tokens, read off the shards in order.

    A mean of no rows is None.

    Not added up as answers come: sums would differ in their last bits after a resume.
    """
    finish = Counter[str](stop=0, length=0)
    rows = empty = prompt_tokens = 0
    lengths = np.zeros(1, np.int64)
    logprob = 0.0
    columns = [
        "prompt_token_ids", "response_token_ids", "response", "finish_reason", "token_logprobs",
    ]  # fmt: skip
    for batch in read_batches(shards, GENERATIONS, columns=columns):
        rows += batch.num_rows
        prompt_tokens += len(batch["prompt_token_ids"].flatten())
        blank = pc.equal(pc.utf8_trim_whitespace(batch["response"]), "")
        empty += pc.sum(blank, min_count=0).as_py()
        for part in batch["finish_reason"].value_counts():
            finish[part["values"].as_py()] += part["counts"].as_py()
        logprob += batch["token_logprobs"].flatten().to_numpy().sum(dtype=np.float64)
        here = np.bincount(pc.list_value_length(batch["response_token_ids"]).to_numpy())
        lengths = _add(lengths, here)
    response_tokens = int(lengths @ np.arange(len(lengths)))
    return (
        {"rows": rows, "empty": empty, **{f"finish_{why}": n for why, n in finish.items()}},
        {
            "mean_response_tokens": response_tokens / rows if rows else None,
            "cut_off_share": finish["length"] / rows if rows else None,
            "empty_share": empty / rows if rows else None,
            "mean_token_logprob": float(logprob) / response_tokens if rows else None,
        },
        {"response_tokens_quantiles": _quantiles(lengths)},
        prompt_tokens + response_tokens,
    )


def _add(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    total = np.zeros(max(len(left), len(right)), np.int64)
    total[: len(left)] += left
    total[: len(right)] += right
    return total


def _quantiles(lengths: np.ndarray) -> dict[str, int]:
    """Return lengths at or below which lie so many percent of the rows.

    Args:
        lengths: number of rows of each length; none has no quantiles.
    """
    if not lengths.any():
        return {}
    share = lengths.cumsum() / lengths.sum()
    return {str(p): int(np.searchsorted(share, p / 100)) for p in (0, 10, 50, 90, 99, 100)}
