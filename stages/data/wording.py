"""How the figures of a paired comparison are told, the same in sentences and in the report.

Of right and wrong a difference is told in points, of all else as a number.
"""

from decimal import ROUND_HALF_UP, Decimal

_NOISE = 12
"""Digits that a sum of floats can be trusted in: 0.1625 - 0.15 is 0.012500000000000011."""


def rounded(value: float, digits: int) -> float:
    """Round to so many digits after the point, a half away from zero.

    Python rounds the float, of which 1.25 is one half and 1.35 is a little more.
    """
    if abs(value) >= 10**_NOISE:
        return value
    exact = Decimal(f"{value:.{_NOISE}g}")
    return float(exact.quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)) + 0.0  # no minus zero


def significant(value: float, digits: int) -> float:
    """Round to so many digits in all, a half away from zero."""
    return rounded(value, digits - 1 - Decimal(f"{value:.{_NOISE}g}").adjusted()) if value else 0.0


def in_points(method: object) -> bool:
    """Tell whether a comparison by this method is one of right and wrong."""
    return method == "mcnemar"


def gain_told(value: float, method: object) -> str:
    """Return a gain with its sign, without its unit; see `unit_told`."""
    if in_points(method):
        points = rounded(100 * value, 1)
        return f"{points:+.1f}" if points or value >= 0 else "-0.0"  # a loss, if a small one
    return f"{significant(value, 3):+.3g}"


def unit_told(method: object) -> str:
    """Return the unit of a gain, after a space, or nothing."""
    return " points" if in_points(method) else ""


def amount_told(value: float, method: object) -> str:
    """Return what a gain is to exceed, or a margin, with its unit: as the recipe has it."""
    if not in_points(method):
        return f"{value:g}"
    points = f"{100 * value:g}"
    return f"{points} point{'' if points == '1' else 's'}"


def p_told(value: float) -> str:
    """Return a p value."""
    return f"{value:.2g}"


def name_of_test(method: object, above: float) -> str:
    """Return the test that the p value is of."""
    if not in_points(method):
        return str(method)
    return "score test" if above else "McNemar"
