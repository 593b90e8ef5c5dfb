"""The report of a run while it goes on, for browsers on this machine only.

Stages are never made to wait: the page is read from what is finished, and made anew only when an
artifact, a decision or an attempt came or went.
"""

import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

from stages.artifacts.keys import sha256_text
from stages.artifacts.locks import lock_path
from stages.artifacts.manifest import MANIFEST_NAME
from stages.errors import BusyError, SpinError
from stages.layout import RunLayout
from stages.reporting.charts import Drawer
from stages.reporting.collect import collect
from stages.reporting.page import render
from stages.status import stage_state

log = logging.getLogger("spin")

HOST = "127.0.0.1"
DEFAULT_PORT = 8642
_NAMES = (HOST, "localhost")
"""What a browser on this machine may call us; another name is another site's (DNS rebinding)."""
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@dataclass
class Pages:
    """The newest page of a run, made when it is asked for and something has changed."""

    run: Path
    drawer: Drawer = field(default_factory=Drawer)
    """Keeps what was drawn, since most of it stays from page to page."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _state: str = ""
    _page: str = ""

    def state(self) -> str:
        """Return a hash of what the run holds; equal ones mean equal pages."""
        return sha256_text("\n".join(_traces(RunLayout(self.run))))[:32]

    def page(self) -> str:
        """Return the page of what the run holds now.

        Raises:
            SpinError: the run is no run any more.
        """
        with self._lock:  # matplotlib's settings are shared by all threads
            state = self.state()
            if state != self._state:
                self._page = render(collect(self.run), drawer=self.drawer, state=state)
                self._state = state
                self.drawer.forget_others()
            return self._page


def serve(run: Path, port: int, announce: Callable[[str], None]) -> None:
    """Serve the report of a run until the process is interrupted.

    Args:
        port: 0 takes one that is free.
        announce: is told the address once, when it can be opened.

    Raises:
        BusyError: the port is taken.
        SpinError: `run` is no run directory.
    """
    pages = Pages(run)
    server = open_server(pages, port)
    try:
        pages.page()  # a run that cannot be told is said now
        announce(f"http://{HOST}:{server.server_port}/")
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        pass  # the way to end it
    finally:
        server.server_close()


def open_server(pages: Pages, port: int) -> "_Server":
    """Return a server that listens; it answers while `serve_forever` runs.

    Raises:
        BusyError: the port is taken.
    """
    try:
        return _Server(pages, port)
    except OSError as error:
        raise BusyError(
            f"port {port} of {HOST} cannot be had ({error.strerror}); name another with --port N "
            "(0 takes a free one)"
        ) from None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a browser may hold a connection open for ever
    # On Linux a second server could else take the port of one that still ends.
    allow_reuse_address = True

    def __init__(self, pages: Pages, port: int) -> None:
        self.pages = pages
        super().__init__((HOST, port), _Handler)

    def server_bind(self) -> None:
        """Bind without looking our own name up, which can take long."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = HOST, int(self.server_address[1])

    def handle_error(self, request: object, client_address: object) -> None:
        """Tell of our own mistakes; say nothing of a browser that went away."""
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            log.error("report: a bug while a page was made: %r", error, exc_info=error)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = 30
    server_version = "spin"
    sys_version = ""
    _routes: ClassVar[dict[str, Callable[["_Handler"], None]]] = {}

    def do_GET(self) -> None:
        """Answer with the page or its state."""
        if not self._is_for_us():
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, "text/plain", "another site's name\n")
            return
        route = self._routes.get(self.path.partition("?")[0])
        if route is None:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", "there is only /\n")
            return
        route(self)

    do_HEAD = do_GET

    def _is_for_us(self) -> bool:
        port = self.server.server_port
        names = {*_NAMES, *(f"{name}:{port}" for name in _NAMES)}
        return self.headers.get_all("Host", []) == [self.headers.get("Host")] and (
            self.headers.get("Host", "").lower() in names
        )

    def _page(self) -> None:
        try:
            page = self.server.pages.page()
        except (SpinError, OSError) as error:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", f"{error}\n")
            return
        self._answer(HTTPStatus.OK, "text/html", page)

    def _state(self) -> None:
        tag = f'"{self.server.pages.state()}"'
        if self.headers.get("If-None-Match") == tag:
            self._answer(HTTPStatus.NOT_MODIFIED, "application/json", "", tag)
            return
        self._answer(HTTPStatus.OK, "application/json", f'{{"state":{tag}}}\n', tag)

    def _answer(self, status: HTTPStatus, kind: str, text: str, tag: str | None = None) -> None:
        body = text.encode("utf-8", "replace")
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        if tag is not None:
            self.send_header("ETag", tag)
        if status != HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of single requests."""


_Handler._routes = {"/": _Handler._page, "/state": _Handler._state}


def _traces(layout: RunLayout) -> Iterator[str]:
    """Yield a line for everything that a page depends on: stamps of manifests, and attempts."""
    for path in (layout.record, layout.champion, layout.ending):
        yield _stamp(path)
    parents = [layout.root, layout.root / "models", layout.root / "start", layout.root / "suites"]
    parents += [layout.stage(t, "generate").parent for t in layout.iterations()]
    for parent in parents:
        try:
            names = sorted(path.name for path in parent.iterdir())
        except OSError:  # not there yet
            continue
        for name in names:
            if name.endswith(".partial"):  # .NAME.KEY.partial, held by its maker or left behind
                place = parent / name[1:].rsplit(".", 2)[0]
                yield f"{parent.name}/{name}: {stage_state(place)['state']}"
            elif not name.startswith("."):
                yield _stamp(parent / name / MANIFEST_NAME)
                yield _stamp(lock_path(parent / name))


def _stamp(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return f"{path.name}: none"
    return f"{path.parent.name}/{path.name}: {found.st_mtime_ns} {found.st_size} {found.st_ino}"
