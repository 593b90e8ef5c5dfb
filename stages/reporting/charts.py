"""Charts as inline SVG: drawn by matplotlib once, coloured by the page's style sheet.

Every colour is drawn as a mark that stands for a role (`player`, `line`, `ramp-3`) and replaced by
a class, so that one drawing serves the light and the dark theme; texts stay texts. The same data
gives the same bytes.
"""

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Shape
from matplotlib.ticker import FuncFormatter, MaxNLocator

from stages.artifacts.keys import sha256_text
from stages.reporting import numbers
from stages.reporting.flow import Flow, Level

WIDTH = 340
"""Units of a panel, which are pixels on a narrow screen."""
RAMP = 6
"""Colours from the oldest iteration to the newest."""
ROLES = ("text", "muted", "line", "surface", "accent", "human", "opponent", "player", "good", "bad")
_MARKS = {role: f"#0a0b{i:02x}" for i, role in enumerate(ROLES)}
_MARKS |= {f"ramp-{i}": f"#0a0c{i:02x}" for i in range(RAMP)}
_ROLE_OF = {mark: role for role, mark in _MARKS.items()}
_FONT_PX = 12
_LABELS = 40
"""Units below the axes, for their labels."""
_PT = 72 / 100  # a panel is drawn at 100 units an inch
_SETTINGS: Any = {  # a dict whose keys are 300 literals, in matplotlib's own types
    "svg.fonttype": "none",
    "svg.hashsalt": "spin",
    "font.family": "DejaVu Sans",
    "font.size": _FONT_PX * _PT,
    "axes.linewidth": 0.8,
    "text.parse_math": False,
    "text.usetex": False,
    "path.simplify": True,
    "axes.unicode_minus": True,
}
_HIGHEST = 1e30  # a training that diverged; matplotlib's own sums overflow near 1e308
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


@dataclass(frozen=True)
class Line:
    """One line of a panel; with `lows` and `highs` each point has an interval."""

    role: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    lows: tuple[float, ...] = ()
    highs: tuple[float, ...] = ()
    dots: bool = False


@dataclass(frozen=True)
class Lines:
    """A panel of lines over iterations or steps."""

    description: str
    lines: tuple[Line, ...]
    x_label: str
    percent: bool = False
    x_names: tuple[tuple[float, str], ...] = ()
    """Names at places of the x axis; empty: numbers."""
    level: float | None = None
    """A value that is worth a thin line, such as one half."""


@dataclass(frozen=True)
class Histogram:
    """Counts of one group, in the bins of its panel."""

    name: str
    role: str
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Histograms:
    """A panel of outlined histograms over each other."""

    description: str
    edges: tuple[float, ...]
    groups: tuple[Histogram, ...]
    x_label: str


@dataclass(frozen=True)
class Spread:
    """Quantiles (5, 25, 50, 75, 95%) of one group at some places."""

    name: str
    role: str
    xs: tuple[float, ...]
    quantiles: tuple[tuple[float, float, float, float, float], ...]


@dataclass(frozen=True)
class Spreads:
    """A panel of spreads over iterations."""

    description: str
    groups: tuple[Spread, ...]
    x_names: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class FlowPanel:
    """A panel of the flow from prompts to pairs."""

    description: str
    flow: Flow


@dataclass(frozen=True)
class Bars:
    """A panel of horizontal bars, each with its value written beside it."""

    description: str
    bars: tuple[tuple[str, float, str], ...]
    """Name, value, and how the value is written."""


Panel = Lines | Histograms | Spreads | FlowPanel | Bars


@dataclass
class Drawer:
    """Draws panels, each only once."""

    drawn: dict[Panel, Markup] = field(default_factory=dict)
    _asked: set[Panel] = field(default_factory=set)

    def draw(self, panel: Panel) -> Markup:
        """Return a panel as an `<svg>` element."""
        if panel not in self.drawn:
            self.drawn[panel] = draw(panel)
        self._asked.add(panel)
        return self.drawn[panel]

    def forget_others(self) -> None:
        """Keep only the panels that were asked for since this was last called."""
        self.drawn = {panel: drawn for panel, drawn in self.drawn.items() if panel in self._asked}
        self._asked = set()


