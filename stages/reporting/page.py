"""The page: one HTML document that asks for nothing and runs only the scripts it was made with.

Its policy names styles and scripts by their hashes, so that no text of a model, a data set or a
path can become one. Data stands in the page as text, or as JSON that no browser runs.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from stages.alarms import fired
from stages.errors import SpinError
from stages.layout import is_of_start
from stages.reporting import figures, numbers
from stages.reporting.ancestry import ancestry
from stages.reporting.charts import Drawer
from stages.reporting.collect import IterationView, RunView
from stages.reporting.costs import costs
from stages.reporting.headline import headline, main_metric
from stages.reporting.samples import SamplesBlock, samples_block
from stages.reporting.settings import changes, settings
from stages.reporting.verdict import Verdict, verdict

TEMPLATES = Path(__file__).parent / "templates"
NEWEST_OPEN = 3
"""Decisions that are shown unfolded."""
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class AlarmRow:
    """An alarm that fired."""

    iteration: int
    stage: str
    name: str
    action: str
    text: str
    is_decided: bool


@dataclass(frozen=True)
class DecisionRow:
    """What was decided of one player."""

    iteration: IterationView
    metric: str
    value: str
    champion_value: str
    rival: str
    """Whose value that is: champion, or start where that stood for it."""
    reasons: tuple[str, ...]
    gain: Verdict | None
    tree: Verdict | None


def render(view: RunView, *, drawer: Drawer | None = None, state: str | None = None) -> str:
    """Return the report as HTML; the same run gives the same text.

    Args:
        drawer: keeps what was drawn for an earlier page of the same run.
        state: names what the run holds, where the page comes from a server: the page then asks it
            whether that is still so.
    """
    live = state is not None
    drawer = drawer or Drawer()
    block, not_shown = _samples(view)
    css = _read("style.css") + _read("page.css") + (block.css if block else "")
    scripts = [_read("page.js"), *([block.js] if block else [])]
    html = (
        _environment(drawer, view.units)
        .get_template("page.html.j2")
        .render(
            policy=policy(css, scripts, live=live),
            live=live,
            state=state,
            css=Markup(css),
            scripts=[Markup(script) for script in scripts],
            samples=block,
            problems=list(dict.fromkeys([*view.problems, *not_shown])),
            view=view,
            **_parts(view),
        )
    )
    return printable_page(html.lstrip())


def policy(css: str, scripts: Sequence[str], *, live: bool) -> str:
    """Return the content security policy of a page with this style and these scripts."""
    sources = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    parts = [
        "default-src 'none'",
        f"script-src {sources}",
        f"style-src 'sha256-{_digest(css)}'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    return "; ".join([*parts, *(["connect-src 'self'"] if live else [])])


def printable_page(html: str) -> str:
    """Return a page without what no document may hold, such as half a surrogate pair."""
    whole = html.encode("utf-8", "backslashreplace").decode()
    return _UNPRINTABLE.sub("\ufffd", whole)


def _parts(view: RunView) -> dict[str, Any]:
    found = costs(view)
    return {
        "headline": headline(view),
        "metric": main_metric(view),
        "course": figures.course(view),
        "left_out": figures.left_out(view),
        "decisions": _decisions(view),
        "newest_open": NEWEST_OPEN,
        "alarms": _alarms(view),
        "training": figures.training(view),
        "supervised": figures.supervised(view),
        "shapes": [g for g in (figures.lengths(view), figures.margins(view)) if g is not None],
        "pair_table": figures.pair_table(view),
        "flows": figures.flows(view),
        "costs": found,
        "cost_figures": figures.cost_groups(found),
        "settings": settings(view),
        "changes": changes(view),
        "ancestry": ancestry(view),
    }


def _samples(view: RunView) -> tuple[SamplesBlock | None, tuple[str, ...]]:
    """Return the browser of samples, and what it could not read."""
    try:
        block = samples_block(view.layout)
    except (SpinError, OSError) as error:
        return None, (view.shown(str(error)),)
    return block, tuple(view.shown(problem) for problem in block.problems)


def _decisions(view: RunView) -> list[DecisionRow]:
    """Return the decisions, the newest first."""
    rows = []
    for each in reversed(view.iterations):
        decision = each.decision
        if decision is None:
            continue
        metric = str(decision.get("metric"))
        gain = decision.get("gain")
        rows.append(
            DecisionRow(
                each,
                metric,
                _value(view.units, metric, decision.get("value")),
                _value(view.units, metric, decision.get("champion_value")),
                _rival(view, each),
                tuple(str(reason) for reason in decision.get("reasons") or ()),
                verdict({"kind": "gain", "figures": gain}, view.units),
                verdict(decision.get("verdict"), view.units),
            )
        )
    return rows


def _rival(view: RunView, iteration: IterationView) -> str:
    """Return whom a player had to beat: the start, while there was no champion."""
    manifest = iteration.manifest("promote")
    ref = manifest.inputs.get("champion_evaluation") if manifest else None
    return "start" if ref is not None and is_of_start(ref.path) else "champion"


def _value(units: numbers.Units, metric: str, value: Any) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return units.metric(metric, value) if is_number else numbers.MISSING


def _alarms(view: RunView) -> list[AlarmRow]:
    """Return the alarms that fired, the newest first: as decisions tell, or not decided yet."""
    rows = []
    for each in reversed(view.iterations):
        if each.decision is not None:
            rows += [
                AlarmRow(each.index, *_texts(alarm), is_decided=True)
                for alarm in each.decision.get("alarms") or ()
                if isinstance(alarm, dict)
            ]
        elif view.recipe is not None:
            config = view.recipe.for_iteration(each.index).alarms
            rows += [
                AlarmRow(each.index, a.stage, a.name, a.action, a.text, is_decided=False)
                for piece in each.pieces
                if piece.manifest is not None
                for a in fired(piece.name, piece.manifest.metrics, config)
            ]
    return rows


def _texts(alarm: dict[str, Any]) -> tuple[str, str, str, str]:
    stage, name, action, text = (str(alarm.get(key)) for key in ("stage", "name", "action", "text"))
    return stage, name, action, text


def _environment(drawer: Drawer, units: numbers.Units) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["draw"] = drawer.draw
    environment.filters |= {
        "code": _code,
        "metric_value": lambda value, name: units.metric(name, value),
        "difference": lambda value, name: units.difference(name, value),
        "unit": units.unit,
        "seconds": numbers.seconds,
        "number": numbers.number,
        "size": numbers.size,
        "digest": lambda text: hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[
            :16
        ],
    }
    return environment


def _code(text: str) -> Markup:
    """Return a sentence of ours with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _read(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
