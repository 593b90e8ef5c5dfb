"""The figures and tables of a report, made from its view of a run.

Every group of panels has a table with the same figures, for those who cannot see or want to copy.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.headlines import in_order, kind_of
from stages.reporting import numbers
from stages.reporting.charts import (
    RAMP,
    Bars,
    FlowPanel,
    Histogram,
    Histograms,
    Line,
    Lines,
    Panel,
    Spread,
    Spreads,
)
from stages.reporting.collect import SIDES, IterationView, RunView
from stages.reporting.costs import Cost, Costs
from stages.reporting.flow import Flow, flow

MOST_POINTS = 240
"""Of one training curve; more steps are drawn as means of neighbours."""
MOST_BINS = 40
MOST_PANELS = 3
"""Of one kind, one an iteration; the latest are shown, the tables hold all."""
MOST_SUITE_PANELS = 4
"""Of one suite."""
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
_METRICS = {
    "sampled_accuracy": "mean reward of the sampled answers",
    "greedy_accuracy": "mean reward of the greedy answers",
    "heldout_reward_accuracy": "how often the player prefers the human answer to its opponent's",
    "human_logprob_per_token": "nats a token of the held-out human answers",
    "heldout_kl": "divergence of the player from its opponent, nats a response",
    "sampled_mean_tokens": "tokens of a sampled answer",
}
"""Shown in this order, after the metric of promote."""
_CURVES = (
    ("loss", "loss", "Mean over the batch"),
    ("accuracy", "accuracy", "How often the chosen answer has the higher implicit reward"),
    ("margin", "margin", "β times the difference of the two log-ratios"),
    ("chosen_logratio", "chosen log-ratio", "Chosen answers, player against reference"),
    ("rejected_logratio", "rejected log-ratio",
     "Rejected answers, player against reference"),
    ("grad_norm", "gradient norm", "Before clipping"),
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Cells of text; all columns but the first hold numbers."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class FigurePanel:
    """A panel with its heading."""

    title: str
    note: str
    panel: Panel


@dataclass(frozen=True)
class Group:
    """Panels that belong together, whose colours mean the same."""

    name: str
    """A heading, or nothing."""
    panels: tuple[FigurePanel, ...]
    legend: tuple[tuple[str, str], ...]
    """Names and roles."""
    tables: tuple[Table, ...]


# -- The course over iterations -------------------------------------------------------------------


def course(view: RunView) -> list[Group]:
    """Return the run's metrics over its iterations, and those of each suite."""
    wanted = view.config.promote.metric if view.config else ""
    names = list(dict.fromkeys([*([wanted] if wanted else []), *_METRICS]))
    main = _course_group(view, "", names, "")
    suites = dict.fromkeys([*view.start_suites, *(s for t in view.iterations for s in t.suites)])
    groups = [main, *(_suite_group(view, suite) for suite in suites)]
    return [group for group in groups if group is not None]


def _suite_group(view: RunView, suite: str) -> Group | None:
    found = [view.start_suites, *(t.suites for t in view.iterations)]
    evaluations = [each[suite] for each in found if suite in each]
    found_names = (name for each in evaluations for name in each.metrics)
    names = in_order(found_names, kind_of(view.config, suite))
    with_interval = [n for n in names if any(n in each.intervals for each in evaluations)]
    telling = [n for n in with_interval or names if not _is_minor(n)]
    kept = telling[:MOST_SUITE_PANELS] or names[:1]
    everything = list(dict.fromkeys([*kept, *names]))
    return _course_group(view, f"Suite {suite}", everything, f"{suite}.", panels=len(kept))


def _is_minor(name: str) -> bool:
    """Tell whether a suite's metric need not be drawn; pass@1 and majority@1 are its accuracy."""
    return name.endswith(("_share", "_tokens", "_stderr", "@1"))


