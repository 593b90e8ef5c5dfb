"""A miniature stage, for tests of artifacts that need no model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.artifacts import Manifest, Outcome, Plan, TableWriter, Workspace, open_artifact, produce
from stages.artifacts.manifest import InputRef

SCHEMA = pa.schema(
    [pa.field("prompt_id", pa.string(), False), pa.field("value", pa.float64(), False)]
)
NUM_SHARDS = 3


def plan(
    stage: str = "pair",
    config: Mapping[str, Any] | None = None,
    inputs: Mapping[str, InputRef] | None = None,
    fingerprints: Mapping[str, str] | None = None,
    format_version: int = 1,
) -> Plan:
    return Plan(
        stage=stage,
        format_version=format_version,
        config=config if config is not None else {"seed": 0, "train": {"beta": 0.1}},
        inputs=inputs or {},
        fingerprints=fingerprints or {},
    )


def input_ref(key: str = "k", content: str = "c", path: str = "data") -> InputRef:
    return InputRef(path=path, inside_run=True, key=key, content=content)


def write_table(path: Path, start: int = 0, num_rows: int = 40) -> None:
    with TableWriter(path, SCHEMA) as table:
        for index in range(start, start + num_rows):
            table.append({"prompt_id": f"{index:08d}", "value": index / 7})


def fill_shards(
    num_shards: int = NUM_SHARDS,
    rows: int = 40,
    begun: Callable[[int], None] = lambda _: None,
    written: Callable[[int], None] = lambda _: None,
) -> Callable[[Workspace], Outcome]:
    """Return a fill that writes what is not there of `num_shards`, a text and a volatile file."""

    def fill(workspace: Workspace) -> Outcome:
        for shard in range(num_shards):
            name, ids_hash = f"part-{shard:05d}.parquet", f"rows {rows} of shard {shard}"
            if not workspace.shards.done(name, ids_hash):
                start = shard * rows
                begun(shard)
                workspace.shards.write(name, ids_hash, lambda p, s=start: write_table(p, s, rows))
                written(shard)
        workspace.file("notes/about.txt").write_text("plain\n")
        workspace.file("timings.txt").write_text("7 s\n")
        return Outcome(
            counts={"rows": num_shards * rows},
            metrics={"loss": 0.5},
            volatile=frozenset({"timings.txt"}),
        )

    return fill


def make(out: Path, a_plan: Plan | None = None, **options: Any) -> Manifest:
    return produce(out, a_plan or plan(), fill_shards(**options), resumable=True)


def hashes(artifact: Path) -> dict[str, str]:
    """From file name to SHA-256, of the files that are meant to be reproducible, all verified."""
    opened = open_artifact(artifact)
    opened.files()
    return {f.path: f.sha256 for f in opened.manifest.files if not f.volatile}
