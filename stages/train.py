"""train: from the opponent's weights, the player learns to prefer the chosen responses."""

import math
from collections.abc import Sequence
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
    run_root,
)
from stages.artifacts.tables import Row
from stages.config import RunConfig, TrainConfig
from stages.data.chat import chat_fingerprint, make_renderer
from stages.data.rows import SCORED_PAIRS, TRAIN_METRICS
from stages.data.store import build_store
from stages.data.timings import TimingsWriter
from stages.errors import DivergedError, InputError
from stages.model.source import ModelSource, resolve_model
from stages.progress import progress

if TYPE_CHECKING:  # torch is loaded only when there is something to train
    from stages.model.fit import Step
    from stages.model.learner import Learner

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
    plan = Plan(
        stage="train",
        format_version=FORMAT_VERSION,
        config={"seed": config.seed, "train": config.train.identity()},
        inputs={"pairs": pairs.input_ref(root), "model": model.ref},
        fingerprints={"chat": chat_fingerprint(model.path, config.chat)},
    )
    return produce(out, plan, lambda space: _fill(space, config, pairs, model))


def _fill(space: Workspace, config: RunConfig, pairs: Artifact, source: ModelSource) -> Outcome:
    from stages.model.learner import open_player

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
    renderer = make_renderer(source.verified(), config.chat)
    player = open_player(source.path, store, config.train, config.seed, renderer)
    same_model = pairs.manifest.inputs["model"].key == source.ref.key
    first_loss = _check_start(player, config.train, must_be_ln2=same_model)
    last = _train(space, player)
    player.save(space.path, source.path)
    scratch.unlink()
    return Outcome(
        counts={"pairs": len(store), "dropped_too_long": too_long, "steps": player.total_steps},
        metrics={"first_loss": first_loss, **last},
        info={"attention": player.mode, "reference_is_opponent": same_model},
        tokens=int(store.lengths_N.sum()),
        volatile=frozenset({"timings.parquet"}),
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


def _train(space: Workspace, player: "Learner") -> dict[str, float]:
    """Take all steps, metrics written as they come; return means over the last tenth."""
    tail: list[Step] = []
    with (
        TableWriter(space.file("metrics.parquet"), TRAIN_METRICS) as table,
        TimingsWriter(space.file("timings.parquet")) as timings,
        progress("train", total=player.total_steps, unit="steps") as bar,
    ):

        def on_step(step: "Step") -> None:
            table.append(_metrics_row(step))
            timings.add(step.step, step.seconds, step.tokens)
            bar.note(f"loss {step.loss:.4f} margin {step.metrics['margin']:.3f}")
            bar.advance(1, step.tokens)
            tail.append(step)
            del tail[: -max(1, player.total_steps // 10)]

        player.train(on_step)
    return {
        "last_loss": _mean([s.loss for s in tail]),
        "last_accuracy": _mean([s.metrics["accuracy"] for s in tail]),
        "last_margin": _mean([s.metrics["margin"] for s in tail]),
    }


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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
