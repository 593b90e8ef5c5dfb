"""A language model behind an OpenAI-compatible URL, asked one question at a time."""

import contextlib
import http.client
import json
import logging
import random
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from email.message import Message
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from stages.errors import ConfigError, EngineError

BACKOFF_S = 1.0
MOST_BACKOFF_S = 60.0
MOST_REPLY_BYTES = 1 << 22
_CHUNK = 1 << 16
_REFUSED = (400, 413, 422)
"""Statuses that speak of this request: too long, or against the server's rules."""
_log = logging.getLogger("spin")


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
    retries: int
    stop: threading.Event = field(default_factory=threading.Event)
    """Set, it ends all waiting."""

    def ask(self, question: str, seed: int) -> str:
        """Return what the model says.

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

    def _ask_once(self, question: str, seed: int) -> str:
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
        opener = urllib.request.build_opener(_NoRedirect)
        deadline = time.monotonic() + self.timeout_s
        try:
            with opener.open(request, timeout=self.timeout_s) as reply:
                return _content(_read(reply, deadline))
        except urllib.error.HTTPError as error:
            raise self._refusal(error, deadline) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise _PassingError(self._clean(f"{type(error).__name__}: {reason}")) from None

    def _refusal(self, error: urllib.error.HTTPError, deadline: float) -> Exception:
        """Return what an answer other than 200 means."""
        said = ""
        with contextlib.suppress(_PassingError, OSError, http.client.HTTPException), error:
            said = _read(error, deadline).decode(errors="replace")
        why = self._clean(f"HTTP {error.code} {said[:300]}")
        if error.code in (408, 429) or error.code >= 500:
            return _PassingError(why, _seconds(error.headers))
        if error.code in _REFUSED:
            return RefusedError(why)
        return ConfigError(
            f"reward judge: {self.url} refuses: {why}; correct reward.judge.url, .model or "
            ".api_key_env"
        )

    def _clean(self, text: str) -> str:
        """Return one line of a text without the key, which servers like to quote."""
        if self.api_key:
            text = text.replace(self.api_key, "***")
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _completions(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/") + "/chat/completions"))


def _read(reply: Any, deadline: float) -> bytes:
    """Read a bounded reply, however slowly it trickles in."""
    data = b""
    while chunk := reply.read1(_CHUNK):
        data += chunk
        if len(data) > MOST_REPLY_BYTES:
            raise _PassingError(f"its reply has more than {MOST_REPLY_BYTES} bytes")
        if time.monotonic() > deadline:
            raise _PassingError("its reply took too long")
    return data


def _content(data: bytes) -> str:
    """Return the text of a reply; a missing one is empty."""
    try:
        text = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise _PassingError("its reply is no chat completion") from None
    # A lone surrogate, which JSON can hold, is nothing that a table can.
    return str(text).encode("utf-8", "replace").decode() if text is not None else ""


def _seconds(headers: Message) -> float:
    """Return how long a server asks to be left alone."""
    try:
        return max(0.0, float(headers.get("Retry-After", "0")))
    except ValueError:  # a date; the pause of ours has to do
        return 0.0
