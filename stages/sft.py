"""sft: supervised fine-tuning, to make a first opponent from a base model or from nothing."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from stages.config import ArchitectureConfig, RunConfig, SftConfig
from stages.data.chat import Renderer, RowRefusedError, make_renderer
from stages.data.draw import smallest_by_hash
from stages.data.rows import PROMPTS, SFT_METRICS, SUPERVISED
from stages.data.store import build_store
from stages.data.timings import TimingsWriter
from stages.errors import ConfigError, InputError
from stages.model.fit import Step, fit, make_accelerator
from stages.model.load import ModelSource, load_model, resolve_model
from stages.model.objectives import SupervisedObjective
from stages.model.optim import count_steps
from stages.model.pairs import PairForward
from stages.model.random_init import make_random_model
from stages.model.save import save_model, source_dtype
from stages.model.tokenizer import train_tokenizer
from stages.progress import progress

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
    accelerator = make_accelerator()
    if base is None:
        tokenizer_dir = _train_tokenizer(space.path, sft.architecture, data)
        renderer = make_renderer(tokenizer_dir, config.chat)
        model = make_random_model(sft.architecture, renderer, config.seed)
    else:
        tokenizer_dir = base.path
        renderer = make_renderer(tokenizer_dir, config.chat)
        model = load_model(base.path)
    model.to(accelerator.device)
    dtype = source_dtype(model, sft.weights_dtype)

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
    objective = SupervisedObjective(
        store, PairForward(model, sft.attention, renderer.pad_token_id), sft
    )
    last_loss = _train(space, objective, model, sft, config.seed, accelerator)
    save_model(model, space.path, tokenizer_dir, renderer.template, dtype)
    scratch.unlink()
    return Outcome(
        counts={
            "rows": len(store),
            "dropped_too_long": too_long,
            "dropped_refused": refused,
            "steps": count_steps(len(store), sft),
        },
        metrics={"last_loss": last_loss},
        info={
            "attention": objective.forward.mode,
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        tokens=int(store.lengths_N.sum()),
        volatile=frozenset({"timings.parquet"}),
    )


def _train(
    space: Workspace,
    objective: SupervisedObjective,
    model: Any,
    sft: SftConfig,
    seed: int,
    accelerator: Any,
) -> float:
    total = count_steps(objective.num_rows, sft)
    losses: list[float] = []
    with (
        TableWriter(space.file("metrics.parquet"), SFT_METRICS) as table,
        TimingsWriter(space.file("timings.parquet")) as timings,
        progress("sft", total=total, unit="steps") as bar,
    ):

        def on_step(step: Step) -> None:
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
            bar.advance(1, step.tokens)
            bar.note(f"loss {step.loss:.4f}")
            losses.append(step.loss)
            del losses[: -max(1, total // 10)]

        fit(model, objective, sft, seed, accelerator, on_step)
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

    train_tokenizer(texts(), architecture.vocab_size).save_pretrained(folder)
    return folder


def _prompts(data: Artifact) -> Iterator[dict[str, Any]]:
    return read_rows(data.files("train-"), PROMPTS)
