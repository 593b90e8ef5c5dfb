"""What status and config show print."""

from pathlib import Path
from typing import Any

from spin_cli.screen import put, put_table
from stages.headlines import in_order
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
    """Print one row an iteration: accuracies, margins, seconds, decision."""
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
        put(f"iteration {row['index']}: {_states(stages)}{_course(row)}")
        if row["training"]:
            put(f"  training: {_training(row['training'])}")
        for alarm in (row["decision"] or {}).get("alarms", []):
            put(f"  alarm ({alarm['action']}): {alarm['text']}")
        if row["converged"]:
            put(f"  converged: {row['converged']}")
    if found["ended"]:
        ended = "the last run ended at {at} with exit code {exit_code}: {message}"
        put(ended.format(**found["ended"]))
    put("")
    _put_iterations(found, _units(run))
    _put_suites(found)


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
    """Return what an iteration was held to, and what its optimizer went on from."""
    words = []
    if row["reference"]:
        words.append(f"reference {row['reference']}")
    if row["optimizer"]:
        words.append(f"optimizer {row['optimizer']}")
    return f" ({', '.join(words)})" if words else ""


def _units(run: Path) -> Units:
    return Units.of(read_recipe(RunLayout(run)).configs())


def _put_iterations(found: dict[str, Any], units: Units) -> None:
    titles = ["iteration", *(title for title, _ in _COLUMNS), "seconds", "decision"]
    rows = [["start", *_cells(found["start"], units), MISSING, MISSING]]
    for row in found["iterations"]:
        seconds = [stage["seconds"] for stage in row["stages"].values()]
        total = sum(s for s in seconds if s is not None)
        rows.append(
            [
                str(row["index"]),
                *_cells(row, units),
                f"{total:.1f}",
                _decision(row, found["champion"]),
            ]
        )
    put_table(titles, rows)


def _cells(row: dict[str, Any], units: Units) -> list[str]:
    """Return what was measured; the first figure with half the width of its interval."""
    names = [name for _, name in _COLUMNS]
    forms = [".1%" if units.is_share(name) else ".3f" for name in names]
    values = [(row["metrics"].get(name), form) for name, form in zip(names, forms, strict=True)]
    cells = [format(v, form) if isinstance(v, int | float) else MISSING for v, form in values]
    low, high = row["intervals"].get(names[0]) or (None, None)
    if low is not None and high is not None:
        cells[0] += f" ±{(high - low) / 2:{forms[0]}}".removesuffix("%")
    return cells


def _put_suites(found: dict[str, Any]) -> None:
    """Print the metrics of each suite, one row for the start and each iteration."""
    parts = [("start", found["start"]), *((str(r["index"]), r) for r in found["iterations"])]
    for name in dict.fromkeys(name for _, row in parts for name in row["suites"]):
        have = [
            (label, row["suites"][name]["metrics"]) for label, row in parts if name in row["suites"]
        ]
        names = in_order(c for _, metrics in have for c in metrics)
        columns, more = names[:MAX_COLUMNS], len(names[MAX_COLUMNS:])
        caption = f"suite {name}{f', and {more} more metrics by --json' if more else ''}"
        cells = [[label, *(_number(m.get(c)) for c in columns), ""] for label, m in have]
        put("")
        put_table(["iteration", *columns, ""], cells, caption=caption)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else MISSING


def _decision(row: dict[str, Any], champion: str | None) -> str:
    decision = row["decision"]
    if decision is None:
        return MISSING
    if not decision["promoted"]:
        return f"refused: {'; '.join(decision['reasons'])}"
    if row["rolled_back"]:
        return "promoted, and rolled back since"
    return (
        "champion"
        if RunLayout(Path()).iteration_of(champion or "") == row["index"]
        else ("promoted")
    )
