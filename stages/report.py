"""report: one offline HTML file that tells a run in the order in which one asks.

It reads manifests, metrics and tables, recomputes nothing, and works on a run in any state.
"""

from dataclasses import dataclass
from pathlib import Path

from stages.artifacts.files import make_folder, write_durably, writing
from stages.artifacts.manifest import MANIFEST_NAME
from stages.errors import ConfigError
from stages.reporting.collect import collect
from stages.reporting.page import render

_BEGINNING = b"<!DOCTYPE html>"


@dataclass(frozen=True)
class Written:
    """What was written."""

    path: Path
    size_bytes: int
    iterations: int
    problems: tuple[str, ...]
    """What of the run could not be read; the page says so too."""


def report_html(run: Path) -> str:
    """Return the report of a run, which `write_report` writes to a file.

    Raises:
        InputError: `run` is no run directory.
    """
    return render(collect(run))


def write_report(run: Path, out: Path) -> Written:
    """Write the report of a run as one HTML file, replacing an earlier one whole.

    The same run gives the same bytes.

    Raises:
        InputError: `run` is no run directory.
        ConfigError: `out` is a directory or a file that is no page, or lies in an artifact.
        NoSpaceError: the disk is full.
    """
    _check_place(out)
    view = collect(run)
    html = render(view)
    with writing(out):
        make_folder(out.parent)
    write_durably(out, html)
    return Written(out, len(html.encode()), len(view.iterations), view.problems)


def _check_place(out: Path) -> None:
    if out.is_dir():
        raise ConfigError(f"--out {out} is a directory; name a file, such as {out / 'report.html'}")
    if out.exists():
        with out.open("rb") as file:
            if file.read(len(_BEGINNING)) != _BEGINNING:
                raise ConfigError(
                    f"--out {out} is there and is no HTML page, so it is not replaced; name another"
                )
    for folder in out.absolute().parents:
        if (folder / MANIFEST_NAME).is_file():
            raise ConfigError(
                f"--out {out} lies in the artifact {folder}, which nothing is added to; name a "
                "place outside"
            )
