"""The external sort equals sorting in memory, whatever the bounds."""

import random
from pathlib import Path

import pytest

from stages.data import sorting
from stages.data.sorting import LineSorter


@pytest.mark.parametrize("num_lines", [0, 1, 7, 1000])
@pytest.mark.parametrize("memory_bytes", [1, 500, 2**20])
@pytest.mark.parametrize("fan_in", [2, 3, 64])
def test_equals_sorting_in_memory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_lines: int,
    memory_bytes: int,
    fan_in: int,
) -> None:
    monkeypatch.setattr(sorting, "FAN_IN", fan_in)
    rng = random.Random(num_lines)
    lines = [
        f"{rng.randint(0, 300)} é {'x' * rng.randint(0, 9)}\n".encode() for _ in range(num_lines)
    ]
    sorter = LineSorter(tmp_path / "runs", memory_bytes)
    for line in lines:
        sorter.add(line)
    found = sorter.finish()
    assert found.read_bytes().splitlines(keepends=True) == sorted(lines)
    assert list((tmp_path / "runs").iterdir()) == [found]
