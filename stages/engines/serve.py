"""An engine's process, seen from inside; `process` is the other side and tells what they say."""

import contextlib
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NoReturn, Protocol

from stages.engines.base import Sampling
from stages.errors import SpinError

ALIVE_EVERY_S = 5.0

Answer = tuple[int, list[int], list[float], str]
"""A request's index, its tokens, their log-probabilities, and why it ended."""


class Backend(Protocol):
    """What an engine does in its own process, one call of `generate` at a time."""

    def load_library(self) -> None:
        """Import what the engine needs."""
        ...

    def start(self, arguments: Mapping[str, Any]) -> dict[str, int]:
        """Load the model; return `vocab_size`, and `window`, the most requests worth holding."""
        ...

    def begin(self, sampling: Sampling) -> None:
        """Hold this for the requests to come."""
        ...

    def add(self, index: int, seed: int, prompt: list[int]) -> None:
        """Take a request."""
        ...

    def drop_all(self) -> None:
        """Forget all requests."""
        ...

    @property
    def busy(self) -> bool:
        """Whether there is a request left to answer."""
        ...

    def step(self) -> Sequence[Answer]:
        """Work for a moment; return what finished."""
        ...

    def sleep(self) -> None:
        """Free the memory that training needs; there is no request left."""
        ...

    def wake(self, arguments: Mapping[str, Any]) -> None:
        """Load `model_dir`; see `KeptEngine.wake`."""
        ...

    def end(self) -> None:
        """End what does not end with this process."""
        ...


def serve() -> NoReturn:
    """Be an engine's process: start when told, answer until told to close."""
    how = json.loads(sys.argv[2])
    if how["cores"]:
        os.sched_setaffinity(0, how["cores"])  # before any library counts them
    os.set_inheritable(how["handle"], False)
    _Server(Connection(how["handle"]), how["kind"]).run()


def _make_backend(kind: str) -> Backend:
    if kind == "vllm":
        from stages.engines.vllm import VllmBackend

        return VllmBackend()
    if kind == "vllm-scores":
        from stages.engines.vllm import VllmScoresBackend

        return VllmScoresBackend()
    if kind == "ray":
        from stages.engines.ray import RayBackend

        return RayBackend()
    from stages.engines.transformers import TransformersBackend

    return TransformersBackend()


def end_group() -> NoReturn:
    """End this process, and with it those that it started, as far as they are of its group."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


class _Server:
    def __init__(self, connection: Connection, kind: str) -> None:
        self._connection = connection
        self._kind = kind
        self._inbox = queue.SimpleQueue[list[Any]]()
        self._last_sent = time.monotonic()
        self._call = 0

    def run(self) -> NoReturn:
        """Serve; never returns, and never leaves a process behind that nobody reads from."""
        threading.Thread(target=self._read, args=(os.getppid(),), daemon=True).start()
        phase = "import"
        try:
            backend = _make_backend(self._kind)
            backend.load_library()
            phase = "start"
            _, arguments = self._inbox.get()
            self._send(["ready", backend.start(arguments)])
            phase = "serve"
            while True:
                self._take_messages(backend)
                self._step(backend)
        except BaseException as error:  # told to the other side, and the end of this process
            logging.getLogger(__name__).exception("the engine failed")
            with contextlib.suppress(OSError):
                text = " ".join(str(error).split())
                if not isinstance(error, SpinError):
                    text = text[:1000]
                self._send(["failed", phase, type(error).__name__, text])
        end_group()

    def _read(self, parent: int) -> None:
        # In a thread, so that the other side's sending never waits for a step of ours, and that
        # we end with it whatever we are doing.
        try:
            while True:
                while not self._connection.poll(1.0):
                    if os.getppid() != parent:
                        end_group()
                self._inbox.put(json.loads(self._connection.recv_bytes()))
        except (EOFError, OSError):
            end_group()

    def _send(self, message: list[Any]) -> None:
        self._connection.send_bytes(json.dumps(message).encode())
        self._last_sent = time.monotonic()

    def _take_messages(self, backend: Backend) -> None:
        """Act on all messages there are; wait for one where there is nothing else to do."""
        while not backend.busy or not self._inbox.empty():
            kind, *content = self._inbox.get()
            if kind == "add":
                call, requests = content
                assert call == self._call, "requests follow their sampling"
                for request in requests:
                    backend.add(*request)
            elif kind == "sampling":
                self._call, sampling = content
                stops = tuple(sampling.pop("stop_token_ids"))
                backend.begin(Sampling(**sampling, stop_token_ids=stops))
            elif kind == "abort":
                if content[0] == self._call:
                    backend.drop_all()
            elif kind == "sleep":
                backend.drop_all()
                backend.sleep()
                self._send(["asleep"])
            elif kind == "wake":
                backend.wake(content[0])
                self._send(["awake"])
            elif kind == "close":
                backend.end()
                os._exit(0)  # frees the rest at once, where an orderly end takes seconds

    def _step(self, backend: Backend) -> None:
        answers = backend.step()
        if answers:
            self._send(["done", self._call, answers])
        elif time.monotonic() - self._last_sent > ALIVE_EVERY_S:
            self._send(["alive"])
