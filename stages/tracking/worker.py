"""The process of the trackers: reads messages from stdin, one a line, until its end.

The first line is the run (`Tracked`), the others are steps and summaries. On stdout it says, in one
line, which tracker failed and why; all that libraries write goes to stderr. One that fails is left
out from then on, the others go on.
"""

import fcntl
import json
import os
import secrets
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any

FINISH_S = 600
"""After the last message, for a network that is slow; then the process ends as it is."""


def main() -> None:
    """Do what the messages on stdin say."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = json.loads(sys.stdin.readline())
    # Where it is full the pipe fills too, and then the parent counts what is lost.
    messages: Queue[dict[str, Any] | None] = Queue(run["max_waiting"])
    threading.Thread(target=_read, args=(messages,), daemon=True).start()
    threading.Thread(target=_end_after_parent, daemon=True).start()
    problems = _work(run, iter(messages.get, None))
    said.write("; ".join(problems))
    said.close()
    os._exit(0)  # threads of libraries are left behind, not waited for


def _read(messages: "Queue[dict[str, Any] | None]") -> None:
    """Take in what comes, as fast as there is room for it."""
    for line in sys.stdin:
        messages.put(json.loads(line))
    messages.put(None)


def _end_after_parent() -> None:
    """End the process some time after the pipe was closed, read to its end or not."""
    hang_up = select.poll()
    hang_up.register(0, 0)
    hang_up.poll()
    time.sleep(FINISH_S)
    os._exit(1)


def _work(run: dict[str, Any], messages: Iterator[dict[str, Any]]) -> list[str]:
    state_path = Path(run["state"])
    state_path.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{state_path}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of an earlier one that was left to itself
        state = _State(state_path, run["identity"])
        trackers = _Trackers(run, state)
        for message in messages:
            if "summary" not in message:
                trackers.tell_step(message["values"], message["step"])
            else:
                trackers.tell_summary(message["summary"], message["of"])
        trackers.finish()
    return trackers.problems


class _State:
    """What each tracker was told already.

    Of steps and summaries it is written before they are told, so that none is told twice.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._path = path
        self._values: dict[str, Any] = {}
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError):
            found = {}
        if isinstance(found, dict) and found.get("identity") == identity:
            self._values = found
        if not self._values:
            self._values = {"identity": identity, "id": secrets.token_hex(8)}
        self._told: dict[str, dict[str, Any]] = self._values.setdefault("told", {})

    @property
    def id(self) -> str:
        """The run's name to trackers that are given one."""
        return str(self._values["id"])

    @property
    def mlflow(self) -> str | None:
        """The run's name at MLflow, which gives it itself."""
        return self._values.get("mlflow")

    def knows_settings(self, tracker: str) -> bool:
        """Whether a tracker was told the recipe."""
        return bool(self._of(tracker).get("settings"))

    def last_step(self, tracker: str) -> int:
        """Return the last step that a tracker was told; -1 before any."""
        return int(self._of(tracker).get("last_step", -1))

    def summaries(self, tracker: str) -> list[str]:
        """Return the artifacts whose summary a tracker was told."""
        return list(self._of(tracker).get("summaries", []))

    def note(self, tracker: str, **values: Any) -> None:
        """Take down what a tracker is told; `keep` writes it."""
        self._told[tracker] = self._of(tracker) | values

    def _of(self, tracker: str) -> dict[str, Any]:
        return self._told.get(tracker, {})

    def keep(self, **values: Any) -> None:
        """Write down some values, and all that was noted."""
        self._values |= values
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        temporary.write_text(json.dumps(self._values, sort_keys=True) + "\n")
        temporary.rename(self._path)


