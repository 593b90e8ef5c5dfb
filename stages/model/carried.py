"""Optimizer state that a training leaves for the next: the folder `optimizer/` of its artifact.

One file a process (see `state_files`), and `state.json`, which says what they are the state of.
Weights are not in it: they are the model.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from stages.artifacts.json_file import write_object
from stages.errors import CorruptError, InputError
from stages.model.state_files import Part, Trained, fill_optimizer, place, snapshot

_DESCRIPTION = "state.json"


@dataclass(frozen=True)
class Carried:
    """The optimizer state at the end of an earlier training."""

    folder: Path
    optimizer: str
    steps: int
    """Optimizer steps it has come from, in all trainings since it began anew."""
    num_parts: int
    shapes: Mapping[str, tuple[int, ...]]
    """Of the trained parameters, by name."""

    def check_fits(self, optimizer: str, trained: Trained) -> None:
        """Check that it is the state of such an optimizer over these parameters.

        Raises:
            InputError: it is not; the message names what differs first.
        """
        found = None
        if optimizer != self.optimizer:
            found = f"optimizer={self.optimizer} there, {optimizer} here"
        for name in sorted(self.shapes.keys() | trained.parameters.keys()):
            theirs = self.shapes.get(name)
            ours = tuple(trained.parameters[name].shape) if name in trained.parameters else None
            if found is None and theirs != ours:
                found = f"{name} is {theirs or 'not trained'} there, {ours or 'not trained'} here"
        if found is not None:
            raise InputError(
                f"{self.folder.parent} has the optimizer state of another training: {found}; give "
                "--optimizer-from the player that this one starts from, or set "
                "train.carry_optimizer=false to begin anew"
            )

    def fill(self, trained: Trained) -> None:
        """Give an optimizer this state, bit for bit.

        Raises:
            ConfigError: it can only be read by as many processes as wrote it.
        """
        names = (_part_name(part, self.num_parts) for part in range(self.num_parts))
        fill_optimizer(trained, [Part(self.folder / name) for name in names])


def open_carried(folder: Path) -> Carried:
    """Return what `write_carried` wrote.

    Raises:
        CorruptError: it is something else.
    """
    try:
        found = json.loads((folder / _DESCRIPTION).read_bytes())
        return Carried(
            folder=folder,
            optimizer=str(found["optimizer"]),
            steps=int(found["steps"]),
            num_parts=int(found["parts"]),
            shapes={name: tuple(shape) for name, shape in found["parameters"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(
            f"{folder / _DESCRIPTION} is damaged; delete {folder.parent} and run its stage again"
        ) from error


def write_carried(folder: Path, trained: Trained, optimizer: str, steps: int) -> None:
    """Write this rank's part of the state, and the first of them what they all are.

    Args:
        steps: how many it has come from; see `Carried`.
    """
    part, num_parts, is_writer = place(trained.parameters)
    if not is_writer:
        return
    folder.mkdir(exist_ok=True)
    copy = snapshot(trained, with_weights=False)
    save_file(copy.tensors, folder / _part_name(part, num_parts), metadata=copy.metadata)
    if part == 0:
        shapes = {name: list(p.shape) for name, p in trained.parameters.items()}
        write_object(
            folder / _DESCRIPTION,
            {"optimizer": optimizer, "steps": steps, "parts": num_parts, "parameters": shapes},
        )


def _part_name(part: int, num_parts: int) -> str:
    return f"part-{part:05d}-of-{num_parts:05d}.safetensors"
