"""A judge behind a URL of this machine, whose behaviour a test decides."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any], int], "tuple[int, dict[str, str], bytes]"]
"""(request's body, number of requests before) → status, headers, body."""


def says(text: str, finish: str = "stop") -> tuple[int, dict[str, str], bytes]:
    message = {"role": "assistant", "content": text}
    body = {"choices": [{"message": message, "finish_reason": finish}]}
    return 200, {}, json.dumps(body).encode()


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """The two answers in a request, by our own template."""
    text = body["messages"][0]["content"]
    found = dict(re.findall(r"(?s)\[Answer ([AB]) begins (\w+\]\n.*?)\n\[Answer \1 ends", text))
    first, second = (found[name].split("\n", 1)[1] for name in "AB")
    return first, second


def longer_wins(body: dict[str, Any], _: int) -> tuple[int, dict[str, str], bytes]:
    first, second = map(len, shown(body))
    winner = "tie" if first == second else "A" if first > second else "B"
    return says(f"[[B]] would be hasty. So: [[{winner}]]")


class Judge:
    """What a running server was asked."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []


@contextmanager
def running_judge(answer: Answer, trickle_s: float = 0.0) -> Iterator[Judge]:
    """Serve until the block ends; with `trickle_s`, a reply comes byte by byte, so long apart."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(judge.requests)
                judge.requests.append(body)
                judge.keys.append(self.headers.get("Authorization"))
                judge.paths.append(self.path)
            status, headers, data = answer(body, number)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                for byte in [data] if not trickle_s else [bytes([b]) for b in data]:
                    time.sleep(trickle_s)
                    self.wfile.write(byte)
            except OSError:
                pass  # the other side has had enough

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    judge = Judge(f"http://127.0.0.1:{server.server_port}/v1")
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
