"""The Typer app: every command parses, loads the recipe, calls one stage, and prints."""

import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from spin_cli import compare_commands, lineage_commands, report_commands, show_commands
from spin_cli.failures import reported
from spin_cli.lineage_commands import export_player
from spin_cli.options import (
    Config,
    Data,
    Generations,
    Gpus,
    Iteration,
    Json,
    MaybeIteration,
    MaybeModel,
    Model,
    NoVerify,
    Out,
    Overrides,
    Pairs,
    Processes,
    Prompts,
    Quiet,
    Revision,
    Run,
    ScoredPairs,
    Shrink,
    TransferThreads,
    Url,
    Verbose,
    example,
)
from spin_cli.screen import counted, put, put_json, say, set_up_messages

if TYPE_CHECKING:
    from spin_cli.steps import Step
    from stages.layout import RunLayout
    from stages.recipe import Recipe


class Commands(TyperGroup):
    """The commands, each ended by `reported`."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read the options of `spin` itself."""
        with reported():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        with reported():
            return super().invoke(ctx)


SETTINGS = {"help_option_names": ["--help", "-h"]}
app = typer.Typer(
    cls=Commands,
    help="Self-play fine-tuning of language models: every stage a command, files in, files out.",
    epilog="\b\nExample:\n  spin run demo --run runs/demo --iterations 3\n  spin status runs/demo",
    rich_markup_mode=None,  # importing rich doubles the time of --help
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
    context_settings=SETTINGS,
)
config_app = typer.Typer(
    help="Show recipes.",
    epilog="\b\nExample:\n  spin config show demo train.beta=0.05",
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings=SETTINGS,
)
app.add_typer(config_app, name="config")


