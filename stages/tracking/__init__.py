"""Experiment trackers: they are told of a run's metrics as they arise; see docs/tracking.md.

Trackers are guests. They work in a process of their own (worker.py), which is fed by a thread, so
that no network, no library and no bug of theirs ends or slows the stage that they look at. Nothing
of an artifact depends on them. They are told numbers, and of the recipe the numbers and the choices
(`allowed`): no free text, no path, no URL, nothing of the environment.
"""

import importlib.util
import json
import logging
import math
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from stages.artifacts import Manifest, read_manifest, run_root
from stages.artifacts.keys import canonical_json, sha256_text
from stages.artifacts.manifest import MANIFEST_NAME
from stages.config import RunConfig, TrackingConfig
from stages.config.fields import Section
from stages.errors import ConfigError, SpinError
from stages.layout import RunLayout

log = logging.getLogger("spin")

Tell = Callable[[int, Mapping[str, Any]], None]
"""Takes the number of a step and its metrics."""
LIBRARIES: dict[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}
_MLFLOW_STORE = ("sqlalchemy", "alembic")
"""What MLflow needs to write a database of its own; mlflow-skinny comes without."""
MAX_WAITING = 10_000
"""Messages held for a tracker that is slow, here and as many in its process; further ones are lost,
and counted."""
FINISH_S = 30.0
"""For trackers to finish when a stage ends; those that take longer are left to themselves."""
BREAK_OFF_S = 3.0
"""The same where the stage was broken off: a signal asks for an end within 25 s."""
SECTIONS = ("seed", "generate", "reward", "pair", "reference", "score", "train", "evaluate",
            "promote", "adapt")  # fmt: skip
"""What trackers are told of the recipe of an iteration."""


@dataclass(frozen=True)
class Tracked:
    """One run, as trackers call it: an iteration, sft, or the start."""

    trackers: tuple[str, ...]
    online: bool
    every_steps: int
    project: str
    group: str
    name: str
    identity: str
    """Of what is tracked: another one of the same name begins a new run."""
    folder: Path
    """Where trackers write."""
    state: Path
    """What was told already, so that nothing is told twice."""
    settings: dict[str, bool | int | float | str]


def check(config: TrackingConfig) -> None:
    """Check that the libraries of the trackers are installed.

    Raises:
        ConfigError: one is not.
    """
    for tracker in config.trackers:
        needed = LIBRARIES[tracker]
        if tracker == "mlflow" and config.mode == "offline":
            needed += _MLFLOW_STORE
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"tracking.trackers has {tracker}, but {' and '.join(missing)} is not installed; "
                "pip install 'spin-selfplay[trackers]', or leave the tracker out"
            )


def tracked(
    config: RunConfig, out: Path, identity: str, sections: tuple[str, ...] = SECTIONS
) -> Tracked | None:
    """Return what trackers call the artifact `out`, or None where there is no tracker.

    Args:
        identity: of an attempt to make the artifact; see `identity_of`.
        sections: of the recipe, that decide it.
    """
    chosen = config.tracking
    if not chosen.trackers:
        return None
    root = run_root(out)
    home = RunLayout(root or Path(os.path.abspath(out)).parent).tracking
    name = _name(root, out)
    return Tracked(
        trackers=tuple(dict.fromkeys(chosen.trackers)),
        online=chosen.mode == "online",
        every_steps=chosen.every_steps,
        project=_plain(chosen.project or config.name),
        group=_plain(chosen.group or home.resolve().parent.name),
        name=name,
        identity=identity,
        folder=Path(os.path.abspath(chosen.dir or home)),
        state=home.absolute() / "state" / f"{name}.json",
        settings=allowed(config, sections),
    )


def _name(root: Path | None, out: Path) -> str:
    if root is None:
        return _plain(out.name)
    place = out.resolve().relative_to(root.resolve()).as_posix()
    iteration = RunLayout(root).iteration_of(place)
    if iteration is not None:
        return f"iteration-{iteration:03d}"
    return "start" if place.startswith("start/") else _plain(out.name)


