"""Damage of every kind is noticed before a damaged byte is used, and the file is named."""

import random
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from stages.artifacts import Outcome, Workspace, open_artifact, produce
from stages.errors import CorruptError
from tests.artifact_tools import plan, write_table

NUM_FLIPS = 1000
NUM_TRUNCATIONS = 200
VICTIMS = ("manifest.json", "model.safetensors", "part-00000.parquet")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each test leaves it as it was."""

    def fill(workspace: Workspace) -> Outcome:
        for shard in range(3):
            write_table(workspace.file(f"part-{shard:05d}.parquet"), start=shard * 100)
        weights = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
        save_file({"w": weights}, workspace.file("model.safetensors"))
        for shard in (1, 2):
            save_file({"w": weights[shard]}, workspace.file(f"shard-{shard}.safetensors"))
        return Outcome(counts={"rows": 300})

    out = tmp_path_factory.mktemp("run") / "out"
    produce(out, plan(), fill)
    return out


def use(artifact: Path) -> None:
    """Open an artifact as every stage does, and ask for each of its files."""
    open_artifact(artifact).files()


def refused(artifact: Path, name: str) -> None:
    with pytest.raises(CorruptError) as told:
        use(artifact)
    assert name in str(told.value), "the message names the file"
    assert f"delete {artifact} and run its stage again" in str(told.value)


@pytest.mark.parametrize("name", VICTIMS)
def test_every_one_of_1000_bit_flips_is_noticed(artifact: Path, name: str) -> None:
    rng, path = random.Random(name), artifact / name
    good = path.read_bytes()
    use(artifact)
    for bit in rng.sample(range(8 * len(good)), NUM_FLIPS):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        refused(artifact, name)
    path.write_bytes(good)
    use(artifact)


@pytest.mark.parametrize("name", VICTIMS)
def test_every_truncation_is_noticed(artifact: Path, name: str) -> None:
    rng, path = random.Random(name), artifact / name
    good = path.read_bytes()
    for size in [0, len(good) - 1, *rng.sample(range(len(good)), NUM_TRUNCATIONS)]:
        path.write_bytes(good[:size])
        refused(artifact, name)
    path.write_bytes(good)
    use(artifact)


@pytest.mark.parametrize("extra", [b"\0", b"\n", b"x" * 4096])
@pytest.mark.parametrize("name", VICTIMS)
def test_bytes_at_the_end_are_noticed(artifact: Path, name: str, extra: bytes) -> None:
    path = artifact / name
    good = path.read_bytes()
    path.write_bytes(good + extra)
    refused(artifact, name)
    path.write_bytes(good)


@pytest.mark.parametrize("name", VICTIMS[1:])
def test_a_missing_file_is_noticed(artifact: Path, name: str) -> None:
    (artifact / name).rename(artifact.parent / "aside")
    refused(artifact, f"{name} is missing")
    (artifact.parent / "aside").rename(artifact / name)


@pytest.mark.parametrize("name", ["part-00003.parquet", "deep/x", ".hidden", "manifest.json.tmp"])
def test_an_extra_file_is_noticed(artifact: Path, name: str) -> None:
    path = artifact / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((artifact / "part-00000.parquet").read_bytes())
    refused(artifact, f"{name} does not belong there")
    path.unlink()


def test_swapped_files_are_noticed(artifact: Path) -> None:
    """Two whole shards, one in place of the other, of equal size."""
    one, two = (artifact / f"shard-{shard}.safetensors" for shard in (1, 2))
    assert one.stat().st_size == two.stat().st_size
    swap(one, two)
    refused(artifact, one.name)
    swap(one, two)
    use(artifact)


def swap(one: Path, two: Path) -> None:
    aside = one.parent.parent / "aside"
    one.rename(aside)
    two.rename(one)
    aside.rename(two)


def test_a_manifest_of_another_artifact_is_noticed(artifact: Path, tmp_path: Path) -> None:
    def fill(workspace: Workspace) -> Outcome:
        for shard in range(3):
            write_table(workspace.file(f"part-{shard:05d}.parquet"), start=shard * 100 + 1)
        save_file({"w": np.zeros((64, 16), np.float32)}, workspace.file("model.safetensors"))
        return Outcome(counts={"rows": 300})

    produce(tmp_path / "other", plan(), fill)
    good = (artifact / "manifest.json").read_bytes()
    (artifact / "manifest.json").write_bytes((tmp_path / "other" / "manifest.json").read_bytes())
    with pytest.raises(CorruptError):
        use(artifact)
    (artifact / "manifest.json").write_bytes(good)
    use(artifact)
