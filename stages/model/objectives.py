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
class PairObjective:
    """The DPO-style loss on pairs whose reference log-probabilities are stored columns.

    `control` minimises the chosen responses' mean negative log-likelihood a token instead: the
    control arm, on the same rows and with the same metrics.
    """

    store: RowStore
    forward: PairForward
    options: PairLossOptions
    config: ForwardConfig
    control: bool = False
    metric_names: tuple[str, ...] = PAIR_METRICS

    @property
    def num_rows(self) -> int:
        """Number of pairs."""
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

    def loss(self, rows: Sequence[int], batch: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See `fit.Objective`; the batch's loss is the mean over its pairs."""
        stored = [self.store.row(i) for i in rows]
        policy = self.forward([pair_tokens(row) for row in stored])
        reference = stored_reference(stored, policy)
        out = pair_losses(policy, reference, self.options, _win_probabilities(stored, policy))
        if self.control:
            batch_tokens = sum(len(self.store.row(i)["chosen_token_ids"]) for i in batch)
            loss = -policy.chosen_B.sum() / batch_tokens
        else:
            loss = out.losses_B.sum() / len(batch)
        metrics = (
            out.accuracies_B,
            out.margins_B,
            policy.chosen_B - reference.chosen_B,
            policy.rejected_B - reference.rejected_B,
            policy.chosen_B,
            policy.rejected_B,
        )
        return loss, torch.stack([m.detach().sum() for m in metrics])


@dataclass
class SupervisedObjective:
    """Mean negative log-likelihood a response token, over the batch."""

    store: RowStore
    forward: PairForward
    config: ForwardConfig
    metric_names: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        """Number of prompts with their response."""
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

    def loss(self, rows: Sequence[int], batch: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See `fit.Objective`."""
        policy = self.forward([pair_tokens(self.store.row(i)) for i in rows])
        batch_tokens = sum(len(self.store.row(i)["chosen_token_ids"]) for i in batch)
        return -policy.chosen_B.sum() / batch_tokens, torch.zeros(0)


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
