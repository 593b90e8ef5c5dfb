"""A hub of models on loopback, as far as sending a folder to it needs one.

It speaks what huggingface_hub's client says to create a repository, to look at it, to list its
files and to commit: all in memory.
"""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What the server holds, and what it was asked."""

    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    """From repository to whether it is private."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Return status and JSON."""
        self.requests.append(f"{method} {path}")
        path = path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(n for n in (asked.get("organization"), asked["name"]) if n)
            if name in self.private:
                return 409, {"error": "exists", "url": f"{self.url}/{name}"}
            self.private[name] = asked.get("private") or asked.get("visibility") == "private"
            self.files[name] = {".gitattributes": b""}
            return 200, {"url": f"{self.url}/{name}", "name": name, "id": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if not path.startswith("/api/models/"):
            return 404, {"error": f"unknown: {path}"}
        parts = path.removeprefix("/api/models/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        if name not in self.private:
            return 404, {"error": "no such repository"}
        match rest:
            case [] | ["revision", _]:
                return 200, {
                    "id": name,
                    "private": self.private[name],
                    "sha": "0" * 40,
                    "siblings": [{"rfilename": file} for file in self.files[name]],
                }
            case ["preupload", _]:
                asked = [file["path"] for file in json.loads(body)["files"]]
                plain = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
                return 200, {"files": [{"path": file, **plain} for file in asked]}
            case ["commit", _]:
                return 200, self._commit(name, body)
            case ["tree", _, *_]:
                files = self.files[name].items()
                return 200, [
                    {"type": "file", "path": p, "size": len(data), "oid": "0"} for p, data in files
                ]
        return 404, {"error": f"unknown: {path}"}

    def _commit(self, name: str, body: bytes) -> dict[str, Any]:
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                value = entry["value"]
                self.files[name][value["path"]] = base64.b64decode(value["content"])
        return {"commitUrl": f"{self.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve a hub while the block runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.tokens.add(self.headers.get("Authorization", ""))
            status, content = hub.answer(self.command, self.path, body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = _do

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
