"""The served report: for this machine only, new when the run is, and in nobody's way."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.artifacts import locks
from stages.ending import ending_noted
from stages.errors import BusyError, DivergedError, InputError
from stages.layout import RunLayout
from stages.recipe import load_recipe
from stages.reporting import serve as serving
from stages.reporting.charts import Drawer
from stages.reporting.serve import HOST, Pages, open_server
from tests import made_runs
from tests.made_runs import write_run

ROOT = Path(__file__).parents[2]
DRAWER = Drawer()
"""Of all tests, most of whose drawings are the same."""


class Served:
    """A report that is served by a thread of this process."""

    def __init__(self, layout: RunLayout) -> None:
        self.layout = layout
        self.pages = Pages(layout.root, DRAWER)
        self.server = open_server(self.pages, 0)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    @property
    def port(self) -> int:
        return self.server.server_port

    def ask(
        self, path: str, method: str = "GET", host: str | None = None, tag: str | None = None
    ) -> tuple[int, http.client.HTTPMessage, str]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=30)
        headers = {"Host": host or f"{HOST}:{self.port}"}
        try:
            connection.request(
                method, path, headers=headers | ({"If-None-Match": tag} if tag else {})
            )
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read().decode()
        finally:
            connection.close()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    it = Served(write_run(tmp_path / "run", 1))
    yield it
    it.close()


def test_the_page_may_ask_only_its_own_server(served: Served) -> None:
    status, headers, page = served.ask("/")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Frame-Options"] == "DENY"
    assert "connect-src &#39;self&#39;" in page
    assert 'data-server="live"' in page
    assert "unsafe" not in page.partition("<title>")[0]


def test_it_listens_on_loopback_alone(served: Served) -> None:
    assert served.server.socket.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1:1", "localhost.evil.example", "0.0.0.0"]
)
def test_another_sites_name_for_us_is_refused(served: Served, host: str) -> None:
    for path in ("/", "/state"):
        status, _, text = served.ask(path, host=host)
        assert (status, text) == (421, "another site's name\n")


def test_our_own_names_are_answered(served: Served) -> None:
    for host in (f"localhost:{served.port}", f"LOCALHOST:{served.port}", HOST):
        assert served.ask("/state", host=host)[0] == 200


@pytest.mark.parametrize("path", ["/x", "/../run.json", "/run.json", "/state/"])
def test_there_is_nothing_but_the_page(served: Served, path: str) -> None:
    assert served.ask(path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_changed(served: Served, method: str) -> None:
    assert served.ask("/", method)[0] == 501


def test_head_has_no_body(served: Served) -> None:
    status, headers, body = served.ask("/", "HEAD")
    assert (status, body) == (200, "")
    assert int(headers["Content-Length"]) > 10_000


def test_the_state_changes_with_every_artifact_and_only_then(served: Served) -> None:
    status, headers, text = served.ask("/state")
    tag = headers["ETag"]
    assert (status, json.loads(text)) == (200, {"state": tag.strip('"')})
    assert served.ask("/state", tag=tag)[0] == 304
    refs = {"model": made_runs.outside("base")}
    made_runs.make(served.layout, 1, "generate", refs, counts={"rows": 3})
    status, headers, _ = served.ask("/state", tag=tag)
    assert (status, headers["ETag"] != tag) == (200, True)
    assert "iterations/001/generate" in served.ask("/")[2]


def test_the_state_changes_with_how_the_run_ended(served: Served) -> None:
    tag = served.ask("/state")[1]["ETag"]
    with pytest.raises(DivergedError), ending_noted(served.layout):
        raise DivergedError("train: step 3: it diverged")
    status, headers, _ = served.ask("/state", tag=tag)
    assert (status, headers["ETag"] != tag) == (200, True)
    assert "train: step 3: it diverged" in served.ask("/")[2]


def test_the_page_is_made_anew_only_when_the_run_has_changed(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    render = serving.render

    def counted(*args: object, **options: object) -> str:
        made.append(1)
        return render(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(serving, "render", counted)
    pages = [served.ask("/")[2] for _ in range(3)]
    assert len(set(pages)) == len(made) == 1
    shutil.rmtree(served.layout.stage(0, "promote"))
    assert served.ask("/")[2] != pages[0]
    assert len(made) == 2


def test_a_server_keeps_no_more_drawings_than_its_page_has(tmp_path: Path) -> None:
    layout = write_run(tmp_path / "run", 1)
    pages, recipe = Pages(layout.root), load_recipe(None)
    for iteration in (1, 2):
        pages.page()
        made_runs.write_iteration(layout, recipe, iteration)
    assert pages.page().count('<svg class="chart"') == len(pages.drawer.drawn)


def test_an_attempt_that_ends_without_a_trace_is_seen(served: Served) -> None:
    place = served.layout.stage(1, "generate")
    (place.parent).mkdir(parents=True)
    lock = locks.lock_path(place)
    with locks.hold(lock, "x"):
        (place.parent / ".generate.0123456789abcdef.partial").mkdir()
        note = lock.read_bytes()
        assert "Running now: iterations/001/generate" in served.ask("/")[2]
        before = served.pages.state()
    stamp = lock.stat().st_mtime_ns
    lock.write_bytes(note)  # as a killed holder leaves it
    os.utime(lock, ns=(stamp, stamp))
    assert served.pages.state() != before
    assert "Cut off before the end: iterations/001/generate" in served.ask("/")[2]


def test_nobody_waits_for_the_report(served: Served) -> None:
    place = served.layout.stage(1, "generate")
    place.parent.mkdir(parents=True)
    (place.parent / ".generate.0123456789abcdef.partial").mkdir()
    ends = threading.Event()

    def read_on() -> None:
        while not ends.is_set():
            served.pages.state()

    reader = threading.Thread(target=read_on)
    reader.start()
    try:
        for _ in range(200):
            with locks.hold(locks.lock_path(place), "a stage that begins while the report looks"):
                pass
    finally:
        ends.set()
        reader.join()


def test_a_run_that_vanished_is_told_and_does_not_end_the_server(served: Served) -> None:
    shutil.rmtree(served.layout.root)
    status, _, text = served.ask("/")
    assert (status, "does not exist" in text) == (503, True)
    assert served.ask("/state")[0] == 200


def test_a_port_in_use_is_one_clear_line(served: Served) -> None:
    with pytest.raises(BusyError, match=f"port {served.port} of 127.0.0.1 .* name another with"):
        open_server(served.pages, served.port)


def test_a_place_that_is_no_run_is_refused_before_anything_is_served(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(InputError, match="is no run directory"):
        serving.serve(tmp_path, 0, said.append)
    assert not said


def test_a_browser_that_goes_away_disturbs_nobody(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"\x16\x03\x01\x00", b""):
        with socket.create_connection((HOST, served.port), timeout=10) as rude:
            rude.sendall(words)
    assert served.ask("/state")[0] == 200
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_the_command_says_where_it_is_and_ends_cleanly(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    layout = write_run(tmp_path / "run", 0)
    command = [
        sys.executable,
        "-m",
        "spin_cli",
        "report",
        str(layout.root),
        "--serve",
        "--port",
        "0",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("http://127.0.0.1:")
            port = int(line.split("/")[2].partition(":")[2])
            idle = socket.create_connection((HOST, port), timeout=10)  # as browsers hold one
            time.sleep(0.3)
            process.send_signal(number)
            _, errors = process.communicate(timeout=30)
            idle.close()
        finally:
            process.kill()
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert (errors == "") == (code == 0)