def draw(panel: Panel) -> Markup:
    """Return a panel as an `<svg>` element that fills its parent's width."""
    with mpl.rc_context(_SETTINGS), warnings.catch_warnings():
        # Letters that its font lacks: the browser has them, and only their widths are guessed here.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        match panel:
            case Lines():
                figure = _figure(210, lambda axes: _lines(axes, panel))
            case Histograms():
                figure = _figure(180, lambda axes: _histograms(axes, panel))
            case Spreads():
                figure = _figure(190, lambda axes: _spreads(axes, panel))
            case Bars():
                height = 22 * max(1, len(panel.bars)) + 12
                figure = _figure(height, lambda axes: _bars(axes, panel), (0.31, 0.02, 0.99, 0.98))
            case FlowPanel():
                height = _flow_height(panel.flow)
                figure = _figure(height, lambda axes: _flow(axes, panel.flow, height), (0, 0, 1, 1))
        file = io.StringIO()
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(
            file, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return _inline(file.getvalue(), panel.description)


def printable(text: str, most: int = 40) -> str:
    """Return a text as a label: nothing that no XML may hold, and not too long."""
    clean = _UNPRINTABLE.sub("\ufffd", text)
    return clean if len(clean) <= most else f"{clean[: most - 1]}…"


# -- Drawing --------------------------------------------------------------------------------------


def _figure(
    height: int,
    fill: Callable[[Axes], None],
    box: tuple[float, float, float, float] | None = None,
) -> Figure:
    """Return a figure with one pair of axes, so many units high."""
    figure = Figure(figsize=(WIDTH / 100, height / 100), dpi=72)
    figure.patch.set_visible(False)
    left, bottom, right, top = box or (0.15, _LABELS / height, 0.985, 0.97)
    axes = figure.add_axes((left, bottom, right - left, top - bottom))
    axes.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_MARKS["muted"])
    axes.tick_params(colors=_MARKS["muted"], length=0, pad=4)
    axes.tick_params(axis="x", length=3)
    fill(axes)
    return figure


def _grid(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_MARKS["line"], linewidth=0.8)


def _y_axis(axes: Axes, percent: bool) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(5))

    def shown(value: float, _: int | None = None) -> str:
        places = max(
            (len(f"{tick:.6g}".partition(".")[2]) for tick in axes.get_yticks()), default=0
        )
        if percent:
            return f"{100 * value:.{max(0, places - 2)}f}%"
        if abs(value) >= 10_000 or 0 < abs(value) < 1e-4:
            return f"{value:.3g}".replace("-", numbers.MINUS)
        return f"{value:,.{places}f}".replace("-", numbers.MINUS)

    axes.yaxis.set_major_formatter(FuncFormatter(shown))


