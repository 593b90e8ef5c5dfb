"""What is said of an iteration's pairs: lengths, margins, and how much lengths alone give away.

Figures do not depend on how the rows are divided into batches: counts are whole numbers, and
numbers with a fraction are added in the order of the rows.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.data.pairing import SURPLUS, Candidates, Floats, Ints, Responses, Verdict

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
MARGIN_DIGITS = 3


@dataclass
class Distribution:
    """Counts by value: exact in little memory, where values are whole or rounded."""

    counts: Counter[float] = field(default_factory=Counter)

    def add(self, values_N: npt.NDArray[Any]) -> None:
        """Count some values."""
        values, counts = np.unique(values_N, return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            self.counts[value] += count

    def summary(self) -> dict[str, Any]:
        """Return the mean, and quantiles: the least value that so large a share does not exceed."""
        values = sorted(self.counts)
        reached = np.cumsum([self.counts[value] for value in values])
        total = int(reached[-1])
        places = [max(0, math.ceil(share * total) - 1) for share in QUANTILES]
        return {
            "mean": math.fsum(value * count for value, count in self.counts.items()) / total,
            "quantiles": {
                f"{share:g}": values[int(np.searchsorted(reached, place, side="right"))]
                for share, place in zip(QUANTILES, places, strict=True)
            },
        }


@dataclass
class PairFigures:
    """Lengths and margins of some pairs."""

    count: int = 0
    chosen: Distribution = field(default_factory=Distribution)
    rejected: Distribution = field(default_factory=Distribution)
    difference: Distribution = field(default_factory=Distribution)
    """Tokens of the chosen response more than of the rejected one."""
    margin: Distribution = field(default_factory=Distribution)

    def add(self, pairs: pa.Table) -> None:
        """Count some rows of PAIRS."""
        chosen, rejected = (
            pc.list_value_length(pairs[f"{side}_token_ids"]).to_numpy()
            for side in ("chosen", "rejected")
        )
        self.count += pairs.num_rows
        self.chosen.add(chosen)
        self.rejected.add(rejected)
        self.difference.add(chosen - rejected)
        margin = pc.subtract(pairs["chosen_reward"], pairs["rejected_reward"]).drop_null()
        self.margin.add(_rounded(margin.to_numpy()))

    def summary(self) -> dict[str, Any]:
        """Return the figures for the report."""
        if not self.count:
            return {"pairs": 0}
        return {
            "pairs": self.count,
            "chosen_tokens": self.chosen.summary(),
            "rejected_tokens": self.rejected.summary(),
            "margin": self.margin.summary() if self.margin.counts else None,
            "length": length_confound(self.difference.counts),
        }

    def metrics(self) -> dict[str, float]:
        """Return the main figures for the manifest."""
        summary = self.summary()
        if not self.count:
            return {}
        found = {
            "chosen_tokens": summary["chosen_tokens"]["mean"],
            "rejected_tokens": summary["rejected_tokens"]["mean"],
            "chosen_longer_share": summary["length"]["chosen_longer_share"],
            "length_accuracy": summary["length"]["rule_accuracy"],
            "length_auc": summary["length"]["auc"],
        }
        return found | ({"margin": summary["margin"]["mean"]} if summary["margin"] else {})


def length_confound(difference: Mapping[float, int]) -> dict[str, Any]:
    """Return what one who sees only lengths can tell, from counts by (chosen − rejected) tokens.

    Returns:
        chosen_longer_share, ties half; the better of the rules "the longer one is chosen" and "the
        shorter one", and its accuracy, ties half; and the area under the curve of the difference
        as a score of "the first one is chosen", each pair shown both ways round: one half where
        lengths tell nothing, further from it the more the large differences point one way.
    """
    values = np.array(sorted(difference))
    counts = np.array([difference[value] for value in values.tolist()], np.int64)
    total = int(counts.sum())
    longer = (2 * int(counts[values > 0].sum()) + int(counts[values == 0].sum())) / (2 * total)
    # P(d > −e) + ½ P(d = −e) for two pairs' differences d and e.
    above = np.append(np.cumsum(counts[::-1])[::-1], 0)
    more = above[np.searchsorted(values, -values, side="right")]
    at_least = above[np.searchsorted(values, -values, side="left")]
    # Python's whole numbers: the sum may pass 2**63.
    twice = sum(a * b for a, b in zip(counts.tolist(), (more + at_least).tolist(), strict=True))
    return {
        "chosen_longer_share": longer,
        "rule": "longer" if longer >= 0.5 else "shorter",
        "rule_accuracy": max(longer, 1 - longer),
        "auc": twice / (2 * total**2),
    }


@dataclass
class WithinPrompts:
    """The correlation of two numbers of samples, each less its mean over the prompt's samples."""

    samples: int = 0
    prompts: int = 0
    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0

    def add(self, prompt_N: Ints, x_N: Floats, y_N: Floats) -> None:
        """Add all samples of some prompts."""
        prompts, group_N, sizes = np.unique(prompt_N, return_inverse=True, return_counts=True)
        x_N, y_N = (
            v - (np.bincount(group_N, v, len(prompts)) / sizes)[group_N] for v in (x_N, y_N)
        )
        self.samples += len(x_N)
        self.prompts += len(prompts)
        self.xx, self.xy, self.yy = (
            _add_in_order(total, values)
            for total, values in ((self.xx, x_N * x_N), (self.xy, x_N * y_N), (self.yy, y_N * y_N))
        )

    def correlation(self) -> float | None:
        """Return it; None where one of the two never varies within a prompt."""
        if not (self.xx > 0 and self.yy > 0):
            return None
        return max(-1.0, min(1.0, self.xy / math.sqrt(self.xx * self.yy)))


