"""Log-probabilities of many pairs under one model, without gradients."""

from collections.abc import Sequence
from pathlib import Path

import torch

from stages.config import ForwardConfig
from stages.data.tokens import PairTokens
from stages.model.load import best_device, load_model
from stages.model.pairs import PairForward, autocast, check_exact, placed


class Scorer:
    """One loaded model that scores pairs."""

    def __init__(
        self,
        model_dir: Path,
        config: ForwardConfig,
        pad_token_id: int,
        max_tokens: int | None,
        device: torch.device | None = None,
    ) -> None:
        """Load the model; see `load_model` for what can go wrong, `PairForward` for the rest."""
        self._config = config
        self._forward = PairForward(
            load_model(model_dir).to(device or best_device()),
            config.attention,
            pad_token_id,
            max_tokens,
        )
        self._is_checked = False

    @property
    def mode(self) -> str:
        """How pairs go through the model; see `PairForward`."""
        return self._forward.mode

    def logprobs(self, pairs: Sequence[PairTokens]) -> list[tuple[float, float]]:
        """Return the summed log-probabilities of each pair's (chosen, rejected) response.

        Raises:
            DivergedError: the recipe insists on a way that is not exact for this model.
        """
        if pairs and not self._is_checked:
            check_exact(self._forward, pairs, self._config)
            self._is_checked = True
        return score_pairs(self._forward, pairs, self._config)


def score_pairs(
    forward: PairForward, pairs: Sequence[PairTokens], config: ForwardConfig
) -> list[tuple[float, float]]:
    """Return (chosen, rejected) log-probabilities of each pair, computed in micro-batches."""
    found = [(0.0, 0.0)] * len(pairs)
    device = forward.model.device
    (groups,) = forward.micro_batches(pairs, config.token_budget, config.micro_batch_size)
    for group in groups:
        with torch.inference_mode(), autocast(device, config.precision):
            out = forward(placed(forward.lay_out([pairs[i] for i in group]), device))
        both = zip(out.chosen_B.tolist(), out.rejected_B.tolist(), strict=True)
        for i, logprobs in zip(group, both, strict=True):
            found[i] = logprobs
    return found
