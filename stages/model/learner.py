"""A model on its way from one artifact to the next: loaded, trained, checked, saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stages.config import OptimConfig, SftConfig, TrainConfig
from stages.data.chat import Renderer
from stages.data.store import RowStore
from stages.data.tokens import pair_tokens
from stages.model.fit import Objective, Step, batch_rows, fit, make_accelerator
from stages.model.load import load_model
from stages.model.objectives import PairObjective, SupervisedObjective, stored_reference
from stages.model.optim import count_steps
from stages.model.pairs import PairForward, autocast
from stages.model.random_init import make_random_model
from stages.model.save import save_model, source_dtype
from stages.objective.losses import PairLossOptions, pair_losses


class Learner:
    """A model with what it minimises; what sft and train have in common."""

    def __init__(
        self,
        model: Any,
        make_objective: Callable[[PairForward], Objective],
        config: OptimConfig,
        seed: int,
        renderer: Renderer,
    ) -> None:
        """Place the model on accelerate's device and choose how pairs go through it."""
        self._accelerator = make_accelerator()
        self._model = model.to(self._accelerator.device)
        self._dtype = source_dtype(model, config.weights_dtype)
        self._forward = PairForward(model, config.attention, renderer.pad_token_id)
        self._objective = make_objective(self._forward)
        self._config = config
        self._seed = seed
        self._renderer = renderer

    @property
    def mode(self) -> str:
        """How pairs go through the model; see `PairForward`."""
        return self._forward.mode

    @property
    def num_parameters(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self._model.parameters())

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps that `train` takes."""
        return count_steps(self._objective.num_rows, self._config)

    def train(self, on_step: Callable[[Step], None]) -> None:
        """Take all steps; see `fit`."""
        fit(self._model, self._objective, self._config, self._seed, self._accelerator, on_step)

    def save(self, folder: Path, tokenizer_dir: Path) -> None:
        """Write the model folder; the learner is of no use afterwards."""
        save_model(self._model, folder, tokenizer_dir, self._renderer.template, self._dtype)

    def sigmoid_loss(self, beta: float) -> float:
        """Return the sigmoid loss of the first batch of pairs, without any update.

        While the player still is the reference it is ln 2, whatever β and the recipe's loss are.
        """
        assert isinstance(self._objective, PairObjective), "only pairs have this loss"
        rows = batch_rows(0, self._objective.num_rows, self._config, self._seed)
        options = PairLossOptions(
            loss="sigmoid",
            beta=beta,
            label_smoothing=0.0,
            length_normalized=False,
            reference_free=False,
            nll_weight=0.0,
        )
        total = 0.0
        for micro in self._objective.micro_batches(rows):
            stored = [self._objective.store.row(rows[i]) for i in micro]
            device = self._accelerator.device
            with torch.inference_mode(), autocast(device, self._config.precision):
                policy = self._forward([pair_tokens(row) for row in stored])
            losses_B = pair_losses(policy, stored_reference(stored, policy), options).losses_B
            total += float(losses_B.double().sum())
        return total / len(rows)


def open_player(
    model_dir: Path, store: RowStore, config: TrainConfig, seed: int, renderer: Renderer
) -> Learner:
    """Return the player: the opponent's weights, to be trained on scored pairs."""
    options = PairLossOptions(
        loss=config.loss,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        length_normalized=config.length_normalized,
        reference_free=config.reference_free,
        nll_weight=config.nll_weight,
    )
    return Learner(
        load_model(model_dir),
        lambda forward: PairObjective(store, forward, config, options, config.control),
        config,
        seed,
        renderer,
    )


def open_student(
    model_dir: Path | None, store: RowStore, config: SftConfig, seed: int, renderer: Renderer
) -> Learner:
    """Return the model of sft: a base model's weights, or random ones where there is none."""
    if model_dir is None:
        model = make_random_model(config.architecture, renderer, seed)
    else:
        model = load_model(model_dir)
    return Learner(
        model, lambda forward: SupervisedObjective(store, forward, config), config, seed, renderer
    )
