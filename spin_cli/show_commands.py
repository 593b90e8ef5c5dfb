"""`spin show`: an artifact, or rows of it, in the terminal."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from spin_cli.options import Json, NoVerify, Quiet, Verbose, example
from spin_cli.screen import put_json, set_up_messages


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(
        epilog=example(
            "spin show runs/demo:2",
            "spin show runs/demo/iterations/002/score --pairs --sort margin",
            "spin show runs/demo/data --find mugs --rows 20 --full",
        )
    )(show)


def show(
    place: Annotated[
        str,
        typer.Argument(metavar="ARTIFACT|RUN:ITERATION|RUN", help="What to look at; RUN:start "
                       "for what was before the first iteration."),
    ],
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Only the rows: what is chosen beside what is rejected.")
    ] = False,
    sort: Annotated[
        str | None,
        typer.Option("--sort", metavar="margin|reward|length|prompt", help="The highest first; "
                     "prompt: the table's own order, by prompt id."),
    ] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="The lowest first.")] = False,
    rows: Annotated[
        int | None,
        typer.Option("--rows", "-n", min=0, help="How many. [default: 3; 10 with --pairs]",
                     show_default=False),
    ] = None,
    offset: Annotated[int, typer.Option("--offset", min=0, help="Rows to leave out first.")] = 0,
    find: Annotated[
        str | None,
        typer.Option("--find", metavar="TEXT", help="Only rows with this text, prompts included; "
                     "small and capital letters are the same."),
    ] = None,
    prompt_id: Annotated[
        str | None, typer.Option("--prompt-id", metavar="ID", help="Only rows of this prompt; the "
                                 "beginning of an id will do.")
    ] = None,
    dropped: Annotated[
        bool, typer.Option("--dropped", help="The rows that were left out, with their reasons.")
    ] = False,
    file: Annotated[
        str | None,
        typer.Option("--file", metavar="NAME", help="Another table or JSON file of the artifact, "
                     "such as heldout or report.json."),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Do not cut long texts.")] = False,
    as_json: Json = False,
    no_verify: NoVerify = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Show an artifact: what it is, its figures, and some rows."""
    set_up_messages(quiet=quiet, verbose=verbose)
    from spin_cli.show_views import put_artifact, put_places, put_rows
    from stages.errors import CorruptError, InputError
    from stages.show import (
        PAIRED,
        Query,
        describe,
        find_shown,
        has_table,
        open_shown,
        read_shown,
    )

    if pairs and (dropped or file):
        raise typer.BadParameter("--pairs has its own table: leave --dropped and --file out")
    place_found = find_shown(place, pairs=pairs)
    if isinstance(place_found, dict):
        flags = {
            "--sort": sort, "--reverse": reverse, "--rows": rows, "--offset": offset,
            "--find": find, "--prompt-id": prompt_id, "--dropped": dropped, "--file": file,
            "--full": full,
        }  # fmt: skip
        _check_no_rows_asked(place, place_found, flags)
        put_json(place_found) if as_json else put_places(place_found)
        problems = [each["problem"] for each in place_found["artifacts"] if "problem" in each]
        problems += [place_found["champion_problem"]] if "champion_problem" in place_found else []
        _end_damaged(place, problems, told=[] if as_json else problems)
        return
    artifact, damage = open_shown(place_found, verify=not no_verify)
    stage = artifact.manifest.stage
    if pairs and stage not in PAIRED:
        raise InputError(
            f"{place_found} is the output of {stage!r}, which has no pairs; name that of "
            f"{', '.join(PAIRED)}"
        )
    query = Query(
        rows=rows if rows is not None else 10 if pairs else 3,
        offset=offset,
        sort=sort,
        reverse=reverse,
        find=find,
        prompt_id=prompt_id,
        file=file,
        dropped=dropped,
    )
    about = describe(artifact)
    about["damage"] = [*damage, *about["damage"]]
    asked = pairs or dropped or any((file, sort, find, prompt_id, offset))
    told: list[str] = []
    if not as_json:
        put_artifact(about, brief=bool(asked))
        told = list(about["damage"])
    found = None
    if query.rows and (asked or has_table(artifact.manifest)):
        try:
            found = read_shown(artifact, query)
            about["damage"] += found.damage
        except CorruptError as error:
            about["damage"].append(str(error))
    if as_json:
        known = {n: v for n, v in vars(found).items() if n != "damage"} if found else {}
        put_json({"artifact": about, **known})
    elif found is not None:
        put_rows(found, query, pairs=pairs, full=full)
    _end_damaged(str(place_found), about["damage"], told=told)


def _end_damaged(place: str, damage: Sequence[str], *, told: Sequence[str]) -> None:
    """End with exit code 4 where something is damaged; what was told already is not repeated."""
    from stages.errors import CorruptError

    untold = [each for each in dict.fromkeys(damage) if each not in told]
    if damage:
        raise CorruptError("; ".join(untold) or f"{place}: what is damaged is named above")


def _check_no_rows_asked(place: str, found: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """Refuse flags that choose rows where a place has several tables, and so none of its own.

    Raises:
        BadParameter: one is given.
    """
    given = next((name for name, value in flags.items() if value not in (None, False, 0)), None)
    if given is None:
        return
    iterations = found.get("iterations")
    part = "a run" if iterations is not None else "an iteration"
    player = f"{place}:{iterations[-1]}" if iterations else place
    pairs = f", or an iteration's pairs: spin show {player} --pairs"
    has_pairs = iterations != [] and found.get("iteration") != "start"
    raise typer.BadParameter(
        f"{given} is of the rows of one artifact, and {place} is {part}; name one of its "
        f"artifacts (spin show {place} lists them){pairs if has_pairs else ''}"
    )