def _plain(name: str) -> str:
    """Return a name that all trackers take, and file systems too."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "run"


def identity_of(manifest: Manifest) -> str:
    """Return what `Plan.attempt_key` was of the attempt that made an artifact."""
    contents = {name: ref.content for name, ref in manifest.inputs.items()}
    return sha256_text(canonical_json({"key": manifest.key, "contents": contents}))


def allowed(config: Section, names: tuple[str, ...]) -> dict[str, bool | int | float | str]:
    """Return what may be told of some sections, from dotted name to value.

    Numbers, and texts that the schema itself lists: what a user wrote freely (prompts, templates,
    paths, URLs, names) may hold what is nobody else's business.
    """
    found: dict[str, bool | int | float | str] = {}
    for name in names:
        value, field = getattr(config, name), type(config).model_fields[name]
        if isinstance(value, Section):
            inner = allowed(value, tuple(type(value).model_fields))
            found |= {f"{name}.{key}": each for key, each in inner.items()}
        elif _is_number(value) or (isinstance(value, str) and value in _choices(field.annotation)):
            found[name] = value
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _choices(annotation: Any) -> set[Any]:
    """Return the values that a type lists."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return {value for part in get_args(annotation) for value in _choices(part)}


# -- Telling --------------------------------------------------------------------------------------


@contextmanager
def open_tracking(run: Tracked | None, prefix: str) -> Iterator[Tell]:
    """Lend what tells trackers of steps; it never raises, waits or fails.

    Args:
        prefix: put before the names of metrics, such as `train`.
    """
    if run is None:
        yield lambda step, values: None
        return
    worker = _Worker(run)
    patience = BREAK_OFF_S

    def tell(step: int, values: Mapping[str, Any]) -> None:
        if step % run.every_steps == 0:
            worker.send({"step": step, "values": _numbers(prefix, values)})

    try:
        yield tell
        patience = FINISH_S
    finally:
        worker.finish(patience)


def summarize(config: RunConfig, out: Path, manifest: Manifest) -> None:
    """Tell trackers what came of an iteration when it is decided, and of the start.

    Other artifacts are passed over: what an iteration made is told together, once, by its decision.
    """
    root = run_root(out)
    if not config.tracking.trackers or root is None:
        return
    made = [out]
    if manifest.stage == "promote":
        made = [path.parent for path in sorted(out.parent.glob(f"[!.]*/{MANIFEST_NAME}"))]
        of = RunLayout(root).stage(_iteration(root, out), "train")
    elif out.resolve().parent == (root / "start").resolve():
        of = RunLayout(root).start_evaluation
    else:
        return
    try:
        manifests = {path.name: read_manifest(path) for path in made}
        run = tracked(config, of, identity_of(read_manifest(of)))
    except SpinError as error:
        log.warning("tracking: no summary of %s: %s", out, error)
        return
    assert run is not None, "there are trackers"
    told = _state(run).get("told", {})
    if all(manifest.key in told.get(name, {}).get("summaries", []) for name in run.trackers):
        return
    values: dict[str, Any] = {}
    for name, each in manifests.items():
        figures = {**each.counts, **each.metrics, "seconds": each.cost.wall_s}
        values |= _numbers(name, figures)
    worker = _Worker(run)
    worker.send({"summary": values, "of": manifest.key})
    worker.finish(FINISH_S)


def _iteration(root: Path, out: Path) -> int:
    place = out.resolve().relative_to(root.resolve()).as_posix()
    iteration = RunLayout(root).iteration_of(place)
    assert iteration is not None, "an iteration's player is promoted"
    return iteration


def _numbers(prefix: str, values: Mapping[str, Any]) -> dict[str, float | int]:
    """Return those values that are numbers, under their names with a prefix."""
    return {
        f"{prefix}/{name}": int(value) if isinstance(value, bool) else value
        for name, value in values.items()
        if _is_number(value) and name != "step"
    }


def _state(run: Tracked) -> dict[str, Any]:
    """Return what was told of a run already; nothing, where it is another one."""
    try:
        state = json.loads(run.state.read_bytes())
    except (OSError, ValueError):
        return {}
    known = isinstance(state, dict) and state.get("identity") == run.identity
    return state if known else {}


