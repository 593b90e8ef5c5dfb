"""Models side by side."""

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from spin_cli.options import Json, NoVerify, Quiet, Verbose, example
from spin_cli.screen import put, put_json, put_table, set_up_messages

if TYPE_CHECKING:
    from stages.compare import Comparison, Difference, SuiteTable, Value

WIDTH = 80
_PADDING = 3  # of a column, on a terminal
MISSING = "-"


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
    put(textwrap.fill(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False))


def letter(index: int) -> str:
    """Return what a model is called in tables: A, …, Z, AA and so on."""
    first, last = divmod(index, 26)
    return (letter(first - 1) if first else "") + chr(ord("A") + last)


def _put_values(table: "SuiteTable", found: "Comparison", every: bool) -> None:
    having = [i for i in range(len(found.models)) if any(v[i] for v in table.values.values())]
    cells = {
        metric: [_value(values[i]) for i in having]
        for metric, values in table.values.items()
        if every or any(value is not None and value.low is not None for value in values)
    }
    name = max(map(len, cells), default=0)
    widths = [max((len(row[k]) for row in cells.values()), default=1) for k in range(len(having))]
    caption = f"{table.suite}: values, with half the width of their 95% intervals"
    for block in _blocks(widths, WIDTH - name - _PADDING):
        titles = ["metric", *(letter(having[k]) for k in block), ""]
        rows = [[metric, *(row[k] for k in block), ""] for metric, row in cells.items()]
        put_table(titles, rows, caption=caption)
        put("")
        caption = f"{table.suite}, further models"


def _blocks(widths: Sequence[int], room: int) -> Iterator[list[int]]:
    """Yield columns that fit side by side; one at least."""
    block: list[int] = []
    for column, width in enumerate(widths):
        if block and sum(widths[k] + _PADDING for k in block) + width + _PADDING > room:
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
            _signed(one.paired.gain),
            _ends(one.paired.low, one.paired.high),
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
        words.append(f"{rest} of {len(own)} metrics show no difference")
        yield f"{table.suite}: {letter(model)} against {letter(own[0].base)}: {'; '.join(words)}"
    rivals = sorted({one["metric"] for one in table.unpaired})
    if rivals:
        why = sorted({str(one["why"]) for one in table.unpaired})
        yield f"{table.suite}: not compared, since {' or '.join(why)}: {', '.join(rivals)}"


def _value(value: "Value | None") -> str:
    if value is None or value.value is None:
        return MISSING
    if value.low is None or value.high is None:
        return _number(value.value)
    # The longer side: near 0 and 1 the two differ.
    text, half = _number(value.value), max(value.high - value.value, value.value - value.low)
    decimals = len(text.partition(".")[2])
    return f"{text} ±{_number(half) if 'e' in text else format(half, f'.{decimals}f')}"


def _number(value: float) -> str:
    """Return three decimals, of tiny numbers two digits, of large ones one decimal."""
    size = abs(value)
    form = ".2g" if 0 < size < 0.01 else ".3f" if size < 10 else ".1f" if size < 1e5 else ".4g"
    return format(value, form)


def _signed(value: float) -> str:
    text = _number(value)
    return text if text.startswith("-") else f"+{text}"


def _ends(low: float | None, high: float | None) -> str:
    return MISSING if low is None or high is None else f"[{_signed(low)}, {_signed(high)}]"


def add_to(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(
        epilog=example(
            "spin compare runs/demo:0 runs/demo:2",
            "spin compare runs/demo --suite gsm8k",
            "spin compare runs/a runs/b runs/c --json",
        )
    )(compare)
