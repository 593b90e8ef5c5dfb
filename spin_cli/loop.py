"""The whole loop: the steps of a run in order, to be executed or printed."""

import logging
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from spin_cli.rooms import check_rooms
from spin_cli.steps import ShellText, Step, command, execute
from stages.adaptation import adapted, at_iteration
from stages.artifacts import Manifest
from stages.artifacts.manifest import MANIFEST_NAME
from stages.artifacts.produce import ALREADY_DONE
from stages.config import (
    OF_COMPARISON,
    RunConfig,
    SamplingConfig,
    TaskSuiteConfig,
    WinRateSuiteConfig,
)
from stages.convergence import conditions, converged
from stages.decisions import (
    Opponent,
    first_opponent,
    opponent_of,
    optimizer_of,
    player,
    pool_of,
    reference_of,
    replayed,
    rival_evaluation,
)
from stages.errors import ConfigError, choices
from stages.layout import ITERATION_STAGES, RunLayout
from stages.recipe import Recipe

log = logging.getLogger("spin")

if TYPE_CHECKING:
    from stages.engines import OpenEngine


def carry_on(
    layout: RunLayout,
    recipe: Recipe,
    iterations: int,
    *,
    verify: bool = True,
    keep_engine: bool = False,
    until_converged: bool = False,
) -> str | None:
    """Run what is missing of a run; the caller holds its lock.

    Args:
        verify: check the SHA-256 of inputs.
        keep_engine: let one engine live through the run; its answers are those of new ones.
        until_converged: end after the first iteration with which the run has converged.

    Returns:
        With `until_converged`: why the run has converged, or None if it has not.

    Raises:
        GateRefusedError: a player was refused, and the recipe stops there.
    """
    with _folded(), _engines(recipe, iterations, keep_engine) as open_engine:
        for step in steps(
            layout,
            recipe,
            iterations,
            lambda t: opponent_of(layout, recipe, t),
            lambda t: str(rival_evaluation(layout, "champion", t)),
        ):
            config = at_iteration(layout, recipe, step.iteration).for_iteration(step.iteration)
            if step.stage == "generate" and step.out.name == "generate":
                _tell_adapted(layout, recipe, step.iteration or 0)
            checked = config if verify else config.model_copy(update={"verify": False})
            manifest = execute(step, checked, open_engine)
            if step.out == layout.start_evaluation:
                _check_gate(recipe, manifest, iterations)
            if step.iteration is None and step.stage == "evaluate":
                _check_conditions(recipe, step, iterations)
            if until_converged and step.stage == "promote" and step.iteration is not None:
                reason = converged(layout, recipe, step.iteration)
                if reason is not None:
                    return reason
    if iterations > 0:
        opponent_of(layout, recipe, iterations)  # raises when the last player was refused
    return None


class _Folding(logging.Filter):
    """Counts stages that were done already, and says how many before anything else is said."""

    done = 0

    def filter(self, record: logging.LogRecord) -> bool:
        if record.msg == ALREADY_DONE:
            self.done += 1
            return False
        self.tell()
        return True

    def tell(self) -> None:
        count, self.done = self.done, 0
        if count:
            log.info("%d stage%s already done", count, " is" if count == 1 else "s are")


@contextmanager
def _folded() -> Iterator[None]:
    folding = _Folding()
    log.addFilter(folding)
    try:
        yield
        folding.tell()
    finally:
        log.removeFilter(folding)


def _tell_adapted(layout: RunLayout, recipe: Recipe, iteration: int) -> None:
    for name, value in adapted(layout, recipe, iteration).items():
        is_led = recipe.for_iteration(iteration).adapt.target_kl is not None
        by = "adapt" if is_led else "promote.retry"
        log.info("iteration %d: %s=%.4g, by %s", iteration, name, value, by)


def _check_gate(recipe: Recipe, start: Manifest, iterations: int) -> None:
    """Check that evaluations will have the metrics that gates ask for, before an iteration is made.

    Raises:
        ConfigError: one of them has no such metric.
    """
    from stages.gates import AMEND

    for iteration in range(iterations):
        metric = recipe.for_iteration(iteration).promote.metric
        if metric not in start.metrics and not metric.startswith(OF_COMPARISON):
            raise ConfigError(
                f"promote.metric={metric}: evaluations of this run have no such metric; "
                f"{choices(metric, start.metrics, 'they have')}, and heldout_… against an "
                f"opponent; {AMEND}"
            )


