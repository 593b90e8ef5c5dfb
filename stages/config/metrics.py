"""Which metrics an evaluation can have: what a gate may ask for, known before anything is made.

One that cannot be is told at once. What only a judge, a library or the data can name is left open,
and is looked for once the start was evaluated.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from stages.config import RunConfig
from stages.config.sections import RewardConfig
from stages.config.suites import (
    OF_WINS,
    AlpacaEvalSuiteConfig,
    LmEvalSuiteConfig,
    MtBenchSuiteConfig,
    TaskSuiteConfig,
    WinRateSuiteConfig,
)

_OF_SAMPLES = ("cut_off_share", "empty_share", "mean_tokens", "repeated_share", "entropy")
_OF_ANSWERS = ("cut_off_share", "mean_tokens", "unscored_share")
_SHARES = re.compile(
    r"\w+_share|win_rate(_[a-z0-9_]+)?|heldout_(reward|length)_accuracy|(pass|majority)@\d+"
)
_SCORES = re.compile(r"((sampled|greedy|opponent)_)?accuracy")


@dataclass(frozen=True)
class Metrics:
    """What an evaluation can measure."""

    names: Sequence[str]
    open: str | None = None
    """A regular expression of what further names may be; None: there are no others."""

    def __contains__(self, name: str) -> bool:
        """Tell whether a metric may be one of them."""
        return name in self.names or (
            self.open is not None and re.fullmatch(self.open, name) is not None
        )


def metrics_of(config: RunConfig, suite: str | None) -> Metrics:
    """Return what a suite can measure; None: the run's own evaluation.

    See `evaluate.summarize`, and the functions that ask a suite of each kind.
    """
    chosen = config.suites[suite] if suite is not None else None
    match chosen:
        case None:
            return Metrics(_of_evaluation(config))
        case TaskSuiteConfig():
            return Metrics(_of_task(chosen), r"(pass|majority)@\d+")
        case WinRateSuiteConfig():
            return Metrics(chosen.metrics(config.reward))
        case MtBenchSuiteConfig():
            asked = ["cut_off_share", "mean_tokens", "unasked_share"]
            return Metrics([*asked, "score", "score_turn_1", "score_turn_2"], r"score_[a-z0-9_]+")
        case AlpacaEvalSuiteConfig():
            return Metrics(["cut_off_share", "mean_tokens", *OF_WINS], r"win_rate_[a-z0-9_]+")
        case LmEvalSuiteConfig():
            return Metrics([], ".*")


def is_a_share(config: RunConfig, suite: str | None, name: str) -> bool:
    """Tell whether a metric is surely between 0 and 1.

    A mean of scores is, unless a function or a model gave them; of lm-evaluation-harness's metrics
    it is not known.
    """
    chosen = config.suites[suite] if suite is not None else None
    if isinstance(chosen, LmEvalSuiteConfig):
        return False
    if _SCORES.fullmatch(name):
        return _reward_of(config, chosen).is_a_share
    return _SHARES.fullmatch(name) is not None


def _reward_of(config: RunConfig, suite: object) -> RewardConfig:
    own = suite.reward if isinstance(suite, TaskSuiteConfig | WinRateSuiteConfig) else None
    return own or config.reward


def _of_evaluation(config: RunConfig) -> list[str]:
    is_scored = config.reward.name != "none"
    names = ["prompts", "sampled_identical_share", "human_logprob_per_token", "human_mean_tokens"]
    names += ["human_repeated_share", *_of_comparison(is_scored=is_scored)]
    names += [f"{who}_{what}" for who in ("sampled", "opponent") for what in _OF_SAMPLES]
    if is_scored:
        scored = ["sampled", "opponent", *(["greedy"] if config.evaluate.greedy else [])]
        names += [f"{who}_{what}" for who in scored for what in ("accuracy", "unscored_share")]
    return names


def _of_comparison(*, is_scored: bool) -> list[str]:
    """Return what is measured of player and opponent together."""
    gain = ["sampled_gain", "sampled_gain_stderr"] if is_scored else []
    names = (
        "reward_accuracy", "reward_accuracy_stderr", "reward_margin", "kl", "kl_stderr",
        "human_logratio", "identical_share", "length_accuracy", "length_explained",
    )  # fmt: skip
    return gain + [f"heldout_{name}" for name in names]


def _of_task(suite: TaskSuiteConfig) -> list[str]:
    prefixes = [*([""] if suite.num_samples else []), *(["greedy_"] if suite.greedy else [])]
    answers = [f"{prefix}{what}" for prefix in prefixes for what in ("accuracy", *_OF_ANSWERS)]
    return [*answers, *(f"{way}@{k}" for k in suite.k for way in ("pass", "majority")), "prompts"]
