"""A local S3 server, and `spin` beside it, in one process: `python -m tests.s3_worker`.

It has the libraries of .venv/s3, which the tests' own process must not see (constraints/s3.txt). It
answers each line of JSON on stdin with one on stdout; the first line that it writes is the server's
address.
"""

import base64
import contextlib
import io
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

BUCKET = "bucket"


class Requests(logging.Handler):
    """Keeps what the server was asked, such as `PUT /bucket/a`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
            _, found, rest = text.partition(f"{method} /")
            if found:
                self.seen.append(f"{method} /{rest.partition(' HTTP')[0]}")
                return


def main() -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the server says is no answer
    requests = Requests()
    log = logging.getLogger("werkzeug")
    log.handlers, log.propagate = [requests], False
    log.setLevel(logging.INFO)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=True)
    server.start()
    host, port = server.get_host_and_port()
    os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)

    def answer(value: Any) -> None:
        out.write(json.dumps(value) + "\n")
        out.flush()

    answer(os.environ["AWS_ENDPOINT_URL"])
    actions: dict[str, Callable[..., Any]] = {
        "spin": spin,
        "keys": lambda: [
            o["Key"] for o in client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
        ],
        "get": lambda key: base64.b64encode(
            client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        ).decode(),
        "put": lambda key, data: client.put_object(
            Bucket=BUCKET, Key=key, Body=base64.b64decode(data)
        )["ETag"],
        "delete": lambda key: str(client.delete_object(Bucket=BUCKET, Key=key)),
        "uploads": lambda: len(client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])),
        "requests": lambda: requests.seen,
        "forget": requests.seen.clear,
    }
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        answer(actions[name](*arguments))


def spin(*words: str) -> dict[str, Any]:
    """Run a command; return its exit code and all that it wrote."""
    from spin_cli.app import app

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            app(list(words), prog_name="spin")
            code: Any = 0
        except SystemExit as end:
            code = end.code
    return {"code": code, "output": text.getvalue()}


if __name__ == "__main__":
    main()
