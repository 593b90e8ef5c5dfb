"""train: from the opponent's weights, the player learns to prefer the chosen responses."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stages.artifacts import (
    Artifact,
    Manifest,
    Outcome,
    Plan,
    TableWriter,
    Workspace,
    open_artifact,
    produce,
    run_root,
)
from stages.config import RunConfig, TrainConfig
from stages.data.chat import Renderer, make_renderer
from stages.data.rows import SCORED_PAIRS, TRAIN_METRICS
from stages.data.store import build_store
from stages.data.timings import TimingsWriter
from stages.errors import DivergedError, InputError
from stages.model.fit import Step, batch_rows, fit, make_accelerator
from stages.model.load import ModelSource, load_model, resolve_model
from stages.model.objectives import PairObjective, stored_reference
from stages.model.optim import count_steps
from stages.model.pairs import PairForward, autocast, pair_tokens
from stages.model.save import save_model, source_dtype
from stages.objective.losses import PairLossOptions, pair_losses
from stages.progress import progress

log = logging.getLogger("spin")

FORMAT_VERSION = 1
TOKEN_COLUMNS = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
STORED_COLUMNS = (
    *TOKEN_COLUMNS,
    "win_probability",
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
        InputError: inputs are missing, of another kind, or hold no pair.
        DivergedError: the first loss is not ln 2 though the reference is the opponent, or a loss
            or gradient is not finite.
    """
    pairs = open_artifact(inputs.pairs, stages=("score",), verify=config.verify)
    root = run_root(out)
    model = resolve_model(inputs.model, inputs.revision, root, config.verify)
    renderer = make_renderer(model.path, config.chat)
    plan = Plan(
        stage="train",
        format_version=FORMAT_VERSION,
        config={"seed": config.seed, "train": config.train.identity()},
        inputs={"pairs": pairs.input_ref(root), "model": model.ref},
        fingerprints={"chat": renderer.fingerprint},
    )
    return produce(out, plan, lambda space: _fill(space, config, pairs, model, renderer))


def _fill(
    space: Workspace, config: RunConfig, pairs: Artifact, source: ModelSource, renderer: Renderer
) -> Outcome:
    scratch = space.path / "rows.scratch"
    store, too_long = build_store(
        pairs.files("part-"),
        SCORED_PAIRS,
        STORED_COLUMNS,
        scratch,
        token_columns=TOKEN_COLUMNS,
        keep=lambda lengths: lengths[0] + max(lengths[1:]) <= config.train.max_length,
    )
    if not len(store):
        raise InputError(
            f"{pairs.path} has no pair to train on ({too_long} longer than train.max_length="
            f"{config.train.max_length}); if all were identical, the opponent already answers as "
            "the data does"
        )
    accelerator = make_accelerator()
    model = load_model(source.path).to(accelerator.device)
    dtype = source_dtype(model, config.train.weights_dtype)
    objective = PairObjective(
        store=store,
        forward=PairForward(model, config.train.attention, renderer.pad_token_id),
        options=_loss_options(config.train),
        config=config.train,
        control=config.train.control,
    )
    same_model = pairs.manifest.inputs["model"].key == source.ref.key
    first_loss = _check_start(objective, config, accelerator, must_be_ln2=same_model)
    last = _train(space, objective, model, config, accelerator)
    save_model(model, space.path, source.path, renderer.template, dtype)
    scratch.unlink()
    steps = count_steps(len(store), config.train)
    return Outcome(
        counts={"pairs": len(store), "dropped_too_long": too_long, "steps": steps},
        metrics={"first_loss": first_loss, **last},
        info={"attention": objective.forward.mode, "reference_is_opponent": same_model},
        tokens=int(store.lengths_N.sum()),
        volatile=frozenset({"timings.parquet"}),
    )


def _train(
    space: Workspace, objective: PairObjective, model: Any, config: RunConfig, accelerator: Any
) -> dict[str, float]:
    """Run the loop with its metrics written as it goes; return means over the last tenth."""
    total = count_steps(objective.num_rows, config.train)
    tail: list[Step] = []
    with (
        TableWriter(space.file("metrics.parquet"), TRAIN_METRICS) as table,
        TimingsWriter(space.file("timings.parquet")) as timings,
        progress("train", total=total, unit="steps") as bar,
    ):

        def on_step(step: Step) -> None:
            table.append(_metrics_row(step))
            timings.add(step.step, step.seconds, step.tokens)
            bar.advance(1, step.tokens)
            bar.note(f"loss {step.loss:.4f} margin {step.metrics['margin']:.3f}")
            tail.append(step)
            del tail[: -max(1, total // 10)]

        fit(model, objective, config.train, config.seed, accelerator, on_step)
    return {
        "last_loss": _mean([s.loss for s in tail]),
        "last_accuracy": _mean([s.metrics["accuracy"] for s in tail]),
        "last_margin": _mean([s.metrics["margin"] for s in tail]),
    }


def _check_start(
    objective: PairObjective, config: RunConfig, accelerator: Any, *, must_be_ln2: bool
) -> float:
    """Return the sigmoid loss of the first batch before any update; it is ln 2.

    The player still is the opponent, so this one number checks template, masks, packing and
    stored log-probabilities together.

    Raises:
        DivergedError: it is not ln 2 within the tolerance of the precision.
    """
    rows = batch_rows(0, objective.num_rows, config.train, config.seed)
    options = PairLossOptions(
        loss="sigmoid",
        beta=min(config.train.beta, STEP_0_BETA),
        label_smoothing=0.0,
        length_normalized=False,
        reference_free=False,
        nll_weight=0.0,
    )
    total = 0.0
    for micro in objective.micro_batches(rows):
        stored = [objective.store.row(rows[i]) for i in micro]
        with torch.inference_mode(), autocast(accelerator.device, config.train.precision):
            policy = objective.forward([pair_tokens(row) for row in stored])
        losses_B = pair_losses(policy, stored_reference(stored, policy), options).losses_B
        total += float(losses_B.double().sum())
    loss = total / len(rows)
    tolerance = STEP_0_TOLERANCE[config.train.precision]
    if must_be_ln2 and not abs(loss - math.log(2)) <= tolerance:
        raise DivergedError(
            f"step 0: the loss is {loss:.6f}, not ln 2 = 0.693147 (tolerance {tolerance}), though "
            "the reference is the opponent: the stored log-probabilities are not this model's. "
            "Run score again with this model, chat template and precision"
        )
    return loss


def _metrics_row(step: Step) -> dict[str, Any]:
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


def _loss_options(config: TrainConfig) -> PairLossOptions:
    return PairLossOptions(
        loss=config.loss,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        length_normalized=config.length_normalized,
        reference_free=config.reference_free,
        nll_weight=config.nll_weight,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
