"""How numbers are written in a report."""

import math
import re

_SHARES = re.compile(
    r"(accuracy|share|_rate|win_rate|^rate|pass@\d+|majority@\d+|(^|[_,./])acc(_norm)?|exact_match)"
    r"(,[\w-]+)?$"
)
MINUS = "−"
MISSING = "–"


def is_share(metric: str) -> bool:
    """Tell whether a metric, named as in metrics.json or as SUITE.METRIC, is a part of one."""
    return bool(_SHARES.search(metric)) and "explained" not in metric


def number(value: float | int | None, digits: int = 4) -> str:
    """Return a number with so many significant digits, thousands apart."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == int(value) and abs(value) < 1e15:
        return _signs(f"{int(value):,}")
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{places}f}" if places <= 8 else f"{value:.{digits - 1}e}"
    return _signs(text)


def metric(name: str, value: float | None) -> str:
    """Return a metric's value, a share as a percentage."""
    if value is None or not math.isfinite(value):
        return MISSING
    return _signs(f"{100 * value:.1f}%") if is_share(name) else number(value)


def interval(name: str, bounds: tuple[float, float] | None) -> str:
    """Return a metric's interval as `low to high`."""
    if bounds is None:
        return ""
    return f"{metric(name, bounds[0])} to {metric(name, bounds[1])}"


def difference(name: str, value: float) -> str:
    """Return a difference of a metric with its sign; of a share in points."""
    shown = f"{100 * value:+.1f}" if is_share(name) else f"{value:+.4g}"
    return "0" if not float(shown) else _signs(shown)


def unit(name: str) -> str:
    """Return the unit of a metric's differences, after a space, or nothing."""
    return " points" if is_share(name) else ""


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