def _check_conditions(recipe: Recipe, start: Step, iterations: int) -> None:
    """Check that gates can be judged by what the start's evaluation, or that of a suite, has.

    Raises:
        ConfigError: one of them asks for what is not measured.
    """
    from stages.evidence import check_gate

    for iteration in [t for t in recipe.turning_points() if t < iterations]:
        check_gate(recipe.for_iteration(iteration), start.options.get("suite"), start.out)


def check_recipe(recipe: Recipe, iterations: int) -> None:
    """Check what is known before the first stage: see `gates.check_names` and `check_rooms`.

    Raises:
        ConfigError: a decision asks for what cannot be measured, or an answer leaves no room.
    """
    from stages.gates import check_names

    for iteration in [t for t in recipe.turning_points() if t < max(iterations, 1)]:
        check_names(recipe.for_iteration(iteration))
    check_rooms(recipe, iterations)


def check_trackers(recipe: Recipe) -> None:
    """Check that the trackers that a run tells are installed.

    Raises:
        ConfigError: one is not.
    """
    from stages import tracking

    for config in recipe.configs():
        tracking.check(config.tracking)


def check_stop(recipe: Recipe) -> None:
    """Check that a run of the recipe can converge.

    Raises:
        ConfigError: no condition of its `stop` section can ever be met.
    """
    if not any(conditions(recipe.for_iteration(t)) for t in recipe.turning_points()):
        raise ConfigError(
            f"{recipe.source}: no condition of `stop` can be met, so the run would never converge; "
            "set stop.min_gain, or stop.identical_share (stop.discriminator_margin is for games "
            "against human responses)"
        )


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
    suites = configs[0].suites.values()
    answers += [s.max_new_tokens for s in suites if isinstance(s, SamplingConfig)]
    with engines.Keeper(engines.open_engine, max(answers) - min(answers)) as keeper:
        yield keeper.open


