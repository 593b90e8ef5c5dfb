"""A gate's verdict as it stands in decision.json, made fit to be shown, whatever it holds."""

import math
from dataclasses import dataclass
from typing import Any

from stages.reporting import numbers

_TITLES = {
    "all": "All of these",
    "any": "Any of these",
    "better": "Better",
    "not_worse": "Not worse",
    "at_least": "At least",
    "length_within": "Length",
    "alarms_clear": "Alarms",
    "min_value": "Least value",
    "min_gain": "Least gain",
}
_OF_THE_METRIC = ("value", "rival_value")
_DIFFERENCES = ("gain", "low", "high", "by", "margin", "min_gain")
_NAMES = {
    "rival_value": "rival's value",
    "p_value": "p",
    "low": "interval from",
    "high": "interval to",
}


@dataclass(frozen=True)
class Verdict:
    """One condition, and those in it."""

    title: str
    passed: bool | None
    text: str
    figures: tuple[tuple[str, str], ...]
    children: tuple["Verdict", ...]


def verdict(node: Any) -> Verdict | None:
    """Return a node of the tree; None for what is none."""
    if not isinstance(node, dict):
        return None
    kind, passed = str(node.get("kind", "")), node.get("passed")
    found = node.get("figures")
    children = node.get("children")
    below = (verdict(child) for child in children) if isinstance(children, list) else ()
    return Verdict(
        _TITLES.get(kind, kind),
        passed if isinstance(passed, bool) else None,
        str(node.get("text") or ""),
        tuple(_figures(found)) if isinstance(found, dict) else (),
        tuple(child for child in below if child is not None),
    )


def _figures(found: dict[str, Any]) -> list[tuple[str, str]]:
    metric = str(found.get("metric") or "")
    return [
        (_NAMES.get(name, name.replace("_", " ")), _shown(name, value, metric))
        for name, value in found.items()
        if value is not None
    ]


def _shown(name: str, value: Any, metric: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return numbers.MISSING
    if name in _OF_THE_METRIC and metric:
        return numbers.metric(metric, value)
    if name in _DIFFERENCES and metric:
        return numbers.difference(metric, value) + numbers.unit(metric)
    if name == "confidence":
        return f"{100 * value:g}%"
    return numbers.number(value, 3)
