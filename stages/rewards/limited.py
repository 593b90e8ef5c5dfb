"""The rewards that run in limited processes: maths, regular expressions, a user's function."""

import os
from importlib.util import find_spec

from stages.config import RewardConfig
from stages.errors import ConfigError
from stages.rewards.base import Question
from stages.rewards.rows import Job, Row, RowPool, RowReward


def open_math(config: RewardConfig) -> RowReward:
    """Start what compares mathematical answers.

    Raises:
        ConfigError: the library is not installed.
    """
    if find_spec("math_verify") is None:
        raise ConfigError(
            "reward.name=math needs math-verify, which is not installed; "
            "pip install 'spin-selfplay[math]'"
        )
    job = Job("math", {"human": config.math.human}, config.math.limit_s)
    return RowReward(RowPool(job, config.processes), _two_texts)


def open_regex(config: RewardConfig) -> RowReward:
    """Start what looks for a regular expression."""
    settings = {"pattern": config.regex.pattern, "compare": config.regex.compare}
    job = Job("regex", settings, config.regex.limit_s)
    return RowReward(RowPool(job, config.processes), _two_texts)


def open_python(config: RewardConfig, program: bytes) -> RowReward:
    """Start the user's function.

    Args:
        program: the bytes of the file that it stands in.

    Raises:
        ConfigError: the file does not run, or has no such function.
    """
    file = os.path.abspath(config.python.file or "")
    try:
        text = program.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"reward.python.file={file} is no UTF-8; correct it") from None
    settings = {"program": text, "file": file, "function": config.python.function}
    job = Job("python", settings, config.python.timeout_s, is_users_code=True)
    return RowReward(RowPool(job, config.processes), _all)


def _two_texts(question: Question, response: str) -> Row:
    return [response, question.human]


def _all(question: Question, response: str) -> Row:
    return [[dict(message) for message in question.messages], response, question.human]
