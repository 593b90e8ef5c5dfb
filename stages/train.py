"""train: from the opponent's weights, the player learns to prefer the chosen responses."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.artifacts import (
    Artifact,
    Manifest,
    Outcome,
    Plan,
    Workspace,
    open_artifact,
    produce,
    run_root,
)
from stages.artifacts.tables import Row
from stages.config import ChatConfig, RunConfig, TrainConfig
from stages.data.chat import chat_fingerprints, make_renderer
from stages.data.rows import SCORED_PAIRS, TRAIN_METRICS
from stages.data.store import build_store, open_store
from stages.data.tokens import TOKEN_COLUMNS
from stages.errors import ConfigError, DivergedError, InputError
from stages.journal import open_journal
from stages.model.base import Base
from stages.model.group import Group, Resources, led, open_group, resources, together
from stages.model.source import ModelSource, resolve_model

if TYPE_CHECKING:  # torch is loaded only when there is something to train
    from stages.model.fit import Step
    from stages.model.learner import Learner

FORMAT_VERSION = 1
STORED_COLUMNS = (
    *TOKEN_COLUMNS,
    "win_probability",
    "weight",
    "reference_chosen_logprob",
    "reference_rejected_logprob",
)
STEP_0_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
STEP_0_BETA = 0.1
"""β of the step-0 check where the recipe's is larger: β multiplies the rounding noise too."""


@dataclass(frozen=True)
class TrainInputs:
    """What train reads."""

    pairs: Path
    """The output of score."""
    model: str
    """The opponent, whose weights the player starts from."""
    revision: str | None = None


def run(config: RunConfig, inputs: TrainInputs, out: Path) -> Manifest:
    """Train the player and write it as a model folder, with metrics of every step.

    Raises:
        ConfigError: the opponent's own adapter is to be trained on, and it has none or another;
            or train.lora is set and peft is not installed.
        InputError: inputs are missing, of another kind, or hold no pair.
        DivergedError: the first loss is not ln 2 though the reference is the opponent, or a loss
            or gradient is not finite.
    """
    return led(config.train, _work, out, lambda: _lead(config, inputs, out))


def _lead(config: RunConfig, inputs: TrainInputs, out: Path) -> Manifest:
    pairs = open_artifact(inputs.pairs, stages=("score",), verify=config.verify)
    root = run_root(out)
    model = resolve_model(inputs.model, inputs.revision, root, config.verify)
    refs = {"pairs": pairs.input_ref(root), "model": model.ref}
    lora = config.train.lora
    changed = model
    if lora is not None and lora.start == "adapter":
        changed = _base_of_own_adapter(model, inputs.model)
        refs["base"] = changed.ref
    base = changed.as_base(out) if lora is not None and lora.output == "adapter" else None
    plan = Plan(
        stage="train",
        format_version=FORMAT_VERSION,
        config={"seed": config.seed, "train": config.train.identity()},
        inputs=refs,
        fingerprints=chat_fingerprints(model.path, config.chat),
    )
    return produce(
        out, plan, lambda space: _fill(space, config, pairs, model, base), resumable=True
    )


def _base_of_own_adapter(model: ModelSource, name: str) -> ModelSource:
    if model.base is None:
        raise ConfigError(
            f"train.lora.start=adapter goes on from the opponent's own adapter, but {name} is a "
            "whole model; set start=merged, in iteration 0 only by `iterations: {0: {train: "
            "{lora: {start: merged}}}}` in the recipe, and output=adapter before"
        )
    return model.base


@dataclass(frozen=True)
class _Job:
    """What every rank is told."""

    space: Workspace
    rows: Path
    model_dir: Path
    config: TrainConfig
    seed: int
    chat: ChatConfig
    reference_is_opponent: bool
    base: Base | None
    """What the adapter is recorded to change, where it is written alone; None: a whole model."""


@dataclass(frozen=True)
class _Report:
    """What rank 0 tells of its work."""

    steps: int
    metrics: dict[str, float]
    attention: str
    num_trained: int
    used: Resources


