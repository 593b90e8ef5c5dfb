"""What status and config show print."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spin_cli.screen import counted, put, put_table, put_wrapped
from stages.ending import Ending
from stages.headlines import in_order, longer_side
from stages.layout import RunLayout
from stages.reporting.numbers import Units
from stages.run_record import read_recipe
from stages.status import stage_state, status

MISSING = "-"
MAX_COLUMNS = 5
"""Figures of a suite that are shown."""
_COLUMNS = (
    ("sampled", "sampled_accuracy"),
    ("greedy", "greedy_accuracy"),
    ("identical", "identical_share"),
    ("held-out accuracy", "heldout_reward_accuracy"),
    ("margin", "heldout_reward_margin"),
)


def put_iterations(run: Path) -> None:
    """Print one row an iteration: accuracies, margins, seconds, decision; why it was refused."""
    _put_iterations(status(run), _units(run))


def put_status(run: Path) -> None:
    """Print what a run holds, for people."""
    found = status(run)
    champion = found["champion"] or "none yet"
    put(f"{run}: champion {champion}")
    layout = RunLayout(run)
    start = {"prepare": layout.data, "sft": layout.sft, "evaluate": layout.start_evaluation}
    states = {name: stage_state(path)["state"] for name, path in start.items()}
    if states["sft"] == "missing":
        del states["sft"]  # a recipe without it, or not yet begun
    put(f"start: {_states(states)}")
    for row in found["iterations"]:
        stages = {name: stage["state"] for name, stage in row["stages"].items()}
        put_wrapped(f"iteration {row['index']}: {_states(stages)}{_course(row)}")
        if row["training"]:
            put_wrapped(f"  training: {_training(row['training'])}")
        for alarm in (row["decision"] or {}).get("alarms", []):
            put_wrapped(f"  alarm {alarm['name']} ({alarm['action']}): {alarm['text']}")
        if row["converged"]:
            put_wrapped(f"  converged: {row['converged']}")
    if found["ended"]:
        put_wrapped(Ending(**found["ended"]).told())
    put("")
    units = _units(run)
    _put_iterations(found, units)
    _put_suites(found, units)


def setting_line(name: str, value: Any, origin: str) -> str:
    """Return a setting as a line of YAML, its origin as a comment."""
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    shown = text.removesuffix("...\n").strip()
    return f"{name}: {shown}  # {origin}"


def _states(states: dict[str, str]) -> str:
    if set(states.values()) == {"done"}:
        return "done"
    return ", ".join(f"{name} {state}" for name, state in states.items())


def _training(metrics: dict[str, Any]) -> str:
    """Return the figures that training itself is usually judged by."""
    forms = (
        ("loss", "first_loss", ".3f"),
        ("to", "last_loss", ".3f"),
        (", reward accuracy", "last_accuracy", ".1%"),
        (", margin", "last_margin", ".2f"),
    )
    known = [(word, metrics[name], form) for word, name, form in forms if name in metrics]
    return " ".join(f"{word} {value:{form}}" for word, value, form in known).replace(" ,", ",")


def _course(row: dict[str, Any]) -> str:
    """Return what an iteration was held to, what its optimizer went on from, what was changed."""
    words = []
    if row["reference"]:
        words.append(f"reference {row['reference']}")
    if row["optimizer"]:
        words.append(f"optimizer {row['optimizer']}")
    for name, change in row["changed"].items():
        words.append(f"{name} {change['value']:.4g} instead of {change['recipe']:.4g}")
    return f" ({', '.join(words)})" if words else ""


def _units(run: Path) -> Units:
    return Units.of(read_recipe(RunLayout(run)).configs())


def _put_iterations(found: dict[str, Any], units: Units) -> None:
    titles = ["iteration", *(title for title, _ in _COLUMNS), "seconds", "decision"]
    names = {name: name for _, name in _COLUMNS}
    rows = [["start", *_cells(found["start"], names, units), MISSING, MISSING]]
    for row in found["iterations"]:
        seconds = [stage["seconds"] for stage in row["stages"].values()]
        total = sum(s for s in seconds if s is not None)
        decision = _decision(row, found["champion"])
        rows.append([str(row["index"]), *_cells(row, names, units), f"{total:.1f}", decision])
    put_table(titles, rows)
    refused = {
        row["index"]: row["decision"]["reasons"]
        for row in found["iterations"]
        if row["decision"] and not row["decision"]["promoted"]
    }
    if refused:
        put("")
    for index, reasons in refused.items():
        put_wrapped(f"iteration {index} was refused: {'; '.join(reasons)}")


def _cells(found: Mapping[str, Any], names: Mapping[str, str], units: Units) -> list[str]:
    """Return what was measured; the first figure with the longer side of its interval.

    Args:
        names: metric → what it is called by `units`.
    """
    cells = []
    for place, (name, unit) in enumerate(names.items()):
        value, form = found["metrics"].get(name), ".1%" if units.is_share(unit) else ".3f"
        if not isinstance(value, int | float):
            cells.append(MISSING)
            continue
        half = longer_side(value, *(found["intervals"].get(name) or (None, None)))
        beside = f" ±{half:{form}}".removesuffix("%") if half is not None and not place else ""
        cells.append(f"{value:{form}}{beside}")
    return cells


def _put_suites(found: dict[str, Any], units: Units) -> None:
    """Print the metrics of each suite, one row for the start and each iteration."""
    parts = [("start", found["start"]), *((str(r["index"]), r) for r in found["iterations"])]
    for suite in dict.fromkeys(name for _, row in parts for name in row["suites"]):
        have = {label: row["suites"][suite] for label, row in parts if suite in row["suites"]}
        names = in_order(name for each in have.values() for name in each["metrics"])
        columns, more = names[:MAX_COLUMNS], len(names[MAX_COLUMNS:])
        further = f", and {counted(more, 'more metric', 'more metrics')} by --json" if more else ""
        called = {name: f"{suite}.{name}" for name in columns}
        cells = [[label, *_cells(each, called, units), ""] for label, each in have.items()]
        put("")
        put_table(["iteration", *columns, ""], cells, caption=f"suite {suite}{further}")


def _decision(row: dict[str, Any], champion: str | None) -> str:
    """Return the decision in a word or two, for which a table has room."""
    decision = row["decision"]
    if decision is None:
        return MISSING
    if not decision["promoted"]:
        return "refused"
    if row["rolled_back"]:
        return "rolled back"
    is_champion = RunLayout(Path()).iteration_of(champion or "") == row["index"]
    return "champion" if is_champion else "promoted"