def _x_axis(axes: Axes, label: str, names: tuple[tuple[float, str], ...]) -> None:
    if names:
        most = 12
        step = -(-len(names) // most)
        kept = names[::step]
        axes.set_xticks([x for x, _ in kept], [printable(name, 8) for _, name in kept])
        pad = 0.35
        axes.set_xlim(names[0][0] - pad, names[-1][0] + pad)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel(printable(label), color=_MARKS["muted"], labelpad=3)


def _lines(axes: Axes, panel: Lines) -> None:
    _grid(axes)
    if panel.level is not None:
        axes.axhline(panel.level, color=_MARKS["muted"], linewidth=0.9, dashes=(2, 3))
    for line in panel.lines:
        color = _MARKS[line.role]
        ys, lows, highs = (_drawable(values) for values in (line.ys, line.lows, line.highs))
        if line.lows:
            if len(line.xs) > 1:
                axes.fill_between(line.xs, lows, highs, color=color, alpha=0.13, linewidth=0)
            axes.vlines(line.xs, lows, highs, color=color, linewidth=1.4)
        axes.plot(
            line.xs,
            ys,
            color=color,
            linewidth=1.7,
            marker="o" if line.dots or len(line.xs) == 1 else None,
            markersize=4.2,
            markeredgewidth=0,
            solid_capstyle="round",
        )
    _y_axis(axes, panel.percent)
    _x_axis(axes, panel.x_label, panel.x_names)


def _drawable(values: tuple[float, ...]) -> list[float]:
    """Return values with gaps in the place of those that have none on any axis."""
    return [value if abs(value) < _HIGHEST else np.nan for value in values]


def _histograms(axes: Axes, panel: Histograms) -> None:
    for group in panel.groups:
        color = _MARKS[group.role]
        axes.stairs(group.counts, panel.edges, color=color, fill=True, alpha=0.14)
        axes.stairs(group.counts, panel.edges, color=color, linewidth=1.6)
    _grid(axes)
    axes.set_ylim(bottom=0)
    _y_axis(axes, percent=False)
    _x_axis(axes, panel.x_label, ())
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlim(panel.edges[0], panel.edges[-1])


def _spreads(axes: Axes, panel: Spreads) -> None:
    _grid(axes)
    count = len(panel.groups)
    for i, group in enumerate(panel.groups):
        color = _MARKS[group.role]
        offset = (i - (count - 1) / 2) * min(0.24, 0.6 / max(1, count))
        xs = [x + offset for x in group.xs]
        low, lower, middle, upper, high = zip(*group.quantiles, strict=True)
        axes.vlines(xs, low, high, color=color, linewidth=1.1)
        axes.vlines(xs, lower, upper, color=color, linewidth=5, alpha=0.4)
        axes.plot(xs, middle, color=color, marker="o", linewidth=0, markersize=4.6,
                  markeredgewidth=0)  # fmt: skip
    _y_axis(axes, percent=False)
    _x_axis(axes, "iteration", panel.x_names)


def _bars(axes: Axes, panel: Bars) -> None:
    places = np.arange(len(panel.bars))[::-1]
    values = [value for _, value, _ in panel.bars]
    most = max(values, default=0.0) or 1.0
    axes.barh(places, values, height=0.62, color=_MARKS["accent"], alpha=0.75)
    for place, (_, value, text) in zip(places, panel.bars, strict=True):
        axes.text(value + most * 0.015, place, text, va="center", color=_MARKS["text"])
    axes.set_yticks(places, [printable(name, 16) for name, _, _ in panel.bars])
    axes.tick_params(axis="y", labelcolor=_MARKS["text"])
    axes.set_xlim(0, most * 1.32)
    axes.set_ylim(-0.6, len(panel.bars) - 0.4)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


# -- The flow from prompts to pairs: downwards, what is dropped leaves to the right ---------------

_BAR, _GAP, _LANE, _TITLE = 13, 26, 19, 17
_FLOW_WIDTH, _LEFT = 190, 4


def _flow_height(flow: Flow) -> int:
    between = sum(_gap(level) for level in flow.levels[:-1])
    return between + (_BAR + _TITLE) * len(flow.levels) + 6


def _gap(level: Level) -> int:
    """Return the room below a level: a lane for all that leaves or comes in, and for a remark."""
    return _GAP + _LANE * (len(level.drops) + len(level.gains) + bool(level.becomes))


def _flow(axes: Axes, flow: Flow, height: int) -> None:
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    most = max((level.count for level in flow.levels), default=0) or 1
    scale = _FLOW_WIDTH / most
    top = 0.0
    for i, level in enumerate(flow.levels):
        width = max(level.count * scale, 1.0)
        axes.text(_LEFT, top + _TITLE - 5, level.name, color=_MARKS["text"])
        axes.text(
            WIDTH - 4, top + _TITLE - 5, f"{level.count:,}", color=_MARKS["text"], ha="right",
            fontweight="bold",
        )  # fmt: skip
        top += _TITLE
        _rectangle(axes, _LEFT, top, width, _BAR, "accent", 0.85)
        top += _BAR
        if i + 1 < len(flow.levels):
            gap = _gap(level)
            _band_to(axes, flow, i, top, gap, scale)
            top += gap


def _band_to(axes: Axes, flow: Flow, i: int, top: float, gap: float, scale: float) -> None:
    """Draw what leads from one level to the next, and what leaves between them."""
    level, following = flow.levels[i], flow.levels[i + 1]
    kept = level.count - sum(drop.count for drop in level.drops)
    below = top + gap + _TITLE
    gained = sum(gain.count for gain in level.gains)
    passed = (following.count - gained) * scale
    role = "muted" if level.becomes else "accent"
    _band(axes, (_LEFT, kept * scale), (_LEFT, passed), top, below, role)
    text_x = _LEFT + _FLOW_WIDTH + 10
    if level.becomes:
        axes.text(text_x, top + 18, printable(level.becomes, 20), color=_MARKS["muted"])
    left, right = _LEFT + passed, _LEFT + level.count * scale
    for lane, gain in enumerate(level.gains, bool(level.becomes)):
        width = gain.count * scale
        start = top + 13 + _LANE * lane
        _rectangle(axes, left, start, max(width, 1.0), 3, "accent", 0.9)
        _band(axes, (left, width), (left, width), start + 3, below, "accent")
        axes.plot([left + width, text_x - 4], [start + 1.5] * 2, color=_MARKS["muted"],
                  linewidth=0.7)  # fmt: skip
        label = f"+ {printable(gain.name, 12)} {gain.count:,}"
        axes.text(text_x, start + 5, label, color=_MARKS["text"])
        left += width
    for lane, drop in enumerate(level.drops, len(level.gains) + bool(level.becomes)):
        width = drop.count * scale
        end = top + 13 + _LANE * lane
        _band(axes, (right - width, width), (right - width, width), top, end, "muted")
        _rectangle(axes, right - width, end, max(width, 1.0), 3, "muted", 0.9)
        axes.plot([right, text_x - 4], [end + 1.5] * 2, color=_MARKS["muted"], linewidth=0.7)
        label = f"{printable(drop.reason, 14)} {drop.count:,}"
        axes.text(text_x, end + 5, label, color=_MARKS["text"])
        right -= width


def _band(
    axes: Axes, above: tuple[float, float], below: tuple[float, float], top: float, bottom: float,
    role: str,
) -> None:  # fmt: skip
    """Draw a band between two segments, given as left end and width."""
    (x0, w0), (x1, w1), middle = above, below, (top + bottom) / 2
    points = [
        (x0, top), (x0, middle), (x1, middle), (x1, bottom),
        (x1 + w1, bottom), (x1 + w1, middle), (x0 + w0, middle), (x0 + w0, top), (x0, top),
    ]  # fmt: skip
    curve = [Shape.CURVE4] * 3
    codes = [Shape.MOVETO, *curve, Shape.LINETO, *curve, Shape.CLOSEPOLY]
    patch = PathPatch(Shape(points, codes), facecolor=_MARKS[role], alpha=0.17, linewidth=0)
    axes.add_patch(patch)


def _rectangle(
    axes: Axes, x: float, y: float, width: float, height: float, role: str, alpha: float
) -> None:
    patch = Rectangle((x, y), width, height, facecolor=_MARKS[role], alpha=alpha, linewidth=0)
    axes.add_patch(patch)


# -- From matplotlib's file to an element of the page ---------------------------------------------


def _inline(text: str, description: str) -> Markup:
    """Return the drawing without styles, ids that clash, or anything that is not drawn."""
    root = ElementTree.fromstring(text)
    prefix = f"c{sha256_text(text + description)[:10]}-"
    width, height = (float(word) for word in root.attrib["viewBox"].split()[2:])
    _clean(root, prefix)
    root.attrib.clear()
    root.attrib |= {
        "class": "chart",
        "viewBox": f"0 0 {width:g} {height:g}",
        "role": "img",
        "aria-label": printable(description, 600),
    }
    _drop_unused_ids(root)
    body = ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)
    return Markup(body)


