"""Engines in processes of their own, behind one `Engine`: one process, or several side by side."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NoReturn

from stages.engines import process
from stages.engines.base import Completion, Request, Sampling, check_finite, check_length
from stages.engines.places import Place, release_gpu_memory
from stages.engines.process import Kind, Process
from stages.errors import EngineError

START_TIMEOUT_S = 3600  # reading a large model from a slow disk, and compiling it

_log = logging.getLogger("spin")


class Fleet:
    """See `KeptEngine`. A request goes to the process that has the fewest.

    A process that dies while others live loses nothing: they get the requests that it had.
    """

    def __init__(
        self,
        kind: Kind,
        arguments: Mapping[str, object],
        places: Sequence[Place],
        environment: Mapping[str, str],
        *,
        model_dir: Path,
        max_model_len: int,
        check_sampling: Callable[[Sampling], None] = lambda _: None,
    ) -> None:
        """Start a process a place, all at once, and wait until each has loaded the model.

        Args:
            arguments: what the processes start with; see `serve.Backend.start`.
            environment: the processes' variables, but for those of their places.
            max_model_len: longest prompt and answer together, in tokens.
            check_sampling: raises a `ConfigError` for what the engine cannot do.

        Raises:
            InputError: the engine's library does not import.
            ConfigError: it refuses the model or an argument, or memory does not suffice.
            EngineError: a process died.
        """
        self._kind = kind
        self._model_dir = model_dir
        self._max_model_len = max_model_len
        self._check_sampling = check_sampling
        self._num_calls = 0
        self._call: int | None = None
        self._given_back = deque[tuple[int, Request]]()
        """Requests of processes that died, to be given to others."""
        self._is_open = True
        self._processes: list[Process] = []
        release_gpu_memory()
        try:
            for place in places:
                self._processes.append(Process(kind, place, environment))
            self._each(lambda child: child.send(["start", dict(arguments)]))
            sizes = self._ask_all("ready", START_TIMEOUT_S)
        except BaseException:
            self._end_processes(wait_s=0)
            raise
        for child, (_, size) in sizes.items():
            child.window = size["window"]
        self._vocab_size = min(size["vocab_size"] for _, size in sizes.values())

    @property
    def pids(self) -> list[int]:
        """The numbers of the processes that live."""
        return [child.pid for child in self._live]

    @property
    def whole(self) -> bool:
        """Whether no process has died."""
        return self._is_open and len(self._live) == len(self._processes)

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """See `Engine.generate`. The requests in flight are bounded by the processes' windows.

        One call at a time. A call that is not read to its end takes its requests back.

        Raises:
            DivergedError: the model's log-probabilities are not finite.
            ConfigError: settings that the engine does not have, or memory does not suffice for.
            EngineError: the last process died, or made no step for a long time.
        """
        assert self._is_open, "the engine is closed"
        assert self._call is None, "one call of generate at a time"
        if not self._live:
            logs = ", ".join(str(child.log_path) for child in self._processes)
            raise EngineError(
                f"engine {self._kind.name}: its process has ended (its log: {logs}); open a new one"
            )
        self._check_sampling(sampling)
        call = self._call = self._num_calls = self._num_calls + 1
        source = enumerate(requests)
        try:
            self._each(lambda child: child.send(["sampling", call, asdict(sampling)]))
            while True:
                self._feed(call, source, sampling)
                if not any(child.pending for child in self._live):
                    if self._given_back:
                        continue
                    return
                for request, answer in self._receive_answers(call):
                    began = time.monotonic()
                    yield self._complete(request, *answer)
                    self._forgive(time.monotonic() - began)
        finally:
            self._leave(call)

    def sleep(self) -> None:
        """See `KeptEngine.sleep`."""
        if self._call is not None:
            self._leave(self._call)
        self._each(lambda child: child.send(["sleep"]))
        self._ask_all("asleep", process.STALL_TIMEOUT_S)

    def wake(self, model_dir: Path, *, max_model_len: int, reload: bool) -> None:
        """See `KeptEngine.wake`."""
        how = {"model_dir": str(model_dir), "max_model_len": max_model_len, "reload": reload}
        self._model_dir, self._max_model_len = model_dir, max_model_len
        release_gpu_memory()
        self._each(lambda child: child.send(["wake", how]))
        self._ask_all("awake", START_TIMEOUT_S)

    def can_wake(self, model_dir: Path, *, max_model_len: int) -> bool:
        """See `KeptEngine.can_wake`."""
        return self.whole

    def close(self) -> None:
        """End the processes, and with them all they hold."""
        self._is_open = False
        self._end_processes()

    @property
    def _live(self) -> list[Process]:
        return [child for child in self._processes if not child.is_dead]

    def _feed(self, call: int, source: Iterator[tuple[int, Request]], sampling: Sampling) -> None:
        """Hand out requests until every process has as many as it shall have, or none is left."""
        live = self._live
        while live:
            child = min(live, key=lambda child: len(child.pending))
            if len(child.pending) >= child.window:
                child = max(live, key=lambda child: child.window - len(child.pending))
                if len(child.pending) >= child.window:
                    break
            item = self._given_back.popleft() if self._given_back else next(source, None)
            if item is None:
                break
            index, request = item
            self._check_request(request, sampling)
            try:
                child.add(call, index, request)
            except EngineError as error:
                self._lose(child, error)
                live = self._live
        self._each(lambda child: child.flush(call))

    def _receive_answers(self, call: int) -> list[tuple[Request, tuple[Any, ...]]]:
        """Wait for a message; return the answers that came, of this call alone."""
        answers = []
        for child, message in self._receive(process.STALL_TIMEOUT_S):
            if message[0] == "done" and message[1] == call:  # else of a call that was left
                for index, *answer in message[2]:
                    answers.append((child.pending.pop(index), tuple(answer)))
        return answers

    def _receive(self, limit_s: float) -> list[tuple[Process, list[Any]]]:
        """Return a message of every process that has one, waiting a moment where none has.

        Raises:
            EngineError: the last process died, or was silent for so long.
        """
        live, messages = self._live, []
        ready = wait([child.connection for child in live], process.POLL_S)
        for child in live:
            try:
                if child.connection in ready:
                    messages.append((child, child.read()))
                elif child.pending or self._call is None:
                    child.check(limit_s)
                else:
                    child.check(math.inf)
            except EngineError as error:
                self._lose(child, error)
        return messages

    def _ask_all(self, answer: str, limit_s: float) -> dict[Process, list[Any]]:
        """Wait for an answer of every process that lives, and return them.

        Raises:
            EngineError: the last one died, or was silent for so long.
        """
        for child in self._processes:
            child.heard_at = time.monotonic()
        answers: dict[Process, list[Any]] = {}
        while waiting := [child for child in self._live if child not in answers]:
            ready = wait([child.connection for child in waiting], process.POLL_S)
            for child in waiting:
                try:
                    if child.connection not in ready:
                        child.check(limit_s)
                    elif (message := child.read())[0] == answer:
                        answers[child] = message
                except EngineError as error:
                    answers.pop(child, None)
                    self._lose(child, error)
        return {child: message for child, message in answers.items() if not child.is_dead}

    def _each(self, action: Callable[[Process], None]) -> None:
        """Do something with every process that lives."""
        for child in self._live:
            try:
                action(child)
            except EngineError as error:
                self._lose(child, error)

    def _lose(self, child: Process, error: EngineError) -> None:
        """Go on without a process that died; others get its requests.

        Raises:
            EngineError: there is no other.
        """
        self._given_back.extend(child.pending.items())
        orphans = len(child.pending)
        child.pending.clear()
        live, total = len(self._live), len(self._processes)
        if not live:
            self._raise_last(error)
        _log.warning(
            "%s; its %d requests go to the other engines: %d of %d go on",
            error, orphans, live, total,
        )  # fmt: skip

    def _raise_last(self, error: EngineError) -> NoReturn:
        self._show_logs()
        total = len(self._processes)
        raise EngineError(f"{error}; it was the last of {total}" if total > 1 else str(error))

    def _show_logs(self) -> None:
        for child in self._processes:
            if child.is_dead:
                for line in child.log_tail():
                    _log.error("engine %s: %s", self._kind.name, line)

    def _leave(self, call: int) -> None:
        """End a call: what is in flight is taken back."""
        if self._call != call:
            return  # left already, and the engine may be busy with another
        self._call = None
        self._given_back.clear()
        for child in self._live:
            try:
                child.abort(call)
            except EngineError as error:  # told here, since no call may follow
                _log.warning("%s", error)

    def _end_processes(self, wait_s: float = process.CLOSE_TIMEOUT_S) -> None:
        for child in self._processes:
            child.ask_to_close()
        for child in self._processes:
            child.close(wait_s)

    def _forgive(self, seconds: float) -> None:
        """Do not hold a pause of our own against the processes: what they said lies unread."""
        for child in self._processes:
            child.heard_at += seconds

    def _check_request(self, request: Request, sampling: Sampling) -> None:
        check_length(request, sampling, self._max_model_len)
        lowest, highest = min(request.prompt_token_ids), max(request.prompt_token_ids)
        if lowest < 0 or highest >= self._vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(
                f"request {request.request_id}: token id {wrong} is not in the model's "
                f"{self._vocab_size} tokens"
            )

    def _complete(
        self, request: Request, tokens: list[int], logprobs: list[float], reason: str
    ) -> Completion:
        completion = Completion(request.request_id, tokens, logprobs, reason)
        check_finite(completion, self._model_dir)
        if reason not in ("stop", "length"):
            raise EngineError(
                f"engine {self._kind.name}: request {request.request_id} ended with {reason!r}"
            )
        return completion