@dataclass
class PairReport:
    """All that is counted while an iteration's pairs are made."""

    iteration: int
    candidates: int = 0
    """The iteration's own."""
    replay_candidates: int = 0
    identical: int = 0
    empty: int = 0
    cut_off: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    by_iteration: dict[int, PairFigures] = field(default_factory=dict)
    all_pairs: PairFigures = field(default_factory=PairFigures)
    reward_and_length: WithinPrompts = field(default_factory=WithinPrompts)

    def judged(self, responses: Responses, found: Candidates, verdict: Verdict) -> None:
        """Count what became of candidates."""
        self.candidates += len(found)
        self.identical += int(verdict.identical_C.sum())
        self.empty += int(verdict.empty_C.sum())
        self.cut_off += int(verdict.cut_off_C.sum())
        scored = responses.samples_S[~np.isnan(responses.reward_R[responses.samples_S])]
        self.reward_and_length.add(
            responses.prompt_R[scored],
            responses.reward_R[scored],
            responses.tokens_R[scored].astype(np.float64),
        )

    def left_out(self, reasons: pa.ChunkedArray) -> None:
        """Count dropped rows by reason."""
        for entry in pc.value_counts(reasons).to_pylist():
            self.dropped[entry["values"]] += entry["counts"]

    def made(self, pairs: pa.Table) -> None:
        """Count rows of PAIRS."""
        self.all_pairs.add(pairs)
        iterations = pairs["iteration"].to_numpy()
        for iteration in np.unique(iterations).tolist():
            of_it = pairs.filter(pa.array(iterations == iteration))
            self.by_iteration.setdefault(iteration, PairFigures()).add(of_it)

    def counts(self, most_back: int) -> dict[str, int]:
        """Return counts for the manifest: candidates = pairs + what was dropped.

        Args:
            most_back: iterations that pairs may be replayed from; 0: only the sum is told.
        """
        pairs = {back: self._figures(back).count for back in range(most_back + 1)}
        named = {f"pairs_replayed_{back}" if back else "pairs_own": n for back, n in pairs.items()}
        return {
            "candidates": self.candidates + self.replay_candidates,
            "pairs": self.all_pairs.count,
            **(named if most_back else {}),
            **{f"dropped_{reason}": n for reason, n in sorted(self.dropped.items())},
        }

    def metrics(self) -> dict[str, float | None]:
        """Return the main figures for the manifest, of the iteration's own pairs alone."""
        scored = {"reward_length_correlation": self.reward_and_length.correlation()}
        return {
            **self._shares(),
            **self._figures(0).metrics(),
            **(scored if self.reward_and_length.samples else {}),
        }

    def to_json(self) -> dict[str, Any]:
        """Return everything."""
        scored = self.reward_and_length
        return {
            "iteration": self.iteration,
            "own_candidates": {"candidates": self.candidates, **self._shares()},
            "replay_candidates": self.replay_candidates,
            "dropped": dict(self.dropped),
            "pairs": self.all_pairs.summary(),
            "pairs_by_iteration": {
                str(iteration): figures.summary()
                for iteration, figures in self.by_iteration.items()
            },
            "reward_and_length": {
                "samples": scored.samples,
                "prompts": scored.prompts,
                "correlation_within_prompts": scored.correlation(),
            },
        }

    def _figures(self, back: int) -> PairFigures:
        return self.by_iteration.get(self.iteration - back, PairFigures())

    def _shares(self) -> dict[str, float]:
        """Return shares of the iteration's own candidates, by what holds of them."""
        fit = self._figures(0).count + self.dropped[SURPLUS]
        counts = {
            "identical_share": self.identical,
            "empty_share": self.empty,
            "cut_off_share": self.cut_off,
            "dropped_share": self.candidates - fit,
        }
        return {name: count / self.candidates for name, count in counts.items()}


def _add_in_order(total: float, values_N: Floats) -> float:
    """Return the sum, one value after the other: numpy's own adds in blocks."""
    return float(np.add.accumulate(np.append(total, values_N))[-1])


def _rounded(values_N: Floats) -> Floats:
    """Return values with so few digits that there are few different ones."""
    return np.array([float(f"{value:.{MARGIN_DIGITS}g}") for value in values_N.tolist()])
