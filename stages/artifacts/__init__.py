"""Artifacts that can be trusted: manifests, commits, shards, locks, keys. Knows nothing of SPIN."""

from stages.artifacts.manifest import Artifact, InputRef, Manifest, open_artifact, read_manifest
from stages.artifacts.pointer import (
    Pointer,
    PointerEntry,
    move_pointer,
    read_pointer,
    roll_back,
)
from stages.artifacts.produce import Outcome, Plan, Workspace, produce, run_root
from stages.artifacts.tables import TableWriter, count_rows, read_batches, read_rows

__all__ = [
    "Artifact",
    "InputRef",
    "Manifest",
    "Outcome",
    "Plan",
    "Pointer",
    "PointerEntry",
    "TableWriter",
    "Workspace",
    "count_rows",
    "move_pointer",
    "open_artifact",
    "produce",
    "read_batches",
    "read_manifest",
    "read_pointer",
    "read_rows",
    "roll_back",
    "run_root",
]