def commands(
    layout: RunLayout,
    recipe: Recipe,
    iterations: int,
    settings: Sequence[str],
    flags: Sequence[str] = (),
    *,
    until_converged: bool = False,
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
    expected = partial(_foreseen, layout, recipe)
    for step, line in _lines(layout, recipe, iterations, settings, flags, expected):
        if step.stage != "promote":
            yield line
            continue
        assert step.iteration is not None, "an iteration's player is promoted"
        policy = recipe.for_iteration(step.iteration).promote.on_refusal
        yield line if policy == "stop" and not until_converged else f"{line} || test $? = 6"
        if until_converged:
            words = ["spin", "converged", str(layout.root), "--iteration", str(step.iteration)]
            yield f'reason="$({shlex.join(words)})"'
            yield 'if [ -n "$reason" ]; then exit 0; fi'
        if until_converged or policy == "retry":
            yield f"{_ask(layout, step.iteration + 1)} > /dev/null"


def rules(
    layout: RunLayout,
    recipe: Recipe,
    iterations: int,
    settings: Sequence[str],
    flags: Sequence[str] = (),
) -> Iterator[str]:
    """Yield the rules that do the same for make; see configs/pipeline.mk.

    They do not depend on what the run holds. Every artifact depends on those it reads, and an
    iteration on the decision before it, which is completed if it was cut off, and asked whether
    the run goes on.

    Raises:
        ConfigError: make could not read the run's name.
    """
    if re.search(r"[\s:%#$=\\]", str(layout.root)):
        raise ConfigError(
            f"{str(layout.root)!r} holds a character that make takes for its own; give --run "
            "a name without spaces and :%#$=\\"
        )
    init = shlex.join(["spin", "init", str(layout.root), *settings])
    yield _rule(layout.record, [], [init])
    before, decide = [str(layout.record)], ""
    expected = partial(_expected, layout, recipe)
    for step, line in _lines(layout, recipe, iterations, settings, flags, expected):
        needs, lines = _artifacts(step, layout, recipe), [line]
        if step.stage == "generate":
            needs += before
            ask = f"{_ask(layout, step.iteration or 0)} > /dev/null"
            lines = [*([decide] if decide else []), ask, line]
        if step.stage == "promote":
            lines = [f"{line} || test $? = 6"]
            decide = f"{line} --quiet 2> /dev/null || test $? = 6"
        if step.stage == "promote":
            before = []
        if step.stage == "promote" or step.iteration is None:
            before = [*before, str(step.out / MANIFEST_NAME)]
        yield _rule(step.out / MANIFEST_NAME, needs or [f"| {layout.record}"], lines)


def _rule(target: Path, needs: Sequence[str], lines: Sequence[str]) -> str:
    head = " ".join([f"{target}:", *needs])
    return "\n\t".join([head, *(_recipe_line(line) for line in lines)]) + "\n"


def _ask(layout: RunLayout, iteration: int) -> str:
    """Return the command that prints an opponent, and fails where there is none."""
    return shlex.join(["spin", "opponent", str(layout.root), "--iteration", str(iteration)])


def _champion(layout: RunLayout, iteration: int) -> ShellText:
    return ShellText(f'"$({_ask(layout, iteration)} --champion)"')


def _lines(
    layout: RunLayout,
    recipe: Recipe,
    iterations: int,
    settings: Sequence[str],
    flags: Sequence[str],
    opponent: Callable[[int], Opponent],
) -> Iterator[tuple[Step, str]]:
    """Yield the steps with their command lines, as far as they can be told now."""
    for step in steps(layout, recipe, iterations, opponent, partial(_champion, layout)):
        more = () if step.stage == "prepare" else flags
        measured = _measured_settings(layout, recipe, step.iteration)
        yield step, command(step, [*more, *settings, *measured])


def _measured_settings(layout: RunLayout, recipe: Recipe, iteration: int | None) -> list[str]:
    """Return the words for a shell that set what was found before; see adaptation.py."""
    if not iteration:
        return []
    is_retried = recipe.for_iteration(iteration - 1).promote.on_refusal == "retry"
    if recipe.for_iteration(iteration).adapt.target_kl is None and not is_retried:
        return []
    words = shlex.join(["spin", "adapted", str(layout.root), "--iteration", str(iteration)])
    return [ShellText(f"$({words})")]  # unquoted: it prints no setting, one, or two


def _artifacts(step: Step, layout: RunLayout, recipe: Recipe) -> list[str]:
    """Return the manifests of a run that a step reads, as make knows them."""
    if step.stage == "promote":
        assert step.iteration is not None, "an iteration's player is promoted"
        suites = recipe.for_iteration(step.iteration).suites_after(step.iteration)
        places = [layout.suite(step.iteration, name) for name in suites]
        read = [layout.stage(step.iteration, "evaluate"), *places]
        return [str(place / MANIFEST_NAME) for place in read]
    single = (place for name, place in step.options.items() if name not in ("part", "suite"))
    several = (place for places in step.several.values() for place in places)
    inside = [
        Path(place) / MANIFEST_NAME
        for place in [*single, *several]
        if not isinstance(place, ShellText) and Path(place).is_relative_to(layout.root)
    ]
    return [str(path) for path in dict.fromkeys(inside)]


def _recipe_line(line: str) -> str:
    """Return a line of a shell as one of make, which calls `$(SPIN)`."""
    escaped = line.replace("$", "$$").replace("$$(spin ", "$$($(SPIN) ")
    return f"$(SPIN) {escaped.removeprefix('spin ')}"


def steps(
    layout: RunLayout,
    recipe: Recipe,
    iterations: int,
    opponent: Callable[[int], Opponent],
    champion: Callable[[int], str],
) -> Iterator[Step]:
    """Yield the steps of a run, each when those before it are done.

    Args:
        opponent: whom an iteration plays against; asked when the iteration begins.
        champion: the evaluation that an iteration's player has to beat; asked when a suite needs
            it.

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
    for name in _suites_with_data(config):
        yield Step("prepare", layout.suite_data(name), options={"suite": name})
    start = {**_model(first.model, first.revision), **data}
    yield Step("evaluate", layout.start_evaluation, options=start)
    for name, suite in config.suites.items():
        if not isinstance(suite, WinRateSuiteConfig):
            yield _suite_step(layout, config, None, name, start)
    for iteration in range(iterations):
        yield from _iteration_steps(layout, recipe, iteration, opponent, champion)


def _iteration_steps(
    layout: RunLayout,
    recipe: Recipe,
    iteration: int,
    opponent: Callable[[int], Opponent],
    champion: Callable[[int], str],
) -> Iterator[Step]:
    config = recipe.for_iteration(iteration)
    place = {name: str(layout.stage(iteration, name)) for name in ITERATION_STAGES}

    def step(stage: str, options: dict[str, str], **several: list[str]) -> Step:
        return Step(stage, layout.stage(iteration, stage), iteration, options, several)

    data = {"data": str(layout.data)}
    now = opponent(iteration)
    model = _model(now.model, now.revision)
    pool = pool_of(recipe, iteration, opponent)
    yield step("generate", {**model, **data, **_part(0, pool)})
    answers = [place["generate"]]
    for member, older in enumerate(pool, 1):
        out = layout.pool(iteration, member)
        options = {**_model(older.model, older.revision), **data, **_part(member, pool)}
        yield Step("generate", out, iteration, options)
        answers.append(str(out))
    rewards: dict[str, str] = {}
    if config.pair.needs_rewards:
        yield step("reward", data, generations=answers)
        rewards = {"rewards": place["reward"]}
    replay = [str(layout.stage(t, "pair")) for t in replayed(recipe, iteration)]
    yield step("pair", {**data, **rewards, **model}, generations=answers, replay=replay)
    reference = reference_of(recipe, iteration, opponent)
    yield step("score", {"pairs": place["pair"], **_model(reference.model, reference.revision)})
    before = _optimizer(layout, recipe, iteration, now)
    carried = {} if before is None else {"optimizer_from": before}
    yield step("train", {"pairs": place["score"], **model, **carried})
    against = {
        **_model(now.model, now.revision, "opponent", "opponent_revision"),
        "opponent_evaluation": now.evaluation,
    }
    yield step("evaluate", {"model": place["train"], **data, **against})
    for name, suite in config.suites_after(iteration).items():
        more: dict[str, str] = {}
        if isinstance(suite, WinRateSuiteConfig):
            more["answers"] = place["evaluate"]
            if suite.against == "champion":
                more["against"] = champion(iteration)
            elif suite.against != "human":
                start = str(layout.start_evaluation)
                more["against"] = start if suite.against == "start" else now.evaluation
        yield _suite_step(
            layout, config, iteration, name, {"model": place["train"], **data, **more}
        )
    yield step("promote", {})


def _suites_with_data(config: RunConfig) -> list[str]:
    suites = config.suites.items()
    return [n for n, suite in suites if isinstance(suite, TaskSuiteConfig) and suite.data]


def _suite_step(
    layout: RunLayout,
    config: RunConfig,
    iteration: int | None,
    name: str,
    options: Mapping[str, str],
) -> Step:
    own = {"data": str(layout.suite_data(name))} if name in _suites_with_data(config) else {}
    return Step(
        "evaluate", layout.suite(iteration, name), iteration, {"suite": name, **options, **own}
    )


def _part(member: int, pool: Sequence[Opponent]) -> dict[str, str]:
    return {"part": f"{member}/{len(pool)}"} if pool else {}


def _optimizer(layout: RunLayout, recipe: Recipe, iteration: int, opponent: Opponent) -> str | None:
    """Return the player whose optimizer goes on, as a question where the opponent is one."""
    if not recipe.for_iteration(iteration).train.carry_optimizer:
        return None
    if isinstance(opponent.model, ShellText):
        return ShellText(f'"$({_ask(layout, iteration)} --optimizer)"')
    return optimizer_of(layout, recipe, opponent)


def _model(
    model: str, revision: str | None, name: str = "model", revision_name: str = "revision"
) -> dict[str, str]:
    return {name: model, **({revision_name: revision} if revision is not None else {})}


def _foreseen(layout: RunLayout, recipe: Recipe, iteration: int) -> Opponent:
    """Return the opponent of an iteration that may lie ahead; see `commands`."""
    decided = layout.stage(iteration - 1, "promote") / MANIFEST_NAME if iteration else None
    if decided is None or decided.is_file():
        return opponent_of(layout, recipe, iteration)
    return _expected(layout, recipe, iteration)


def _expected(layout: RunLayout, recipe: Recipe, iteration: int) -> Opponent:
    """Return the opponent of an iteration if all goes well, as a question where it may not."""
    if iteration == 0:
        return opponent_of(layout, recipe, iteration)
    if recipe.for_iteration(iteration - 1).promote.on_refusal not in ("champion", "retry"):
        return player(layout, iteration - 1)
    ask = _ask(layout, iteration)
    return Opponent(
        model=ShellText(f'"$({ask})"'),
        revision=None,
        evaluation=ShellText(f'"$({ask} --evaluation)"'),
    )
