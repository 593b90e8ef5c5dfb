"""Engines: what answers prompts. One interface (`base.Engine`), and the door to those there are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from stages.config import EngineConfig
from stages.engines.base import Engine
from stages.engines.keeper import Keeper
from stages.engines.places import engines_on, gpus_used
from stages.model.base import is_adapter

__all__ = ["Keeper", "OpenEngine", "gpus_used", "open_engine", "running"]

OpenEngine = Callable[..., Engine]


def open_engine(
    config: EngineConfig,
    model_dir: Path,
    *,
    max_model_len: int,
    pad_token_id: int,
    keep: bool = False,
) -> Engine:
    """Load a model into the engine that the recipe names.

    Args:
        max_model_len: longest prompt and answer together, in tokens.
        keep: the engine is to outlive the model; see `Keeper`.

    Raises:
        InputError: the engine is not installed, or cannot load the model.
        ConfigError: a setting that the engine refuses, or too few GPUs.
        EngineError: its process died.
    """
    if config.gpus is not None:
        processes = engines_on(config.gpus, config.tensor_parallel_size, config.name)
        config = config.model_copy(update={"processes": processes, "gpus": None})
    if config.name == "vllm":
        from stages.engines.vllm import VllmEngine

        return VllmEngine(model_dir, config, max_model_len=max_model_len, keep=keep)
    if config.name == "ray":
        from stages.engines.ray import RayEngine

        return RayEngine(model_dir, config, max_model_len=max_model_len)
    from stages.engines.transformers import TransformersEngine, open_fleet

    if config.processes > 1:
        return open_fleet(
            model_dir,
            processes=config.processes,
            dtype=config.dtype,
            max_model_len=max_model_len,
            batch_size=config.batch_size,
            pad_token_id=pad_token_id,
        )
    return TransformersEngine(
        model_dir,
        dtype=config.dtype,
        max_model_len=max_model_len,
        batch_size=config.batch_size,
        pad_token_id=pad_token_id,
    )


@contextmanager
def running(
    open_engine: OpenEngine,
    config: EngineConfig,
    model_dir: Path,
    scratch: Path,
    *,
    max_model_len: int,
    pad_token_id: int,
) -> Iterator[Engine]:
    """Lend an engine with a loaded model, and close it when the block ends.

    Args:
        open_engine: see the function of this name, for the rest too.
        scratch: a folder in which an adapter's whole model may lie as long, for vLLM.
    """
    with _whole(config, model_dir, scratch) as folder:
        engine = open_engine(config, folder, max_model_len=max_model_len, pad_token_id=pad_token_id)
        try:
            yield engine
        finally:
            engine.close()


@contextmanager
def _whole(config: EngineConfig, model_dir: Path, scratch: Path) -> Iterator[Path]:
    """Lend a folder that the engine can load; an adapter is merged in fp32, as everywhere."""
    if config.name == "transformers" or not is_adapter(model_dir):
        yield model_dir
        return
    from stages.model.load import load_model

    with TemporaryDirectory(prefix="merged-", dir=scratch) as folder:
        load_model(model_dir).save_pretrained(folder)
        yield Path(folder)
