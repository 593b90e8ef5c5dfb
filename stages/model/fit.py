"""The one training loop: rows in a fixed order, gradient accumulation, clipping, metrics.

It knows nothing of pairs: an `Objective` says how rows become a loss. `sft` and `train` share it.
On a GPU it never waits for a step: loss, norm and metrics stay there until they are read, every
`log_every` steps, and a step that is not finite undoes itself there (see `optim.step_unless`).
"""

import logging
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stages.config import OptimConfig
from stages.data.store import epoch_order
from stages.errors import DivergedError
from stages.model.carried import Carried
from stages.model.checkpoints import Checkpoints
from stages.model.group import Group
from stages.model.optim import (
    count_steps,
    learning_rate,
    make_optimizer,
    set_learning_rate,
    step_unless,
    steps_an_epoch,
)
from stages.model.pairs import autocast, pinned, placed
from stages.model.sharding import sharded_parameters, synchronise_gradients
from stages.model.state_files import Trained

log = logging.getLogger("spin")

AHEAD = 2
"""Global batches read and packed while one is computed."""
SAME_SIGNAL_S = 2.0
"""Signals this close are one request: a process group gets it, and its parent passes it on."""
GO_ON, CHECKPOINT, LEAVE = range(3)
_LOSS, _NORM, _SECONDS, _METRICS = range(4)


class Objective(Protocol):
    """How rows become a loss. Row numbers are those of the training set."""

    metric_names: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Number of rows in the training set."""
        ...

    def tokens(self, rows: Sequence[int]) -> int:
        """Number of distinct tokens in some rows, for rates."""
        ...

    def prepare(self, rows: Sequence[int], rank: int, num_ranks: int) -> Sequence[Any]:
        """Return this rank's part of a global batch, as micro-batches; equally many on each.

        It runs in a thread beside training, and must not touch the model.
        """
        ...

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return what a micro-batch adds to the global batch's loss, and sums of the metrics.

        The parts of all micro-batches add up to the loss, however it was split.
        """
        ...


@dataclass(frozen=True)
class Step:
    """What one optimizer step was."""

    step: int
    epoch: float
    learning_rate: float
    loss: float
    grad_norm: float
    """Before clipping."""
    metrics: dict[str, float]
    """Means over the rows of the batch."""
    rows: int
    tokens: int
    seconds: float
    is_new: bool
    """False for a step of an earlier attempt, from whose checkpoint this one goes on."""


def fit(
    forward: nn.Module,
    objective: Objective,
    config: OptimConfig,
    seed: int,
    group: Group,
    on_step: Callable[[Step], None],
    checkpoints: Checkpoints | None = None,
    carried: Carried | None = None,
) -> Trained:
    """Train the model inside `forward` in place.

    Goes on from the newest of `checkpoints`, and writes some. SIGTERM or Ctrl-C ends it at the
    next micro-batch, with a checkpoint of the last whole step; a later second one ends it at once.

    Args:
        on_step: is told every step, also those of an earlier attempt, after its update.
        carried: optimizer state to go on with; the learning rate, too, goes on after its steps.

    Returns:
        The weights with the optimizer, as they are after the last step.

    Raises:
        InputError: `carried` is the state of another optimizer, or over other parameters.
        ConfigError: optimizer state can only be read by as many processes as wrote it.
        DivergedError: a loss or gradient is NaN or infinite; the update was not made.
    """
    make_ready(forward)
    loop = _Loop(forward, objective, config, seed, group, on_step, checkpoints, carried)
    loop.run()
    forward.eval()
    return loop.trained


def make_ready(forward: nn.Module) -> None:
    """Put a model into training mode, without any dropout, whatever a family calls it."""
    forward.train()
    for module in forward.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def batch_rows(step: int, num_rows: int, config: OptimConfig, seed: int) -> list[int]:
    """Return the row numbers of one global batch; (seed, step) decide them and nothing else."""
    epoch, inside = divmod(step, steps_an_epoch(num_rows, config))
    start = inside * config.batch_size
    order_N = epoch_order(num_rows, seed, epoch)
    return [int(row) for row in order_N[start : start + config.batch_size]]


