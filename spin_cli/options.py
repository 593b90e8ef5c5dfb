"""The options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The artifact to make: a new directory.")]
Config = Annotated[
    str | None,
    typer.Option("--config", "-c", metavar="RECIPE",
                 help="A recipe file, or the name of a shipped recipe."),
]  # fmt: skip
Iteration = Annotated[
    int, typer.Option("--iteration", "-t", min=0, help="Whose settings and seeds hold.")
]
MaybeIteration = Annotated[
    int | None, typer.Option("--iteration", "-t", min=0, help="Whose settings hold.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Settings to override.")
]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Do not check the hashes of inputs. Damage goes unseen.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Details, and tracebacks.")]
Data = Annotated[Path, typer.Option("--data", help="The output of prepare.")]
Prompts = Annotated[Path, typer.Option("--data", "--prompts", help="The output of prepare.")]
Generations = Annotated[
    list[Path],
    typer.Option("--generations", help="The output of generate; several times with a pool, the "
                 "newest opponent's first."),
]  # fmt: skip
Shrink = Annotated[
    bool, typer.Option("--shrink", help="The recipe's reduced form: tiny model, little data.")
]
Pairs = Annotated[Path, typer.Option("--pairs", help="The output of pair.")]
ScoredPairs = Annotated[Path, typer.Option("--pairs", help="The output of score.")]
Model = Annotated[
    str, typer.Option("--model", help="An artifact, a model folder, RUN/champion, or a hub id.")
]
MaybeModel = Annotated[
    str | None,
    typer.Option("--model", help="An artifact, a model folder, RUN/champion, or a hub id. "
                 "[default: the recipe's model.path]", show_default=False),
]  # fmt: skip
Revision = Annotated[str | None, typer.Option("--revision", help="The commit of a hub model.")]
Processes = Annotated[
    int | None,
    typer.Option("--processes", min=1, help="Work with so many processes on this machine."),
]
Gpus = Annotated[
    int | None,
    typer.Option("--gpus", min=1, help="Work on so many GPUs of this machine, a process each."),
]
Url = Annotated[
    str, typer.Argument(metavar="URL", help="s3://bucket/folder, or what else fsspec knows.")
]
TransferThreads = Annotated[int, typer.Option("--threads", min=1, help="Files carried at once.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def example(*lines: str) -> str:
    """Return the lines that end the help of a command."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)