class _Trackers:
    """Accelerate's trackers; each is left out once it has failed."""

    def __init__(self, run: dict[str, Any], state: _State) -> None:
        from accelerate import PartialState

        PartialState(cpu=True)  # accelerate's trackers log by it; this process is its only rank
        self.problems: list[str] = []
        self._state = state
        self._trackers: dict[str, Any] = {}
        for name in run["trackers"]:
            self._try(name, lambda n=name: self._start(n, run, state))  # type: ignore[misc]

    def _start(self, name: str, run: dict[str, Any], state: _State) -> None:
        tracker = _MAKERS[name](run, state)
        tracker.start()
        self._trackers[name] = tracker
        if name == "mlflow":
            state.keep(mlflow=tracker.tracker.info.run_id)
        # Trackio takes what the last process says of a run for all that is known of it.
        if run["settings"] and (name == "trackio" or not state.knows_settings(name)):
            tracker.store_init_configuration(run["settings"])
            state.note(name, settings=True)
            state.keep()

    def tell_step(self, values: dict[str, Any], step: int) -> None:
        """Tell those of a step who were not told of it before."""
        names = [name for name in self._trackers if self._state.last_step(name) < step]
        self._tell(values, dict.fromkeys(names, step))

    def tell_summary(self, values: dict[str, Any], of: str) -> None:
        """Tell those what came of an artifact who were not told before, as one further step."""
        names = [name for name in self._trackers if of not in self._state.summaries(name)]
        for name in names:
            self._state.note(name, summaries=[*self._state.summaries(name), of])
        self._tell(values, {name: self._state.last_step(name) + 1 for name in names})

    def _tell(self, values: dict[str, Any], steps: dict[str, int]) -> None:
        """Tell some trackers of metrics, each at its step."""
        for name, step in steps.items():
            self._state.note(name, last_step=step)
        if steps:
            self._state.keep()
        for name, step in steps.items():
            tracker = self._trackers[name]
            self._try(name, lambda t=tracker, at=step: t.log(values, step=at))  # type: ignore[misc]

    def finish(self) -> None:
        """Let all write what they hold."""
        for name, tracker in list(self._trackers.items()):
            self._try(name, tracker.finish)

    def _try(self, name: str, do: Callable[[], object]) -> None:
        try:
            do()
        except Exception as error:  # noqa: BLE001 whatever a library raises, told to the parent
            traceback.print_exc()
            self._trackers.pop(name, None)
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            self.problems.append(f"{name} failed ({type(error).__name__}: {reason})")


def _tensorboard(run: dict[str, Any], state: _State) -> Any:
    from accelerate.tracking import TensorBoardTracker

    folder = Path(run["folder"], "tensorboard", run["group"])
    folder.mkdir(parents=True, exist_ok=True)
    return TensorBoardTracker(_label(run, state), folder)


def _wandb(run: dict[str, Any], state: _State) -> Any:
    import wandb
    from accelerate.tracking import WandBTracker

    quiet = wandb.Settings(
        # Nothing but what it is told: no code, git remote, host, user, command line, packages.
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        save_code=False,
        console="off",
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_viewer=not run["online"],
        x_save_requirements=False,
        silent=True,
    )
    return WandBTracker(
        run["project"],
        mode="online" if run["online"] else "offline",
        resume="allow" if run["online"] else None,
        dir=run["folder"],
        id=state.id,
        name=run["name"],
        group=run["group"],
        settings=quiet,
    )


def _mlflow(run: dict[str, Any], state: _State) -> Any:
    from accelerate.tracking import MLflowTracker

    local = None if run["online"] else str(Path(run["folder"], "mlflow-artifacts"))
    return MLflowTracker(
        run["project"],
        logging_dir=local,
        run_id=state.mlflow,
        run_name=run["name"],
        # The first two are MLflow's own, and would be the user's name and the program's path.
        tags={"mlflow.user": "spin", "mlflow.source.name": "spin", "group": run["group"]},
    )


def _trackio(run: dict[str, Any], state: _State) -> Any:
    from accelerate.tracking import TrackioTracker

    return TrackioTracker(
        run["project"],
        name=_label(run, state),
        group=run["group"],
        resume="allow",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )


def _label(run: dict[str, Any], state: _State) -> str:
    """Return a name that no other run has, for trackers that tell runs by their names."""
    return f"{run['name']}-{state.id[:6]}"


_MAKERS: dict[str, Callable[[dict[str, Any], _State], Any]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
