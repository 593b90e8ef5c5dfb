"""What training minimises: the loss on pairs, and the supervised loss on responses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.config import ForwardConfig
from stages.data.store import RowStore
from stages.data.tokens import pair_tokens
from stages.errors import InputError
from stages.model.pairs import PairForward, PairInput
from stages.objective.losses import PairLogprobs, PairLossOptions, pair_losses

PAIR_METRICS = (
    "accuracy",
    "margin",
    "chosen_logratio",
    "rejected_logratio",
    "chosen_logprob",
    "rejected_logprob",
    "chosen_logprob_per_token",
)


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward pass, ready to be computed, as a part of a global batch."""

    inputs: PairInput
    reference_B2: Tensor | None
    """The reference's log-probabilities of (chosen, rejected); None in supervised training."""
    win_probability_B: Tensor | None
    weights_B: Tensor
    """Each row's weight in the loss, divided by their mean in the global batch."""
    rows_in_batch: int
    """Rows of the whole global batch, on all ranks."""
    chosen_tokens_in_batch: float
    """Chosen tokens of the whole global batch, each counted as often as its row weighs."""
    counts: float
    """1, or 0 for a row that a rank computes only because others have one more than it."""


@dataclass
class _RowObjective:
    """What objectives on the rows of a store have in common; see `fit.Objective`."""

    store: RowStore
    forward: PairForward
    config: ForwardConfig

    @property
    def num_rows(self) -> int:
        """Number of rows in the training set."""
        return len(self.store)

    def tokens(self, rows: Sequence[int]) -> int:
        """See `fit.Objective`."""
        return int(self.store.lengths_N[list(rows)].sum())

    def prepare(self, rows: Sequence[int], rank: int, num_ranks: int) -> list[MicroBatch]:
        """See `fit.Objective`. Touches no model: it may run beside a forward pass."""
        stored = [self.store.row(i) for i in rows]
        weights = _weights(stored)
        pairs = [pair_tokens(row) for row in stored]
        parts = self.forward.micro_batches(
            pairs, self.config.token_budget, self.config.micro_batch_size, num_ranks
        )
        chosen_tokens = sum(
            weight * len(pair.chosen) for weight, pair in zip(weights, pairs, strict=True)
        )
        return [
            MicroBatch(
                inputs=self.forward.lay_out([pairs[i] for i in part or (0,)]),
                reference_B2=_reference([stored[i] for i in part or (0,)]),
                win_probability_B=_win_probabilities([stored[i] for i in part or (0,)]),
                weights_B=torch.tensor([weights[i] for i in part or (0,)]),
                rows_in_batch=len(rows),
                chosen_tokens_in_batch=chosen_tokens,
                counts=1.0 if part else 0.0,
            )
            for part in parts[rank]
        ]


@dataclass
class PairObjective(_RowObjective):
    """The DPO-style loss on pairs whose reference log-probabilities are stored columns.

    `control` minimises the chosen responses' mean negative log-likelihood a token instead: the
    control arm, on the same rows, by the same weights and with the same metrics.
    """

    options: PairLossOptions
    control: bool = False
    metric_names: tuple[str, ...] = PAIR_METRICS

    def loss(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """See `fit.Objective`; the batch's loss is the mean over its pairs by their weights.

        The metrics are plain sums over pairs.
        """
        return self.loss_with(batch, self.options)

    def loss_with(self, batch: MicroBatch, options: PairLossOptions) -> tuple[Tensor, Tensor]:
        """As `loss`, with other options."""
        policy = self.forward(batch.inputs)
        assert batch.reference_B2 is not None, "pairs have a reference"
        reference = PairLogprobs(
            batch.reference_B2[:, 0],
            batch.reference_B2[:, 1],
            policy.chosen_tokens_B,
            policy.rejected_tokens_B,
        )
        out = pair_losses(policy, reference, options, batch.win_probability_B)
        metrics = (
            out.accuracies_B,
            out.margins_B,
            policy.chosen_B - reference.chosen_B,
            policy.rejected_B - reference.rejected_B,
            policy.chosen_B,
            policy.rejected_B,
            -out.nll_B,
        )
        sums = torch.stack([m.detach().sum() for m in metrics])
        if self.control:
            loss = -(batch.weights_B * policy.chosen_B).sum() / batch.chosen_tokens_in_batch
        else:
            loss = (batch.weights_B * out.losses_B).sum() / batch.rows_in_batch
        return loss * batch.counts, sums * batch.counts


@dataclass
class SupervisedObjective(_RowObjective):
    """Mean negative log-likelihood a response token, over the batch."""

    metric_names: tuple[str, ...] = ()

    def loss(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """See `fit.Objective`."""
        policy = self.forward(batch.inputs)
        loss = -policy.chosen_B.sum() / batch.chosen_tokens_in_batch
        return loss * batch.counts, torch.zeros(0, device=loss.device)


def _reference(rows: Sequence[dict[str, Any]]) -> Tensor | None:
    if "reference_chosen_logprob" not in rows[0]:
        return None
    columns = ("reference_chosen_logprob", "reference_rejected_logprob")
    return torch.tensor([[row[name] for name in columns] for row in rows])


def _win_probabilities(rows: Sequence[dict[str, Any]]) -> Tensor | None:
    values = [row.get("win_probability") for row in rows]
    return None if any(value is None for value in values) else torch.tensor(values)


def _weights(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Return each row's weight over their mean: exactly 1 where all are 1, or rows have none.

    Raises:
        InputError: a weight is negative or no number, or all are 0.
    """
    found = [float(row.get("weight", 1.0)) for row in rows]
    total = math.fsum(found)
    if not (min(found) >= 0 and 0 < total < math.inf):
        raise InputError(
            f"the weights of a batch of {len(found)} pairs are {min(found)} to {max(found)}; they "
            "must be 0 or more, and not all 0: run pair and score again with other replay weights"
        )
    return [weight * len(found) / total for weight in found]
