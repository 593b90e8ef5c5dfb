"""The whole loop: the steps of a run in order, to be executed or printed."""

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from spin_cli.steps import ShellText, Step, command, execute
from stages.artifacts.manifest import MANIFEST_NAME
from stages.decisions import Opponent, first_opponent, opponent_of, player
from stages.layout import ITERATION_STAGES, RunLayout
from stages.recipe import Recipe

if TYPE_CHECKING:
    from stages.engines import OpenEngine


def carry_on(
    layout: RunLayout,
    recipe: Recipe,
    iterations: int,
    *,
    verify: bool = True,
    keep_engine: bool = False,
) -> None:
    """Run what is missing of a run; the caller holds its lock.

    Args:
        verify: check the SHA-256 of inputs.
        keep_engine: let one engine live through the run; its answers are those of new ones.

    Raises:
        GateRefusedError: a player was refused, and the recipe stops there.
    """
    with _engines(recipe, iterations, keep_engine) as open_engine:
        for step in steps(layout, recipe, iterations, lambda t: opponent_of(layout, recipe, t)):
            config = recipe.for_iteration(step.iteration)
            checked = config if verify else config.model_copy(update={"verify": False})
            execute(step, checked, open_engine)
    if iterations > 0:
        opponent_of(layout, recipe, iterations)  # raises when the last player was refused


@contextmanager
def _engines(recipe: Recipe, iterations: int, keep: bool) -> Iterator["OpenEngine | None"]:
    """Lend what opens the run's engines; None leaves each stage to open its own."""
    if not keep:
        yield None
        return
    from stages import engines

    configs = [recipe.for_iteration(iteration) for iteration in [None, *range(iterations)]]
    answers = [c.generate.max_new_tokens for c in configs]
    answers += [c.evaluate.max_new_tokens for c in configs]
    with engines.Keeper(engines.open_engine, max(answers) - min(answers)) as keeper:
        yield keeper.open


def commands(
    layout: RunLayout,
    recipe: Recipe,
    iterations: int,
    settings: Sequence[str],
    flags: Sequence[str] = (),
) -> Iterator[str]:
    """Yield the command lines that do the same as `carry_on`, for a shell with `set -e`.

    Iterations that are not decided yet are taken to end in a promotion; where one does not and
    the recipe stops there, `spin promote` ends the shell with exit code 6.

    Args:
        settings: the words that choose the recipe and its overrides.
        flags: further words for every stage that reads artifacts.

    Raises:
        GateRefusedError: a player was refused already, and the recipe stops there.
    """
    yield shlex.join(["spin", "init", str(layout.root), *settings])
    for step in steps(layout, recipe, iterations, lambda t: _foreseen(layout, recipe, t)):
        more = () if step.stage == "prepare" else flags
        line = command(step, [*more, *settings])
        goes_on = recipe.for_iteration(step.iteration).promote.on_refusal != "stop"
        yield f"{line} || test $? = 6" if step.stage == "promote" and goes_on else line


def steps(
    layout: RunLayout, recipe: Recipe, iterations: int, opponent: Callable[[int], Opponent]
) -> Iterator[Step]:
    """Yield the steps of a run, each when those before it are done.

    Args:
        opponent: whom an iteration plays against; asked when the iteration begins.

    Raises:
        ConfigError: the recipe names no model to start from.
    """
    config = recipe.for_iteration()
    first = first_opponent(layout, config)
    data = {"data": str(layout.data)}
    yield Step("prepare", layout.data)
    if config.sft is not None:
        pretrained = config.sft.init == "pretrained" and config.model.path is not None
        base = _model(config.model.path or "", config.model.revision) if pretrained else {}
        yield Step("sft", layout.sft, options={**data, **base})
    yield Step(
        "evaluate", layout.start_evaluation, options={**_model(first.model, first.revision), **data}
    )
    for iteration in range(iterations):
        yield from _iteration_steps(layout, recipe, iteration, opponent(iteration))


def _iteration_steps(
    layout: RunLayout, recipe: Recipe, iteration: int, opponent: Opponent
) -> Iterator[Step]:
    config = recipe.for_iteration(iteration)
    place = {name: str(layout.stage(iteration, name)) for name in ITERATION_STAGES}

    def step(stage: str, options: dict[str, str]) -> Step:
        return Step(stage, layout.stage(iteration, stage), iteration, options)

    data = {"data": str(layout.data)}
    model = _model(opponent.model, opponent.revision)
    generations = {**data, "generations": place["generate"]}
    yield step("generate", {**model, **data})
    rewards: dict[str, str] = {}
    if config.pair.needs_rewards:
        yield step("reward", generations)
        rewards = {"rewards": place["reward"]}
    yield step("pair", {**generations, **rewards, **model})
    yield step("score", {"pairs": place["pair"], **model})
    yield step("train", {"pairs": place["score"], **model})
    against = {
        **_model(opponent.model, opponent.revision, "opponent", "opponent_revision"),
        "opponent_evaluation": opponent.evaluation,
    }
    yield step("evaluate", {"model": place["train"], **data, **against})
    yield step("promote", {})


def _model(
    model: str, revision: str | None, name: str = "model", revision_name: str = "revision"
) -> dict[str, str]:
    return {name: model, **({revision_name: revision} if revision is not None else {})}


def _foreseen(layout: RunLayout, recipe: Recipe, iteration: int) -> Opponent:
    """Return the opponent of an iteration that may lie ahead; see `commands`."""
    if iteration == 0:
        return opponent_of(layout, recipe, iteration)
    before = iteration - 1
    if (layout.stage(before, "promote") / MANIFEST_NAME).is_file():
        return opponent_of(layout, recipe, iteration)
    if recipe.for_iteration(before).promote.on_refusal != "champion":
        return player(layout, before)
    words = shlex.join(["spin", "opponent", str(layout.root), "--iteration", str(iteration)])
    return Opponent(
        model=ShellText(f'"$({words})"'),
        revision=None,
        evaluation=ShellText(f'"$({words} --evaluation)"'),
    )
