"""A model on its way from one artifact to the next: loaded, checked, trained, saved."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stages.artifacts.shards import ShardStore
from stages.config import LoraConfig, OptimConfig, SftConfig, TrainConfig
from stages.data.chat import Renderer
from stages.data.store import RowStore
from stages.data.tokens import pair_tokens
from stages.errors import ConfigError
from stages.model import adapters
from stages.model.base import Base
from stages.model.carried import Carried, write_carried
from stages.model.checkpoints import Checkpoints
from stages.model.fit import Step, batch_rows, fit, make_ready
from stages.model.group import Group
from stages.model.load import load_model
from stages.model.memory import apply_activation_checkpointing, compile_layers
from stages.model.objectives import PairObjective, SupervisedObjective
from stages.model.optim import count_steps
from stages.model.pairs import COMPILED_LENGTH, PairForward, autocast, check_exact, placed
from stages.model.random_init import make_random_model
from stages.model.save import save_adapter, save_model, saved_dtype
from stages.model.sharding import gathered, gathered_adapter, open_sharded, shard
from stages.model.source import model_chain
from stages.objective.losses import PairLossOptions

log = logging.getLogger("spin")

_LN_2_OPTIONS = PairLossOptions(
    loss="sigmoid",
    beta=0.1,
    label_smoothing=0.0,
    length_normalized=False,
    reference_free=False,
    nll_weight=0.0,
)


class Learner:
    """A model with what it minimises; what sft and train have in common."""

    def __init__(
        self,
        forward: PairForward,
        objective: PairObjective | SupervisedObjective,
        config: OptimConfig,
        seed: int,
        group: Group,
        dtype: torch.dtype,
    ) -> None:
        """Hold a model that stands where it will be trained; `dtype` is that of what is saved."""
        make_ready(forward)  # before any check, which then sees what training will see
        self._forward = forward
        self._objective = objective
        self._config = config
        self._seed = seed
        self._group = group
        self._dtype = dtype

    @property
    def mode(self) -> str:
        """How pairs go through the model; see `PairForward`."""
        return self._forward.mode

    @property
    def num_parameters(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self._forward.model.parameters())

    @property
    def num_trained(self) -> int:
        """Number of weights that training changes."""
        return sum(p.numel() for p in self._forward.model.parameters() if p.requires_grad)

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps that `train` takes."""
        return count_steps(self._objective.num_rows, self._config)

    def check_exact(self) -> None:
        """Compare the fast way through the model with its slow twin on some rows of the data."""
        store = self._objective.store
        rows = batch_rows(0, len(store), self._config, self._seed)
        pairs = [pair_tokens(store.row(i)) for i in rows]
        check_exact(self._forward, pairs, self._config, self._group.highest)

    def train(
        self,
        on_step: Callable[[Step], None],
        shards: ShardStore,
        carried: Carried | None = None,
        keep_state: Path | None = None,
    ) -> None:
        """Take all steps, with checkpoints among a workspace's shards; see `fit`.

        Args:
            carried: optimizer state to go on with; None begins anew.
            keep_state: a folder to leave the optimizer's state in; None leaves none.
        """
        trained = fit(
            self._forward,
            self._objective,
            self._config,
            self._seed,
            self._group,
            on_step,
            Checkpoints(shards, self._config.checkpoint.keep),
            carried,
        )
        if keep_state is not None:
            steps = self.total_steps + (carried.steps if carried else 0)
            write_carried(keep_state, trained, self._config.optimizer, steps)
            self._group.wait_for_all()

    def save(
        self, folder: Path, renderer: Renderer, tokenizer_dir: Path, base: Base | None = None
    ) -> None:
        """Gather the weights, and let rank 0 write the model folder.

        Args:
            base: what the trained adapter is recorded to change, to write it alone; None writes
                a whole model.
        """
        model, chat = self._forward.model, (tokenizer_dir, renderer.template)
        if base is None:
            state = gathered(model, self._group, self._dtype)
            if state is not None:
                save_model(model, state, folder, *chat)
            return
        adapter = gathered_adapter(model, self._group)
        if adapter is not None:
            save_adapter(model, adapter, base, folder, self._dtype, *chat)

    def sigmoid_loss(self, beta: float) -> float:
        """Return the sigmoid loss of the first batch of pairs, without any update.

        While the player still is the reference it is ln 2, whatever β and the recipe's loss are.
        """
        objective = self._objective
        assert isinstance(objective, PairObjective), "only pairs have this loss"
        rows = batch_rows(0, objective.num_rows, self._config, self._seed)
        total = torch.zeros((), dtype=torch.float64, device=self._group.device)
        of_pairs = replace(objective, control=False)
        for micro in objective.prepare(rows, self._group.rank, self._group.num_ranks):
            with torch.no_grad(), autocast(self._group.device, self._config.precision):
                part, _ = of_pairs.loss_with(
                    placed(micro, self._group.device), replace(_LN_2_OPTIONS, beta=beta)
                )
            total += part
        self._group.add_up(total)
        return float(total)


