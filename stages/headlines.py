"""What is told of metrics, and which first: a table, a chart or a line has no room for all."""

import re
from collections.abc import Iterable

from stages.artifacts.keys import KEY_CHARS
from stages.artifacts.manifest import InputRef, Manifest
from stages.config import RunConfig

HEADLINES = {
    "task": ("accuracy", "greedy_accuracy", r"pass@\d+", r"majority@\d+"),
    "win_rate": (
        "win_rate", "length_controlled_win_rate", "mean_reward", "other_mean_reward", "tie_share",
        "position_flip_share",
    ),
    "mt_bench": ("score", r"score_turn_\d", r"score_.*"),
    "alpaca_eval": ("length_controlled_win_rate", "win_rate", r"win_rate_.*", "tie_share"),
    "lm_eval": (
        r"open_llm_leaderboard_v1\.average", r"(?!mmlu_).*\.(acc_norm|exact_match|acc)(\..*)?",
    ),
}  # fmt: skip
"""By kind of suite, patterns of whole names, the most telling first."""
_MINOR = re.compile(r".*(_share|_tokens|_characters|_stderr.*|@1)|prompts|seconds.*")
"""What is told last: pass@1 and majority@1 are the accuracy, or nearly so."""


def in_order(names: Iterable[str], kind: str | None = None) -> list[str]:
    """Return the metrics of a suite, each once, the most telling first.

    Those of no headline stand behind in the order given, and behind them what is told beside:
    shares, lengths, errors. Of pass@k and majority@k the highest k stands first.

    Args:
        kind: the suite's; None where it is not known, which takes the headlines of all kinds.
    """
    kinds = [kind] if kind in HEADLINES else list(HEADLINES)
    patterns = [pattern for each in kinds if each for pattern in HEADLINES[each]]
    return sorted(dict.fromkeys(names), key=lambda name: _rank(name, patterns))


def _rank(name: str, patterns: list[str]) -> tuple[int, int, int, int]:
    is_minor = _MINOR.fullmatch(name) is not None
    number = re.search(r"@(\d+)$", name)
    k = int(number[1]) if number else 0
    for place, pattern in enumerate(patterns):
        if k != 1 and "_stderr" not in name and re.fullmatch(pattern, name):
            # pass@8, majority@8, pass@4, …: what is told of one k stands together
            group = next(i for i, each in enumerate(patterns) if "@" in each) if k else place
            return 0, group, -k, place
    return 2 if is_minor else 1, 0, 0, 0


def longer_side(value: float, low: float | None, high: float | None) -> float | None:
    """Return what is told as ± beside a value: the longer side of its interval, None without one.

    Near the ends of a metric's range, such as 0 and 1, the two sides differ.
    """
    return None if low is None or high is None else max(high - value, value - low)


def kind_of(config: RunConfig | None, suite: str) -> str | None:
    """Return the kind of a suite, where the recipe is known and has it."""
    found = config.suites.get(suite) if config else None
    return found.kind if found else None


def rival_input(made: Manifest) -> InputRef | None:
    """Return the model or evaluation that an evaluation compares its model with, if with any."""
    return made.inputs.get("against") or made.inputs.get("opponent")


def rival_of(made: Manifest) -> str | None:
    """Return whom an evaluation compares the model with, as its manifest names it, if with any.

    Of an artifact from outside of the run the manifest has the folder's name, which many share, so
    its key is told besides. Models are known by their names (their keys are folder:… or hub:…).
    """
    rival = rival_input(made)
    if rival is not None:
        is_known = rival.inside_run or ":" in rival.key
        return rival.path if is_known else f"{rival.path} (key {rival.key[:KEY_CHARS]})"
    if made.config.get("kind") == "win_rate":
        return "the human answers"
    reference = made.info.get("reference")
    return str(reference) if made.stage == "suite" and reference else None
