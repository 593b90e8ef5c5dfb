"""What every kind of suite is given."""

from dataclasses import dataclass
from pathlib import Path

from stages.config import RunConfig
from stages.engines import OpenEngine

STAGE = "suite"
"""What the manifests of all kinds say."""


@dataclass(frozen=True)
class SuiteInputs:
    """What a suite reads; which of it is needed, its kind says."""

    name: str
    model: str | None = None
    """The model that is asked."""
    revision: str | None = None
    data: Path | None = None
    """The output of prepare: the suite's own prompts, or those of the run, held-out rows only."""
    answers: Path | None = None
    """An evaluation of the model, whose answers are taken instead of asking it."""
    against: Path | None = None
    """An artifact with the answers that it is compared with; None: the human ones of `data`."""
    judged: Path | None = None
    """What an outside judge found; see docs/evaluation.md."""


@dataclass(frozen=True)
class SuiteWork:
    """One suite to be asked."""

    config: RunConfig
    inputs: SuiteInputs
    out: Path
    open_engine: OpenEngine
