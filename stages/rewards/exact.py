"""Exact match: the response is the human response, but for what the recipe overlooks."""

import re

from stages.config import ExactRewardConfig

_WHITE_SPACE = re.compile(r"\s+")


def exact_reward(config: ExactRewardConfig, response: str, human: str) -> float:
    """Return 1.0 where the two texts are equal once they are normalised, else 0.0."""
    return float(normalised(response, config) == normalised(human, config))


def normalised(text: str, config: ExactRewardConfig) -> str:
    """Return the text without the differences that are overlooked."""
    if config.collapse_whitespace:
        text = _WHITE_SPACE.sub(" ", text)
    if config.strip:
        text = text.strip()
    return text.casefold() if config.ignore_case else text
