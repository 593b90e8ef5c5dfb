"""Models side by side."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from spin_cli.options import Json, NoVerify, Quiet, Verbose, example
from spin_cli.screen import (
    fill,
    put,
    put_json,
    put_table,
    safe,
    set_up_messages,
    terminal_width,
)

if TYPE_CHECKING:
    from stages.compare import Comparison, Difference, SuiteTable, Value

WIDTH = 80
_GAP = 2  # before a column
MISSING = "-"
_MOST_DIGITS = 6  # of the largest value in a row
_MOST_DECIMALS = 6
_LARGE, _TINY = 1e7, 1e-6


def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="A B …",
            help="Evaluations; players; RUN:N or its folder for an iteration, RUN:start; a run for "
            "its champion. One run alone: all its iterations.",
        ),
    ],
    suite: Annotated[
        list[str] | None,
        typer.Option("--suite", help="Only this suite, or evaluate; several times."),
    ] = None,
    mixed: Annotated[
        bool,
        typer.Option("--mixed", help="Compare even where settings or data differ, and say how."),
    ] = False,
    every: Annotated[
        bool, typer.Option("--all", help="Also the metrics that have no interval.")
    ] = False,
    as_json: Json = False,
    no_verify: NoVerify = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Put models side by side, with paired differences.

    Differences are from the first model, with 95% intervals over the examples that both answered.
    """
    set_up_messages(quiet=quiet, verbose=verbose)
    from stages.compare import compare as compare_models

    found = compare_models(models, suite or (), mixed=mixed, verify=not no_verify)
    if as_json:
        put_json(found.to_json())
        return
    for index, model in enumerate(found.models):
        put(f"{letter(index)}  {model.name}  ({', '.join(model.evaluations)})")
    for table in found.suites:
        put("")
        for line in _rivals(table):
            _put_wrapped(line)
        _put_values(table, found, every)
        _put_differences(table)
        for line in _summary(table):
            _put_wrapped(line)
    if any(table.differences for table in found.suites):
        put("")
        _put_wrapped(
            "Each interval holds for itself: of 20 metrics without any difference one is expected "
            "to show one."
        )


def _rivals(table: "SuiteTable") -> Iterator[str]:
    """Yield whom the models were compared with: once, where it is the same for all."""
    told: dict[str, list[str]] = {}
    for index, rival in enumerate(table.rivals):
        if rival is not None:
            told.setdefault(rival, []).append(letter(index))
    having = [i for i in range(len(table.rivals)) if any(v[i] for v in table.values.values())]
    for rival, letters in told.items():
        whose = "" if len(letters) == len(having) else f"{', '.join(letters)} "
        yield f"{table.suite}: {whose}against {rival}"


def _put_wrapped(line: str) -> None:
    put(fill(safe(line), _width()))


def _width() -> int:
    """Return the columns that there are; of a pipe WIDTH, so that output depends on no terminal."""
    return terminal_width() or WIDTH


def letter(index: int) -> str:
    """Return what a model is called in tables: A, …, Z, AA and so on."""
    first, last = divmod(index, 26)
    return (letter(first - 1) if first else "") + chr(ord("A") + last)


def _put_values(table: "SuiteTable", found: "Comparison", every: bool) -> None:
    having = [i for i in range(len(found.models)) if any(v[i] for v in table.values.values())]
    cells = {
        metric: _row([values[i] for i in having])
        for metric, values in table.values.items()
        if every or any(value is not None and value.low is not None for value in values)
    }
    name = max(map(len, ("metric", *cells)))
    widths = [max((len(row[k]) for row in cells.values()), default=1) for k in range(len(having))]
    caption = f"{table.suite}: values, ± the longer side of their 95% intervals"
    for block in _blocks(widths, _width() - name):
        titles = ["metric", *(letter(having[k]) for k in block), ""]
        rows = [[metric, *(row[k] for k in block), ""] for metric, row in cells.items()]
        put_table(titles, rows, caption=caption)
        put("")
        caption = f"{table.suite}, further models"


def _blocks(widths: Sequence[int], room: int) -> Iterator[list[int]]:
    """Yield columns that fit side by side; one at least."""
    block: list[int] = []
    for column, width in enumerate(widths):
        if block and sum(widths[k] + _GAP for k in block) + width + _GAP > room:
            yield block
            block = []
        block.append(column)
    yield block


