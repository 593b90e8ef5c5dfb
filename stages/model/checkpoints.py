"""Checkpoints inside a training stage: what a stage that was cut off goes on from.

A checkpoint is a folder with one file a rank (see `state_files`), each a shard of the workspace
(see `artifacts.shards`): written aside, flushed, hashed, renamed, then noted. It is whole when the
notes of all its files are there. No random state is stored, since training has none: rows come in
an order that seed and step decide, and dropout is off.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from safetensors.torch import save_file

from stages.artifacts.keys import sha256_text
from stages.artifacts.shards import ASIDE, ShardStore
from stages.model.state_files import (
    Part,
    Snapshot,
    Trained,
    fill_optimizer,
    fill_weights,
    place,
    snapshot,
)

HISTORY = "history"
_FILE = re.compile(rf"{re.escape(ASIDE)}/step-(\d+)/part-(\d+)-of-(\d+)\.safetensors")


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
        part, num_parts, is_writer = place(trained.parameters)
        if not is_writer:
            return
        copy = snapshot(trained, with_weights=True)
        if part == 0:
            copy.tensors[HISTORY] = torch.tensor(history, dtype=torch.float64)
        name = f"{ASIDE}/step-{step:08d}/part-{part:05d}-of-{num_parts:05d}.safetensors"
        self._writing = self._writer.submit(self._write, name, copy)

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
        parts = [Part(self._shards.root / name) for name in whole[step]]
        fill_weights(trained, parts)
        fill_optimizer(trained, parts)
        history: list[list[float]] = parts[0].tensor(HISTORY).tolist()
        return step, history

    def _discard_parts(self, whole: Mapping[int, Sequence[str]]) -> None:
        """Delete files of checkpoints that are not whole: they must not complete one of ours."""
        complete = {name for names in whole.values() for name in names}
        for name in self._shards.noted():
            if _FILE.fullmatch(name) and name not in complete:
                self._shards.discard(name)

    def _write(self, name: str, copy: Snapshot) -> None:
        save = partial(save_file, copy.tensors, metadata=copy.metadata)
        self._shards.write(name, sha256_text(name), save)
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
