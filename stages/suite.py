"""suite: a named evaluation of the recipe's; one row an answer."""

from pathlib import Path

from stages import engines
from stages.artifacts import Manifest
from stages.config import (
    AlpacaEvalSuiteConfig,
    LmEvalSuiteConfig,
    MtBenchSuiteConfig,
    RunConfig,
    TaskSuiteConfig,
    WinRateSuiteConfig,
    suite_of,
)
from stages.engines import OpenEngine
from stages.suites.base import SuiteInputs, SuiteWork

__all__ = ["SuiteInputs", "run"]


def run(
    config: RunConfig,
    inputs: SuiteInputs,
    out: Path,
    *,
    open_engine: OpenEngine = engines.open_engine,
) -> Manifest:
    """Ask a suite; write its measures (see data/measures.py) and examples.parquet.

    Raises:
        ConfigError: the recipe has no such suite.
        InputError: inputs are missing or do not belong together.
    """
    suite = suite_of(config, inputs.name)
    work = SuiteWork(config, inputs, out, open_engine)
    match suite:
        case TaskSuiteConfig():
            from stages.suites import task

            return task.run(work, suite)
        case LmEvalSuiteConfig():
            from stages.suites import lm_eval

            return lm_eval.run(work, suite)
        case WinRateSuiteConfig():
            from stages.suites import win_rate

            return win_rate.run(work, suite)
        case MtBenchSuiteConfig():
            from stages.suites import mt_bench

            return mt_bench.run(work, suite)
        case AlpacaEvalSuiteConfig():
            from stages.suites import alpaca_eval

            return alpaca_eval.run(work, suite)
