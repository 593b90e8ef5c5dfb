"""Where an artifact comes from, how two differ, and whether it can be made again."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spin_cli.options import Json, NoVerify, Quiet, Verbose, example
from spin_cli.screen import counted, put, put_json, say, set_up_messages

if TYPE_CHECKING:
    from stages.reproduce import Agreement

Subject = Annotated[
    str,
    typer.Argument(
        metavar="ARTIFACT",
        help="An artifact; a run, which means its champion; RUN:N or its folder for an iteration.",
    ),
]
_KINDS = "An artifact, a run, or RUN:N (or its folder) for an iteration."


def lineage(
    artifact: Subject,
    as_json: Json = False,
    as_dot: Annotated[
        bool, typer.Option("--dot", help="Print a graph for Graphviz's dot instead.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Tell what made something, down to data and commit.

    It reads manifests alone; `spin verify` hashes the bytes.
    """
    set_up_messages(quiet=quiet, verbose=verbose)
    from spin_cli.lineage_views import dot_lines, put_tree
    from stages.lineage import lineage as read_lineage
    from stages.subjects import find_subject

    if as_json and as_dot:
        raise typer.BadParameter("give one of --json and --dot")
    found = read_lineage(find_subject(artifact))
    if as_json:
        put_json(found.to_json())
    else:
        if as_dot:
            for line in dot_lines(found):
                put(line)
        else:
            put_tree(found)
        problems = found.problems()
        if problems:
            number = counted(len(problems), "problem", "problems")
            say(f"{artifact}: {number} on the way, named above")
    _end_damaged(found.damage())


def _end_damaged(damage: "Sequence[str]") -> None:
    """End with exit code 4 where a manifest is damaged; all that is sound was told."""
    from stages.errors import CorruptError

    if damage:
        raise CorruptError("; ".join(dict.fromkeys(damage)))


def diff(
    one: Annotated[str, typer.Argument(metavar="A", help=_KINDS)],
    other: Annotated[str, typer.Argument(metavar="B", help="Another of the same kind.")],
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Tell how two artifacts, iterations or runs differ.

    Settings, inputs, code, counts and metrics; nothing is recomputed.
    """
    set_up_messages(quiet=quiet, verbose=verbose)
    from spin_cli.lineage_views import difference_lines
    from stages.difference import difference
    from stages.subjects import find_subject

    found = difference(find_subject(one), find_subject(other))
    if as_json:
        put_json(found.to_json())
    else:
        for line in difference_lines(found):
            put(line)
    _end_damaged(list(found.problems.values()))


def reproduce(
    artifact: Subject,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="SECTION.KEY=VALUE", help="Settings that only name places or change "
                       "speed, such as model.path on this machine."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--in", metavar="DIR", help="The run directory to work in; what is there "
                     "from before is not made again. [default: RUN-reproduced]",
                     show_default=False),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option("--tolerance", min=0.0, help="How far metrics without an interval may be "
                     "apart where bytes may differ: a share of the larger one."),
    ] = 0.02,
    as_json: Json = False,
    no_verify: NoVerify = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Make something again, elsewhere, and compare.

    Exit code 5 when something does not agree: bytes of prepare, pair and promote where their inputs
    are the same, and metrics of the rest.
    """
    set_up_messages(quiet=quiet, verbose=verbose)
    from spin_cli.replay import replay
    from stages.reproduce import chain, other_makers
    from stages.subjects import find_subject

    original = chain(find_subject(artifact))
    root = original.root
    assert root is not None, "chains are those of runs"
    place = folder if folder is not None else _beside(root)
    steps = replay(
        original, place, tolerance=tolerance, overrides=overrides or [], verify=not no_verify
    )
    makers = other_makers(original)
    for line in makers:
        say(f"made by other code than this: {line}")
    made = counted(len(list(original.made())), "artifact is", "artifacts are")
    say(f"{artifact}: {made} made again in {place}")
    found = []
    for each in steps:
        found.append(each)
        if not as_json:
            put(f"{each.place}: {each.text()}")
    if as_json:
        put_json(
            {
                "artifact": artifact,
                "in": str(place),
                "agrees": all(each.agrees is not False for each in found),
                "not_compared": [each.place for each in found if each.agrees is None],
                "tolerance": tolerance,
                "other_makers": makers,
                "artifacts": [each.to_json() for each in found],
            }
        )
    _end_reproduction(root, place, found)


def _beside(root: Path) -> Path:
    """Return the folder beside a run that its reproduction is made in."""
    named = root if root.name.strip(".") else root.resolve()  # . and .. have no name to add to
    return named.with_name(f"{named.name}-reproduced")


def _end_reproduction(root: Path, place: Path, found: "Sequence[Agreement]") -> None:
    from stages.errors import DivergedError

    apart = [each.place for each in found if each.agrees is False]
    if apart:
        raise DivergedError(
            f"{place}: {len(apart)} of {len(found)} artifacts do not agree with the original, "
            f"{apart[0]} first; compare them: spin diff {root / apart[0]} {place / apart[0]}"
        )
    say(f"{place}: {_summary(found)}")


def _summary(found: "Sequence[Agreement]") -> str:
    """Return in words how well artifacts agree of which none differs."""
    equal = sum(each.same_bytes for each in found)
    unknown = sum(each.agrees is None for each in found)
    near = [each for each in found if each.agrees and not each.same_bytes]
    text = f"{'none differs' if unknown else 'all agree'}: {equal} of {len(found)} in every byte"
    if near:
        text += f", {len(near)} in metrics"
        farthest = [(each.place, figure) for each in near if (figure := each.farthest())]
        if farthest:
            where, most = max(farthest, key=lambda pair: pair[1].deviation or 0.0)
            text += (
                f" (the largest deviation is {most.deviation:.2g} of its value, {where}: {most})"
            )
    if unknown:
        text += f", {unknown} not compared"
    now = sum(each.made_now for each in found)
    return f"{text}; {now} made by this call, {len(found) - now} by earlier ones"


def export_player(
    run: Path,
    folder: Path,
    iteration: int | None,
    repo: str | None,
    *,
    public: bool = False,
    verify: bool = True,
) -> None:
    """Do the work of `spin promote --export`.

    Args:
        iteration: None means the champion.
        repo: of the hub, where the export is sent; None sends nothing.
    """
    from stages import hub
    from stages.export import CARD, export
    from stages.layout import RunLayout

    if repo is not None:
        hub.check_ready(repo)
    made = export(RunLayout(run), folder, iteration, verify=verify)
    who = "the champion" if made.is_champion else "not the champion"
    merged = ", its adapters merged" if made.merges else ""
    say(f"{folder}: iteration {made.iteration}, {who}{merged}; its card is {folder / CARD}")
    if repo is not None:
        say(f"{folder}: sent to {hub.push(folder, repo, public=public)}")


def add_to(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command(epilog=example("spin lineage runs/demo", "spin lineage runs/demo:2 --json"))(
        lineage
    )
    app.command(epilog=example("spin diff runs/demo:1 runs/demo:2", "spin diff runs/a runs/b"))(
        diff
    )
    app.command(epilog=example("spin reproduce runs/demo --in runs/again"))(reproduce)
