"""Whether answers fit the model of a run, checked before its first stage."""

from collections.abc import Iterator
from pathlib import Path

from stages.config import EngineConfig, RunConfig, SamplingConfig
from stages.recipe import Recipe


def check_rooms(recipe: Recipe, iterations: int) -> None:
    """Check that a prompt fits beside each answer that a run asks for, as far as is known now.

    It is known of random weights, and of a folder on this machine; a hub's model is first seen by
    the stages, which check likewise.

    Raises:
        ConfigError: one does not; see `model_room`.
    """
    from stages.engines.prompts import room_of

    found = _positions(recipe.for_iteration())
    if found is None:
        return
    played = [t for t in recipe.turning_points() if t < iterations]
    for iteration in [None, *played]:
        config = recipe.for_iteration(iteration)
        for section, sampling, engine in _asking(config, plays=iteration is not None):
            room_of(*found, engine.max_model_len, sampling.max_new_tokens, section)


def _positions(config: RunConfig) -> tuple[str, int] | None:
    """Return what the first model is called, and its positions; None where it is not known yet."""
    from stages.engines.prompts import model_positions

    if config.sft is not None and config.sft.init == "random":
        return "the model of sft.architecture", config.sft.architecture.max_position_embeddings
    folder = Path(config.model.path) if config.model.path is not None else None
    if folder is None or not (folder / "config.json").is_file():
        return None
    return folder.name, model_positions(folder)


def _asking(
    config: RunConfig, *, plays: bool
) -> Iterator[tuple[str, SamplingConfig, EngineConfig]]:
    """Yield what asks for answers: its place in the recipe, how they are drawn, and by what."""
    if plays:
        yield "generate", config.generate, config.generate.engine
    yield "evaluate", config.evaluate, config.answering_engine()
    for name, suite in config.suites.items():
        if isinstance(suite, SamplingConfig):
            own = getattr(suite, "engine", None)
            yield f"suites.{name}", suite, config.answering_engine(own)
