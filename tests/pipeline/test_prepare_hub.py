"""Data sets of the hub: the real client libraries against a stub of the hub on this machine.

The client reads its settings when it is imported, so it runs in a process of its own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlparse

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
ID = "openai/gsm8k"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = """---
configs:
- config_name: main
  data_files: [{split: train, path: "main/train-*"}, {split: test, path: "main/test-*"}]
- config_name: broken
  data_files: [{split: train, path: "broken/train-*"}]
---
"""

# Each line is one run of prepare; the driver prints what came of it.
DRIVER = """
import json, sys
from pathlib import Path
from stages import prepare
from stages.config import RunConfig
from stages.errors import SpinError
for line in sys.stdin:
    out, section = json.loads(line)
    try:
        manifest = prepare.run(RunConfig.model_validate({"prepare": section}), Path(out))
        print(json.dumps([dict(manifest.counts), manifest.key, manifest.fingerprints]))
    except SpinError as error:
        print(json.dumps(str(error)))
    sys.stdout.flush()
"""


def json_lines(count: int, word: str) -> bytes:
    rows = [{"question": f"{word} {i}?", "answer": f"<<{i}={i}>>{i}"} for i in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


DATA_SETS = {
    ID: {
        "README.md": CARD.encode(),
        "main/train-00000-of-00001.jsonl": json_lines(20, "train"),
        "main/test-00000-of-00001.jsonl": json_lines(5, "test"),
        "broken/train-00000-of-00001.jsonl": json_lines(3, "x") + b'{"question": \n',
    },
    "with/code": {"code.py": b"raise SystemExit('code of a data set was run')"},
}


class StubHub(BaseHTTPRequestHandler):
    """The few answers that a data set's listing and reading need."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlparse(self.path).path.removeprefix("/api").removeprefix("/datasets/")
        owner, name, action, revision, *rest = (*path.split("/"), "", "", "")
        files, file = DATA_SETS.get(f"{owner}/{name}"), "/".join(rest).strip("/")
        if files is None:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif action in ("", "revision") and revision in ("", "main", COMMIT):
            siblings = [{"rfilename": name} for name in files]
            info = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings, "tags": []}
            self.answer_json(info)
        elif (action, revision) == ("tree", COMMIT):
            self.answer_json(self.listing(files, file))
        elif (action, revision) == ("resolve", COMMIT) and file in files:
            self.answer_file(files[file])
        else:
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def listing(self, files: dict[str, bytes], folder: str) -> list[dict[str, Any]]:
        def entry(name: str) -> dict[str, Any]:
            return {"type": "file", "path": name, "oid": "0" * 40, "size": len(files[name])}

        if folder:
            return [entry(name) for name in files if name.startswith(f"{folder}/")]
        folders = sorted({name.split("/")[0] for name in files if "/" in name})
        below = [{"type": "directory", "path": name, "oid": "1" * 40} for name in folders]
        return below + [entry(name) for name in files if "/" not in name]

    def answer_file(self, content: bytes) -> None:
        headers = {"ETag": '"1"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if not asked:
            self.answer(200, content, headers)
            return
        first, last = asked.removeprefix("bytes=").split("-")
        end = min(int(last or len(content)) + 1, len(content))
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
        self.answer(206, content[int(first) : end], headers)

    def answer_json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), StubHub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class Client:
    """A process that runs prepare against a hub."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "NO_PROXY": "*"}
        settings |= {
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
        }  # tests run offline elsewhere
        self._process = subprocess.Popen(
            [sys.executable, "-c", DRIVER],
            cwd=ROOT,
            env={**os.environ, **settings, "HF_HUB_DISABLE_TELEMETRY": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, out: Path, **section: Any) -> Any:
        """Return counts, key and fingerprints, or the error's message."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        section = {"format": "gsm8k", "heldout_size": 3, **section}
        self._process.stdin.write(json.dumps([str(out), section]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=60)


@pytest.mark.timeout(180)
def test_data_set_of_the_hub(tmp_path: Path, hub: ThreadingHTTPServer) -> None:
    client = Client(tmp_path, f"http://127.0.0.1:{hub.server_port}")

    # No source: GSM8K's own id and subset; the unpinned revision is resolved to a commit.
    answer = client.run(tmp_path / "data", heldout_split="test")
    assert isinstance(answer, list), answer
    counts, key, fingerprints = answer
    assert (counts["train"], counts["heldout"], counts["dropped_not_drawn"]) == (20, 3, 2)
    assert fingerprints == {
        "source": f"{ID} subset=main split=train commit={COMMIT}",
        "heldout_source": f"{ID} subset=main split=test commit={COMMIT}",
    }

    refused = {
        "Bad split: nope. Available splits: ['train', 'test']": {"split": "nope"},
        "BuilderConfig 'nope' not found. Available: ['main', 'broken']": {"subset": "nope"},
        "no data set openai/gsm8k@v9 could be found on the hub": {"revision": "v9"},
        "prepare.source=no/such is no file or folder here, and no data": {"source": "no/such"},
        f"{ID} has no column prompt; columns there: question, answer; set prepare.prompt_column": {
            "format": "prompt_response", "source": ID, "subset": "main",
        },
        f"data set {ID} broke off after": {"subset": "broken"},
        "with/code cannot be loaded from the hub (Dataset scripts are no": {"source": "with/code"},
    }  # fmt: skip
    for message, section in refused.items():
        answer = client.run(tmp_path / "refused", **section)
        assert isinstance(answer, str), f"{section} was not refused: {answer}"
        assert message in answer
        assert "\n" not in answer

    client.close()

    # Finished, it needs no hub: the commit is that of the first time.
    client = Client(tmp_path, "http://127.0.0.1:9")  # where nobody listens
    assert client.run(tmp_path / "data", heldout_split="test")[1] == key
    unreachable = client.run(tmp_path / "new")
    assert f"no data set {ID}@main could be found on the hub" in unreachable
    client.close()