class _Loop:
    """The state of one training, and what is done in turn with it."""

    def __init__(
        self,
        forward: nn.Module,
        objective: Objective,
        config: OptimConfig,
        seed: int,
        group: Group,
        on_step: Callable[[Step], None],
        checkpoints: Checkpoints | None,
        carried: Carried | None,
    ) -> None:
        self.forward, self.objective, self.config = forward, objective, config
        self.seed, self.group = seed, group
        self.on_step, self.checkpoints, self.carried = on_step, checkpoints, carried
        named = sharded_parameters(forward, forward.get_submodule("model"))
        self.parameters = {name: p for name, p in named.items() if p.requires_grad}
        self.optimizer = make_optimizer(self.parameters.values(), config)
        self.trained = Trained(self.parameters, self.optimizer)
        self.steps_before = 0
        if carried is not None:
            carried.check_fits(config.optimizer, self.trained)
            self.steps_before = carried.steps
        self.total_steps = count_steps(objective.num_rows, config)
        self.stop = torch.zeros((), device=group.device)
        """1 once a step was not finite: no later step changes anything."""
        self.history: list[list[float]] = []
        """Figures of the steps taken: loss, gradient norm, seconds, metrics."""
        self.unread: list[Tensor] = []
        self.read_at = self.saved_at = time.monotonic()

    def run(self) -> None:
        start = 0
        if self.checkpoints is not None:
            start, self.history = self.checkpoints.restore(self.trained)
            if start and self.group.rank == 0:
                log.info("going on after step %d of %d, from a checkpoint", start, self.total_steps)
            for step, figures in enumerate(self.history):
                self._tell(step, figures, is_new=False)
        if not start and self.carried is not None:  # else the checkpoint has what became of it
            self.carried.fill(self.trained)
        self.read_at = self.saved_at = time.monotonic()
        with _Interruption() as interruption:
            try:
                self._take_all(start, interruption)
                if self._agreed(interruption):
                    self._read()
                    self._save(len(self.history))
                self._read()
            finally:
                if self.checkpoints is not None:
                    self.checkpoints.finish()
        interruption.leave()

    def _take_all(self, start: int, interruption: "_Interruption") -> None:
        with closing(self._batches(start)) as batches:
            for step, batch in enumerate(batches, start):
                if not self._take(step, batch, interruption):
                    return
                self._attend(step + 1)

    def _agreed(self, interruption: "_Interruption") -> bool:
        """Tell whether any rank was asked to leave; all ask this equally often."""
        if self.group.highest(LEAVE if interruption.asked else GO_ON) != LEAVE:
            return False
        if not interruption.asked:
            interruption.ask(signal.SIGTERM)
        return True

    def _take(self, step: int, batch: Sequence[Any], interruption: "_Interruption") -> bool:
        """Take one step; False if a signal came before its update, which then is not made."""
        set_learning_rate(self.optimizer, self._learning_rate(step))
        figures = torch.zeros(
            1 + len(self.objective.metric_names), dtype=torch.float64, device=self.group.device
        )
        for number, micro in enumerate(batch):
            is_last = number + 1 == len(batch)
            every = self.config.sharding.reshard_after_forward
            synchronise_gradients(self.forward, is_last=is_last, every=every)
            micro = placed(micro, self.group.device)
            with autocast(self.group.device, self.config.precision):
                part, sums = self.objective.loss(micro)
            # Ranks' gradients are averaged, and their parts of the loss add up.
            (part * self.group.num_ranks).backward()  # type: ignore[no-untyped-call]
            figures[0] += part.detach()
            figures[1:] += sums
            if self._agreed(interruption):
                return False
        self.group.add_up(figures)
        # Offloaded gradients, and so their norm, are on the CPU.
        norm = _clip(self.parameters.values(), self.config.max_grad_norm).to(self.group.device)
        bad = ~(torch.isfinite(figures[0]) & torch.isfinite(norm))
        self.stop = torch.maximum(self.stop, bad.to(self.stop.dtype))
        step_unless(self.optimizer, self.stop)
        self.optimizer.zero_grad(set_to_none=True)
        self.unread.append(torch.cat([figures[:1], norm.double().reshape(1), figures[1:]]))
        return True

    def _learning_rate(self, step: int) -> float:
        return learning_rate(self.steps_before + step, self.total_steps, self.config)

    def _attend(self, steps: int) -> None:
        """Read metrics and write a checkpoint, where it is time to."""
        if len(self.unread) >= _steps_unread(self.group, self.config):
            self._read()
        if self.group.highest(self._due(steps)) == CHECKPOINT and steps < self.total_steps:
            self._save(steps)

    def _due(self, steps: int) -> int:
        every = self.config.checkpoint
        by_steps = every.every_steps is not None and steps % every.every_steps == 0
        by_time = (
            every.every_minutes is not None
            and self.group.rank == 0
            and time.monotonic() - self.saved_at >= 60 * every.every_minutes
        )
        return CHECKPOINT if by_steps or by_time else GO_ON

    def _save(self, steps: int) -> None:
        self._read()  # raises if the weights are not those of a finite step
        if self.checkpoints is not None and steps:
            self.checkpoints.write(steps, self.trained, self.history)
        self.saved_at = time.monotonic()

    def _read(self) -> None:
        """Wait for the device, and tell the steps since the last time.

        Raises:
            DivergedError: one of them was not finite.
        """
        if not self.unread:
            return
        rows = torch.stack(self.unread).tolist()
        now = time.monotonic()
        seconds, self.read_at = (now - self.read_at) / len(rows), now
        self.unread.clear()
        for loss, norm, *metrics in rows:
            step = len(self.history)
            _refuse_non_finite(step, loss, norm)
            num_rows = len(batch_rows(step, self.objective.num_rows, self.config, self.seed))
            self.history.append([loss, norm, seconds, *(total / num_rows for total in metrics)])
            self._tell(step, self.history[-1], is_new=True)

    def _tell(self, step: int, figures: Sequence[float], *, is_new: bool) -> None:
        rows = batch_rows(step, self.objective.num_rows, self.config, self.seed)
        names = self.objective.metric_names
        self.on_step(
            Step(
                step=step,
                epoch=(step + 1) / steps_an_epoch(self.objective.num_rows, self.config),
                learning_rate=self._learning_rate(step),
                loss=figures[_LOSS],
                grad_norm=figures[_NORM],
                metrics=dict(zip(names, figures[_METRICS:], strict=True)),
                rows=len(rows),
                tokens=self.objective.tokens(rows),
                seconds=figures[_SECONDS],
                is_new=is_new,
            )
        )

    def _batches(self, start: int) -> Generator[Sequence[Any]]:
        """Yield this rank's part of every step's batch, prepared ahead in a thread."""
        ahead: deque[Future[Sequence[Any]]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
            for step in range(start, self.total_steps + AHEAD):
                if step < self.total_steps:
                    ahead.append(thread.submit(self._prepare, step))
                if step >= start + AHEAD:
                    yield ahead.popleft().result()

    def _prepare(self, step: int) -> Sequence[Any]:
        rows = batch_rows(step, self.objective.num_rows, self.config, self.seed)
        batch = self.objective.prepare(rows, self.group.rank, self.group.num_ranks)
        if self.group.device.type == "cuda":
            return [pinned(micro) for micro in batch]
        return batch


class _Interruption:
    """Catches SIGTERM and SIGINT while it lasts, for the loop to end where nothing is lost."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self.ask)
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def ask(self, number: int, frame: FrameType | None = None) -> None:
        """Note the wish to leave; a second one, if it is not the same passed on, is obeyed now."""
        now = time.monotonic()
        if self.asked and now - self._asked_at > SAME_SIGNAL_S:
            self.leave()
        if not self.asked:
            self.asked, self._asked_at = number, now

    def leave(self) -> None:
        """Do what the signal would have done, if one came."""
        if self.asked is not None:
            self.restore()
            signal.raise_signal(self.asked)

    def restore(self) -> None:
        """Let signals do again what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _steps_unread(group: Group, config: OptimConfig) -> int:
    """Return after how many steps metrics are read: on a CPU there is nothing to wait for."""
    return 1 if group.device.type == "cpu" else config.log_every


def _clip(parameters: Any, max_norm: float) -> Tensor:
    """Scale all gradients so that their norm is at most `max_norm`; return it from before."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _refuse_non_finite(step: int, loss: float, norm: float) -> None:
    for name, value in (("loss", loss), ("gradient norm", norm)):
        if not math.isfinite(value):
            raise DivergedError(
                f"step {step}: the {name} is {value}; stopped before the update. Lower the "
                "learning rate, or try precision=fp32"
            )
