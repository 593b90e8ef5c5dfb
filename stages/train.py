"""train: from the opponent's weights, the player learns to prefer the chosen responses."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.alarms import TrainingWatch
from stages.artifacts import (
    Artifact,
    Manifest,
    Outcome,
    Plan,
    Workspace,
    open_artifact,
    produce,
    read_batches,
    run_root,
)
from stages.artifacts.tables import Row
from stages.config import AlarmsConfig, ChatConfig, RunConfig, TrainConfig
from stages.data.chat import chat_fingerprints, make_renderer
from stages.data.rows import SCORED_PAIRS, TRAIN_METRICS
from stages.data.store import build_store, open_store
from stages.data.tokens import TOKEN_COLUMNS
from stages.errors import ConfigError, DivergedError, InputError
from stages.journal import open_journal
from stages.model.base import Base
from stages.model.group import Group, Resources, led, open_group, resources, together
from stages.model.source import OPTIMIZER_FOLDER, ModelSource, resolve_model
from stages.tracking import Tracked, tracked

if TYPE_CHECKING:  # torch is loaded only when there is something to train
    from stages.model.carried import Carried
    from stages.model.fit import Step
    from stages.model.learner import Learner

log = logging.getLogger("spin")

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
    optimizer_from: Path | None = None
    """The train artifact whose optimizer state and step count go on, with
    `train.carry_optimizer`; None begins anew."""


def run(config: RunConfig, inputs: TrainInputs, out: Path) -> Manifest:
    """Train the player and write it as a model folder, with metrics of every step.

    Raises:
        ConfigError: the opponent's own adapter is to be trained on, and it has none or another;
            train.lora is set and peft is not installed; or optimizer state is given that a recipe
            does not carry, or that as many processes cannot read.
        InputError: inputs are missing, of another kind, or hold no pair; or the optimizer state is
            that of another optimizer, or over other parameters.
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
    before = _optimizer_source(inputs.optimizer_from, config)
    if before is not None:
        refs["optimizer_from"] = before.input_ref(root)
    base = changed.as_base(out) if lora is not None and lora.output == "adapter" else None
    plan = Plan(
        stage="train",
        format_version=FORMAT_VERSION,
        config={"seed": config.seed, "train": config.train.identity()},
        inputs=refs,
        fingerprints=chat_fingerprints(model.path, config.chat),
    )
    found = _Found(pairs, model, base, before)
    run = tracked(config, out, plan.attempt_key)
    return produce(out, plan, lambda space: _fill(space, config, found, plan, run), resumable=True)


def _base_of_own_adapter(model: ModelSource, name: str) -> ModelSource:
    if model.base is None:
        raise ConfigError(
            f"train.lora.start=adapter goes on from the opponent's own adapter, but {name} is a "
            "whole model; set start=merged, in iteration 0 only by `iterations: {0: {train: "
            "{lora: {start: merged}}}}` in the recipe, and output=adapter before"
        )
    return model.base


def _optimizer_source(path: Path | None, config: RunConfig) -> Artifact | None:
    """Open the train artifact whose optimizer state goes on, if one is given."""
    if path is None:
        return None
    lora = config.train.lora
    if not config.train.carry_optimizer:
        raise ConfigError(
            f"--optimizer-from {path} is given, but train.carry_optimizer is false; set it, or "
            "leave the option out"
        )
    if lora is not None and lora.start == "merged":
        raise ConfigError(
            "train.carry_optimizer cannot go on with train.lora.start=merged: a fresh adapter has "
            "new parameters, which no optimizer state is of; set train.lora.start=adapter after "
            "iteration 0, or carry_optimizer=false"
        )
    artifact = open_artifact(path, stages=("train",), verify=config.verify)
    if not any(f.path.startswith(OPTIMIZER_FOLDER) for f in artifact.manifest.files):
        raise InputError(
            f"{path} kept no optimizer state, since it was trained without train.carry_optimizer; "
            "train it again with it, or leave --optimizer-from out to begin anew"
        )
    return artifact


@dataclass(frozen=True)
class _Found:
    """What rank 0 opened."""

    pairs: Artifact
    model: ModelSource
    base: Base | None
    before: Artifact | None
    """Whose optimizer state goes on."""


@dataclass(frozen=True)
class _Job:
    """What every rank is told."""

    space: Workspace
    rows: Path
    model_dir: Path
    config: TrainConfig
    seed: int
    chat: ChatConfig
    reference: str
    """What it is called in the manifest."""
    reference_is_opponent: bool
    base: Base | None
    """What the adapter is recorded to change, where it is written alone; None: a whole model."""
    optimizer_dir: Path | None
    """The optimizer state to go on with; None: anew."""
    alarms: AlarmsConfig
    tracked: Tracked | None


@dataclass(frozen=True)
class _Report:
    """What rank 0 tells of its work."""

    steps: int
    steps_before: int
    metrics: dict[str, float]
    attention: str
    num_trained: int
    used: Resources


