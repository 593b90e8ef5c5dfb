"""A gate's verdict as it stands in decision.json, made fit to be shown, whatever it holds."""

import math
from dataclasses import dataclass
from typing import Any

from stages.reporting import numbers
from stages.reporting.numbers import Units

_TITLES = {
    "all": "All of these",
    "any": "Any of these",
    "better": "Better",
    "not_worse": "Not worse",
    "at_least": "At least",
    "length_within": "Length",
    "alarms_clear": "Alarms",
    "number": "A number",
    "min_value": "Least value",
    "min_gain": "Least gain",
}
_OF_THE_METRIC = ("value", "rival_value", "min_value", "at_least")
_BOUNDS = ("low", "high")
"""Of the gain where there is one, otherwise of the metric."""
_DIFFERENCES = ("gain", "above", "min_gain")
_IF_NOT_ZERO = ("above", "unmatched")
_SHARES = ("confidence", "share", "off")
_NAMES = {
    "rival_value": "rival's value",
    "above": "to exceed",
    "unmatched": "not in both",
    "counted": "that count",
    "p_value": "one-sided p",
}

_ORDER = (
    "metric", "against", "rival", "value", "rival_value", "gain", "low", "high", "p_value", "above",
    "confidence", "method", "examples", "wins", "losses", "ties",
)  # fmt: skip
_PLACES = {name: place for place, name in enumerate(_ORDER)}


@dataclass(frozen=True)
class Verdict:
    """One condition, and those in it, whose texts stand for its own."""

    title: str
    passed: bool | None
    text: str
    figures: tuple[tuple[str, str], ...]
    children: tuple["Verdict", ...]


def verdict(node: Any, units: Units) -> Verdict | None:
    """Return a node of the tree; None for what is none."""
    if not isinstance(node, dict):
        return None
    kind, passed = str(node.get("kind", "")), node.get("passed")
    found = node.get("figures")
    children = node.get("children")
    nodes = [verdict(child, units) for child in children] if isinstance(children, list) else []
    below = tuple(node for node in nodes if node is not None)
    return Verdict(
        _TITLES.get(kind, kind),
        passed if isinstance(passed, bool) else None,
        "" if below else str(node.get("text") or ""),
        tuple(_figures(kind, found, units)) if isinstance(found, dict) else (),
        below,
    )


def _figures(kind: str, found: dict[str, Any], units: Units) -> list[tuple[str, str]]:
    """Return figures in the order of `_ORDER`, the ends of an interval together.

    What is zero where nothing else is of interest is left out.
    """
    metric, is_compared = str(found.get("metric") or ""), "gain" in found
    shown = {
        name: _shown(name, found[name], metric, units, is_compared=is_compared)
        for name in sorted(found, key=lambda name: _PLACES.get(name, len(_PLACES)))
        if found[name] is not None and (name not in _IF_NOT_ZERO or found[name])
    }
    names = dict(_NAMES)
    if is_compared and all(name in shown for name in (*_BOUNDS, "confidence")):
        confidence = shown.pop("confidence")
        # a gate's condition asks one end only
        names["low"] = f"{confidence} interval" if kind == "gain" else f"{confidence} bounds"
        shown["low"] = f"{shown['low']} to {shown.pop('high')}{units.unit(metric)}"
    return [(names.get(name, name.replace("_", " ")), text) for name, text in shown.items()]


def _shown(name: str, value: Any, metric: str, units: Units, *, is_compared: bool) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return numbers.MISSING
    if metric and (name in _OF_THE_METRIC or (name in _BOUNDS and not is_compared)):
        return units.metric(metric, value)
    if metric and name in _BOUNDS:
        return units.difference(metric, value)
    if metric and name in _DIFFERENCES:
        return units.difference(metric, value) + units.unit(metric)
    if name in _SHARES:
        return f"{100 * value:.4g}%"
    return numbers.number(value, 3)
