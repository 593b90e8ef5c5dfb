"""sft: supervised fine-tuning, to make a first opponent from a base model or from nothing."""

from collections.abc import Iterator
from dataclasses import dataclass
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
from stages.config import ArchitectureConfig, RunConfig, SftConfig
from stages.data.chat import Renderer, RowRefusedError, make_renderer
from stages.data.draw import smallest_by_hash
from stages.data.rows import PROMPTS, SFT_METRICS, SUPERVISED
from stages.data.store import build_store
from stages.data.timings import TimingsWriter
from stages.errors import ConfigError, InputError
from stages.model.source import ModelSource, resolve_model
from stages.progress import progress

if TYPE_CHECKING:  # torch is loaded only when there is something to train
    from stages.model.fit import Step
    from stages.model.learner import Learner

FORMAT_VERSION = 1
TOKEN_COLUMNS = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")


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
    )
    return produce(out, plan, lambda space: _fill(space, config, sft, data, base))


def _fill(
    space: Workspace, config: RunConfig, sft: SftConfig, data: Artifact, base: ModelSource | None
) -> Outcome:
    from stages.model.learner import open_student

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
        token_columns=TOKEN_COLUMNS,
        keep=lambda lengths: sum(lengths) <= sft.max_length,
    )
    rows_file.unlink()
    if not len(store):
        raise InputError(
            f"{data.path} leaves no row to train on ({too_long} longer than sft.max_length="
            f"{sft.max_length}, {refused} refused); raise sft.max_length or mend the data"
        )
    student = open_student(base_dir, store, sft, config.seed, renderer)
    last_loss = _train(space, student)
    student.save(space.path, tokenizer_dir)
    scratch.unlink()
    return Outcome(
        counts={
            "rows": len(store),
            "dropped_too_long": too_long,
            "dropped_refused": refused,
            "steps": student.total_steps,
        },
        metrics={"last_loss": last_loss},
        info={"attention": student.mode, "parameters": student.num_parameters},
        tokens=int(store.lengths_N.sum()),
        volatile=frozenset({"timings.parquet"}),
    )


def _train(space: Workspace, student: "Learner") -> float:
    """Take all steps, metrics written as they come; return the loss over the last tenth."""
    losses: list[float] = []
    with (
        TableWriter(space.file("metrics.parquet"), SFT_METRICS) as table,
        TimingsWriter(space.file("timings.parquet")) as timings,
        progress("sft", total=student.total_steps, unit="steps") as bar,
    ):

        def on_step(step: "Step") -> None:
            table.append(
                {
                    "step": step.step,
                    "epoch": step.epoch,
                    "learning_rate": step.learning_rate,
                    "loss": step.loss,
                    "grad_norm": step.grad_norm,
                    "rows": step.rows,
                    "tokens": step.tokens,
                }
            )
            timings.add(step.step, step.seconds, step.tokens)
            bar.note(f"loss {step.loss:.4f}")
            bar.advance(1, step.tokens)
            losses.append(step.loss)
            del losses[: -max(1, student.total_steps // 10)]

        student.train(on_step)
    return sum(losses) / len(losses)


def _render(path: Path, renderer: Renderer, data: Artifact, max_examples: int | None) -> int:
    """Write the chosen rows as tokens; return how many the renderer refused."""
    drawn = None
    if max_examples is not None:
        ids = (row["prompt_id"] for row in _prompts(data))
        drawn = smallest_by_hash(ids, max_examples, "sft")
    refused = 0
    with TableWriter(path, SUPERVISED) as table:
        for row in _prompts(data):
            if drawn is not None and row["prompt_id"] not in drawn:
                continue
            try:
                prompt = renderer.prompt_tokens(row["messages"])
                response = renderer.response_tokens(row["response"])
            except RowRefusedError:
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