def _course_group(
    view: RunView, title: str, names: Sequence[str], prefix: str, panels: int | None = None
) -> Group | None:
    places = [(-1, "start"), *((t.index, str(t.index)) for t in view.iterations)]
    lines = {name: _course_line(view, prefix + name) for name in names}
    known = {name: line for name, line in lines.items() if line is not None}
    if not known:
        return None
    shown = list(known)[:panels]
    figures = [
        FigurePanel(
            name,
            _METRICS.get(name, ""),
            Lines(
                description=_course_words(view.units, prefix + name, known[name], places),
                lines=(known[name],),
                x_label="iteration",
                percent=view.units.is_share(prefix + name),
                x_names=tuple(places),
                level=0.5 if name == "heldout_reward_accuracy" else None,
            ),
        )
        for name in shown
    ]
    rows = []
    for x, label in places:
        cells = [_course_cell(view.units, prefix + name, line, x) for name, line in known.items()]
        if any(cell != numbers.MISSING for cell in cells):
            rows.append((label, *cells))
    caption = f"{title or 'Metrics'} by iteration, with 95% intervals"
    more = len(known) - len(shown)
    caption += f"; {len(shown)} are drawn above, and {more} more are told here" if more else ""
    table = Table(caption, ("iteration", *known), tuple(rows))
    return Group(title, tuple(figures), (), (table,))


def _course_line(view: RunView, metric: str) -> Line | None:
    found = [(-1, *view.measured_at_start(metric))]
    found += [(t.index, *t.measured(metric)) for t in view.iterations]
    points = [(x, value, bounds) for x, value, bounds in found if value is not None]
    if not points:
        return None
    bounds = [known or (value, value) for _, value, known in points]
    has_bounds = any(known is not None for _, _, known in points)
    return Line(
        "player",
        tuple(float(x) for x, _, _ in points),
        tuple(value for _, value, _ in points),
        tuple(low for low, _ in bounds) if has_bounds else (),
        tuple(high for _, high in bounds) if has_bounds else (),
        dots=True,
    )


def _course_cell(units: numbers.Units, name: str, line: Line, x: float) -> str:
    if x not in line.xs:
        return numbers.MISSING
    at = line.xs.index(x)
    value = units.metric(name, line.ys[at])
    if not line.lows or line.lows[at] == line.highs[at]:
        return value
    return f"{value} ({units.interval(name, (line.lows[at], line.highs[at]))})"


def _course_words(
    units: numbers.Units, name: str, line: Line, places: Sequence[tuple[int, str]]
) -> str:
    names = dict(places)
    told = [f"{names[int(x)]}: {_course_cell(units, name, line, x)}" for x in line.xs]
    return f"{name} by iteration. {'; '.join(told)}."


def left_out(view: RunView) -> list[str]:
    """Return which held-out prompts were not asked, and why, a sentence for what is the same."""
    found = {f"iteration {t.index}": t.evaluation for t in view.iterations}
    whose: dict[str, list[str]] = {}
    for who, evaluation in {"the start": view.start, **found}.items():
        reasons = evaluation.left_out
        count, asked = sum(reasons.values()), evaluation.metrics.get("prompts")
        if count:
            total = "the" if asked is None else f"{int(asked) + count:,}"
            why = ", ".join(f"{reason.replace('_', ' ')}: {n:,}" for reason, n in reasons.items())
            verb = "was" if count == 1 else "were"
            words = f"{count:,} of {total} held-out prompts {verb} left out ({why})"
            whose.setdefault(words, []).append(who)
    return [f"{words} in the evaluation of {_listed(who)}." for words, who in whose.items()]


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


# -- Training -------------------------------------------------------------------------------------


