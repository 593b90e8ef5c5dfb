"""Figures of bench/regimes.py: means with intervals, paired differences, table and plots."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")  # before pyplot: no display is needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

ARMS = ("self-play", "control", "sft")
MEASURES = ("sampled_accuracy", "greedy_accuracy", "slip", "sloppy", "spoilt")
RIVALS = ("control", "sft")
T_975 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, 97.5%, by degrees of freedom."""
STYLE = {
    # Grey and middling colours can be read on white and on black pages alike.
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), "#7f7f7f"),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), "#7f7f7f"),
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "regimes",
}
COLORS = {"self-play": "#d9722e", "control": "#3f8fd2", "sft": "#4aa564"}
WIDTH = 7.2
COLUMNS = 3


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean and half the width of its 95% t interval; None of a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "half_width": None}
    error = statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "half_width": T_975[len(values) - 1] * error}


def summarize(runs: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return the figures of one point, from seed and arm to a line of done.jsonl.

    Differences are self-play's value minus the rival's at the same seed. Only iterations that
    every run has are summed up.
    """
    length = min(len(line["metrics"]) for arms in runs.values() for line in arms.values())
    values = {
        measure: {
            arm: [[runs[s][arm]["metrics"][t][measure] for s in runs] for t in range(length)]
            for arm in ARMS
        }
        for measure in MEASURES
    }
    return {
        "seeds": list(runs),
        "values": values,
        "means": {
            measure: {arm: [interval(v) for v in courses[arm]] for arm in ARMS}
            for measure, courses in values.items()
        },
        "gains": {
            measure: {
                rival: [
                    interval([a - b for a, b in zip(ours, theirs, strict=True)])
                    for ours, theirs in zip(courses["self-play"], courses[rival], strict=True)
                ]
                for rival in RIVALS
            }
            for measure, courses in values.items()
            if measure in ("sampled_accuracy", "greedy_accuracy")
        },
        "exit_codes": {arm: [runs[s][arm]["exit_code"] for s in runs] for arm in ARMS},
        "pairs": {arm: [runs[s][arm]["pairs"] for s in runs] for arm in ARMS if arm != "sft"},
    }


def show(points: Sequence[Mapping[str, Any]]) -> None:
    """Print what sampled and greedy accuracy came to."""
    for measure in ("sampled_accuracy", "greedy_accuracy"):
        print(f"{measure}, % at the last iteration; self-play minus the others, points")
        heads = ["point", "seeds", "start", *ARMS, "- control", "- sft"]
        print("  ".join(f"{head:>14}" for head in heads))
        for point in points:
            means = point["means"][measure]
            cells = [point["name"], len(point["seeds"]), percent(means["self-play"][0])]
            cells += [percent(means[arm][-1]) for arm in ARMS]
            cells += [percent(point["gains"][measure][rival][-1], "+") for rival in RIVALS]
            print("  ".join(f"{cell!s:>14}" for cell in cells))


def rounded(value: Any) -> Any:
    """Return a report with every fraction cut to five digits."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, Mapping):
        return {name: rounded(inner) for name, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


def percent(figure: Mapping[str, Any], sign: str = "") -> str:
    """Return a mean with its half width, in per cent."""
    half = figure["half_width"]
    spread = "" if half is None else f" ± {100 * half:.1f}"
    return f"{100 * figure['mean']:{sign}.1f}{spread}"


def draw(points: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write regimes-gains.svg, every point's difference, and regimes-curves.svg, its courses.

    Points of a single seed have no interval and are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    points = [point for point in points if len(point["seeds"]) > 1]
    with mpl.rc_context(STYLE):
        _draw_gains(points, folder / "regimes-gains.svg")
        _draw_curves(points, folder / "regimes-curves.svg")


def _draw_gains(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    figure, sides = plt.subplots(
        1, 2, figsize=(WIDTH, 1.2 + 0.34 * len(points)), sharey=True, layout="constrained"
    )
    for iteration, axes in enumerate(sides):
        axes.axvline(0, color="#7f7f7f", linewidth=0.8)
        for rival, offset, marker in (("control", -0.13, "o"), ("sft", 0.13, "s")):
            gains = [p["gains"]["sampled_accuracy"][rival][iteration + 1] for p in points]
            axes.errorbar(
                [100 * gain["mean"] for gain in gains],
                [place + offset for place in range(len(points))],
                xerr=[100 * gain["half_width"] for gain in gains],
                fmt=marker,
                color=COLORS[rival],
                markersize=4,
                elinewidth=1.2,
                label=f"self-play minus {rival}",
            )
        axes.grid(axis="x", alpha=0.25)
        axes.set_title(f"after iteration {iteration}", fontsize=9)
    sides[0].set_yticks(range(len(points)), [point["label"] for point in points])
    sides[0].invert_yaxis()
    figure.supxlabel("sampled held-out accuracy, difference in points", fontsize=9)
    handles, labels = sides[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
    _save(path)


def _draw_curves(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    rows = math.ceil(len(points) / COLUMNS)
    figure, grid = plt.subplots(
        rows, COLUMNS, figsize=(WIDTH, 0.7 + 1.75 * rows), sharey=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for axes, point in zip(grid.flat, points, strict=False):
        _draw_courses(axes, point)
    for axes in list(grid.flat)[len(points) :]:
        axes.set_axis_off()
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=6, frameon=False)
    figure.supylabel("held-out accuracy, %", fontsize=9)
    _save(path)


def _draw_courses(axes: Axes, point: Mapping[str, Any]) -> None:
    for measure, line, short in (
        ("sampled_accuracy", "-", ""), ("greedy_accuracy", ":", " greedy"),
    ):  # fmt: skip
        for arm in ARMS:
            course = point["means"][measure][arm]
            means = [100 * figure["mean"] for figure in course]
            places = range(len(means))
            axes.plot(places, means, line, color=COLORS[arm], linewidth=1.4, label=arm + short)
            if not short and len(point["seeds"]) > 1:
                low = [m - 100 * f["half_width"] for m, f in zip(means, course, strict=True)]
                high = [m + 100 * f["half_width"] for m, f in zip(means, course, strict=True)]
                axes.fill_between(places, low, high, color=COLORS[arm], alpha=0.15, linewidth=0)
    axes.set_title(point["label"], fontsize=9)
    axes.set_xticks(places, ["start", *map(str, places[:-1])])
    axes.grid(alpha=0.25)


def _save(path: Path) -> None:
    plt.savefig(path, metadata={"Date": None})  # no date: equal figures are equal bytes
    plt.close()
