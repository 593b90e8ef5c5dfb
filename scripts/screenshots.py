"""Pictures of a run's report for the README: `python -m scripts.screenshots RUN --out FOLDER`."""

import argparse
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page

from scripts.chromium import REMEDY, find_chromium, open_chromium, open_report
from stages.report import write_report

LARGEST_BYTES = 300_000


@dataclass(frozen=True)
class Picture:
    """What a picture shows."""

    name: str
    width: int
    height: int
    theme: str
    prepare: Callable[[Page], None] = lambda page: None


def _best_samples(page: Page) -> None:
    """Show answers that differ: where the player won, and tells human and opponent apart best."""
    page.select_option("#samples-versus", "won")
    page.select_option("#samples-sort", "margin-high")
    page.evaluate("document.getElementById('samples').scrollIntoView()")


PICTURES = (
    Picture("report-light", 1240, 1500, "light"),
    Picture("report-dark", 1240, 1500, "dark"),
    Picture("samples", 1240, 1100, "light", _best_samples),
    Picture("narrow", 390, 900, "dark"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    arguments = parser.parse_args()
    if find_chromium() is None:
        raise SystemExit(REMEDY)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, open_chromium() as browser:
        report = Path(folder) / "report.html"
        write_report(arguments.run, report)
        for picture in PICTURES:
            data = small(taken(browser, report, picture))
            path = arguments.out / f"{picture.name}.png"
            path.write_bytes(data)
            print(f"{path}: {len(data) // 1000} kB")
            if len(data) > LARGEST_BYTES:
                raise SystemExit(f"{path} has more than {LARGEST_BYTES} bytes; make it smaller")


def taken(browser: Browser, report: Path, picture: Picture) -> bytes:
    """Take a picture of a report, twice as fine as the page."""
    page = browser.new_page(
        viewport={"width": picture.width, "height": picture.height},
        color_scheme="dark" if picture.theme == "dark" else "light",
        device_scale_factor=2,
        reduced_motion="reduce",
    )
    open_report(page, report.absolute().as_uri())
    picture.prepare(page)
    data = page.screenshot()
    page.close()
    return data


def small(data: bytes) -> bytes:
    """Return a picture with 256 colours, which is less than half as large and looks the same."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    palette = image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    packed = io.BytesIO()
    palette.save(packed, "PNG", optimize=True)
    return packed.getvalue()


if __name__ == "__main__":
    main()
