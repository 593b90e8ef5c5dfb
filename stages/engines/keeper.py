"""An engine that outlives the stage that opened it, and sleeps until the next one opens it."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from stages.artifacts.manifest import MANIFEST_NAME
from stages.config import EngineConfig
from stages.engines.base import Completion, Engine, KeptEngine, Request, Sampling
from stages.engines.prompts import model_room
from stages.errors import EngineError, SpinError

LENGTH_STEP = 64  # tokens; room for prompts somewhat longer than those seen so far

_log = logging.getLogger("spin")


class Keeper:
    """Opens engines like `open_engine`, and starts one only where the last cannot go on.

    A new one is started for other settings, a model of another architecture, requests longer than
    the last was opened for, or when a process of the last has died. Answers are those of an engine
    that was started for the model.
    """

    def __init__(self, open_engine: Callable[..., Engine], spare_tokens: int = 0) -> None:
        """Start nothing yet.

        Args:
            open_engine: starts an engine; see the function of this name.
            spare_tokens: by how much requests may be longer than those of the first stage.
        """
        self._open_engine = open_engine
        self._spare_tokens = spare_tokens
        self._engine: KeptEngine | None = None
        self._settings: tuple[EngineConfig, int] | None = None
        self._weights: str | None = None
        self._is_lent = False

    def open(
        self, config: EngineConfig, model_dir: Path, *, max_model_len: int, pad_token_id: int
    ) -> Engine:
        """Lend the engine with a model; it sleeps from its `close` on.

        Raises:
            SpinError: see the function `open_engine`.
        """
        assert not self._is_lent, "the engine is lent to one stage at a time"
        settings, weights = (config, pad_token_id), _fingerprint(model_dir)
        if settings != self._settings or not self._wake(model_dir, max_model_len, weights):
            self.close()
            length = self._foreseen(config, model_dir, max_model_len)
            engine = self._open_engine(
                config, model_dir, max_model_len=length, pad_token_id=pad_token_id, keep=True
            )
            if not isinstance(engine, KeptEngine):
                return engine
            self._engine, self._settings = engine, settings
        assert self._engine is not None, "it was woken or started"
        self._weights, self._is_lent = weights, True
        return _Lent(self._engine, self._take_back)

    def close(self) -> None:
        """End the engine."""
        engine, self._engine, self._settings = self._engine, None, None
        self._is_lent = False
        if engine is not None:
            engine.close()

    def __enter__(self) -> Self:
        """Return the keeper."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the engine."""
        self.close()

    def _wake(self, model_dir: Path, max_model_len: int, weights: str | None) -> bool:
        """Load a model into the engine that sleeps; return whether it could."""
        engine = self._engine
        if engine is None or not engine.can_wake(model_dir, max_model_len=max_model_len):
            return False
        reload = weights is None or weights != self._weights
        try:
            engine.wake(model_dir, max_model_len=max_model_len, reload=reload)
        except EngineError as error:
            _log.warning("%s; starting another", error)
            return False
        except SpinError:
            self.close()
            raise
        return True

    def _foreseen(self, config: EngineConfig, model_dir: Path, max_model_len: int) -> int:
        """Return a length limit that shall do for the stages to come."""
        from stages.engines.vllm import architecture

        if config.name != "vllm" or config.max_model_len is not None:
            return max_model_len
        if architecture(model_dir) is None:
            return max_model_len  # it is started for each model, and may depend on the limit
        wanted = -(-(max_model_len + self._spare_tokens) // LENGTH_STEP) * LENGTH_STEP
        return max(max_model_len, min(wanted, model_room(model_dir, None, 0)))

    def _take_back(self) -> None:
        """Put the engine to sleep, or end it where it is not well."""
        engine = self._engine
        if engine is None or not self._is_lent:
            return
        self._is_lent = False
        if not engine.whole:
            self.close()
            return
        try:
            engine.sleep()
        except EngineError as error:
            _log.warning("%s; another will be started", error)
            self.close()


class _Lent:
    """The keeper's engine, as a stage sees it."""

    def __init__(self, engine: Engine, take_back: Callable[[], None]) -> None:
        self._engine = engine
        self._take_back = take_back

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """See `Engine.generate`."""
        return self._engine.generate(requests, sampling)

    def close(self) -> None:
        """Give the engine back."""
        self._take_back()


def _fingerprint(model_dir: Path) -> str | None:
    """Return what tells an artifact's weights from all others; None for other folders.

    A manifest has the hashes of all files, and artifacts are never changed; other folders, such
    as those of merged adapters, have no name that says what they hold.
    """
    manifest = model_dir / MANIFEST_NAME
    if not manifest.is_file():
        return None
    return f"{model_dir.resolve()} {hashlib.sha256(manifest.read_bytes()).hexdigest()}"
