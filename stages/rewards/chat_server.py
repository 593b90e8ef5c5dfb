"""A language model behind an OpenAI-compatible URL, asked one question at a time."""

import contextlib
import http.client
import json
import logging
import random
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from stages.errors import ConfigError, EngineError

BACKOFF_S = 1.0
MOST_BACKOFF_S = 60.0
MOST_WRAPPING_BYTES = 1 << 16
"""Of a reply, beside its tokens."""
MOST_TOKEN_BYTES = 64
LEAST_SECRET = 8
"""Characters of a key that is hidden in replies; a shorter one ("EMPTY") is a word, no secret."""
_REFUSED = (400, 413, 422)
"""Statuses that speak of this request: too long, or against the server's rules."""
_log = logging.getLogger("spin")


@dataclass(frozen=True)
class Said:
    """A reply."""

    text: str
    is_cut: bool = False
    """It ends because it has `max_tokens`."""


class RefusedError(Exception):
    """The server takes this question from nobody; the others may pass."""


class StoppedError(Exception):
    """Nobody waits for the reply any more."""


class _PassingError(Exception):
    """What may be gone when it is tried again."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: it would carry the key to another server."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Refuse."""


class _Deadline:
    """Ends a connection when a request has had its time, whatever trickles in by then."""

    def __init__(self, limit_s: float) -> None:
        self.is_over = False
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(limit_s, self._end)
        self._timer.daemon = True

    def __enter__(self) -> "_Deadline":
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._timer.cancel()
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def connection(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """Return what makes connections that end with us."""

        def made(*args: Any, **settings: Any) -> Any:
            connection = make(*args, **settings)
            create = connection._create_connection
            connection._create_connection = lambda *a, **k: self._hold(create(*a, **k))
            return connection

        return made

    def _hold(self, opened: socket.socket) -> socket.socket:
        with self._lock:
            # A second handle: TLS takes the first one over, and urllib lets it go with the headers.
            self._socket = opened.dup()
        if self.is_over:
            self._end()
        return opened

    def _end(self) -> None:
        self.is_over = True
        with self._lock, contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)


class _Http(urllib.request.HTTPHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(self._deadline.connection(http.client.HTTPConnection), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(self._deadline.connection(http.client.HTTPSConnection), req)


@dataclass(frozen=True)
class ChatServer:
    """Where the model is, and how it is asked. Used by several threads."""

    url: str
    """As in the recipe; `/chat/completions` is added to its path."""
    model: str
    api_key: str | None
    temperature: float
    max_tokens: int
    timeout_s: float
    """Of a request: to connect, its headers and its body together."""
    retries: int
    stop: threading.Event = field(default_factory=threading.Event)
    """Set, it ends all waiting."""

    def ask(self, question: str, seed: int) -> Said:
        """Return what the model says, without the key, which servers like to quote.

        A busy or failing server is asked again, after a pause that doubles each time.

        Raises:
            RefusedError: the server refuses this question.
            ConfigError: it refuses all: a wrong address, model or key.
            EngineError: it cannot be reached, or fails, after all retries.
            StoppedError: `stop` was set.
        """
        for attempt in range(self.retries + 1):
            if self.stop.is_set():
                raise StoppedError
            try:
                return self._ask_once(question, seed)
            except _PassingError as error:
                why = error
            if attempt < self.retries:
                pause_s = BACKOFF_S * 2**attempt * random.uniform(0.5, 1.0)
                self.stop.wait(min(max(pause_s, why.wait_s), MOST_BACKOFF_S))
        raise EngineError(
            f"reward judge: {self.url} gave no reply in {self.retries + 1} attempts ({why}); see "
            "that the server runs, then run the same command again: what it said is kept"
        )

    def _ask_once(self, question: str, seed: int) -> Said:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": seed,
        }
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(_completions(self.url), json.dumps(body).encode(), headers)
        with _Deadline(self.timeout_s) as deadline:
            opener = urllib.request.build_opener(_NoRedirect, _Http(deadline), _Https(deadline))
            try:
                with opener.open(request, timeout=self.timeout_s) as reply:
                    data = self._read(reply)
            except urllib.error.HTTPError as error:
                raise self._refusal(error) from None
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                if deadline.is_over or isinstance(reason, TimeoutError):
                    raise _PassingError("its reply took too long") from None
                raise _PassingError(self._clean(f"{type(error).__name__}: {reason}")) from None
        if deadline.is_over:  # what came may be a part
            raise _PassingError("its reply took too long")
        return self._said(data)

    def _read(self, reply: Any) -> bytes:
        """Return all of a bounded reply."""
        most = MOST_TOKEN_BYTES * self.max_tokens + MOST_WRAPPING_BYTES
        data: bytes = reply.read(most + 1)
        if len(data) > most:
            raise _PassingError(f"its reply has more than {most} bytes")
        return data

    def _said(self, data: bytes) -> Said:
        """Return what a reply holds; a missing text is empty."""
        try:
            choice = json.loads(data)["choices"][0]
            text, is_cut = choice["message"]["content"], choice.get("finish_reason") == "length"
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise _PassingError("its reply is no chat completion") from None
        # A lone surrogate, which JSON can hold, is nothing that a table can.
        clean = str(text).encode("utf-8", "replace").decode() if text is not None else ""
        return Said(self._scrub(clean), is_cut)

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        """Return what an answer other than 200 means."""
        said = ""
        with contextlib.suppress(_PassingError, OSError, http.client.HTTPException), error:
            said = self._scrub(self._read(error).decode(errors="replace"))
        why = self._clean(f"HTTP {error.code} {said[:300]}")
        if error.code in (408, 429) or error.code >= 500:
            return _PassingError(why, _seconds(error.headers))
        if error.code in _REFUSED:
            return RefusedError(why)
        return ConfigError(
            f"reward judge: {self.url} refuses: {why}; correct reward.judge.url, .model or "
            ".api_key_env"
        )

    def _scrub(self, text: str) -> str:
        """Return a text without the key."""
        if self.api_key is None or len(self.api_key) < LEAST_SECRET:
            return text
        return text.replace(self.api_key, "***")

    def _clean(self, text: str) -> str:
        """Return one line of a text without the key."""
        text = self._scrub(text)
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _completions(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/") + "/chat/completions"))


def _seconds(headers: Message) -> float:
    """Return how long a server asks to be left alone."""
    try:
        return max(0.0, float(headers.get("Retry-After", "0")))
    except ValueError:  # a date; the pause of ours has to do
        return 0.0
