"""Checkpoints inside a training stage: what a stage that was cut off goes on from.

A checkpoint is a folder with one safetensors file a rank, each a shard of the workspace (see
`artifacts.shards`): written aside, flushed, hashed, renamed, then noted. It is whole when the
notes of all its files are there. A file holds the rows of every trained weight and of its
optimizer state that its rank has, and says which rows they are: so any number of processes can
read it. No random state is stored, since training has none: rows come in an order that seed and
step decide, and dropout is off.
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from stages.artifacts.keys import sha256_text
from stages.artifacts.shards import ASIDE, ShardStore
from stages.errors import ConfigError
from stages.model.optim import export_state, import_state

HISTORY = "history"
_FILE = re.compile(rf"{re.escape(ASIDE)}/step-(\d+)/part-(\d+)-of-(\d+)\.safetensors")


@dataclass(frozen=True)
class Trained:
    """What training changes."""

    parameters: Mapping[str, Tensor]
    """By name, in the order in which the optimizer has them; sharded ones are DTensors."""
    optimizer: torch.optim.Optimizer


class Checkpoints:
    """The checkpoints of one stage, as one rank sees them."""

    def __init__(self, shards: ShardStore, keep: int) -> None:
        """Keep the newest `keep` checkpoints among the shards of a workspace."""
        self._shards = shards
        self._keep = keep
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def write(self, step: int, trained: Trained, history: Sequence[Sequence[float]]) -> None:
        """Take a copy of everything, and write it while training goes on.

        Args:
            step: number of steps taken.
            history: figures of those steps; they come back as they are.

        Raises:
            OSError, SafetensorError: the checkpoint before could not be written.
        """
        self.finish()
        part, num_parts, is_writer = _place(trained.parameters)
        if not is_writer:
            return
        tensors, starts = _snapshot(trained)
        if part == 0:
            tensors[HISTORY] = torch.tensor(history, dtype=torch.float64)
        metadata = {"spin": json.dumps({"starts": starts})}
        name = f"{ASIDE}/step-{step:08d}/part-{part:05d}-of-{num_parts:05d}.safetensors"
        self._writing = self._writer.submit(self._write, name, tensors, metadata)

    def finish(self) -> None:
        """Wait until what is being written is on the disk; see `write` for errors."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def restore(self, trained: Trained) -> tuple[int, list[list[float]]]:
        """Fill weights and optimizer state from the newest whole checkpoint, bit for bit.

        Returns:
            The number of steps it had taken, and the figures of those; 0 and none where there
            is no checkpoint.

        Raises:
            ConfigError: its optimizer state can only be read by as many processes as wrote it.
        """
        whole = self._whole()
        self._discard_parts(whole)
        if not whole:
            return 0, []
        step = max(whole)
        parts = [_Part(self._shards.root / name) for name in whole[step]]
        _fill(trained, parts)
        history: list[list[float]] = parts[0].tensor(HISTORY).tolist()
        return step, history

    def _discard_parts(self, whole: Mapping[int, Sequence[str]]) -> None:
        """Delete files of checkpoints that are not whole: they must not complete one of ours."""
        complete = {name for names in whole.values() for name in names}
        for name in self._shards.noted():
            if _FILE.fullmatch(name) and name not in complete:
                self._shards.discard(name)

    def _write(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        self._shards.write(name, sha256_text(name), partial(save_file, tensors, metadata=metadata))
        whole = self._whole()
        kept = sorted(whole)[-self._keep :]
        for found in self._shards.noted():
            match = _FILE.fullmatch(found)
            if match and kept and int(match[1]) < kept[0]:
                self._shards.discard(found)

    def _whole(self) -> dict[int, list[str]]:
        """Return the files, in order of their parts, of every checkpoint that lacks none."""
        found: dict[tuple[int, int], list[str]] = defaultdict(list)
        for name in sorted(self._shards.noted()):
            if match := _FILE.fullmatch(name):
                found[int(match[1]), int(match[3])].append(name)
        return {step: names for (step, parts), names in found.items() if len(names) == parts}


class _Part:
    """One file of a checkpoint."""

    def __init__(self, path: Path) -> None:
        file: Any = safe_open(path, framework="pt")
        self._file = file
        self.starts: dict[str, int] = json.loads(file.metadata()["spin"])["starts"]
        self.names: set[str] = set(file.keys())

    def tensor(self, key: str) -> Tensor:
        found: Tensor = self._file.get_tensor(key)
        return found

    def shape(self, key: str) -> list[int]:
        found: list[int] = self._file.get_slice(key).get_shape()
        return found

    def copy_rows(self, key: str, owner: str, into: Tensor, start: int) -> None:
        """Copy those rows of a tensor that this file has to where they belong in `into`.

        Args:
            owner: the parameter whose rows they are.
            start: the first row of `into`.
        """
        if not into.ndim:
            into.copy_(self.tensor(key))
            return
        rows = self._file.get_slice(key)
        first = self.starts[owner]
        low, high = max(first, start), min(first + rows.get_shape()[0], start + into.shape[0])
        if low < high:
            into[low - start : high - start].copy_(rows[low - first : high - first])


def _snapshot(trained: Trained) -> tuple[dict[str, Tensor], dict[str, int]]:
    tensors, starts = {}, {}
    states = export_state(trained.optimizer)
    for index, (name, parameter) in enumerate(trained.parameters.items()):
        local, starts[name] = rows_here(parameter)
        tensors[f"model/{name}"] = _copy(local)
        for key, state in states.get(index, {}).items():
            tensors[f"optimizer/{name}/{key}"] = _copy(state)
    return tensors, starts


def _fill(trained: Trained, parts: Sequence[_Part]) -> None:
    states: dict[int, dict[str, Tensor]] = {}
    part, num_parts, _ = _place(trained.parameters)
    for index, (name, parameter) in enumerate(trained.parameters.items()):
        local, start = rows_here(parameter)
        with torch.no_grad():
            for file in parts:
                file.copy_rows(f"model/{name}", name, local, start)
        prefix = f"optimizer/{name}/"
        keys = sorted(key for key in parts[0].names if key.startswith(prefix))
        for key in keys:
            states.setdefault(index, {})[key.removeprefix(prefix)] = _state(
                key, name, local, start, parts, part if len(parts) == num_parts else None
            )
    import_state(trained.optimizer, states)


def _state(
    key: str, name: str, local: Tensor, start: int, parts: Sequence[_Part], part: int | None
) -> Tensor:
    """Return this rank's state of one parameter.

    Args:
        part: the file that this very rank wrote, None where other ranks wrote.
    """
    if part is not None:
        return parts[part].tensor(key)
    if not parts[0].shape(key):
        return parts[0].tensor(key)
    if any(file.shape(key) != file.shape(f"model/{name}") for file in parts):
        raise ConfigError(
            f"the checkpoint of {len(parts)} processes keeps optimizer state in blocks of 8 bits, "
            f"which only {len(parts)} processes can go on from; start as many"
        )
    into = torch.empty(local.shape, dtype=parts[0].tensor(key).dtype)
    for file in parts:
        file.copy_rows(key, name, into, start)
    return into


def rows_here(parameter: Tensor) -> tuple[Tensor, int]:
    """Return the rows of a parameter that are here, and the number of the first."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0
    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    local: Tensor = parameter.to_local()
    return local.detach(), offset[0] if offset else 0


def _place(parameters: Mapping[str, Tensor]) -> tuple[int, int, bool]:
    """Return which part of how many is here, and whether this copy of it is the first."""
    first = next(iter(parameters.values()))
    if not isinstance(first, DTensor):
        return 0, 1, True
    mesh, coordinate = first.device_mesh, first.device_mesh.get_coordinate()
    assert coordinate is not None, "every rank is in the mesh"
    copies = [d for d, placement in enumerate(first.placements) if isinstance(placement, Replicate)]
    (shard,) = [d for d in range(mesh.ndim) if d not in copies]
    return coordinate[shard], mesh.size(shard), all(coordinate[d] == 0 for d in copies)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
