"""What every kind of suite is given."""

from dataclasses import dataclass
from pathlib import Path

from stages.artifacts import Workspace, run_root
from stages.config import EngineConfig, RunConfig, SamplingConfig
from stages.data.chat import make_renderer
from stages.engines import OpenEngine
from stages.errors import ConfigError
from stages.model.source import ModelSource, resolve_model
from stages.suites.answering import Asker

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

    @property
    def root(self) -> Path | None:
        """The run that the evaluation lies in."""
        return run_root(self.out)

    def model(self) -> ModelSource:
        """Find the model that is asked.

        Raises:
            ConfigError: none is named.
            InputError, CorruptError: see `resolve_model`.
        """
        if self.inputs.model is None:
            raise ConfigError(f"suites.{self.inputs.name} asks a model; name one by --model")
        inputs = self.inputs
        return resolve_model(inputs.model or "", inputs.revision, self.root, self.config.verify)

    def asker(
        self,
        model: ModelSource,
        sampling: SamplingConfig,
        space: Workspace,
        engine: EngineConfig | None,
    ) -> Asker:
        """Return what asks the model.

        Args:
            engine: the suite's own, if it has one.
        """
        config = self.config
        renderer = make_renderer(model.verified(), config.chat)
        return Asker(
            f"suite {self.inputs.name}", self.open_engine, config.answering_engine(engine),
            sampling, config.seed, renderer, space,
        )  # fmt: skip

    def refuse_all_but(self, *used: str) -> None:
        """Check that no input is given that this kind of suite has no use for.

        Args:
            used: fields of `SuiteInputs`, beside its name.

        Raises:
            ConfigError: there is one.
        """
        kind = self.config.suites[self.inputs.name].kind
        for name in ("model", "revision", "data", "answers", "against", "judged"):
            if name not in used and getattr(self.inputs, name) is not None:
                raise ConfigError(
                    f"--{name}={getattr(self.inputs, name)}: suites.{self.inputs.name} is of kind "
                    f"{kind}, which has no use for it; leave it out"
                )
