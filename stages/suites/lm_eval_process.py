"""The process that lm-evaluation-harness runs in, seen from ours; see `lm_eval_child`."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from stages.errors import ConfigError, EngineError, InputError
from stages.progress import progress

PROGRAM = Path(__file__).with_name("lm_eval_child.py")
CLOSE_S = 10.0
LOG_LINES = 5
_SAID_CHARS = 400
_VARIABLES = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_DATASETS_TRUST_REMOTE_CODE": "0",
    "DISABLE_MULTIPROC": "1",  # standard errors would fork a process that holds the model
}
_log = logging.getLogger("spin")


class Library:
    """The process that the library runs in, seen from ours; it ends with us, however we end."""

    def __init__(self, name: str, folder: Path | None, variables: Mapping[str, str]) -> None:
        """Start it.

        Args:
            name: the suite's, for messages.
            folder: where it runs; None: in an empty one. It matters: what is the name of a data set
                on the hub means a local folder first.
            variables: what its environment has beside or instead of ours.
        """
        self._name = name
        self._empty = tempfile.TemporaryDirectory(prefix="spin-lm-eval-")
        self._log_path = Path(self._empty.name, "log")
        empty = Path(self._empty.name, "empty")
        empty.mkdir()
        with self._log_path.open("wb") as log:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", os.fspath(PROGRAM)],
                env={**os.environ, **_VARIABLES, **variables},
                cwd=folder or empty,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                process_group=0,  # Ctrl-C is ours, and what it starts ends with it
            )

    def load(self, job: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Have it load tasks; return its version, and what identifies each task.

        Args:
            job: see `lm_eval_child`.

        Raises:
            ConfigError, InputError, EngineError: see `lm_eval.run`.
        """
        self._say(job)
        message = self._hear()
        return str(message["library"]), dict(message["tasks"])

    def ask(
        self, job: Mapping[str, Any], scratch: Path
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Have it ask the model; return what it found, and its samples."""
        with tempfile.TemporaryDirectory(prefix="samples-", dir=scratch) as folder:
            file = Path(folder, "samples.jsonl").absolute()
            self._say({**job, "out": os.fspath(file)})
            results = self._results()
            with file.open(encoding="utf-8") as lines:
                return results, [json.loads(line) for line in lines]

    def _results(self) -> dict[str, Any]:
        """Wait for the results, and show how far it is."""
        message = self._hear()
        while "results" not in message:
            total = int(message["asking"])
            with progress(f"suite {self._name}", total=total, unit="requests") as bar:
                message = self._hear()
                while "asked" in message:
                    bar.advance(max(0, min(int(message["asked"]), total) - bar.done))
                    message = self._hear()
                bar.advance(total - bar.done)
        return dict(message["results"])

    def _say(self, message: Mapping[str, Any]) -> None:
        assert self._popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # that it has ended is heard
            self._popen.stdin.write(json.dumps(message) + "\n")
            self._popen.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        message: dict[str, Any] = json.loads(line) if line.endswith("\n") else self._ended()
        if "error" in message:
            self._fail(*message["error"])
        return message

    def _fail(self, kind: str, text: str) -> NoReturn:
        what = f"suites.{self._name}"
        if text == "missing":
            raise ConfigError(
                f"{what} needs lm-evaluation-harness, which is not installed; "
                "pip install 'spin-selfplay[lm-eval]'"
            )
        said = " ".join(text.split())
        said = said if len(said) <= _SAID_CHARS else f"{said[:_SAID_CHARS]}…"
        if kind == "config":
            raise ConfigError(f"{what}: {said}")
        if kind == "input":
            raise InputError(f"{what}: a task or the model cannot be loaded ({said})")
        raise EngineError(f"{what}: lm-evaluation-harness failed ({said})")

    def _ended(self) -> NoReturn:
        status = self._popen.wait()
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        lines = self._log_path.read_text(errors="replace").splitlines()
        said = " ".join(" ".join(lines[-LOG_LINES:]).split())[-_SAID_CHARS:]
        raise EngineError(
            f"suites.{self._name}: the process of lm-evaluation-harness ended with {how}"
            + (f"; its last words: {said}" if said else "")
        )

    def __enter__(self) -> "Library":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it and all that it started; its log goes to ours."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait(CLOSE_S)
        for stream in (self._popen.stdin, self._popen.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        for line in self._log_path.read_text(errors="replace").splitlines():
            _log.debug("lm-evaluation-harness: %s", line)
        self._empty.cleanup()
