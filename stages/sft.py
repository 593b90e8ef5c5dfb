"""sft: supervised fine-tuning, to make a first opponent from a base model or from nothing."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

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
from stages.artifacts.tables import Row
from stages.config import ArchitectureConfig, ChatConfig, RunConfig, SftConfig
from stages.data.chat import Renderer, RowRefusedError, chat_fingerprints, make_renderer
from stages.data.draw import smallest_by_hash
from stages.data.rows import PROMPTS, SFT_METRICS, SUPERVISED
from stages.data.store import build_store, open_store
from stages.errors import ConfigError, InputError
from stages.journal import open_journal
from stages.model.group import Group, Resources, led, open_group, resources, together
from stages.model.source import ModelSource, resolve_model
from stages.tracking import Tracked, tracked

if TYPE_CHECKING:  # torch is loaded only when there is something to train
    from stages.model.fit import Step
    from stages.model.learner import Learner

FORMAT_VERSION = 1
RENDERED_TOGETHER = 4096


@dataclass(frozen=True)
class SftInputs:
    """What sft reads."""

    data: Path
    model: str | None = None
    """The base model; None with `sft.init: random`."""
    revision: str | None = None


def run(config: RunConfig, inputs: SftInputs, out: Path) -> Manifest:
    """Train on prompts with their human responses and write a model folder.

    Raises:
        ConfigError: the recipe has no sft section, or names no model to start from.
        InputError: inputs are missing or of another kind.
        DivergedError: a loss or gradient is not finite.
    """
    sft = config.sft
    if sft is None:
        raise ConfigError("the recipe has no sft section; give one, for example sft.epochs=1")
    return led(sft, _work, out, lambda: _lead(config, sft, inputs, out))


def _lead(config: RunConfig, sft: SftConfig, inputs: SftInputs, out: Path) -> Manifest:
    data = open_artifact(inputs.data, stages=("prepare",), verify=config.verify)
    root = run_root(out)
    refs = {"data": data.input_ref(root)}
    base: ModelSource | None = None
    if sft.init == "pretrained":
        if inputs.model is None:
            raise ConfigError("sft.init=pretrained needs a model; give --model or model.path")
        base = resolve_model(inputs.model, inputs.revision, root, config.verify)
        refs["model"] = base.ref
    plan = Plan(
        stage="sft",
        format_version=FORMAT_VERSION,
        config={
            "seed": config.seed,
            "sft": sft.identity(),
            "chat": config.chat.identity(),
        },
        inputs=refs,
        fingerprints=chat_fingerprints(base.path if base else None, config.chat),
    )
    run = tracked(config, out, plan.attempt_key, ("seed", "sft"))
    return produce(
        out, plan, lambda space: _fill(space, config, sft, data, base, run), resumable=True
    )


@dataclass(frozen=True)
class _Job:
    """What every rank is told."""

    space: Workspace
    rows: Path
    model_dir: Path | None
    tokenizer_dir: Path
    config: SftConfig
    seed: int
    chat: ChatConfig
    tracked: Tracked | None


@dataclass(frozen=True)
class _Report:
    """What rank 0 tells of its work."""

    steps: int
    last_loss: float
    attention: str
    parameters: int
    used: Resources


def _fill(
    space: Workspace,
    config: RunConfig,
    sft: SftConfig,
    data: Artifact,
    base: ModelSource | None,
    run: Tracked | None,
) -> Outcome:
    base_dir = base.verified() if base else None
    tokenizer_dir = base_dir or _train_tokenizer(space.path, sft.architecture, data)
    renderer = make_renderer(tokenizer_dir, config.chat)
    rows_file, scratch = space.path / "rows.parquet", space.path / "rows.scratch"
    refused = _render(rows_file, renderer, data, sft.max_examples)
    store, too_long = build_store(
        [rows_file],
        SUPERVISED,
        SUPERVISED.names[1:],
        scratch,
        keep=lambda lengths: sum(lengths) <= sft.max_length,
    )
    rows_file.unlink()
    if not len(store):
        raise InputError(
            f"{data.path} leaves no row to train on ({too_long} longer than sft.max_length="
            f"{sft.max_length}, {refused} refused); raise sft.max_length or mend the data"
        )
    job = _Job(space, scratch, base_dir, tokenizer_dir, sft, config.seed, config.chat, run)
    report = together(_work, job, sft)
    scratch.unlink()
    return Outcome(
        counts={
            "rows": len(store),
            "dropped_too_long": too_long,
            "dropped_refused": refused,
            "steps": report.steps,
        },
        metrics={"last_loss": report.last_loss},
        info={
            "attention": report.attention,
            "parameters": report.parameters,
            **report.used.info(),
        },
        tokens=int(store.lengths_N.sum()),
        peak_memory_bytes=report.used.peak_memory_bytes,
        volatile=frozenset({"timings.parquet"}),
    )


def _work(job: _Job) -> _Report:
    """Train as one rank; rank 0 also writes."""
    from stages.model.learner import open_student

    group = open_group(job.config)
    renderer = make_renderer(job.tokenizer_dir, job.chat)
    store = open_store(job.rows)
    student = open_student(job.model_dir, store, job.config, job.seed, renderer, group)
    student.check_exact()
    last_loss = _train(job, group, student)
    student.save(job.space.path, renderer, job.tokenizer_dir)
    return _Report(
        student.total_steps, last_loss, student.mode, student.num_parameters, resources(group)
    )


def _train(job: _Job, group: Group, student: "Learner") -> float:
    """Take all steps, rank 0 writing down each; return the loss over the last tenth."""
    folder, total = job.space.path, student.total_steps
    with open_journal(
        group.rank, folder, "sft", SFT_METRICS, total, _metrics_row, _remark, job.tracked
    ) as journal:
        student.train(journal.add, job.space.shards)
    return journal.tail_mean(lambda step: step.loss)


def _metrics_row(step: "Step") -> Row:
    return {
        "step": step.step,
        "epoch": step.epoch,
        "learning_rate": step.learning_rate,
        "loss": step.loss,
        "grad_norm": step.grad_norm,
        "rows": step.rows,
        "tokens": step.tokens,
    }


def _remark(step: "Step") -> str:
    return f"loss {step.loss:.4f}"


def _render(path: Path, renderer: Renderer, data: Artifact, max_examples: int | None) -> int:
    """Write the chosen rows as tokens; return how many the renderer refused."""
    drawn = None
    if max_examples is not None:
        ids = (row["prompt_id"] for row in _prompts(data))
        drawn = smallest_by_hash(ids, max_examples, "sft")
    refused = 0
    kept = (row for row in _prompts(data) if drawn is None or row["prompt_id"] in drawn)
    with TableWriter(path, SUPERVISED) as table:
        while rows := list(islice(kept, RENDERED_TOGETHER)):
            prompts = renderer.prompts_tokens([row["messages"] for row in rows])
            responses = renderer.responses_tokens([row["response"] for row in rows])
            for row, prompt, response in zip(rows, prompts, responses, strict=True):
                if isinstance(prompt, RowRefusedError) or isinstance(response, RowRefusedError):
                    refused += 1
                    continue
                table.append(
                    {
                        "prompt_id": row["prompt_id"],
                        "prompt_token_ids": prompt,
                        "chosen_token_ids": response,
                        "rejected_token_ids": [],
                    }
                )
    return refused


def _train_tokenizer(folder: Path, architecture: ArchitectureConfig, data: Artifact) -> Path:
    """Train the tokenizer on the data's own text and save it in the workspace."""

    def texts() -> Iterator[str]:
        for row in _prompts(data):
            yield from (m["content"] for m in row["messages"])
            yield row["response"]

    from stages.model.tokenizer import train_tokenizer

    train_tokenizer(texts(), architecture.vocab_size).save_pretrained(folder)
    return folder


def _prompts(data: Artifact) -> Iterator[Row]:
    return read_rows(data.files("train-"), PROMPTS)
