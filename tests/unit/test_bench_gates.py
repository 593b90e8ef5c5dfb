"""The simulation of bench/gates.py in small: what is no better seldom passes."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
PLAYERS, SETS = 2_000, 500


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """The script, as a module, with fewer examples."""
    spec = importlib.util.spec_from_file_location("bench_gates", BENCH / "gates.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.EXAMPLES = (100, 250)  # type: ignore[attr-defined]
    return module


def noise(trials: int) -> float:
    """Three standard errors of a share of 5%."""
    return 3 * float(0.05 * 0.95 / trials) ** 0.5


def test_a_player_that_is_no_better_seldom_passes(bench: ModuleType) -> None:
    rows: list[dict[str, Any]] = list(bench.right_or_wrong(PLAYERS))
    false = [row["passed"] for row in rows if row["is_false"]]
    assert len(false) == 2 * 3 * (2 + 1)  # `better` at two gains, `not_worse` at its margin
    assert max(false) <= 0.0503 + noise(PLAYERS)
    powers = [
        row["passed"]
        for row in rows
        if (row["gate"], row["examples"], row["differing"]) == ("better", 250, 0.1)
    ]
    assert powers == sorted(powers), "the larger the gain, the likelier it is seen"
    assert powers[-1] > 0.99


def test_nor_does_one_whose_mean_is_no_higher(bench: ModuleType) -> None:
    rows = list(bench.means(SETS, (100,)))
    assert max(row["passed"] for row in rows if row["is_false"]) <= 0.054 + noise(SETS)
    seen = [row["passed"] for row in rows if row["gain"] == 0.3 and row["shape"] in bench.SHAPES]
    assert min(seen) > 0.6


def test_ten_gates_in_a_row_let_more_through_than_one(bench: ModuleType) -> None:
    better = bench.repeated(200, "better", 0.0)
    lowest = bench.repeated(200, "min_gain", 0.0)
    assert 0.1 < better["any_passed"] < 0.4
    assert lowest["any_passed"] > 0.8
    assert bench.repeated(200, "not_worse", -0.01)["mean_fall"] < -0.002
