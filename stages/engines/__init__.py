"""Engines: what answers prompts. One interface (`base.Engine`), and the door to those there are."""

from pathlib import Path

from stages.config import EngineConfig
from stages.engines.base import Engine


def open_engine(
    config: EngineConfig, model_dir: Path, *, max_model_len: int, pad_token_id: int
) -> Engine:
    """Load a model into the engine that the recipe names.

    Args:
        max_model_len: longest prompt and answer together, in tokens.

    Raises:
        InputError: the engine is not installed, or cannot load the model.
    """
    if config.name == "vllm":
        from stages.engines.vllm import VllmEngine

        return VllmEngine(
            model_dir,
            dtype=config.dtype,
            max_model_len=max_model_len,
            gpu_memory_utilization=config.gpu_memory_utilization,
            tensor_parallel_size=config.tensor_parallel_size,
            enforce_eager=config.enforce_eager,
            extra=config.extra,
        )
    from stages.engines.transformers import TransformersEngine

    return TransformersEngine(
        model_dir,
        dtype=config.dtype,
        max_model_len=max_model_len,
        batch_size=config.batch_size,
        pad_token_id=pad_token_id,
    )