@app.command(epilog=example("spin prepare --source train.jsonl --out data --config gsm8k"))
def prepare(
    out: Out,
    source: Annotated[
        str | None,
        typer.Option("--source", help="A file, a folder, or a data set id; sets prepare.source."),
    ] = None,
    suite: Annotated[
        str | None, typer.Option("--suite", help="Read a suite's own prompts: its `data` section.")
    ] = None,
    config: Config = None,
    shrink: Shrink = False,
    overrides: Overrides = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Read prompts and human responses; hold some out."""
    set_up_messages(quiet=quiet, verbose=verbose)
    from spin_cli.steps import Step

    if suite is not None and source is not None:
        raise typer.BadParameter("--source is not a suite's; set suites.NAME.data.source=…")
    options = {"suite": suite} if suite is not None else {}
    recipe = _recipe(config, overrides, source, shrink=shrink)
    _execute(Step("prepare", out, options=options), recipe)


@app.command(epilog=example("spin sft --data data --model BASE --out models/sft sft.epochs=1"))
def sft(
    out: Out,
    data: Data,
    model: MaybeModel = None,
    revision: Revision = None,
    config: Config = None,
    shrink: Shrink = False,
    overrides: Overrides = None,
    processes: Processes = None,
    gpus: Gpus = None,
    no_verify: NoVerify = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fine-tune on human responses: the first opponent."""
    set_up_messages(quiet=quiet, verbose=verbose)
    from spin_cli.steps import Step

    words = [*(overrides or []), *_processes("sft", processes, gpus)]
    recipe = _recipe(config, words, shrink=shrink)
    section = recipe.for_iteration().sft
    if section is not None and section.init == "random" and model is None:
        options: dict[str, str] = {}
    else:
        options = _model(recipe, None, model, revision)
    _execute(Step("sft", out, options={"data": str(data), **options}), recipe, no_verify)


@app.command(
    epilog=example("spin generate --model M --prompts data --out generations",
                    "spin generate --model M --data data --out g --gpus 8 --join",
                    "spin generate --model M --data data --out g generate.temperature=0.7")
)  # fmt: skip
def generate(
    out: Out,
    data: Prompts,
    model: MaybeModel = None,
    revision: Revision = None,
    config: Config = None,
    shrink: Shrink = False,
    iteration: Iteration = 0,
    overrides: Overrides = None,
    processes: Annotated[
        int | None,
        typer.Option("--processes", min=1, help="Run so many engines side by side."),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", min=1, help="Use so many GPUs of this machine, an engine each."),
    ] = None,
    join: Annotated[
        bool,
        typer.Option("--join", help="Where others are making it already, here or on a machine "
                     "that shares the folder, help them; each worker takes shards."),
    ] = False,
    show_samples: Annotated[
        bool, typer.Option("--show-samples", help="Show an answer every 30 seconds.")
    ] = False,
    part: Annotated[
        str | None,
        typer.Option("--part", metavar="K/M", help="Of the drawn prompts those of the K-th of M "
                     "pool members; 0/M: those left to the newest opponent."),
    ] = None,
    no_verify: NoVerify = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Let the opponent answer every prompt; one row a sample.

    Ctrl-C once finishes the open shards, twice stops at once; either can be gone on from.
    """
    set_up_messages(quiet=quiet, verbose=verbose)
    from spin_cli.steps import Step

    if processes is not None and gpus is not None:
        raise typer.BadParameter("give either --processes N or --gpus N")
    chosen = {
        "engine.processes": processes,
        "engine.gpus": gpus,
        "join": "true" if join else None,
        "show_samples_every_s": 30 if show_samples else None,
    }
    words = [f"generate.{name}={value}" for name, value in chosen.items() if value is not None]
    recipe = _recipe(config, [*(overrides or []), *words], shrink=shrink)
    options = {**_model(recipe, iteration, model, revision), "data": str(data)}
    if part is not None:
        options["part"] = part
    _execute(Step("generate", out, iteration, options), recipe, no_verify)


@app.command(
    epilog=example("spin reward --data data --generations generations --out rewards "
                    "reward.name=gsm8k")
)  # fmt: skip
def reward(
    out: Out,
    data: Data,
    generations: Generations,
    config: Config = None,
    shrink: Shrink = False,
    iteration: Iteration = 0,
    overrides: Overrides = None,
    no_verify: NoVerify = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Score every sample: by rule, function, model or judge."""
    set_up_messages(quiet=quiet, verbose=verbose)
    from spin_cli.steps import Step

    several = {"generations": [str(path) for path in generations]}
    step = Step("reward", out, iteration, {"data": str(data)}, several)
    _execute(step, _recipe(config, overrides, shrink=shrink), no_verify)


@app.command(
    epilog=example("spin pair --data data --generations generations --model M --out pairs")
)
def pair(
    out: Out,
    data: Data,
    generations: Generations,
    model: Model,
    rewards: Annotated[
        Path | None,
        typer.Option("--rewards", help="The output of reward, where the policy ranks samples."),
    ] = None,
    replay: Annotated[
        list[Path] | None,
        typer.Option(
            "--replay",
            help="The pairs of an iteration before, to be trained on again; "
            "several times, the newest first.",
        ),
    ] = None,
    revision: Revision = None,
    config: Config = None,
    shrink: Shrink = False,
    iteration: Iteration = 0,
    overrides: Overrides = None,
    no_verify: NoVerify = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Give each prompt a chosen and a rejected response."""
    set_up_messages(quiet=quiet, verbose=verbose)
    from spin_cli.steps import Step

    recipe = _recipe(config, overrides, shrink=shrink)
    options = {"data": str(data), **({"rewards": str(rewards)} if rewards is not None else {})}
    options |= _model(recipe, iteration, model, revision)
    several = {
        "generations": [str(path) for path in generations],
        "replay": [str(path) for path in replay or []],
    }
    _execute(Step("pair", out, iteration, options, several), recipe, no_verify)


@app.command(epilog=example("spin score --pairs pairs --model M --out scored"))
def score(
    out: Out,
    pairs: Pairs,
    model: Model,
    revision: Revision = None,
    config: Config = None,
    shrink: Shrink = False,
    iteration: Iteration = 0,
    overrides: Overrides = None,
    processes: Processes = None,
    gpus: Gpus = None,
    no_verify: NoVerify = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Add log-probabilities under the reference to pairs."""
    set_up_messages(quiet=quiet, verbose=verbose)
    from spin_cli.steps import Step

    words = [*(overrides or []), *_processes("score", processes, gpus)]
    recipe = _recipe(config, words, shrink=shrink)
    options = {"pairs": str(pairs), **_model(recipe, iteration, model, revision)}
    _execute(Step("score", out, iteration, options), recipe, no_verify)


@app.command(
    epilog=example("spin train --pairs scored --model M --out player train.beta=0.1",
                    "spin train --pairs scored --model M --out player --gpus 8")
)  # fmt: skip
def train(
    out: Out,
    pairs: ScoredPairs,
    model: Model,
    revision: Revision = None,
    optimizer_from: Annotated[
        str | None,
        typer.Option(
            "--optimizer-from",
            help="The player before, whose optimizer's state goes on (with train.carry_optimizer); "
            "empty: anew.",
        ),
    ] = None,
    config: Config = None,
    shrink: Shrink = False,
    iteration: Iteration = 0,
    overrides: Overrides = None,
    processes: Processes = None,
    gpus: Gpus = None,
    no_verify: NoVerify = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train the player, from the opponent's weights."""
    set_up_messages(quiet=quiet, verbose=verbose)
    from spin_cli.steps import Step

    words = [*(overrides or []), *_processes("train", processes, gpus)]
    recipe = _recipe(config, words, shrink=shrink)
    options = {"pairs": str(pairs), **_model(recipe, iteration, model, revision)}
    if optimizer_from:
        options["optimizer_from"] = optimizer_from
    _execute(Step("train", out, iteration, options), recipe, no_verify)


@app.command(
    epilog=example("spin evaluate --model player --opponent M --data data --out evaluation",
                   "spin evaluate --suite gsm8k --model M --data data --out e --config r.yaml")
)  # fmt: skip
def evaluate(
    out: Out,
    data: Annotated[Path | None, typer.Option("--data", help="The output of prepare.")] = None,
    model: MaybeModel = None,
    revision: Revision = None,
    opponent: Annotated[
        str | None, typer.Option("--opponent", help="The model that the player is compared with.")
    ] = None,
    opponent_revision: Annotated[
        str | None, typer.Option("--opponent-revision", help="The commit of a hub model.")
    ] = None,
    opponent_evaluation: Annotated[
        Path | None,
        typer.Option("--opponent-evaluation", help="The opponent's own evaluation, whose samples "
                     "are used instead of drawing them again."),
    ] = None,
    suite: Annotated[
        str | None, typer.Option("--suite", help="Ask this suite of the recipe's instead.")
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option("--answers", help="Of a suite: an evaluation of the model, whose answers are "
                     "taken instead of asking it."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="Of a win rate: an artifact with the answers to compare "
                     "with. [default: as the run of the model does, else the human ones]",
                     show_default=False),
    ] = None,
    judged: Annotated[
        Path | None,
        typer.Option("--judged", help="Of MT-Bench and AlpacaEval: what their judge found."),
    ] = None,
    config: Config = None,
    shrink: Shrink = False,
    iteration: MaybeIteration = None,
    overrides: Overrides = None,
    no_verify: NoVerify = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Try a model on held-out prompts, or on a suite.

    With an opponent, also compare the two. A model in a run, or answers that lie in one, take the
    run's recipe, data, and whom its win rates compare with, unless others are given.
    """
    set_up_messages(quiet=quiet, verbose=verbose)
    from spin_cli.of_run import OfRun, rival_by_hand
    from spin_cli.steps import Step
    from stages.subjects import player_of

    of_suites = {"answers": answers, "against": against, "judged": judged}
    of_itself = {"opponent": opponent, "opponent_revision": opponent_revision,
                 "opponent_evaluation": opponent_evaluation}  # fmt: skip
    unfit = of_suites if suite is None else of_itself
    for name, value in unfit.items():
        if value is not None:
            without = "goes with --suite" if suite is None else "does not go with --suite"
            raise typer.BadParameter(f"--{name.replace('_', '-')} {without}")
    model = None if model is None else player_of(model)
    run = OfRun.find(model if model is not None or answers is None else str(answers))
    takes = run is not None and config is None and not shrink
    if run is not None and takes and data is None:
        data = run.data_of(suite)
    if suite is None and data is None:
        raise typer.BadParameter("give --data, the output of prepare")
    recipe = (
        run.recipe(overrides)
        if run is not None and takes
        else _recipe(config, overrides, shrink=shrink)
    )
    if suite is not None and against is None:
        of_suites["against"] = rival_by_hand(recipe.for_iteration(iteration), suite, run)
    is_answered = answers is not None and model is None
    options = {} if is_answered else _model(recipe, iteration, model, revision)
    if opponent is not None:
        of_itself["opponent"] = opponent = player_of(opponent)
        theirs = _model(recipe, iteration, opponent, opponent_revision)
        of_itself["opponent_revision"] = theirs.get("revision")
    more = {"suite": suite, "data": data, **of_suites, **of_itself}
    options |= {name: str(value) for name, value in more.items() if value is not None}
    _execute(Step("evaluate", out, iteration, options), recipe, no_verify)


@app.command(
    epilog=example("spin promote runs/demo --iteration 2", "spin promote runs/demo --rollback",
                   "spin promote runs/demo --iteration 2 --again",
                   "spin promote runs/demo --export models/champion")
)  # fmt: skip
def promote(
    run: Run,
    iteration: Annotated[
        int | None,
        typer.Option("--iteration", "-t", min=0, help="Whose player to decide on, or to export."),
    ] = None,
    again: Annotated[
        bool,
        typer.Option("--again", help="Undo a roll-back: make that player champion again, which was "
                     "promoted and rolled back since. Nothing is decided."),
    ] = False,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Go back to the champion before.")
    ] = False,
    history: Annotated[
        bool,
        typer.Option("--history", help="Print every champion so far, with the reasons; the present "
                     "one is marked with *."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --history: one JSON object on stdout.")
    ] = False,
    export: Annotated[
        Path | None,
        typer.Option("--export", metavar="DIR", help="Decide nothing: write the champion (with "
                     "--iteration, that player) as a plain model folder with a model card."),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="REPO", help="Send the export to this repository of "
                     "the Hugging Face hub, which is private if it is new."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="The repository is, or becomes, public.")
    ] = False,
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", metavar="RECIPE", help="A recipe file, or the name of a "
                     "shipped recipe. [default: the run's]", show_default=False),
    ] = None,
    shrink: Shrink = False,
    overrides: Overrides = None,
    no_verify: NoVerify = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Let the gate decide on a player, roll back, or export.

    Exit code 6 when the gate refuses the player, or it was promoted and rolled back since.
    """
    set_up_messages(quiet=quiet, verbose=verbose)
    if as_json and not history:
        raise typer.BadParameter("--json goes with --history")
    if again and (iteration is None or export is not None):
        raise typer.BadParameter("--again goes with --iteration, and not with --export")
    if (export is None and push_to_hub is not None) or (public and push_to_hub is None):
        raise typer.BadParameter("--push-to-hub goes with --export DIR, and --public with it")
    if export is not None and not (rollback or history):
        export_player(run, export, iteration, push_to_hub, public=public, verify=not no_verify)
        return
    if [rollback, history, iteration is not None or export is not None].count(True) != 1:
        raise typer.BadParameter("give one of --iteration, --rollback, --history and --export")
    if (rollback or history or again) and (config or overrides or shrink or no_verify):
        raise typer.BadParameter("settings and --no-verify are for decisions: leave them out")
    if rollback:
        _roll_back(run)
        return
    if history:
        _put_history(run, as_json=as_json)
        return
    assert iteration is not None, "checked above"
    if again:
        _promote_again(run, iteration)
        return
    from spin_cli.steps import Step
    from stages.artifacts import read_pointer
    from stages.decisions import is_rolled_back, read_decision
    from stages.errors import GateRefusedError
    from stages.layout import RunLayout
    from stages.run_record import read_recipe

    layout = RunLayout(run)
    recorded = read_recipe(layout)
    recipe = (
        _recipe(config, overrides, shrink=shrink)
        if config
        else recorded.with_overrides(overrides or [])
    )
    out = layout.stage(iteration, "promote")
    _execute(Step("promote", out, iteration), recipe, no_verify)
    decision = read_decision(out)
    reasons = "; ".join(decision.reasons)
    if not decision.promoted:
        raise GateRefusedError(f"{run}: iteration {iteration} is not promoted: {reasons}")
    pointer = read_pointer(layout.champion)
    if pointer is not None and is_rolled_back(layout, iteration, pointer):
        raise GateRefusedError(
            f"{run}: iteration {iteration} was promoted, and rolled back since: the champion is "
            f"{pointer.path}; to undo that: spin promote {run} --iteration {iteration} --again"
        )
    say(f"{run}: iteration {iteration} is promoted: {reasons}")


def _roll_back(run: Path) -> None:
    from stages.promote import rollback

    left, now = rollback(_checked_run(run))
    say(f"{run}: champion was {left}, is {now.path} again")
    _put_history(run)


def _promote_again(run: Path, iteration: int) -> None:
    from stages.promote import promote_again

    left, now = promote_again(_checked_run(run), iteration)
    say(f"{run}: champion was {left}, is {now.path} again")
    _put_history(run)


def _checked_run(run: Path) -> "RunLayout":
    """Return where things are in a run whose record is sound, before anything of it is moved."""
    from stages.layout import RunLayout
    from stages.run_record import read_recipe

    layout = RunLayout(run)
    read_recipe(layout)
    return layout


def _put_history(run: Path, *, as_json: bool = False) -> None:
    from stages.artifacts import read_pointer
    from stages.artifacts.keys import KEY_CHARS

    pointer = read_pointer(_checked_run(run).champion)
    history = pointer.history if pointer else []
    if as_json:
        entries = [entry.model_dump(mode="json") for entry in history]
        put_json({"champion": pointer.path if pointer else None, "history": entries})
        return
    if pointer is None:
        say(f"{run}: no champion yet")
    for number, entry in enumerate(history):
        mark = "*" if number == len(history) - 1 else " "  # the history ends at the champion
        when = f"  {entry.at}" if entry.at else ""
        reason = " ".join(entry.reason.split())
        put(f"{mark} {number}  {entry.path}  {entry.key[:KEY_CHARS]}{when}  {reason}")


@app.command(
    name="run",
    epilog=example("spin run demo --run runs/demo --iterations 3",
                    "spin run recipe.yaml --run runs/a --iterations 1 --dry-run train.beta=0.05",
                    "spin run demo --run runs/b -n 9 --keep-engine generate.engine.name=vllm"),
)  # fmt: skip
def run_(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe."),
    ],
    run: Annotated[Path, typer.Option("--run", "-r", help="The run directory; made when new.")],
    iterations: Annotated[
        int | None,
        typer.Option("--iterations", "-n", min=0, help="How many there shall be in all. "
                     "[default: 1; with --until-converged the recipe's stop.max_iterations]",
                     show_default=False),
    ] = None,
    overrides: Overrides = None,
    shrink: Shrink = False,
    until_converged: Annotated[
        bool,
        typer.Option("--until-converged", help="Stop as soon as the opponent can no longer be told "
                     "from the data, by the recipe's `stop` section."),
    ] = False,
    control: Annotated[
        bool,
        typer.Option("--control", help="Run the control arm instead, supervised steps on the same "
                     "prompts, in the directory RUN-control."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands that do the same, and stop.")
    ] = False,
    as_rules: Annotated[
        bool, typer.Option("--rules", help="Print rules of make that do the same, and stop.")
    ] = False,
    amend: Annotated[
        bool,
        typer.Option("--amend", help="Take another recipe than the run was started with for what "
                     "is not done yet."),
    ] = False,
    keep_engine: Annotated[
        bool,
        typer.Option("--keep-engine", help="Let one engine live through the run, asleep while "
                     "other stages work. Changes nothing but the time that engines take to start, "
                     "and --dry-run not at all."),
    ] = False,
    no_verify: NoVerify = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Run the whole loop, or go on where it stopped."""
    set_up_messages(quiet=quiet, verbose=verbose)
    from spin_cli.amending import kept
    from spin_cli.loop import (
        carry_on,
        check_recipe,
        check_stop,
        check_trackers,
        commands,
        rules,
    )
    from spin_cli.views import put_iterations
    from stages.artifacts.locks import hold
    from stages.convergence import distance
    from stages.ending import ending_noted
    from stages.errors import GateRefusedError
    from stages.layout import RunLayout
    from stages.run_record import start_or_resume

    words = [*(overrides or []), *(["train.control=true"] if control else [])]
    chosen = _recipe(recipe, words, shrink=shrink)
    layout = RunLayout(_control_arm(run) if control else run)
    if iterations is None:
        iterations = chosen.for_iteration().stop.max_iterations if until_converged else 1
    if until_converged:
        check_stop(chosen)
    check_recipe(chosen, iterations)
    if amend and (dry_run or as_rules):
        raise typer.BadParameter("--amend changes a run; it cannot be printed")
    if until_converged and as_rules:
        raise typer.BadParameter("rules make a number of iterations: leave --until-converged out")
    if dry_run or as_rules:
        settings = ["--config", recipe, *(["--shrink"] if shrink else []), *words]
        flags = ["--no-verify"] if no_verify else []
        if as_rules:
            lines = rules(layout, chosen, iterations, settings, flags)
        else:
            lines = commands(
                layout, chosen, iterations, settings, flags, until_converged=until_converged
            )
        for line in lines:
            put(line)
        return
    check_trackers(chosen)
    with hold(layout.lock, f"run {layout.root}"):
        before = start_or_resume(layout, chosen, amend=amend)
        try:
            with ending_noted(layout), kept(layout, before, amend=amend):
                reason = carry_on(
                    layout,
                    chosen,
                    iterations,
                    verify=not no_verify,
                    keep_engine=keep_engine,
                    until_converged=until_converged,
                )
        except GateRefusedError:
            put_iterations(layout.root)
            raise
        put_iterations(layout.root)
        name = shlex.quote(str(layout.root))
        logging.getLogger("spin").info("the whole story: spin report %s --out report.html", name)
    if until_converged:
        why_not = distance(layout, chosen, iterations - 1) if iterations and not reason else None
        not_yet = f"not converged after {iterations} iterations, which is all that it may have"
        not_yet += f": {why_not}" if why_not else ""
        say(f"{layout.root}: " + (f"converged: {reason}" if reason else not_yet))
    if iterations and not layout.champion.exists():
        say("no player was promoted: the champion is still the start")


def _control_arm(run: Path) -> Path:
    run = run if run.name not in ("", "..") else run.resolve()
    return run.with_name(f"{run.name}-control")


@app.command(epilog=example("spin init runs/a --config demo"))
def init(
    run: Run,
    config: Config = None,
    shrink: Shrink = False,
    overrides: Overrides = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Start a run directory for stages called one by one."""
    set_up_messages(quiet=quiet, verbose=verbose)
    from stages.artifacts.locks import hold
    from stages.layout import RunLayout
    from stages.run_record import start_or_resume

    layout = RunLayout(run)
    recipe = _recipe(config, overrides, shrink=shrink)
    with hold(layout.lock, f"run {run}"):
        start_or_resume(layout, recipe)


@app.command(epilog=example('spin generate --model "$(spin opponent runs/a --iteration 1)" …'))
def opponent(
    run: Run,
    iteration: Iteration,
    evaluation: Annotated[
        bool, typer.Option("--evaluation", help="Print its evaluation instead.")
    ] = False,
    reference: Annotated[
        bool, typer.Option("--reference", help="Print the reference's model instead.")
    ] = False,
    optimizer: Annotated[
        bool,
        typer.Option(
            "--optimizer",
            help="Print the player whose optimizer's state goes on; empty where it begins anew.",
        ),
    ] = False,
    champion: Annotated[
        bool, typer.Option("--champion", help="Print the evaluation that its player has to beat.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Print the model that an iteration plays against.

    Exit code 6 when a refusal ended the run before it.
    """
    set_up_messages(quiet=quiet, verbose=verbose)
    from stages.decisions import opponent_of, optimizer_of, reference_of, rival_evaluation
    from stages.layout import RunLayout
    from stages.run_record import read_recipe

    if evaluation + reference + optimizer + champion > 1:
        raise typer.BadParameter(
            "give one of --evaluation, --reference, --optimizer and --champion"
        )
    layout = RunLayout(run)
    recipe = read_recipe(layout)
    if champion:
        put(str(rival_evaluation(layout, "champion", iteration)))
        return
    found = opponent_of(layout, recipe, iteration)
    if reference:
        found = reference_of(recipe, iteration, lambda t: opponent_of(layout, recipe, t))
    if optimizer:
        carries = recipe.for_iteration(iteration).train.carry_optimizer
        put((optimizer_of(layout, recipe, found) if carries else None) or "")
    else:
        put(found.evaluation if evaluation else found.model)


@app.command(epilog=example("spin train … $(spin adapted runs/a --iteration 1)"))
def adapted(run: Run, iteration: Iteration, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Print the setting that measurements changed for an iteration."""
    set_up_messages(quiet=quiet, verbose=verbose)
    from stages.adaptation import adapted as read_adapted
    from stages.layout import RunLayout
    from stages.run_record import read_recipe

    layout = RunLayout(run)
    for name, value in read_adapted(layout, read_recipe(layout), iteration).items():
        put(f"{name}={value!r}")


@app.command(epilog=example("spin converged runs/a --iteration 3"))
def converged(
    run: Run, iteration: Iteration, quiet: Quiet = False, verbose: Verbose = False
) -> None:
    """Print why a run has converged, if it has."""
    set_up_messages(quiet=quiet, verbose=verbose)
    from stages.convergence import converged as read_converged
    from stages.layout import RunLayout
    from stages.run_record import read_recipe

    layout = RunLayout(run)
    reason = read_converged(layout, read_recipe(layout), iteration)
    if reason is not None:
        put(reason)


@app.command(epilog=example("spin status runs/demo", "spin status runs/demo --json"))
def status(run: Run, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Show stages, key metrics and champion of a run."""
    set_up_messages(quiet=quiet, verbose=verbose)
    from spin_cli.views import put_status
    from stages.status import status as read_status

    if as_json:
        put_json(read_status(run))
    else:
        put_status(run)


@app.command(epilog=example("spin verify runs/demo", "spin verify runs/demo/data --json"))
def verify(
    place: Annotated[Path, typer.Argument(metavar="RUN|ARTIFACT", help="What to check.")],
    as_json: Json = False,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Files hashed at once. [default: CPUs]")
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Hash every file again and check the chain of inputs."""
    set_up_messages(quiet=quiet, verbose=verbose)
    from stages.errors import CorruptError
    from stages.verify import verify as check

    report = check(place, threads=threads)
    if as_json:
        put_json(report.to_json())
    for problem in [] if as_json else report.problems:
        put(problem)
    say(
        f"{place}: {report.artifacts} artifacts, {report.files} files, "
        f"{report.size_bytes / 1e6:,.1f} MB hashed in {report.seconds:.1f} s"
    )
    if report.problems:
        number = counted(len(report.problems), "problem", "problems")
        raise CorruptError(f"{place}: {number}, named above")
    say(f"{place}: all is as its manifests say")


@app.command(
    epilog=example("spin push runs/demo s3://bucket/runs/demo",
                    "spin push runs/demo/models/sft s3://bucket/models/sft")
)  # fmt: skip
def push(
    place: Annotated[Path, typer.Argument(metavar="RUN|ARTIFACT", help="What to send.")],
    url: Url,
    threads: TransferThreads = 4,
    amend: Annotated[
        bool, typer.Option("--amend", help="Replace the recipe of a run there, if it is another.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Send a run or an artifact to S3 or another store.

    Files first, each manifest last; what is there already is not sent again.
    """
    set_up_messages(quiet=quiet, verbose=verbose)
    from stages import transfer

    say(f"{url}: {transfer.push(place, url, threads=threads, amend=amend).line('sent')}")


@app.command(epilog=example("spin pull s3://bucket/runs/demo runs/demo && spin verify runs/demo"))
def pull(
    url: Url,
    place: Annotated[Path, typer.Argument(metavar="PLACE", help="A new directory, or the run "
                                          "that shall get what it lacks.")],
    threads: TransferThreads = 4,
    amend: Annotated[
        bool, typer.Option("--amend", help="Take the recipe of the run there, if it is another.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Fetch a run or an artifact from S3 or another store.

    Every file is checked against its manifest; what is here already is not fetched again.
    """
    set_up_messages(quiet=quiet, verbose=verbose)
    from stages import transfer

    say(f"{place}: {transfer.pull(url, place, threads=threads, amend=amend).line('fetched')}")


@config_app.command("show", epilog=example("spin config show demo --iteration 1 train.beta=0.05"))
def config_show(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="A recipe file, or a shipped recipe.")
    ] = None,
    overrides: Overrides = None,
    iteration: MaybeIteration = None,
    shrink: Shrink = False,
    verbose: Verbose = False,
) -> None:
    """Print the resolved recipe, each value with its origin."""
    set_up_messages(verbose=verbose)
    from spin_cli.views import setting_line

    words = list(overrides or [])
    if recipe is not None and "=" in recipe and not Path(recipe).exists():
        words.insert(0, recipe)
        recipe = None
    for name, value, origin in _recipe(recipe, words, shrink=shrink).origins(iteration):
        put(setting_line(name, value, origin))


@config_app.command("list", epilog=example("spin config list"))
def config_list() -> None:
    """Print the names of the shipped recipes."""
    set_up_messages()
    from spin_cli import recipes

    for name, path in recipes.shipped().items():
        put(f"{name}\t{recipes.summary(path)}".rstrip())


@app.command(epilog=example("spin version"))
def version() -> None:
    """Print the versions that can change a result."""
    from stages.artifacts.produce import library_versions

    found = library_versions()
    put(f"spin-selfplay {found.pop('spin-selfplay', '(not installed)')}")
    for name, number in found.items():
        put(f"{name} {number}")


def _recipe(
    name: str | None,
    overrides: list[str] | None,
    source: str | None = None,
    *,
    shrink: bool = False,
) -> "Recipe":
    from spin_cli import recipes

    return recipes.load(name, list(overrides or []), source, shrink=shrink)


def _processes(section: str, processes: int | None, gpus: int | None) -> list[str]:
    """Return the overrides that `--processes` and `--gpus` mean."""
    if processes is not None and gpus is not None:
        raise typer.BadParameter("give either --processes N or --gpus N")
    if gpus is not None:
        return [f"{section}.processes={gpus}", f"{section}.device=cuda"]
    return [] if processes is None else [f"{section}.processes={processes}"]


def _model(
    recipe: "Recipe", iteration: int | None, model: str | None, revision: str | None
) -> dict[str, str]:
    """Return the options for a model: the one that was named, or the recipe's."""
    from stages.errors import ConfigError

    section = recipe.for_iteration(iteration).model
    if model is None or model == section.path:
        model, revision = section.path, revision or section.revision
    if model is None:
        raise ConfigError("no model: give --model, or set model.path in the recipe")
    return {"model": model, **({"revision": revision} if revision is not None else {})}


def _execute(step: "Step", recipe: "Recipe", no_verify: bool = False) -> None:
    from spin_cli.steps import execute

    config = recipe.for_iteration(step.iteration)
    execute(step, config.model_copy(update={"verify": False}) if no_verify else config)


lineage_commands.add_to(app)
report_commands.add_to(app)
show_commands.add_to(app)
compare_commands.add_to(app)
