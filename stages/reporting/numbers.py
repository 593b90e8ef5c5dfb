"""How numbers are written in a report."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from stages.config import RunConfig
from stages.data.wording import rounded

_SHARES = re.compile(
    r"(accuracy|share|_rate|win_rate|(^|\.)rate|pass@\d+|majority@\d+|(^|[_,./])acc(_norm)?|exact_match)"
    r"(,[\w-]+)?$"
)
MINUS = "−"
MISSING = "–"


@dataclass(frozen=True)
class Units:
    """How the metrics of a run are written, named as in metrics.json or as SUITE.METRIC."""

    on_a_scale: frozenset[str] = frozenset()
    """Accuracies that are mean rewards of any scale, and so no parts of one."""

    @classmethod
    def of(cls, configs: Iterable[RunConfig]) -> "Units":
        """Return the units of a run, from all settings that it has had."""
        found: set[str] = set()
        for config in configs:
            if not config.reward.is_a_share:
                found |= {f"{whose}_accuracy" for whose in ("sampled", "greedy", "opponent")}
            for name, suite in config.suites.items():
                if suite.kind == "task" and not (suite.reward or config.reward).is_a_share:
                    found |= {f"{name}.accuracy", f"{name}.greedy_accuracy"}
        return cls(frozenset(found))

    def is_share(self, metric: str) -> bool:
        """Tell whether a metric is a part of one."""
        has_its_name = bool(_SHARES.search(metric)) and "explained" not in metric
        return has_its_name and metric not in self.on_a_scale

    def metric(self, name: str, value: float | None) -> str:
        """Return a metric's value, a share as a percentage."""
        return percent(value) if self.is_share(name) else number(value)

    def interval(self, name: str, bounds: tuple[float, float] | None) -> str:
        """Return a metric's interval as `low to high`."""
        if bounds is None:
            return ""
        return f"{self.metric(name, bounds[0])} to {self.metric(name, bounds[1])}"

    def difference(self, name: str, value: float) -> str:
        """Return a difference of a metric with its sign; of a share in points."""
        shown = f"{rounded(100 * value, 1):+.1f}" if self.is_share(name) else f"{value:+.4g}"
        return "0" if not float(shown) else _signs(shown)

    def unit(self, name: str) -> str:
        """Return the unit of a metric's differences, after a space, or nothing."""
        return " points" if self.is_share(name) else ""


def number(value: float | int | None, digits: int = 4) -> str:
    """Return a number with so many significant digits, thousands apart."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == int(value) and abs(value) < 1e15:
        return _signs(f"{int(value):,}")
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{places}f}" if places <= 8 else f"{value:.{digits - 1}e}"
    return _signs(text)


def percent(value: float | None) -> str:
    """Return a share as a percentage."""
    if value is None or not math.isfinite(value):
        return MISSING
    return _signs(f"{100 * value:.1f}%")


def seconds(value: float) -> str:
    """Return a duration as people say it."""
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def size(value: float) -> str:
    """Return bytes as people say them."""
    for unit_name, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit_name}"
    return f"{value:.0f} B"


def _signs(text: str) -> str:
    return text.replace("-", MINUS) if "e" not in text else text
