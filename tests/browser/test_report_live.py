"""The served report in a real browser: news arrive, and the reader stays where she was."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="needs playwright: pip install -e '.[dev]'")

from playwright.sync_api import Route

from scripts.chromium import REMEDY, find_chromium, open_chromium, open_report, wait_until
from stages.layout import RunLayout
from stages.recipe import load_recipe
from stages.reporting.serve import HOST, Pages, open_server
from tests.made_runs import write_iteration, write_run

pytestmark = pytest.mark.skipif(find_chromium() is None, reason=REMEDY)
PLAYED = "document.getElementById('decision-1') !== null"


@contextmanager
def served(layout: RunLayout) -> Iterator[str]:
    """Serve the report of a run; lend its address."""
    server = open_server(Pages(layout.root), 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://{HOST}:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


def play(layout: RunLayout) -> None:
    write_iteration(layout, load_recipe(None, ["promote.metric=sampled_accuracy"]), 1)


def test_news_leave_what_is_read_opened_and_searched_as_it_is(tmp_path: Path) -> None:
    layout = write_run(tmp_path / "run", 1)
    said: list[str] = []
    asked: set[str] = set()
    with served(layout) as url, open_chromium() as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.add(request.url))
        open_report(page, url)
        wait_until(page, "document.getElementById('live').textContent === 'Live'")
        page.fill("#samples-search", "Question 3")
        page.locator("#decision-0 > summary").click()
        page.locator("#course-1-table > summary").click()
        place = "document.getElementById('samples-search').getBoundingClientRect().top"
        page.evaluate("document.getElementById('samples').scrollIntoView({behavior: 'instant'})")
        before = page.evaluate(place)
        play(layout)
        wait_until(page, PLAYED, 60)
        wait_until(page, "document.querySelectorAll('#samples-evaluation option').length === 3")
        assert page.evaluate("document.getElementById('decision-0').open") is False
        assert page.evaluate("document.getElementById('course-1-table').open") is True
        assert page.input_value("#samples-search") == "Question 3"
        assert abs(page.evaluate(place) - before) < 50, "what is read stays in view"
        assert page.locator("#live").inner_text().startswith("Updated at")
        assert "iteration 1" in page.locator("#summary").inner_text()
        assert (said, asked) == ([], {url, f"{url}state"})


def test_what_changes_before_the_page_first_asks_is_shown(tmp_path: Path) -> None:
    layout = write_run(tmp_path / "run", 1)
    first = True

    def played_first(route: Route) -> None:
        nonlocal first
        if first:
            play(layout)
            first = False
        route.continue_()

    with served(layout) as url, open_chromium() as browser:
        page = browser.new_page()
        page.route("**/state", played_first)
        open_report(page, url)
        wait_until(page, PLAYED)
        assert page.locator("#live").inner_text().startswith("Updated at")


def test_news_that_cannot_be_had_at_first_are_asked_for_again(tmp_path: Path) -> None:
    layout = write_run(tmp_path / "run", 1)
    refused: list[str] = []

    def once_refused(route: Route) -> None:
        if refused:
            route.continue_()
        else:
            refused.append(route.request.url)
            route.fulfill(status=503, body="damaged\n")

    with served(layout) as url, open_chromium() as browser:
        page = browser.new_page()
        open_report(page, url)
        wait_until(page, "document.getElementById('live').textContent === 'Live'")
        page.route(url, once_refused)
        play(layout)
        wait_until(page, "document.getElementById('live').textContent.includes('last page')")
        assert page.locator("#live").inner_text().startswith("The run cannot be read")
        wait_until(page, PLAYED)
        assert page.locator("#live").inner_text().startswith("Updated at")