def _fill(
    space: Workspace,
    config: RunConfig,
    pairs: Artifact,
    source: ModelSource,
    base: Base | None,
) -> Outcome:
    if config.train.lora is not None:
        from stages.model.adapters import require_peft

        require_peft()
    scratch = space.path / "rows.scratch"
    store, too_long = build_store(
        pairs.files("part-"),
        SCORED_PAIRS,
        STORED_COLUMNS,
        scratch,
        keep=lambda lengths: lengths[0] + max(lengths[1:]) <= config.train.max_length,
    )
    if not len(store):
        raise InputError(
            f"{pairs.path} has no pair to train on ({too_long} longer than train.max_length="
            f"{config.train.max_length}); if all were identical, the opponent already answers as "
            "the data does"
        )
    same_model = pairs.manifest.inputs["model"].key == source.ref.key
    job = _Job(
        space,
        scratch,
        source.verified(),
        config.train,
        config.seed,
        config.chat,
        same_model,
        base,
    )
    report = together(_work, job, config.train)
    scratch.unlink()
    return Outcome(
        counts={"pairs": len(store), "dropped_too_long": too_long, "steps": report.steps},
        metrics=report.metrics,
        info={
            "attention": report.attention,
            "reference_is_opponent": same_model,
            "trained_parameters": report.num_trained,
            **report.used.info(),
        },
        tokens=int(store.lengths_N.sum()),
        peak_memory_bytes=report.used.peak_memory_bytes,
        volatile=frozenset({"timings.parquet"}),
    )


def _work(job: _Job) -> _Report:
    """Train as one rank; rank 0 also writes."""
    from stages.model.learner import open_player

    group = open_group(job.config)
    renderer = make_renderer(job.model_dir, job.chat)
    store = open_store(job.rows)
    player = open_player(job.model_dir, store, job.config, job.seed, renderer, group)
    player.check_exact()
    first_loss = _check_start(player, job.config, must_be_ln2=job.reference_is_opponent)
    last = _train(job, group, player)
    player.save(job.space.path, renderer, job.model_dir, job.base)
    return _Report(
        player.total_steps,
        {"first_loss": first_loss, **last},
        player.mode,
        player.num_trained,
        resources(group),
    )


def _check_start(player: "Learner", config: TrainConfig, *, must_be_ln2: bool) -> float:
    """Return the sigmoid loss of the first batch before any update; it is ln 2.

    The player still is the opponent, so this one number checks template, masks, packing and
    stored log-probabilities together.

    Raises:
        DivergedError: it is not ln 2 within the tolerance of the precision.
    """
    loss = player.sigmoid_loss(min(config.beta, STEP_0_BETA))
    tolerance = STEP_0_TOLERANCE[config.precision]
    if must_be_ln2 and not abs(loss - math.log(2)) <= tolerance:
        raise DivergedError(
            f"step 0: the loss is {loss:.6f}, not ln 2 = 0.693147 (tolerance {tolerance}), though "
            "the reference is the opponent: the stored log-probabilities are not this model's. "
            "Run score again with this model, chat template and precision"
        )
    return loss


def _train(job: _Job, group: Group, player: "Learner") -> dict[str, float]:
    """Take all steps, rank 0 writing down each; return means over the last tenth."""
    folder, total = job.space.path, player.total_steps
    with open_journal(
        group.rank, folder, "train", TRAIN_METRICS, total, _metrics_row, _remark
    ) as journal:
        player.train(journal.add, job.space.shards)
    return {
        "last_loss": journal.tail_mean(lambda step: step.loss),
        "last_accuracy": journal.tail_mean(lambda step: step.metrics["accuracy"]),
        "last_margin": journal.tail_mean(lambda step: step.metrics["margin"]),
    }


def _remark(step: "Step") -> str:
    return f"loss {step.loss:.4f} margin {step.metrics['margin']:.3f}"


def _metrics_row(step: "Step") -> Row:
    return {
        "step": step.step,
        "epoch": step.epoch,
        "learning_rate": step.learning_rate,
        "loss": step.loss,
        **step.metrics,
        "grad_norm": step.grad_norm,
        "pairs": step.rows,
        "tokens": step.tokens,
    }