def training(view: RunView) -> Group | None:
    """Return the training curves, one line an iteration."""
    trained = [t for t in view.iterations if t.steps.get("step")]
    if not trained:
        return None
    roles = ramp(len(trained))
    panels = []
    for column, title, note in _CURVES:
        lines = tuple(
            _curve(role, t.steps["step"], t.steps[column])
            for t, role in zip(trained, roles, strict=True)
        )
        ends = "; ".join(
            f"iteration {t.index} from {numbers.number(t.steps[column][0])} to "
            f"{numbers.number(t.steps[column][-1])}"
            for t in trained
        )
        panel = Lines(
            description=f"{title} by training step. {note}. {ends}.",
            lines=lines,
            x_label="step",
            percent=column == "accuracy",
            level=0.0 if column in ("margin", "chosen_logratio", "rejected_logratio") else None,
        )
        panels.append(FigurePanel(title, note, panel))
    legend = tuple((f"iteration {t.index}", role) for t, role in zip(trained, roles, strict=True))
    return Group("", tuple(panels), legend, (_training_table(trained),))


def supervised(view: RunView) -> Group | None:
    """Return the curves of the supervised start."""
    steps = view.sft_steps
    if not steps.get("step"):
        return None
    curves = (("loss", "nats a response token"), ("grad_norm", "before clipping"))
    panels = tuple(
        FigurePanel(
            name.replace("grad_norm", "gradient norm"),
            note,
            Lines(
                description=(
                    f"{name} of supervised fine-tuning, from {numbers.number(steps[name][0])} to "
                    f"{numbers.number(steps[name][-1])}."
                ),
                lines=(_curve("human", steps["step"], steps[name]),),
                x_label="step",
            ),
        )
        for name, note in curves
    )
    rows = tuple(
        (name, numbers.number(steps[name][0]), numbers.number(steps[name][-1]))
        for name, _ in curves
    )
    table = Table("The supervised start, first and last step", ("figure", "first", "last"), rows)
    return Group("The supervised start", panels, (), (table,))


def ramp(count: int) -> list[str]:
    """Return so many colours, from the oldest to the newest; a single one is the newest."""
    if count == 1:
        return [f"ramp-{RAMP - 2}"]
    return [f"ramp-{round(i * (RAMP - 1) / (count - 1))}" for i in range(count)]


