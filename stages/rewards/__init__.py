"""Rewards: a response becomes a score. An error is an error, never a default score."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.artifacts import InputRef
from stages.artifacts.keys import sha256_bytes, sha256_text
from stages.config import RewardConfig
from stages.errors import ConfigError, InputError
from stages.model.source import ModelSource, resolve_model
from stages.rewards.base import (
    REASONS,
    Question,
    Reward,
    RuleReward,
    Score,
    Scored,
    Unscored,
)
from stages.rewards.exact import exact_reward
from stages.rewards.gsm8k import gsm8k_reward
from stages.rewards.judge import open_judge, template_of
from stages.rewards.limited import open_math, open_python, open_regex

__all__ = [
    "REASONS",
    "Question",
    "Reward",
    "RewardSource",
    "Score",
    "Scored",
    "Unscored",
    "find_reward",
    "open_reward",
    "shard_prompts",
]

_SHARD_PROMPTS = {"judge": 16, "model": 256}
_MOST_SHARD_PROMPTS = 2048


@dataclass(frozen=True)
class RewardSource:
    """A reward that was found: what it is made of, and its identity for keys."""

    config: RewardConfig
    identity: Mapping[str, Any]
    """What decides its scores: the settings, and hashes of the files that they name."""
    inputs: Mapping[str, InputRef] = field(default_factory=dict)
    """What it reads beside settings: the reward model."""
    program: bytes = b""
    """The file of a `python` reward, as it was hashed."""
    model: ModelSource | None = None
    swap: bool = True
    """Whether a judge sees each pair of answers in both orders."""


def find_reward(
    config: RewardConfig, root: Path | None, verify: bool = True, *, heldout: bool = False
) -> RewardSource | None:
    """Return the reward that a recipe names, or None for `none`; the files it names are hashed.

    Args:
        root: the run directory that recorded paths are relative to.
        verify: check the SHA-256 of a model artifact's files before they are loaded.
        heldout: each answer is to be scored for itself: a judge compares with the human response.

    Raises:
        InputError: a file or model that it names does not exist or is refused.
        CorruptError: the model is an artifact that was damaged.
    """
    if config.name == "none":
        return None
    if heldout and config.name == "judge":
        judge = config.judge.model_copy(update={"against": "human"})
        config = config.model_copy(update={"judge": judge})
    identity = config.identity()
    if config.name == "python":
        program = _read_program(config.python.file)
        identity["python"] |= {"sha256": sha256_bytes(program)}
        return RewardSource(config, identity, program=program)
    if config.name == "judge":
        identity["judge"] |= {"template": sha256_text(template_of(config.judge))}
        return RewardSource(config, identity)
    if config.name == "model":
        assert config.model.path is not None, "checked with the recipe"
        model = resolve_model(config.model.path, config.model.revision, root, verify)
        return RewardSource(config, identity, {"reward_model": model.ref}, model=model)
    return RewardSource(config, identity)


def shard_prompts(config: RewardConfig) -> int:
    """Return the number of prompts whose scores are committed together."""
    return config.shard_prompts or _SHARD_PROMPTS.get(config.name, _MOST_SHARD_PROMPTS)


@contextmanager
def open_reward(source: RewardSource) -> Iterator[Reward]:
    """Lend a reward, and end its processes when the block ends.

    Raises:
        ConfigError: it cannot be opened as the recipe says.
        InputError: its model, or a library that it needs, cannot be loaded.
    """
    reward = _make(source)
    try:
        yield reward
    finally:
        reward.close()


def _make(source: RewardSource) -> Reward:
    config = source.config
    match config.name:
        case "gsm8k":
            return RuleReward(gsm8k_reward)
        case "exact":
            return RuleReward(functools.partial(exact_reward, config.exact))
        case "math":
            return open_math(config)
        case "regex":
            return open_regex(config)
        case "python":
            return open_python(config, source.program)
        case "judge":
            return open_judge(config.judge, swap=source.swap)
        case "model":
            from stages.rewards.model import open_model  # torch, which other rewards need not

            assert source.model is not None, "found with the source"
            return open_model(config.model, source.model)
    raise ConfigError(f"reward.name={config.name} scores nothing; choose another")


def _read_program(file: str | None) -> bytes:
    assert file is not None, "checked with the recipe"
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise InputError(
            f"reward.python.file={file} cannot be read ({error.strerror}); correct the path"
        ) from None
