"""An engine that answers at once, the same answer to a seed on every machine."""

import os
import signal
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from stages.engines.base import Completion, Engine, Request, Sampling

WINDOW = 700  # requests that are answered in another order than they came


class FakeEngine:
    """Answers with tokens and log-probabilities made of the seed; every fifth is cut off."""

    def __init__(
        self,
        kill_after: int | None = None,
        delay_s: float = 0.0,
        window: int = WINDOW,
        gate: Path | None = None,
        gate_after: int = 0,
    ) -> None:
        """Answer `gate_after` requests, and the others once there is a file at `gate`.

        Who has come so far makes a file of the same name and the number of its process.
        """
        self._kill_after, self._delay_s, self._window = kill_after, delay_s, window
        self._gate, self._gate_after = gate, gate_after
        self.answered = 0
        self.most_held = 0
        self.closed = False

    def open(self, config: Any, model_dir: Path, **limits: int) -> Engine:
        """Stand in for `open_engine`."""
        self.limits = limits
        return self

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        source = iter(requests)
        while window := list(islice(source, self._window)):
            for request in reversed(window):
                time.sleep(self._delay_s)
                if self._gate and self.answered >= self._gate_after:
                    self._gate.with_name(f"{self._gate.name}.{os.getpid()}").touch()
                    while not self._gate.exists():
                        time.sleep(0.02)
                if self.answered == self._kill_after:
                    os.kill(os.getpid(), signal.SIGKILL)
                self.answered += 1
                yield answer(request, sampling)

    def close(self) -> None:
        self.closed = True


def answer(request: Request, sampling: Sampling) -> Completion:
    cut_off = request.seed % 5 == 0
    length = sampling.max_new_tokens if cut_off else 1 + request.seed % sampling.max_new_tokens
    tokens = [10 + (request.seed >> i) % 200 for i in range(length)]
    if not cut_off:
        tokens[-1] = sampling.stop_token_ids[0]
    logprobs = [-1.0 - token / 256 for token in tokens]
    return Completion(request.request_id, tokens, logprobs, "length" if cut_off else "stop")