def _clean(element: ElementTree.Element, prefix: str) -> None:
    for child in list(element):
        if _name(child) in ("metadata", "style"):
            element.remove(child)
            continue
        _clean(child, prefix)
        if _name(child) in ("defs", "g") and not len(child):
            element.remove(child)
    element.tag = _name(element)
    attributes = {_name_of(key): value for key, value in element.attrib.items()}
    attributes |= _presentation(attributes.pop("style", ""))
    if "id" in attributes:
        attributes["id"] = prefix + attributes["id"]
    if attributes.get("href", "").startswith("#"):
        attributes["href"] = f"#{prefix}{attributes['href'][1:]}"
    classes = []
    for kind in ("fill", "stroke"):
        role = _ROLE_OF.get(attributes.get(kind, ""))
        if role is not None:
            del attributes[kind]
            classes.append(f"{kind[0]}-{role}")
    if classes:
        attributes["class"] = " ".join(classes)
    element.attrib.clear()
    for key, value in attributes.items():
        if key == "transform" and value.startswith("rotate(-0 "):
            continue
        shorter = _NUMBER.sub(lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), value)
        plain = _REFERENCE.sub(rf"url(#{prefix}\1)", shorter)
        element.attrib[key] = " ".join(plain.split())
    element.text = element.text if (element.text or "").strip() else None
    element.tail = None


def _presentation(style: str) -> dict[str, str]:
    """Return a style as presentation attributes, which no policy forbids."""
    found: dict[str, str] = {}
    for part in style.split(";"):
        key, colon, value = (word.strip() for word in part.partition(":"))
        if not colon:
            continue
        if key == "font":
            found["font-size"] = next(w for w in value.split() if w[0].isdigit() and "px" in w)
            if "bold" in value or re.search(r"\b[6-9]00\b", value):
                found["font-weight"] = "600"
        elif key != "font-family":
            found[key] = value
    return found


def _drop_unused_ids(root: ElementTree.Element) -> None:
    """Drop the ids that nothing in the drawing refers to, and what only groups."""
    used = set()
    for element in root.iter():
        for value in element.attrib.values():
            used |= set(_REFERENCE.findall(value))
        if "href" in element.attrib:
            used.add(element.attrib["href"][1:])
    for element in root.iter():
        if element.attrib.get("id") not in used:
            element.attrib.pop("id", None)


def _name(element: ElementTree.Element) -> str:
    return _name_of(element.tag)


def _name_of(tag: str) -> str:
    return tag.rpartition("}")[2]
