"""Training state as files: weights and optimizer state, one safetensors file a rank.

A file holds the rows of every trained weight and of its optimizer state that its rank has, and
says which rows they are: so any number of processes can read what any other wrote. Only state in
blocks of 8 bits asks for as many.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from stages.errors import ConfigError
from stages.model.optim import export_state, import_state


@dataclass(frozen=True)
class Trained:
    """What training changes."""

    parameters: Mapping[str, Tensor]
    """By name, in the order in which the optimizer has them; sharded ones are DTensors."""
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class Snapshot:
    """A copy of what one rank has, for one file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


class Part:
    """One file that a rank wrote."""

    def __init__(self, path: Path) -> None:
        """Open it; tensors are read when they are asked for."""
        file: Any = safe_open(path, framework="pt")
        self._file = file
        described = json.loads(file.metadata()["spin"])
        self.starts: dict[str, int] = described["starts"]
        self.shapes: dict[str, list[int]] = described["shapes"]
        """Of the rows of each parameter that the rank had; those of `starts` are the first."""
        self.names: set[str] = set(file.keys())

    def tensor(self, key: str) -> Tensor:
        """Return a whole tensor of the file."""
        found: Tensor = self._file.get_tensor(key)
        return found

    def shape(self, key: str) -> list[int]:
        """Return its shape, without reading it."""
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


def snapshot(trained: Trained, *, with_weights: bool) -> Snapshot:
    """Return a copy, on the CPU, of the rows that are here."""
    tensors: dict[str, Tensor] = {}
    starts, shapes = {}, {}
    states = export_state(trained.optimizer)
    for index, (name, parameter) in enumerate(trained.parameters.items()):
        local, starts[name] = rows_here(parameter)
        shapes[name] = list(local.shape)
        if with_weights:
            tensors[f"model/{name}"] = _copy(local)
        for key, state in states.get(index, {}).items():
            tensors[f"optimizer/{name}/{key}"] = _copy(state)
    return Snapshot(tensors, {"spin": json.dumps({"starts": starts, "shapes": shapes})})


def fill_weights(trained: Trained, parts: Sequence[Part]) -> None:
    """Give the weights that are here the values in the files of all ranks that wrote, bit for bit.

    Args:
        parts: the files, in order.
    """
    for name, parameter in trained.parameters.items():
        local, start = rows_here(parameter)
        with torch.no_grad():
            for file in parts:
                file.copy_rows(f"model/{name}", name, local, start)


def fill_optimizer(trained: Trained, parts: Sequence[Part]) -> None:
    """Give the optimizer the state in the files, likewise.

    Raises:
        ConfigError: it can only be read by as many processes as wrote it.
    """
    states: dict[int, dict[str, Tensor]] = {}
    part, num_parts, _ = place(trained.parameters)
    for index, (name, parameter) in enumerate(trained.parameters.items()):
        local, start = rows_here(parameter)
        prefix = f"optimizer/{name}/"
        keys = sorted(key for key in parts[0].names if key.startswith(prefix))
        for key in keys:
            states.setdefault(index, {})[key.removeprefix(prefix)] = _state(
                key, name, local, start, parts, part if len(parts) == num_parts else None
            )
    import_state(trained.optimizer, states)


def _state(
    key: str, name: str, local: Tensor, start: int, parts: Sequence[Part], part: int | None
) -> Tensor:
    """Return this rank's state of one parameter.

    Args:
        part: the file that this very rank wrote, None where other ranks wrote.
    """
    if part is not None:
        return parts[part].tensor(key)
    if not parts[0].shape(key):
        return parts[0].tensor(key)
    if any(file.shape(key) != file.shapes[name] for file in parts):
        raise ConfigError(
            f"the optimizer state that {len(parts)} processes wrote is in blocks of 8 bits, which "
            f"only {len(parts)} processes can go on from; start as many"
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


def place(parameters: Mapping[str, Tensor]) -> tuple[int, int, bool]:
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
