"""Checkpoints as files: which are whole, which are kept, and what comes back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stages.artifacts.shards import ShardStore
from stages.config import OptimConfig
from stages.errors import ConfigError
from stages.model import checkpoints as module
from stages.model import state_files
from stages.model.checkpoints import Checkpoints
from stages.model.optim import make_optimizer
from stages.model.state_files import Trained


def trained(rows: int = 7, optimizer: Any = "adamw", seed: int = 0) -> Trained:
    """Two parameters after one step."""
    torch.manual_seed(seed)
    parameters = {"w": nn.Parameter(torch.randn(rows, 3)), "b": nn.Parameter(torch.randn(rows))}
    config = OptimConfig(optimizer=optimizer, learning_rate=1e-2, betas=(0.9, 0.99))
    made = make_optimizer(parameters.values(), config)
    sum((p**2).sum() for p in parameters.values()).backward()  # type: ignore[union-attr]
    made.step()
    return Trained(parameters, made)


def content(state: Trained) -> list[Tensor]:
    found = [p.detach().clone() for p in state.parameters.values()]
    for p in state.parameters.values():
        found += [torch.as_tensor(v).clone() for _, v in sorted(state.optimizer.state[p].items())]
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_what_was_written_comes_back_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    shards, history = ShardStore(tmp_path, "key"), [[0.1, 2.5], [1 / 3, 1e-300]]
    before = trained(optimizer=optimizer)
    one = Checkpoints(shards, keep=2)
    one.write(2, before, history)
    one.finish()
    after = trained(optimizer=optimizer, seed=1)
    assert Checkpoints(shards, keep=2).restore(after) == (2, history)
    for ours, theirs in zip(content(after), content(before), strict=True):
        assert torch.equal(ours, theirs)


def test_what_is_written_is_a_copy_of_the_moment(tmp_path: Path) -> None:
    shards, state = ShardStore(tmp_path, "key"), trained()
    then = content(state)
    checkpoints = Checkpoints(shards, keep=1)
    checkpoints.write(1, state, [[0.0]])
    with torch.no_grad():
        for p in state.parameters.values():
            p.zero_()
    checkpoints.finish()
    Checkpoints(shards, keep=1).restore(state)
    assert all(torch.equal(a, b) for a, b in zip(content(state), then, strict=True))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    shards = ShardStore(tmp_path, "key")
    checkpoints = Checkpoints(shards, keep=2)
    for step in range(1, 6):
        checkpoints.write(step, trained(), [[0.0]] * step)
    checkpoints.finish()
    assert sorted(name.split("/")[2] for name in shards.noted()) == [
        "step-00000004",
        "step-00000005",
    ]


def test_a_checkpoint_that_lacks_a_part_is_none(tmp_path: Path) -> None:
    shards = ShardStore(tmp_path, "key")
    checkpoints = Checkpoints(shards, keep=5)
    for step in (1, 2):
        checkpoints.write(step, trained(), [[0.0]] * step)
    checkpoints.finish()
    (newest,) = (name for name in shards.noted() if "step-00000002" in name)
    shards.write(newest.replace("-of-00001", "-of-00002"), "ids", lambda p: p.touch())
    shards.discard(newest)
    assert Checkpoints(shards, keep=5).restore(trained())[0] == 1


def test_a_part_of_another_attempt_never_completes_one(tmp_path: Path) -> None:
    """On a GPU two attempts are not bit for bit the same, and must not be joined."""
    shards = ShardStore(tmp_path, "key")
    name = module.ASIDE + "/step-00000020/part-00000-of-00002.safetensors"
    shards.write(name, "ids", lambda path: path.touch())
    assert Checkpoints(shards, keep=2).restore(trained()) == (0, [])
    assert not shards.noted()


def test_those_of_another_attempt_are_not_seen(tmp_path: Path) -> None:
    checkpoints = Checkpoints(ShardStore(tmp_path, "key"), keep=1)
    checkpoints.write(1, trained(), [[0.0]])
    checkpoints.finish()
    assert Checkpoints(ShardStore(tmp_path, "other"), keep=1).restore(trained()) == (0, [])


def test_a_disk_that_refuses_is_told_at_the_next_occasion(tmp_path: Path) -> None:
    (tmp_path / ".shards").touch()  # a file where a folder is needed
    checkpoints = Checkpoints(ShardStore(tmp_path, "key"), keep=1)
    checkpoints.write(1, trained(), [[0.0]])
    with pytest.raises(OSError, match="shards"):
        checkpoints.finish()


class _Ranks:
    """Pretends that the parameters are divided: rank `part` of `parts` has every row it should."""

    def __init__(self, part: int, parts: int, rows: int) -> None:
        self.size = -(-rows // parts)
        self.start, self.stop = part * self.size, min(rows, (part + 1) * self.size)
        self.part, self.parts = part, parts

    def apply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(state_files, "rows_here", lambda p: (p.detach(), self.start))
        for user in (state_files, module):
            monkeypatch.setattr(user, "place", lambda _: (self.part, self.parts, True))

    def of(self, whole: Trained) -> Trained:
        rows = slice(self.start, self.stop)
        parameters = {n: nn.Parameter(p.detach()[rows]) for n, p in whole.parameters.items()}
        made = make_optimizer(parameters.values(), OptimConfig(learning_rate=1e-2))
        for name, p in parameters.items():
            state = whole.optimizer.state[whole.parameters[name]]
            made.state[p] = {k: v[rows].clone() if v.ndim else v.clone() for k, v in state.items()}
        return Trained(parameters, made)


@pytest.mark.parametrize(("writers", "readers"), [(1, 3), (3, 1), (2, 4), (4, 3)])
def test_any_number_of_processes_reads_what_any_other_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writers: int, readers: int
) -> None:
    """Seven rows: the last of four processes has one, of three one too."""
    shards, whole = ShardStore(tmp_path, "key"), trained()
    for part in range(writers):
        ranks = _Ranks(part, writers, 7)
        ranks.apply(monkeypatch)
        checkpoints = Checkpoints(shards, keep=1)
        checkpoints.write(1, ranks.of(whole), [[0.5]])
        checkpoints.finish()
    for part in range(readers):
        ranks = _Ranks(part, readers, 7)
        ranks.apply(monkeypatch)
        mine = ranks.of(trained(seed=1))
        assert Checkpoints(shards, keep=1).restore(mine) == (1, [[0.5]])
        for ours, theirs in zip(content(mine), content(ranks.of(whole)), strict=True):
            assert torch.equal(ours, theirs)


def test_blocks_of_8_bits_are_read_by_as_many_processes_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    shards = ShardStore(tmp_path, "key")
    for part in range(2):
        ranks = _Ranks(part, 2, 4000)
        ranks.apply(monkeypatch)
        state = trained(rows=2000, optimizer="adamw_8bit_bnb")
        checkpoints = Checkpoints(shards, keep=1)
        checkpoints.write(1, state, [[0.5]])
        checkpoints.finish()
    _Ranks(0, 1, 4000).apply(monkeypatch)
    with pytest.raises(ConfigError, match="only 2 processes can go on from; start as many"):
        Checkpoints(shards, keep=1).restore(trained(rows=4000, optimizer="adamw_8bit_bnb"))