def open_player(
    model_dir: Path,
    store: RowStore,
    config: TrainConfig,
    seed: int,
    renderer: Renderer,
    group: Group,
) -> Learner:
    """Return the player: the opponent's weights, to be trained on scored pairs.

    With `config.lora` they stay, and it is an adapter on them that is trained: a fresh one, or the
    opponent's own.
    """
    options = PairLossOptions(
        loss=config.loss,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        length_normalized=config.length_normalized,
        reference_free=config.reference_free,
        nll_weight=config.nll_weight,
    )
    forward = _open(model_dir, store, config, renderer, group, config.lora)
    if config.lora is not None:
        own = model_dir if config.lora.start == "adapter" else None
        adapters.fill(forward.model, config.lora, seed, own)
    objective = PairObjective(store, forward, config, options, config.control)
    dtype = saved_dtype(config.weights_dtype, model_dir)
    whole = config.lora is None or config.lora.output == "merged"
    if config.carry_optimizer and whole and dtype == torch.bfloat16 and group.rank == 0:
        log.warning(
            "train.carry_optimizer: the player is saved in bf16, which rounds away what an "
            "iteration adds to a weight if that is less than about 1/500 of it; set "
            "train.weights_dtype=float32 to keep all"
        )
    return Learner(forward, objective, config, seed, group, dtype)


def open_student(
    model_dir: Path | None,
    store: RowStore,
    config: SftConfig,
    seed: int,
    renderer: Renderer,
    group: Group,
) -> Learner:
    """Return the model of sft: a base model's weights, or random ones where there is none."""
    start: Any = model_dir or make_random_model(config.architecture, renderer, seed)
    forward = _open(start, store, config, renderer, group)
    objective = SupervisedObjective(store, forward, config)
    dtype = saved_dtype(config.weights_dtype, model_dir)
    return Learner(forward, objective, config, seed, group, dtype)


def _open(
    start: Path | Any,
    store: RowStore,
    config: OptimConfig,
    renderer: Renderer,
    group: Group,
    lora: LoraConfig | None = None,
) -> PairForward:
    """Return a model, from a folder or as it is, ready to be trained by the ranks of a group.

    Args:
        lora: adapters to attach, whose weights are filled in later; with `start: adapter` to the
            base of the folder's own.
    """
    if group.num_ranks > 1 and config.attention == "single":
        raise ConfigError(
            "attention=single is the slow way that others are compared with, in one process; "
            f"with {group.num_ranks} take auto"
        )

    def wrap(model: Any) -> PairForward:
        room = getattr(model.config, "max_position_embeddings", None)
        if room is not None and store.longest > room:
            raise ConfigError(
                f"the longest row has {store.longest} tokens, and the model takes {room}; "
                f"set max_length={room} or less"
            )
        if lora is not None:
            adapters.attach(model, lora)
        apply_activation_checkpointing(model, config.activation_checkpointing)
        forward = PairForward(
            model,
            config.attention,
            renderer.pad_token_id,
            max_tokens=store.longest,
            pad_to_multiple=COMPILED_LENGTH if config.compile else 1,
        )
        if config.compile:
            compile_layers(model)
        return forward

    if lora is not None and lora.start == "adapter":
        start = model_chain(start)[-2]
    sharded = group.num_ranks > 1 or config.sharding.cpu_offload
    if sharded and isinstance(start, Path):
        return open_sharded(start, wrap, group, config.sharding, config.precision)
    model = load_model(start) if isinstance(start, Path) else start
    if not sharded:
        return wrap(model.to(group.device))
    forward = wrap(model)
    shard(forward, group, config.sharding, config.precision)
    return forward
