"""The Chromium that tries out the report and takes its pictures: the system's, never a download."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
REMEDY = f"no Chromium found ({', '.join(NAMES)}); install it: make browser"
# Nothing but the page is asked for, and nothing outlives it: the profile is a temporary folder.
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage",
)  # fmt: skip


def find_chromium() -> str | None:
    """Return the path of the system's Chromium."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def open_chromium() -> Iterator[Browser]:
    """Start Chromium without a window."""
    path = find_chromium()
    assert path is not None, REMEDY
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


def open_report(page: Page, url: str) -> None:
    """Open a report, and wait until its samples can be read."""
    page.goto(url)
    wait_until(page, "performance.getEntriesByName('samples-ready').length > 0")


def wait_until(page: Page, condition: str, timeout_s: float = 20) -> None:
    """Wait until an expression is true; `wait_for_function` evals it, which the page forbids."""
    end = time.monotonic() + timeout_s
    while not page.evaluate(condition):
        if time.monotonic() > end:
            raise TimeoutError(f"not true after {timeout_s} s: {condition}")
        page.wait_for_timeout(20)
