"""What training minimises: the loss on pairs, and the supervised loss on responses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.config import ForwardConfig
from stages.data.store import RowStore
from stages.data.tokens import pair_tokens
from stages.model.pairs import PairForward
from stages.objective.losses import PairLogprobs, PairLossOptions, pair_losses

PAIR_METRICS = (
    "accuracy",
    "margin",
    "chosen_logratio",
    "rejected_logratio",
    "chosen_logprob",
    "rejected_logprob",
)


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

    def micro_batches(self, rows: Sequence[int]) -> list[list[int]]:
        """See `fit.Objective`."""
        pairs = [pair_tokens(self.store.row(i)) for i in rows]
        return self.forward.micro_batches(
            pairs, self.config.token_budget, self.config.micro_batch_size
        )

    def tokens(self, rows: Sequence[int]) -> int:
        """See `fit.Objective`."""
        return int(self.store.lengths_N[list(rows)].sum())

    def chosen_nll(self, policy: PairLogprobs, batch: Sequence[int]) -> Tensor:
        """Return this part of the batch's mean negative log-likelihood a chosen token."""
        batch_tokens = sum(len(self.store.row(i)["chosen_token_ids"]) for i in batch)
        return -policy.chosen_B.sum() / batch_tokens


@dataclass
class PairObjective(_RowObjective):
    """The DPO-style loss on pairs whose reference log-probabilities are stored columns.

    `control` minimises the chosen responses' mean negative log-likelihood a token instead: the
    control arm, on the same rows and with the same metrics.
    """

    options: PairLossOptions
    control: bool = False
    metric_names: tuple[str, ...] = PAIR_METRICS

    def loss(self, rows: Sequence[int], batch: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See `fit.Objective`; the batch's loss is the mean over its pairs."""
        stored = [self.store.row(i) for i in rows]
        policy = self.forward([pair_tokens(row) for row in stored])
        reference = stored_reference(stored, policy)
        out = pair_losses(policy, reference, self.options, _win_probabilities(stored, policy))
        metrics = (
            out.accuracies_B,
            out.margins_B,
            policy.chosen_B - reference.chosen_B,
            policy.rejected_B - reference.rejected_B,
            policy.chosen_B,
            policy.rejected_B,
        )
        loss = self.chosen_nll(policy, batch) if self.control else out.losses_B.sum() / len(batch)
        return loss, torch.stack([m.detach().sum() for m in metrics])


@dataclass
class SupervisedObjective(_RowObjective):
    """Mean negative log-likelihood a response token, over the batch."""

    metric_names: tuple[str, ...] = ()

    def loss(self, rows: Sequence[int], batch: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See `fit.Objective`."""
        policy = self.forward([pair_tokens(self.store.row(i)) for i in rows])
        return self.chosen_nll(policy, batch), torch.zeros(0)


def stored_reference(rows: Sequence[dict[str, Any]], like: PairLogprobs) -> PairLogprobs:
    """Return the reference's stored log-probabilities of some rows, placed beside `like`."""
    device = like.chosen_B.device
    return PairLogprobs(
        torch.tensor([row["reference_chosen_logprob"] for row in rows], device=device),
        torch.tensor([row["reference_rejected_logprob"] for row in rows], device=device),
        like.chosen_tokens_B,
        like.rejected_tokens_B,
    )


def _win_probabilities(rows: Sequence[dict[str, Any]], like: PairLogprobs) -> Tensor | None:
    values = [row["win_probability"] for row in rows]
    if any(value is None for value in values):
        return None
    return torch.tensor(values, device=like.chosen_B.device)