def _put_differences(table: "SuiteTable") -> None:
    if not table.differences:
        return
    base = letter(table.differences[0].base)
    rows = [
        [
            one.metric,
            letter(one.model),
            *_change(one),
            one.verdict,
        ]
        for one in sorted(table.differences, key=lambda one: _place(one, table))
    ]
    titles = ["metric", "of", f"minus {base}", "95% interval", "so it is"]
    put_table(titles, rows, caption=f"{table.suite}: differences, paired by example")
    put("")


def _place(one: "Difference", table: "SuiteTable") -> tuple[int, int]:
    return list(table.values).index(one.metric), one.model


def _summary(table: "SuiteTable") -> Iterator[str]:
    """Yield a line on each model: what got better, what worse, and what nobody can tell."""
    for model in dict.fromkeys(one.model for one in table.differences):
        own = [one for one in table.differences if one.model == model]
        words = []
        for verdict in ("better", "worse", "higher", "lower"):
            names = [one.metric for one in own if one.verdict == verdict]
            if names:
                words.append(f"{verdict} {', '.join(names)}")
        rest = sum(one.verdict in ("open", "same") for one in own)
        words.append(f"no difference in {rest} of {len(own)}")
        yield f"{table.suite}: {letter(model)} against {letter(own[0].base)}: {'; '.join(words)}"
    rivals = sorted({one["metric"] for one in table.unpaired})
    if rivals:
        why = sorted({str(one["why"]) for one in table.unpaired})
        yield f"{table.suite}: not compared, since {' or '.join(why)}: {', '.join(rivals)}"


def _row(values: "Sequence[Value | None]") -> list[str]:
    """Return a metric of all models with one number of decimals: what its intervals need."""
    from stages.headlines import longer_side

    halves = [longer_side(v.value, v.low, v.high) for v in values if v and v.value is not None]
    told = [v.value for v in values if v and v.value is not None]
    decimals = _decimals([half for half in halves if half], told)
    return [_value(value, decimals) for value in values]


def _value(value: "Value | None", decimals: int | None) -> str:
    if value is None or value.value is None:
        return MISSING
    from stages.headlines import longer_side

    half = longer_side(value.value, value.low, value.high)
    text = _number(value.value, decimals)
    return text if half is None else f"{text} ±{_number(half, decimals)}"


def _decimals(halves: Sequence[float], values: Sequence[float]) -> int | None:
    """Return how many decimals tell numbers of a row: two digits of its narrowest interval.

    Without an interval, four digits of the smallest value. None where that takes too much room.
    """
    digits = 2 if halves else 4
    sizes = [abs(each) for each in (halves or values) if each]
    largest = max(map(abs, values), default=0.0)
    if largest >= _LARGE or (sizes and max([*sizes, largest]) < _TINY):
        return None
    wanted = digits - 1 - math.floor(math.log10(min(sizes))) if sizes else 3
    # An interval that is all but a point would ask for any number of them.
    most = _MOST_DIGITS - 1 - math.floor(math.log10(max(largest, _TINY)))
    return max(0, min(wanted, most, _MOST_DECIMALS))


def _number(value: float, decimals: int | None) -> str:
    """Return a number with so many decimals, nought without a sign; None: four digits of it."""
    text = f"{value:.4g}" if decimals is None else f"{value:.{decimals}f}"
    return text if float(text) else text.removeprefix("-")


def _change(one: "Difference") -> tuple[str, str]:
    """Return a difference and its interval, with one number of decimals."""
    gain, low, high = one.paired.gain, one.paired.low, one.paired.high
    if low is None or high is None:
        return _signed(gain, _decimals([], [gain])), MISSING
    halves = [(high - low) / 2] if high > low else []
    decimals = _decimals(halves, [gain, low, high])
    return _signed(gain, decimals), f"[{_signed(low, decimals)}, {_signed(high, decimals)}]"


def _signed(value: float, decimals: int | None) -> str:
    text = _number(value, decimals)
    return text if text.startswith("-") else f"+{text}"


def add_to(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(
        epilog=example(
            "spin compare runs/demo:0 runs/demo:2",
            "spin compare runs/demo --suite gsm8k",
            "spin compare runs/a runs/b runs/c --json",
        )
    )(compare)
