"""`spin report`: a run as a page."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from spin_cli.options import Quiet, Run, Verbose, example
from spin_cli.screen import counted, put, say, set_up_messages


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command(
        epilog=example(
            "spin report runs/demo --out demo.html",
            "spin report runs/demo --out - | gzip > demo.html.gz",
            "spin report runs/demo --serve",
            "spin report runs/demo --serve --port 8000",
        )
    )(report)


def report(
    run: Run,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE.html", help="The file to write; an earlier one "
                     "is replaced. -: to stdout."),
    ] = None,
    serve: Annotated[
        bool,
        typer.Option("--serve", help="Show it on this machine's loopback address until Ctrl-C, "
                     "with news while the run goes on."),
    ] = False,
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, help="With --serve; 0 takes a free one. "
                     "[default: 8642]", show_default=False),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Tell a run in one offline HTML file, or serve it live.

    It works on a run in any state: what is missing or damaged is named in the page.
    """
    set_up_messages(quiet=quiet, verbose=verbose)
    if (out is None) == (not serve) or (port is not None and not serve):
        raise typer.BadParameter("give either --out FILE.html, or --serve with or without --port N")
    if out is None:
        from stages.reporting.serve import DEFAULT_PORT
        from stages.reporting.serve import serve as serve_report

        wanted = DEFAULT_PORT if port is None else port
        serve_report(run, wanted, lambda url: put(f"{url} (Ctrl-C ends it)"))
        return
    from stages.report import report_html, write_report

    if str(out) == "-":
        sys.stdout.buffer.write(report_html(run).encode())
        sys.stdout.buffer.flush()
        return
    written = write_report(run, out)
    gaps = f", {counted(len(written.problems), 'thing', 'things')} could not be read"
    if not quiet:
        say(
            f"{written.path}: {counted(written.iterations, 'iteration', 'iterations')}, "
            f"{written.size_bytes / 1e6:.1f} MB{gaps if written.problems else ''}"
        )
