"""What trackers wrote in a folder, by their own readers: `python -m tests.tracker_files FOLDER`.

Prints {tracker: {run: {"metrics": {name: [[step, value], …]}, "config": {…}, "group": …}}} as JSON.
It has the libraries of .venv/trackers, which the tests' own process must not see.
"""

import json
import os
import struct
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768


def tensorboard(folder: Path) -> dict[str, Any]:
    import yaml
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for run in sorted(folder.glob("tensorboard/*/*")):
        events = EventAccumulator(str(run), size_guidance={"scalars": 0})
        events.Reload()
        names = events.Tags()["scalars"]
        settings = [yaml.safe_load(file.read_text()) for file in run.glob("*/hparams.yml")]
        found[run.name] = {
            "metrics": {n: [[e.step, e.value] for e in events.Scalars(n)] for n in names},
            "config": settings[0] if settings else {},
            "group": run.parent.name,
        }
    return found


def wandb(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        metrics: dict[str, list[Any]] = defaultdict(list)
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "run":
                run = found.setdefault(record.run.run_id, {"metrics": metrics, "config": {}})
                run |= {"name": record.run.display_name, "project": record.run.project,
                        "group": record.run.run_group}  # fmt: skip
                metrics = run["metrics"]
            elif record.WhichOneof("record_type") == "config":
                run["config"] |= {i.key: json.loads(i.value_json) for i in record.config.update}
            elif record.WhichOneof("record_type") == "history":
                items = {".".join(i.nested_key) or i.key: i for i in record.history.item}
                values = {name: json.loads(item.value_json) for name, item in items.items()}
                for name, value in values.items():
                    if not name.startswith("_"):
                        metrics[name].append([values["_step"], value])
    return found


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a file: LevelDB's log format, after a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, held = 7, b""
    while place + 7 <= len(data):
        room = BLOCK - place % BLOCK
        if room < 7:
            place += room
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        held += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(held)
            held = b""
            yield record


def mlflow(folder: Path) -> dict[str, Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    found = {}
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            history = {
                name: [[m.step, m.value] for m in client.get_metric_history(run.info.run_id, name)]
                for name in run.data.metrics
            }
            found[run.info.run_id] = {
                "metrics": history,
                "config": run.data.params,
                "name": run.info.run_name,
                "project": experiment.name,
                "group": run.data.tags["group"],
                "status": run.info.status,
                "tags": run.data.tags,
            }
    return found


def trackio(folder: Path) -> dict[str, Any]:
    os.environ["TRACKIO_DIR"] = str(folder / "trackio")
    from trackio.sqlite_storage import SQLiteStorage

    found = {}
    for project in SQLiteStorage.get_projects():
        for run in SQLiteStorage.get_runs(project):
            metrics: dict[str, list[Any]] = defaultdict(list)
            for row in SQLiteStorage.get_logs(project, run):
                for name, value in row.items():
                    if name not in ("step", "timestamp"):
                        metrics[name].append([row["step"], value])
            config = SQLiteStorage.get_run_config(project, run) or {}
            found[run] = {
                "metrics": metrics,
                "config": {n: v for n, v in config.items() if not n.startswith("_")},
                "project": project,
                "group": config.get("_Group"),
            }
    return found


if __name__ == "__main__":
    place = Path(sys.argv[1])
    readers = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow, "trackio": trackio}
    chosen = sys.argv[2:] or list(readers)
    stdout, sys.stdout = sys.stdout, sys.stderr
    result = {name: readers[name](place) for name in chosen}
    print(json.dumps(result), file=stdout)
