"""Rewards: a response becomes a score. An error is an error, never a default score."""

from collections.abc import Callable

from stages.errors import ConfigError
from stages.rewards.gsm8k import gsm8k_reward

Reward = Callable[[str, str], float]
"""(response, human response) → score; raises ValueError where there is none."""

_RULES: dict[str, Reward] = {"gsm8k": gsm8k_reward}


def open_reward(name: str) -> Reward:
    """Return the reward that a recipe names.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in _RULES:
        raise ConfigError(f"reward.name={name!r} scores nothing; choose {', '.join(_RULES)}")
    return _RULES[name]
