"""A gate's verdict as it stands in decision.json, made fit to be shown, whatever it holds.

A condition's figures are written as its sentence writes them: see stages/data/wording.py.
"""

import math
from dataclasses import dataclass
from typing import Any

from stages.data.wording import amount_told, gain_told, in_points, name_of_test, p_told, unit_told
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
_AS_NUMBERS = ("at_least", "min_value", "min_gain")
"""Conditions that compare with a number of the recipe, and are told as that is."""
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
    writer = _Writer(kind, found, units)
    shown = {
        name: writer.shown(name, found[name])
        for name in sorted(found, key=lambda name: _PLACES.get(name, len(_PLACES)))
        if found[name] is not None and (name not in _IF_NOT_ZERO or found[name])
    }
    names = dict(_NAMES)
    if kind == "not_worse":
        names["above"] = "margin"
    if writer.is_compared and all(name in shown for name in (*_BOUNDS, "confidence")):
        confidence = shown.pop("confidence")
        # a gate's condition asks one end only
        names["low"] = f"{confidence} interval" if kind == "gain" else f"{confidence} bounds"
        shown["low"] = f"{shown['low']} to {shown.pop('high')}{writer.unit}"
    return [(names.get(name, name.replace("_", " ")), text) for name, text in shown.items()]


@dataclass(frozen=True)
class _Writer:
    """Writes the figures of one condition."""

    kind: str
    found: dict[str, Any]
    units: Units

    @property
    def is_compared(self) -> bool:
        """Whether there is a gain, which bounds are then of."""
        return "gain" in self.found

    @property
    def unit(self) -> str:
        """That of a gain, after a space, or nothing."""
        if self.kind in _AS_NUMBERS:
            return ""
        method = self.found.get("method")
        return self.units.unit(self._metric) if method is None else unit_told(method)

    @property
    def _metric(self) -> str:
        return str(self.found.get("metric") or "")

    def shown(self, name: str, value: Any) -> str:
        """Return a figure as a text."""
        if name == "method":
            return name_of_test(value, self.found.get("above") or 0)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return str(value)
        if not math.isfinite(value):
            return numbers.MISSING
        if name == "p_value":
            return p_told(value)
        if self._metric and (name in _DIFFERENCES or (name in _BOUNDS and self.is_compared)):
            return self._difference(name, value).replace("-", numbers.MINUS)
        if self._metric and (name in _OF_THE_METRIC or name in _BOUNDS):
            return self._value(value)
        return f"{100 * value:.4g}%" if name in _SHARES else numbers.number(value, 3)

    def _difference(self, name: str, value: float) -> str:
        method, unit = self.found.get("method"), "" if name in _BOUNDS else self.unit
        if self.kind in _AS_NUMBERS:
            return f"{value:g}"
        if method is None:
            return self.units.difference(self._metric, value) + unit
        if name == "above":
            return amount_told(-value if self.kind == "not_worse" else value, method)
        return gain_told(value, method) + unit

    def _value(self, value: float) -> str:
        if self.kind in _AS_NUMBERS:
            return f"{value:g}".replace("-", numbers.MINUS)
        method = self.found.get("method")
        if method is None:
            return self.units.metric(self._metric, value)
        return numbers.percent(value) if in_points(method) else numbers.number(value)
