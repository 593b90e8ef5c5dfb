"""A run that cannot be carried on with its recipe: what becomes of the record of the recipe."""

from collections.abc import Iterator
from contextlib import contextmanager

from stages.config import RunConfig
from stages.errors import ConfigError, FinishedError
from stages.layout import ITERATION_STAGES, RunLayout
from stages.recipe import OF_THE_RUN, ONE_OF_KINDS, Recipe
from stages.run_record import forget, start_or_resume


@contextmanager
def kept(layout: RunLayout, before: Recipe | None, *, amend: bool) -> Iterator[None]:
    """Give a run its recipe back where it cannot be carried on with the amended one.

    A run that is new, and in which nothing was made, has no recipe then.

    Args:
        before: the recipe of before; None where the run begins now.
        amend: whether it may be another one now.

    Raises:
        ConfigError: it cannot.
    """
    try:
        yield
    except ConfigError as error:
        if before is None:
            forget(layout)
        if before is None or not amend:
            raise
        start_or_resume(layout, before, amend=True)
        raise (_told_how(layout, error) if isinstance(error, FinishedError) else error) from None


def _told_how(layout: RunLayout, error: FinishedError) -> ConfigError:
    """Return the error that says how the setting can be had from here on, where it can be."""
    setting = error.setting
    if setting is None:
        return error
    what = f"{error.place} is finished with other settings: {error.difference}; --amend changes "
    what += "what is not done yet"
    stage, head = error.place.name, setting.partition(".")[0]
    iteration = layout.iteration_of(layout.relative(error.place))
    is_start = error.place == layout.start_evaluation
    of_iterations = head in RunConfig.model_fields and head not in OF_THE_RUN
    if not of_iterations or stage not in ITERATION_STAGES or (iteration is None and not is_start):
        return ConfigError(
            f"{what}, and {setting} holds for the whole run: leave it as it was, or name another "
            "--run"
        )
    if setting.startswith(f"{ONE_OF_KINDS}."):
        setting = ONE_OF_KINDS
    first = "generate" if is_start else stage
    done = [t for t in layout.iterations() if layout.stage(t, first).is_dir()]
    span = f"{max(done, default=-1) + 1}+"
    return ConfigError(
        f"{what}: give it as iterations.{span}.{setting}=…, or in the recipe under iterations: "
        f"{{{span}: …}}"
    )
