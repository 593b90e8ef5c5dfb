"""The parts of bench/regimes.py that need no training: data, verdicts, arms, figures, plots."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from stages.data.word_sums import word_sums
from stages.rewards.gsm8k import final_answer

BENCH = Path(__file__).parents[2] / "bench"
PROMPT = "Ann has 27 pens, finds 5, loses 9. How many?"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("bench_regimes", BENCH / "regimes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_regimes"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def noise(bench: ModuleType) -> ModuleType:
    return sys.modules["_word_noise"]


@pytest.fixture(scope="module")
def figures(bench: ModuleType) -> ModuleType:
    return sys.modules["_regimes_report"]


@pytest.mark.parametrize(("kind", "share"), [("sloppy", 0.25), ("slips", 0.2), ("none", 0.0)])
def test_the_share_of_flawed_answers_is_the_one_asked_for(
    noise: Any, kind: str, share: float
) -> None:
    rows = noise.human_rows(2000, 80_000, kind, share)
    careful = list(word_sums(2000, "careful", 0, skip=80_000))
    assert [row.prompt for row in rows] == [good.prompt for good in careful]
    flawed = sum(r.response != g.response for r, g in zip(rows, careful, strict=True))
    assert flawed / 2000 == pytest.approx(share, abs=0.03)


def test_a_slip_spoils_the_last_total_alone(noise: Any) -> None:
    rows = noise.human_rows(200, 80_000, "slips", 1.0)
    for row, good in zip(rows, word_sums(200, "careful", 0, skip=80_000), strict=True):
        wrong, right = final_answer(row.response), final_answer(good.response)
        assert wrong is not None and right is not None
        assert 1 <= abs(int(wrong) - int(right)) <= 9 and int(wrong) >= 0
        assert row.response == good.response.replace(
            f"={right}. #### ", f"={wrong}. #### "
        ).replace(f"#### {right}", f"#### {wrong}")
        assert noise.verdict(row.prompt, row.response, 0.0) == "slip"


def test_flawed_rows_stay_flawed_at_a_larger_share_and_in_any_slice(noise: Any) -> None:
    few = noise.human_rows(300, 80_000, "slips", 0.1)
    many = noise.human_rows(300, 80_000, "slips", 0.4)
    good = noise.human_rows(300, 80_000, "none", 0.0)
    changed = [i for i in range(300) if few[i] != good[i]]
    assert changed and all(many[i] == few[i] for i in changed)
    assert noise.human_rows(100, 80_100, "slips", 0.4) == many[100:200]


def test_more_sloppy_answers_than_there_are_is_refused(noise: Any) -> None:
    with pytest.raises(ValueError, match=r"share=0.6 of sloppy; use 0 to 0.5"):
        noise.human_rows(10, 0, "sloppy", 0.6)


@pytest.mark.parametrize(
    ("answer", "reward", "expected"),
    [
        ("27+5=32. 32-9=23. #### 23", 1.0, "right"),
        ("27+5=32. 32-9=24. #### 24", 0.0, "slip"),
        ("27+5=32. #### 32", 0.0, "sloppy"),
        ("About 25, I guess. #### 25", 0.0, "sloppy"),
        ("Ann likes pens. #### 25", 0.0, "sloppy"),
        ("Ann likes pens. #### 23", 1.0, "right"),
        ("27+5=32. 32-9=2", 0.0, "spoilt"),
        ("", 0.0, "spoilt"),
        ("27+5=32. likes #### 3", 0.0, "spoilt"),
    ],
)
def test_verdicts_of_answers(noise: Any, answer: str, reward: float, expected: str) -> None:
    assert noise.verdict(PROMPT, answer, reward) == expected


def test_held_out_rows_and_seeds_share_no_prompt(bench: Any) -> None:
    size = bench.Size()
    assert size.heldout + size.most_human <= bench.ROWS_A_SEED
    assert max(point.start.num_human for point in bench.POINTS) <= size.most_human


def test_points_have_names_of_their_own(bench: Any) -> None:
    assert len({point.name for point in bench.POINTS}) == len(bench.POINTS)
    assert {point.start.base for point in bench.POINTS} <= {"demo", *bench.BASES}


def test_rivals_are_shared_only_where_nothing_of_theirs_differs(bench: Any) -> None:
    point = {p.name: p for p in bench.POINTS}

    def name(place: str, kind: str, seed: int = 0) -> str:
        return str(bench.arm_of(point[place], kind, seed).name())

    for kind in ("control", "sft"):
        assert name("default", kind) == name("beta-1", kind) == name("nll-1", kind)
        assert name("default", kind) != name("lr-4e-4", kind)
        assert name("default", kind) != name("slips-20", kind)
        assert name("default", kind) != name("default", kind, seed=1)
        assert name("default", kind) != name("long", kind)
    assert name("default", "self-play") != name("beta-1", "self-play")


def test_an_interval_by_hand(figures: Any) -> None:
    found = figures.interval([0.8, 0.9, 1.0])
    assert found["mean"] == pytest.approx(0.9)
    assert found["half_width"] == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert figures.interval([0.5]) == {"mean": 0.5, "half_width": None}


def _line(sampled: list[float]) -> dict[str, Any]:
    rest = dict.fromkeys(("greedy_accuracy", "slip", "sloppy", "spoilt"), 0.5)
    metrics = [{"sampled_accuracy": x, **rest} for x in sampled]
    return {"metrics": metrics, "exit_code": 0, "pairs": [3, 2]}


@pytest.fixture
def summary(figures: Any) -> dict[str, Any]:
    """Two seeds, far apart; self-play is 0.1 above control at both."""
    runs = {
        seed: {
            "self-play": _line([low, low, low + 0.2]),
            "control": _line([low, low, low + 0.1]),
            "sft": _line([low, low, 0.9]),
        }
        for seed, low in ((0, 0.2), (1, 0.6))
    }
    return {"name": "x", "label": "X", "axis": "a", **figures.summarize(runs)}


def test_a_rounded_report_is_the_same_to_five_digits(figures: Any) -> None:
    report = {"a": [0.1234567, 3, None], "b": (0.5,)}
    assert figures.rounded(report) == {"a": [0.12346, 3, None], "b": [0.5]}


def test_differences_are_between_arms_of_one_seed(summary: dict[str, Any]) -> None:
    gains = summary["gains"]["sampled_accuracy"]
    assert gains["control"][-1]["mean"] == pytest.approx(0.1)
    assert gains["control"][-1]["half_width"] == pytest.approx(0, abs=1e-9)
    assert gains["sft"][-1]["half_width"] > 1
    assert gains["control"][0]["mean"] == 0  # one start


def test_plots_are_the_same_bytes_for_the_same_figures(
    figures: Any, summary: dict[str, Any], tmp_path: Path
) -> None:
    alone = {**summary, "seeds": [0]}  # has no interval, and no place in the plots
    for folder, points in (("a", [summary]), ("b", [alone, summary])):
        figures.draw(points, tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["regimes-curves.svg", "regimes-gains.svg"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_seed_counts_when_all_its_arms_are_there(bench: Any, tmp_path: Path) -> None:
    place = bench.Place(tmp_path, bench.QUICK)
    point = bench.POINTS[0]
    arms = [bench.arm_of(point, kind, 0) for kind in ("self-play", "control", "sft")]
    arms.append(bench.arm_of(point, "self-play", 1))
    lines = [{"arm": arm.name(), "commit": "c", **_line([0.5, 0.6])} for arm in arms]
    place.done.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = bench.reported([point], range(2), place)["points"]
    assert found["seeds"] == [0]