class _Worker:
    """The process of the trackers, and the thread that feeds it."""

    def __init__(self, run: Tracked) -> None:
        self._run, self._lost = run, 0
        self._messages: queue.Queue[str | None] = queue.Queue(MAX_WAITING)
        self._done = threading.Event()
        self._problem = ""
        places = {"folder": str(run.folder), "state": str(run.state)}
        self.send({**asdict(run), **places, "max_waiting": MAX_WAITING})
        threading.Thread(target=self._work, name="spin tracking", daemon=True).start()

    def send(self, message: Mapping[str, Any]) -> None:
        """Leave a message for the process; the caller does not wait."""
        try:
            self._messages.put_nowait(json.dumps(message))
        except queue.Full:
            self._lost += 1

    def finish(self, patience_s: float) -> None:
        """Let the process finish, and say what went wrong."""
        end_s = time.monotonic() + patience_s
        try:
            self._messages.put(None, timeout=patience_s)
        except queue.Full:  # it must hear of the end all the same
            with suppress(queue.Empty):
                self._messages.get_nowait()
                self._lost += 1
            self._messages.put_nowait(None)  # nobody else puts anything in
        names = ", ".join(self._run.trackers)
        if not self._done.wait(max(0.0, end_s - time.monotonic())):
            log.warning(
                "tracking: %s has not finished after %g s and is left to itself; see %s",
                names, patience_s, self._log,
            )  # fmt: skip
        elif self._problem:
            log.warning("tracking: %s; the rest went on without; see %s", self._problem, self._log)
        if self._lost and not self._problem:
            log.warning("tracking: %s was too slow: %d messages are lost", names, self._lost)

    @property
    def _log(self) -> Path:
        return self._run.folder / "tracking.log"

    def _work(self) -> None:
        try:
            self._problem = self._feed()
        except (OSError, ValueError) as error:
            self._problem = f"{', '.join(self._run.trackers)} failed ({error})"
        self._done.set()

    def _feed(self) -> str:
        """Start the process, pass on what comes, and return what it says went wrong."""
        self._run.folder.mkdir(parents=True, exist_ok=True)
        with (
            self._log.open("ab") as chatter,
            subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, *sys.path],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=chatter,
                env=_environment(self._run), start_new_session=True,
            ) as process,
        ):  # fmt: skip
            assert process.stdin is not None and process.stdout is not None, "they are pipes"
            with suppress(OSError):  # it ended early: what it said is read below
                while (message := self._messages.get()) is not None:
                    process.stdin.write(message.encode() + b"\n")
                    process.stdin.flush()
            with suppress(OSError):
                process.stdin.close()
            said = process.stdout.read().decode("utf-8", "replace").strip()
        if said or process.returncode == 0:
            return said
        return f"{', '.join(self._run.trackers)} failed (exit code {process.returncode})"


_BOOT = "import sys; sys.path[:] = sys.argv[1:]; from stages.tracking.worker import main; main()"
"""The same libraries as here are found, whatever put them on the path."""
_NOT_THEIRS = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|WORLD_RANK|NAME)|MASTER_(ADDR|PORT)|TORCHELASTIC_.*"
    r"|ACCELERATE_.*|MLFLOW_(RUN_ID|EXPERIMENT_NAME|EXPERIMENT_ID|TAGS|NESTED_RUN)"
)
"""Variables of a launcher, which would have the worker wait for other ranks; and those that would
call a run otherwise than the recipe does."""


def _environment(run: Tracked) -> dict[str, str]:
    """Return the worker's environment: the user's, for the libraries to read, and no telemetry."""
    environment = {n: v for n, v in os.environ.items() if not _NOT_THEIRS.fullmatch(n)}
    environment |= {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "WANDB_ERROR_REPORTING": "false",
    }
    if run.online:
        return environment
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID",
                 "TRACKIO_DATASET_ID", "TRACKIO_WEBHOOK_URL"):  # fmt: skip
        environment.pop(name, None)
    return environment | {
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"sqlite:///{run.folder / 'mlflow.db'}",
        "TRACKIO_DIR": str(run.folder / "trackio"),
    }