def _fill(
    space: Workspace, config: RunConfig, found: _Found, plan: Plan, run: Tracked | None
) -> Outcome:
    if config.train.lora is not None:
        from stages.model.adapters import require_peft

        require_peft()
    if config.train.loss == "sppo":
        _check_win_probabilities(found.pairs)
    pairs, scratch = found.pairs, space.path / "rows.scratch"
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
            f"{config.train.max_length}); the dropped_ counts of pair's manifest.json say why "
            "others are not there: if all were identical, the opponent answers as the data does"
        )
    reference = pairs.manifest.inputs["model"]
    job = _Job(
        space,
        scratch,
        found.model.verified(),
        config.train,
        config.seed,
        config.chat,
        reference.path,
        reference.key == found.model.ref.key,
        found.base,
        _verified_state(found),
        config.alarms,
        run,
    )
    report = together(_work, job, config.train)
    scratch.unlink()
    return Outcome(
        counts={"pairs": len(store), "dropped_too_long": too_long, "steps": report.steps},
        metrics=report.metrics,
        info={
            "attention": report.attention,
            "reference": job.reference,
            "reference_is_opponent": job.reference_is_opponent,
            "optimizer": plan.inputs["optimizer_from"].path if found.before else "fresh",
            "steps_before": report.steps_before,
            "trained_parameters": report.num_trained,
            **report.used.info(),
        },
        tokens=int(store.lengths_N.sum()),
        peak_memory_bytes=report.used.peak_memory_bytes,
        volatile=frozenset({"timings.parquet"}),
    )


def _check_win_probabilities(pairs: Artifact) -> None:
    """Check that every pair has what the sppo loss is told; replayed pairs may have none.

    Raises:
        InputError: one has not.
    """
    batches = read_batches(pairs.files("part-"), SCORED_PAIRS, columns=["win_probability"])
    missing = sum(batch["win_probability"].null_count for batch in batches)
    if missing:
        raise InputError(
            f"{pairs.path}: {missing} pairs have no win probability, which train.loss=sppo needs; "
            "set pair.win_probability in all iterations whose pairs are trained on, and run pair "
            "again"
        )


def _verified_state(found: _Found) -> Path | None:
    """Return the folder of the optimizer state to go on with, its hashes checked."""
    if found.before is None:
        return None
    found.before.files(OPTIMIZER_FOLDER)
    if found.before.manifest.key != found.model.ref.key:
        log.warning(
            "the optimizer state is that of %s, and the weights are those of %s: it was not made "
            "on the way to them", found.before.path, found.model.ref.path,
        )  # fmt: skip
    return found.before.path / OPTIMIZER_FOLDER


def _work(job: _Job) -> _Report:
    """Train as one rank; rank 0 also writes."""
    from stages.model.carried import open_carried
    from stages.model.learner import open_player

    group = open_group(job.config)
    renderer = make_renderer(job.model_dir, job.chat)
    store = open_store(job.rows)
    player = open_player(job.model_dir, store, job.config, job.seed, renderer, group)
    carried = open_carried(job.optimizer_dir) if job.optimizer_dir else None
    player.check_exact()
    first_loss = _check_start(player, job, group)
    watch = TrainingWatch(
        player.total_steps,
        store.chosen_tokens / len(store),
        job.alarms,
        aloud=group.rank == 0,
    )
    last = _train(job, group, player, carried, watch)
    player.save(job.space.path, renderer, job.model_dir, job.base)
    return _Report(
        player.total_steps,
        carried.steps if carried else 0,
        {"first_loss": first_loss, **last},
        player.mode,
        player.num_trained,
        resources(group),
    )


def _check_start(player: "Learner", job: _Job, group: Group) -> float:
    """Return the sigmoid loss of the first batch before any update; it is ln 2.

    The player still is the opponent, so this one number checks template, masks, packing and
    stored log-probabilities together. Where the reference is another model nothing is known of
    it, which is said once.

    Raises:
        DivergedError: it is not ln 2 within the tolerance of the precision.
    """
    beta, tolerance = min(job.config.beta, STEP_0_BETA), STEP_0_TOLERANCE[job.config.precision]
    loss = player.sigmoid_loss(beta)
    if not job.reference_is_opponent:
        if group.rank == 0:
            log.info(
                "the reference (%s) is not the opponent, so the first loss need not be ln 2 = "
                "0.6931 and checks no stored log-probability: it is %.4f at β=%g",
                job.reference, loss, beta,
            )  # fmt: skip
        return loss
    if not abs(loss - math.log(2)) <= tolerance:
        raise DivergedError(
            f"step 0: the loss is {loss:.6f}, not ln 2 = 0.693147 (tolerance {tolerance}), though "
            "the reference is the opponent: the stored log-probabilities are not this model's. "
            "Run score again with this model, chat template and precision"
        )
    return loss


def _train(
    job: _Job, group: Group, player: "Learner", carried: "Carried | None", watch: TrainingWatch
) -> dict[str, float]:
    """Take all steps, rank 0 writing down each; return means over the last tenth, and the worst.

    Raises:
        DivergedError: an alarm fired that is set to stop.
    """
    folder, total = job.space.path, player.total_steps
    keep_state = folder / OPTIMIZER_FOLDER if job.config.carry_optimizer else None
    with open_journal(
        group.rank, folder, "train", TRAIN_METRICS, total, _metrics_row, _remark, job.tracked
    ) as journal:
        has_moved = [False]

        def tell(step: "Step") -> None:
            journal.add(step)
            has_moved[0] |= step.learning_rate > 0
            watch.add(
                step.step,
                accuracy=step.metrics["accuracy"],
                chosen_logratio=step.metrics["chosen_logratio"],
                grad_norm=step.grad_norm,
                is_new=step.is_new,
            )

        player.train(tell, job.space.shards, carried, keep_state)
    if group.rank == 0 and not has_moved[0]:
        log.warning(
            "train: the learning rate was 0 in all %d steps (a warm-up begins with it), so the "
            "player is its opponent; give more pairs, or a smaller train.batch_size", total,
        )  # fmt: skip
    return {
        **watch.metrics(),
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