def _curve(role: str, xs: Sequence[float], ys: Sequence[float]) -> Line:
    size = -(-len(xs) // MOST_POINTS)
    if size > 1:
        cuts = range(0, len(xs), size)
        xs = [float(np.mean(xs[at : at + size])) for at in cuts]
        ys = [float(np.mean(ys[at : at + size])) for at in cuts]
    return Line(role, tuple(xs), tuple(ys))


def _training_table(trained: Iterable[IterationView]) -> Table:
    rows = []
    for each in trained:
        cells = []
        for column, _, _ in _CURVES:
            values = each.steps[column]
            cells.append(f"{numbers.number(values[0])} → {numbers.number(values[-1])}")
        rows.append((str(each.index), str(len(each.steps["step"])), *cells))
    head = ("iteration", "steps", *(title for _, title, _ in _CURVES))
    return Table("Training, first step → last step", head, tuple(rows))


# -- Lengths and margins --------------------------------------------------------------------------


def lengths(view: RunView) -> Group | None:
    """Return how long the held-out answers are: the human ones, the opponent's, the player's."""
    shapes = {t.index: t.lengths for t in view.iterations if t.lengths}
    return _shapes_group(shapes, SIDES, "Lengths", "tokens", "tokens of a held-out answer")


def margins(view: RunView) -> Group | None:
    """Return the implicit rewards of the held-out answers."""
    shapes = {t.index: t.margins for t in view.iterations if t.margins}
    name = "implicit reward β(log π player − log π opponent)"
    return _shapes_group(shapes, SIDES[:2], "Margins", "implicit reward", name)


def _shapes_group(
    shapes: Mapping[int, Mapping[str, list[float]]],
    sides: Sequence[str],
    name: str,
    unit: str,
    note: str,
) -> Group | None:
    if not shapes:
        return None
    panels = [_spread_panel(shapes, sides, note)] if len(shapes) > 1 else []
    latest = sorted(shapes)[-MOST_PANELS:]
    edges = _edges([values for t in latest for values in shapes[t].values()])
    panels += [_histogram_panel(t, shapes[t], sides, edges, unit, note) for t in latest]
    head = ("iteration, whose", "answers", "mean", *(f"{100 * level:g}%" for level in LEVELS))
    rows = tuple(
        (
            f"{t}, {side}",
            f"{len(values):,}",
            _plain(np.mean(values)),
            *map(_plain, _quantiles(values)),
        )
        for t, groups in shapes.items()
        for side, values in groups.items()
    )
    legend = tuple((side, side) for side in sides if any(side in each for each in shapes.values()))
    return Group(name, tuple(panels), legend, (Table(f"{name}: {note}", head, rows),))


def _spread_panel(
    shapes: Mapping[int, Mapping[str, list[float]]], sides: Sequence[str], note: str
) -> FigurePanel:
    groups = []
    for side in sides:
        known = [t for t in shapes if side in shapes[t]]
        if known:
            groups.append(
                Spread(
                    side,
                    side,
                    tuple(float(t) for t in known),
                    tuple(_quantiles(shapes[t][side]) for t in known),
                )
            )
    medians = "; ".join(
        f"{g.name}: {', '.join(_plain(quantiles[2]) for quantiles in g.quantiles)}" for g in groups
    )
    names = tuple((float(t), str(t)) for t in shapes)
    panel = Spreads(f"{note}, by iteration. Medians of {medians}.", tuple(groups), names)
    return FigurePanel("by iteration", "median, middle half, middle 90%", panel)


def _histogram_panel(
    index: int,
    groups: Mapping[str, list[float]],
    sides: Sequence[str],
    edges: tuple[float, ...],
    unit: str,
    note: str,
) -> FigurePanel:
    outlined = tuple(
        Histogram(
            side, side, tuple(int(n) for n in np.histogram(_within(groups[side], edges), edges)[0])
        )
        for side in sides
        if side in groups
    )
    told = "; ".join(
        f"{group.name}: median {_plain(_quantiles(groups[group.name])[2])}" for group in outlined
    )
    panel = Histograms(f"{note}, iteration {index}. {told}.", edges, outlined, unit)
    return FigurePanel(f"iteration {index}", "answers", panel)


def _within(values: Sequence[float], edges: tuple[float, ...]) -> np.ndarray:
    return np.clip(np.array(values, np.float64), edges[0], edges[-1])


def _edges(groups: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Return bins over the middle 99% of all values; what is further out is in the outer bins."""
    values = np.concatenate([np.array(group, np.float64) for group in groups])
    low, high = np.quantile(values, (0.005, 0.995))
    if bool(np.all(values == np.round(values))):
        step = max(1, int(np.ceil((high - low + 1) / MOST_BINS)))
        first = int(np.floor(low))
        count = int(np.ceil((high - first + 1) / step))
        return tuple(first - 0.5 + step * i for i in range(count + 1))
    if low == high:
        low, high = low - 0.5, high + 0.5
    return tuple(float(edge) for edge in np.linspace(low, high, MOST_BINS + 1))


def _quantiles(values: Sequence[float]) -> tuple[float, float, float, float, float]:
    a, b, c, d, e = (float(q) for q in np.quantile(values, LEVELS))
    return a, b, c, d, e


def _plain(value: float | np.floating[Any]) -> str:
    return numbers.number(float(f"{value:.4g}"))


def pair_table(view: RunView) -> Table | None:
    """Return what pair said of lengths and rewards, one row an iteration."""
    rows = []
    for each in view.iterations:
        figures = (each.pairs or {}).get("pairs")
        if not isinstance(figures, dict) or not figures.get("pairs"):
            continue
        length, margin = figures.get("length") or {}, figures.get("margin") or {}
        rows.append(
            (
                str(each.index),
                f"{figures['pairs']:,}",
                *(_plain((figures.get(f"{s}_tokens") or {}).get("mean", np.nan))
                  for s in ("chosen", "rejected")),
                numbers.percent(length.get("chosen_longer_share")),
                numbers.percent(length.get("rule_accuracy")),
                numbers.number(margin.get("mean")),
            )
        )  # fmt: skip
    head = (
        "iteration", "pairs", "chosen tokens", "rejected tokens", "chosen longer",
        "told by length alone", "reward margin",
    )  # fmt: skip
    return Table("The pairs that were trained on", head, tuple(rows)) if rows else None


# -- Prompts to pairs -----------------------------------------------------------------------------


def flows(view: RunView) -> Group | None:
    """Return the way from prompts to pairs of each iteration."""
    found = {t.index: each for t in view.iterations if (each := flow(t)) is not None}
    if not found:
        return None
    panels = tuple(
        FigurePanel(
            f"iteration {t}",
            "",
            FlowPanel(_flow_words(t, found[t]), found[t]),
        )
        for t in sorted(found)[-MOST_PANELS:]
    )
    rows = []
    for t, each in found.items():
        for level in each.levels:
            rows.append((f"{t}, {level.name}", f"{level.count:,}", level.becomes))
            rows += [(f"{t}, added: {gain.name}", f"{gain.count:,}", "") for gain in level.gains]
            rows += [
                (f"{t}, left out: {drop.reason}", f"{drop.count:,}",
                 f"{drop.count / level.count:.1%}" if level.count else "")
                for drop in level.drops
            ]  # fmt: skip
    head = ("iteration, step", "rows", "share of the step")
    return Group("", panels, (), (Table("From prompts to pairs", head, tuple(rows)),))


def _flow_words(index: int, found: Flow) -> str:
    levels = ", ".join(f"{level.count:,} {level.name}" for level in found.levels)
    drops = ", ".join(f"{drop.count:,} {drop.reason}" for _, drop in found.drops())
    gains = ", ".join(f"{gain.count:,} {gain.name}" for gain in found.gains())
    added = f" Added: {gains}." if gains else ""
    return f"Iteration {index}: {levels}. Left out: {drops or 'nothing'}.{added}"


# -- Costs ----------------------------------------------------------------------------------------


def cost_groups(found: Costs) -> Group | None:
    """Return what the stages and the iterations took."""
    if not found.stages:
        return None
    stages = tuple(
        (cost.name, cost.seconds, numbers.seconds(cost.seconds)) for cost in found.stages
    )
    iterations = tuple(
        (f"iteration {cost.name}" if cost.name.isdigit() else cost.name, cost.seconds,
         numbers.seconds(cost.seconds))
        for cost in found.iterations
    )  # fmt: skip
    panels = [
        FigurePanel("by stage", "wall time", Bars(_bar_words("stage", stages), stages)),
        FigurePanel(
            "by iteration", "wall time", Bars(_bar_words("iteration", iterations), iterations)
        ),
    ]
    by_stage = Table(
        "By stage", _COST_HEAD, tuple(_cost_row(c) for c in (*found.stages, found.total))
    )
    by_iteration = Table(
        "By iteration",
        ("iteration", *_COST_HEAD[1:]),
        tuple(_cost_row(c) for c in found.iterations),
    )
    return Group("", tuple(panels), (), (by_stage, by_iteration))


_COST_HEAD = (
    "stage", "artifacts", "time", "tokens", "tokens/s", "GPU hours", "peak memory",
    "peak GPU memory",
)  # fmt: skip


def _bar_words(kind: str, bars: Iterable[tuple[str, float, str]]) -> str:
    return f"Wall time by {kind}: {', '.join(f'{name} {text}' for name, _, text in bars)}."


def _cost_row(cost: Cost) -> tuple[str, ...]:
    gpu = cost.gpu_hours
    return (
        cost.name,
        f"{cost.artifacts:,}",
        numbers.seconds(cost.seconds),
        f"{cost.tokens:,}" if cost.tokens else numbers.MISSING,
        numbers.number(round(cost.tokens_per_s)) if cost.tokens_per_s else numbers.MISSING,
        f"{gpu:.2f}" if gpu is not None else numbers.MISSING,
        numbers.size(cost.peak_memory_bytes),
        numbers.size(cost.peak_gpu_memory_bytes) if cost.peak_gpu_memory_bytes else numbers.MISSING,
    )
