"""Evaluates by a judge; dies (SIGKILL) before it answers request argv[6] to the engine.

Its arguments: what to make, where, the model, the data, the judge's URL, and that number.
"""

import sys
from pathlib import Path
from typing import Any

from stages import evaluate, suite
from stages.artifacts import Manifest
from stages.config import RunConfig
from stages.evaluate import EvaluateInputs
from stages.suites import answering
from stages.suites.base import SuiteInputs
from tests.fakes import FakeEngine

SHARD_PROMPTS = 4
"""Prompts whose scores are kept together."""


def make(
    what: str, out: Path, model: Path, data: Path, engine: FakeEngine, url: str, **of_judge: Any
) -> Manifest:
    """Evaluate by a judge: by a suite of kind task or win_rate, or by `evaluate`."""
    judge = {"url": url, "model": "j", "concurrency": 1, "retries": 0, **of_judge}
    settings = {"max_new_tokens": 8}
    config = RunConfig.model_validate(
        {
            "reward": {"name": "judge", "shard_prompts": SHARD_PROMPTS, "judge": judge},
            "evaluate": {**settings, "precision": "fp32"},
            "suites": {"quiz": {"kind": "task", **settings}, "duel": {"kind": "win_rate"}},
        }
    )
    if what == "main":
        return evaluate.run(config, EvaluateInputs(str(model), data), out, open_engine=engine.open)
    inputs = SuiteInputs(what, str(model), data=data)
    return suite.run(config, inputs, out, open_engine=engine.open)


def main() -> None:
    what, *places, url, kill_after = sys.argv[1:]
    out, model, data = map(Path, places)
    answering.ANSWER_SHARD = 8
    make(what, out, model, data, FakeEngine(int(kill_after), window=6), url)


if __name__ == "__main__":
    main()
