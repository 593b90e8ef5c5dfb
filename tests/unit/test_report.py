"""The report of a run, as far as Python makes it; tests/browser tries it out in Chromium."""

import base64
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from spin_cli.app import app
from stages.alarms import RULES
from stages.artifacts import read_manifest, read_rows
from stages.config import ConditionConfig
from stages.data.measures import Column
from stages.data.rows import EXAMPLES, TRAIN_METRICS
from stages.data.wording import gain_told
from stages.decisions import opponent_of
from stages.errors import ConfigError, GateRefusedError, InputError
from stages.gates import Evidence, Measured, Rival, judge
from stages.layout import RunLayout
from stages.promote import rollback
from stages.recipe import load_recipe
from stages.report import write_report
from stages.reporting import numbers
from stages.reporting.ancestry import ancestry
from stages.reporting.charts import ROLES, Bars, Drawer, Histograms, Line, Lines, draw
from stages.reporting.collect import SIDES, collect
from stages.reporting.costs import Cost, costs
from stages.reporting.figures import MOST_BINS, lengths, margins
from stages.reporting.flow import Flow, flow
from stages.reporting.headline import headline
from stages.reporting.page import TEMPLATES, printable_page, render
from stages.reporting.settings import changes
from stages.reporting.verdict import verdict
from stages.run_record import start_or_resume
from stages.verify import verify
from tests import made_runs
from tests.hostile import hostile_texts
from tests.made_runs import write_iteration, write_run
from tests.made_samples import write_evaluation

DRAWER = Drawer()
"""Of all tests, most of whose drawings are the same."""
SECTIONS = [
    "summary", "course", "decisions", "alarms", "samples", "training", "shapes", "flow", "cost",
    "settings", "lineage",
]  # fmt: skip
ATTACKS = (
    "<script>alert(1)</script>", "</style><img src=x onerror=alert(1)>", "{{ 7*7 }}{% raw %}",
    "' onmouseover='alert(1)", '" style="color:red', "$x_1$ \\alpha", "</script><b>",
    "\x00\x1b[31m", "\ud800", "&lt;b&gt;",
)  # fmt: skip


TRAINED = {
    "loss": "loss", "accuracy": "accuracy", "margin": "margin",
    "chosen log-ratio": "chosen_logratio", "rejected log-ratio": "rejected_logratio",
    "gradient norm": "grad_norm",
}  # fmt: skip
"""From a chart's title to train's column."""


class Page(HTMLParser):
    """A page as a browser would read it: elements with attributes, and the texts in them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def all(self, *tags: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.elements if tag in tags]

    def inside(self, tag: str) -> list[str]:
        return [text for within, text in self.texts if within == tag]

    def text(self) -> str:
        shown = (text for tag, text in self.texts if tag not in ("script", "style"))
        return " ".join(" ".join(shown).split())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunLayout:
    return write_run(tmp_path_factory.mktemp("made") / "a run", 3, refused=(1,))


@pytest.fixture(scope="module")
def page(made: RunLayout) -> Page:
    return report(made)


@pytest.fixture
def run(made: RunLayout, tmp_path: Path) -> RunLayout:
    """A copy that a test may spoil."""
    shutil.copytree(made.root, tmp_path / "a run")
    return RunLayout(tmp_path / "a run")


def report(layout: RunLayout) -> Page:
    return Page(render(collect(layout.root), drawer=DRAWER))


def part(page: Page, section: str) -> str:
    start = page.html.index(f'<section id="{section}"')
    return page.html[start : page.html.index("</section>", start)]


def charts_of(page: Page, section: str) -> list[tuple[str, str]]:
    """Each panel's title and drawing."""
    pattern = r"<figcaption><strong>(.*?)</strong>.*?(<svg.*?</svg>)"
    return re.findall(pattern, part(page, section), re.DOTALL)


def tables_of(page: Page, section: str) -> list[list[list[str]]]:
    """Cells of each table, its head first."""
    tables = re.findall(r"<table.*?</table>", part(page, section), re.DOTALL)
    rows = [re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL) for table in tables]
    cells = r"<t[hd][^>]*>(.*?)</t[hd]>"
    return [[[unescape(c) for c in re.findall(cells, row)] for row in table] for table in rows]


def told(chart: str) -> str:
    """What a drawing tells those who cannot see it."""
    [label] = re.findall(r'aria-label="(.*?)"', chart)
    return unescape(label)


def plain(cell: str) -> float:
    return float(cell.replace(numbers.MINUS, "-").replace(",", ""))


def heights(chart: str, role: str) -> list[list[float]]:
    """The lines of one colour, read off at the numbers beside the grid, as one who sees would."""
    ys = re.findall(r'<path d="M \S+ (\S+) L [^"]*"[^>]* class="s-line"', chart)
    names = re.findall(r'text-anchor="end" class="f-muted">([^<]*)<', chart)
    shown = [plain(name.rstrip("%")) / (100 if "%" in name else 1) for name in names]
    slope, zero = np.polyfit([float(y) for y in ys], shown, 1)
    lines = re.findall(rf'<path d="([^"]*)"[^>]* class="s-{role}"', chart)
    return [[zero + slope * float(y) for y in line.split()[2::3]] for line in lines]


def seen(values: Iterable[float], *, within: float = 1e-3) -> Any:
    """What is read off a drawing whose coordinates have two decimals."""
    return pytest.approx(list(values), rel=within, abs=within)


# -- What the page tells --------------------------------------------------------------------------


def test_the_parts_come_in_the_order_in_which_one_asks(page: Page) -> None:
    assert [a["id"] for a in page.all("section")] == SECTIONS
    assert [a["href"] for a in page.all("a")[1:]] == [f"#{name}" for name in SECTIONS]


def test_the_headline_compares_the_champion_with_the_start(made: RunLayout, page: Page) -> None:
    found = headline(collect(made.root))
    assert found.title == "Better than the start: +15.0 points"
    assert found.gain is not None
    assert (found.gain.value, found.gain.start_value) == (16 / 40, 10 / 40)
    paired = found.gain.paired
    assert paired is not None
    assert (paired.examples, paired.wins, paired.losses) == (40, 6, 0)
    assert 0 < paired.low < 0.15 < paired.high
    text = page.text()
    assert "The player of iteration 2 is the champion" in text
    assert "on 6 and worse on 0" in text
    assert "the reason of 2" in text
    assert "spin run with --iterations 4 plays on" in text


@pytest.mark.parametrize(
    ("right", "tone", "title"),
    [(11, "plain", "No clear difference"), (30, "good", "Better"), (0, "bad", "Worse")],
)
def test_the_headline_says_no_more_than_the_interval(
    tmp_path: Path, right: int, tone: str, title: str
) -> None:
    layout = write_run(tmp_path / "run", 1)
    evaluated = layout.stage(0, "evaluate")
    shutil.rmtree(evaluated)
    write_evaluation(evaluated, made_runs.samples(right), layout.data)
    found = headline(collect(layout.root))
    assert (found.tone, found.title.startswith(title)) == (tone, True), found.title


def test_what_was_asked_in_another_way_is_not_compared_example_by_example(run: RunLayout) -> None:
    assert headline(collect(run.root)).title.startswith("Better")
    made_runs.ask_otherwise(run.start_evaluation, run.data)
    found = headline(collect(run.root))
    assert found.gain is not None
    assert found.gain.paired is None
    assert found.gain.verdict == "unsure"
    assert "how surely is not known" in found.title


def test_the_headline_tells_of_the_same_examples_alone(tmp_path: Path) -> None:
    layout = write_run(tmp_path / "run", 1)
    start, evaluated = layout.start_evaluation, layout.stage(0, "evaluate")
    shutil.rmtree(start)
    shutil.rmtree(evaluated)
    answers = made_runs.samples(40)  # of the last ten, which are right, only the start has a score
    scores = [0.0] * 30 + [1.0] * 10
    before = [replace(a, player_reward=r) for a, r in zip(answers, scores, strict=True)]
    known = [1.0] * 5 + [0.0] * 25 + [None] * 10
    after = [replace(a, player_reward=r) for a, r in zip(answers, known, strict=True)]
    write_evaluation(start, before, layout.data)
    write_evaluation(evaluated, after, layout.data)
    found = headline(collect(layout.root))
    assert found.gain is not None
    assert found.gain.own == (5 / 30, 10 / 40), "over all it seems to be worse"
    assert found.title == "Better than the start: +16.7 points"
    assert (found.gain.value, found.gain.start_value) == (5 / 30, 0)
    text = report(layout).text()
    assert "Left out: 10 for which only one of the two has a value; with these it is 16.7%" in text


def test_figures_stand_in_the_page_as_the_stages_wrote_them(made: RunLayout, page: Page) -> None:
    cells = page.inside("td") + page.inside("th")
    for t in range(3):
        metrics = read_manifest(made.stage(t, "evaluate")).metrics
        for name in ("sampled_accuracy", "heldout_reward_accuracy", "heldout_kl"):
            value = metrics[name]
            assert isinstance(value, float)
            shown = numbers.Units().metric(name, value)
            assert any(cell == shown or cell.startswith(f"{shown} (") for cell in cells), name
    assert "0.6931 → 0.2931" in cells
    assert cells.count("1,000") == 3, "train's tokens, by iteration"


def test_the_course_tells_every_interval_that_was_measured(made: RunLayout, page: Page) -> None:
    places = {"start": made.start_evaluation}
    places |= {str(t): made.stage(t, "evaluate") for t in range(3)}
    [[head, *rows]] = tables_of(page, "course")
    charts = charts_of(page, "course")
    assert head == ["iteration", *(name for name, _ in charts)]
    assert [row[0] for row in rows] == list(places)
    bounded = set()
    for column, (name, chart) in enumerate(charts, 1):
        values, bounds = [], []
        for row, (where, place) in zip(rows, places.items(), strict=True):
            value = json.loads((place / "metrics.json").read_bytes())[name]
            low, high = json.loads((place / "intervals.json").read_bytes())[name]
            cell, low_text, high_text = (
                numbers.Units().metric(name, v) for v in (value, low, high)
            )
            if low is not None:
                bounds.append([low, high])
                cell += f" ({low_text} to {high_text})"
            values.append(value)
            assert row[column] == cell, (name, where)
            assert re.search(rf"[.;] {where}: {re.escape(cell)}[.;]", told(chart)), (name, where)
        bounded |= {name} if bounds else set()
        drawn = heights(chart, "player")
        assert drawn == [seen(line) for line in [*bounds, values]], name
    assert bounded == {"sampled_accuracy", "heldout_reward_accuracy", "sampled_mean_tokens"}


def test_a_training_curve_has_one_line_an_iteration(page: Page) -> None:
    training = part(page, "training")
    charts = re.findall(r"<svg.*?</svg>", training, re.DOTALL)
    assert len(charts) == 6
    for chart in charts:
        assert [len(re.findall(f's-ramp-{i}"', chart)) for i in (0, 2, 5)] == [1, 1, 1]
    for i, name in ((0, "iteration 0"), (2, "iteration 1"), (5, "iteration 2")):
        assert f'b-ramp-{i}"></span>{name}' in training


def test_each_training_chart_shows_its_own_column(made: RunLayout, page: Page) -> None:
    tables = [made.stage(t, "train") / "metrics.parquet" for t in range(3)]
    trained = [list(read_rows([table], TRAIN_METRICS)) for table in tables]
    figures = [row[name] for rows in trained for row in rows for name in TRAINED.values()]
    assert len(set(figures)) == len(figures), "one could stand in the place of another"
    charts = charts_of(page, "training")
    [[head, *cells]] = tables_of(page, "training")
    assert head == ["iteration", "steps", *TRAINED]
    assert [title for title, _ in charts] == list(TRAINED)
    for place, (title, chart) in enumerate(charts):
        assert told(chart).startswith(f"{title} by training step. ")
        for t, rows in enumerate(trained):
            values = [row[TRAINED[title]] for row in rows]
            assert heights(chart, f"ramp-{(0, 2, 5)[t]}") == [seen(values)], (title, t)
            first, last = numbers.number(values[0]), numbers.number(values[-1])
            assert re.search(rf" iteration {t} from {first} to {last}[.;]", told(chart)), (title, t)
            assert cells[t][2 + place] == f"{first} → {last}"


@pytest.fixture
def spread(run: RunLayout) -> dict[str, dict[int, dict[str, list[float]]]]:
    """Lengths and margins, drawn at random, that the evaluations of a run are made to hold."""
    random = np.random.default_rng(0)
    found: dict[str, dict[int, dict[str, list[float]]]] = {"Lengths": {}, "Margins": {}}
    columns = {
        "Lengths": {"human": "human_token_ids", "opponent": "opponent_sample_token_ids",
                    "player": "sampled_token_ids"},
        "Margins": {"human": "human_margin", "opponent": "opponent_margin"},
    }  # fmt: skip
    for t in range(3):
        place = run.stage(t, "evaluate")
        rows = list(read_rows([place / "examples.parquet"], EXAMPLES))
        for row in rows:
            for i, side in enumerate(SIDES):
                tokens = int(random.lognormal(2 + i / 2 + t / 3))
                row[columns["Lengths"][side]] = list(range(tokens))
            row |= {"human_margin": random.normal(1 + t), "opponent_margin": random.normal(-1, 2)}
        inputs, tables = read_manifest(place).inputs, {"examples.parquet": (EXAMPLES, rows)}
        shutil.rmtree(place)
        made_runs.make(run, t, "evaluate", inputs, tables=tables)
        for name, sides in columns.items():
            found[name][t] = {
                side: [float(len(v) if isinstance(v, list) else v) for v in (r[c] for r in rows)]
                for side, c in sides.items()
            }
    return found


@pytest.mark.parametrize("name", ["Lengths", "Margins"])
def test_lengths_and_margins_are_counted_as_they_stand_in_the_examples(
    run: RunLayout, spread: dict[str, dict[int, dict[str, list[float]]]], name: str
) -> None:
    wanted, sides = spread[name], list(spread[name][0])
    everything = np.concatenate([wanted[t][side] for t in wanted for side in sides])
    group = (lengths if name == "Lengths" else margins)(collect(run.root))
    assert group is not None
    assert group.legend == tuple((side, side) for side in sides)
    for t, figure in enumerate(group.panels[1:]):
        panel = figure.panel
        assert isinstance(panel, Histograms)
        check_bins(np.array(panel.edges), everything, name == "Lengths")
        chart = DRAWER.draw(panel)
        for side, drawn in zip(sides, panel.groups, strict=True):
            values = np.clip(wanted[t][side], panel.edges[0], panel.edges[-1])
            counts = np.histogram(values, panel.edges)[0].tolist()
            assert (drawn.name, drawn.role, list(drawn.counts)) == (side, side, counts), t
            assert sum(counts) == made_runs.PROMPTS
            [stairs] = heights(chart, side)
            assert stairs[1:-1:2] == seen(counts, within=0.02), (t, side)


def check_bins(edges: np.ndarray, values: np.ndarray, whole: bool) -> None:
    """Bins are alike and hold the middle 99%; whole numbers lie in the middle of theirs."""
    low, high = np.quantile(values, (0.005, 0.995))
    widths = np.diff(edges)
    assert widths == pytest.approx(widths[0])
    assert len(widths) <= MOST_BINS + 1
    if whole:
        assert set(edges % 1) == {0.5}
        assert edges[0] == np.floor(low) - 0.5
        assert high <= edges[-1] < high + 1 + widths[0]
    else:
        assert (edges[0], edges[-1], len(widths)) == (low, high, MOST_BINS)


@pytest.mark.parametrize("name", ["Lengths", "Margins"])
def test_quantiles_of_lengths_and_margins_are_those_of_the_examples(
    run: RunLayout, spread: dict[str, dict[int, dict[str, list[float]]]], name: str
) -> None:
    page = report(run)
    at = ["Lengths", "Margins"].index(name)
    levels = (0.05, 0.25, 0.5, 0.75, 0.95)
    [head, *rows] = tables_of(page, "shapes")[at]
    assert head[3:] == ["5%", "25%", "50%", "75%", "95%"]
    whose = {(t, side): values for t, of in spread[name].items() for side, values in of.items()}
    assert [row[0] for row in rows] == [f"{t}, {side}" for t, side in whose]
    for row, values in zip(rows, whose.values(), strict=True):
        wanted = [len(values), np.mean(values), *np.quantile(values, levels)]
        assert [plain(cell) for cell in row[1:]] == pytest.approx(wanted, rel=1e-3), row
    chart = [chart for title, chart in charts_of(page, "shapes") if title == "by iteration"][at]
    for side in spread[name][0]:
        fives = [np.quantile(spread[name][t][side], levels) for t in range(3)]
        ends = [[five[0], five[4]] for five in fives] + [[five[1], five[3]] for five in fives]
        assert heights(chart, side) == [seen(line, within=0.02) for line in ends], side
        [medians] = re.findall(rf" {side}: ([^;]*)[;.](?: |$)", told(chart))
        assert [plain(word) for word in medians.split(", ")] == seen(five[2] for five in fives)


def test_the_flow_goes_from_prompts_to_pairs_and_loses_no_row(made: RunLayout) -> None:
    found = flow(collect(made.root).iterations[0])
    assert found is not None
    assert [(level.name, level.count) for level in found.levels] == [
        ("prompts", 80), ("prompts drawn", 40), ("answers", 40), ("candidate pairs", 40),
        ("pairs", 12), ("trained on", 12),
    ]  # fmt: skip
    check_adds_up(found)
    assert [(d.reason, d.count) for _, d in found.drops()] == [
        ("not drawn", 40), ("identical", 27), ("cut off", 1),
    ]  # fmt: skip


def check_adds_up(found: Flow) -> None:
    """Every row goes on, or has a reason, but where other things are counted."""
    for above, below in itertools.pairwise(found.levels):
        rest = above.count - sum(drop.count for drop in above.drops)
        rest += sum(gain.count for gain in above.gains)
        assert above.becomes or rest == below.count, (above, below)


def test_the_flow_of_a_pool_with_replay_adds_up(tmp_path: Path) -> None:
    layout, base = write_run(tmp_path / "run", 0), {"model": made_runs.outside("base")}
    data = {"data": made_runs.ref(layout, layout.data)}
    both = {"train_prompts": 80, "drawn": 40}
    make = partial(made_runs.make, layout, 0)
    make("generate", data | base, counts=both | {
        "in_part": 32, "prompts": 30, "dropped_too_long": 2, "rows": 60,
    })  # fmt: skip
    found = flow(collect(layout.root).iterations[0])
    assert found is not None
    check_adds_up(found)
    assert ("not answered", 8) in {(drop.reason, drop.count) for _, drop in found.drops()}
    make("pool-1", data | base, counts=both | {
        "in_part": 8, "prompts": 7, "dropped_too_long": 1, "rows": 14,
    })  # fmt: skip
    report_of_it = made_runs.pair_report() | {"replay_candidates": 20}
    make("pair", data | made_runs.inputs(layout, 0, generations="generate"), counts={
        "candidates": 94, "pairs": 60, "dropped_identical": 30, "dropped_replay_share": 4,
    }, files={"report.json": report_of_it})  # fmt: skip
    make("train", base, counts={"pairs": 59, "dropped_too_long": 1})
    found = flow(collect(layout.root).iterations[0])
    assert found is not None
    check_adds_up(found)
    assert [(level.name, level.count, level.becomes) for level in found.levels] == [
        ("prompts", 80, ""), ("prompts drawn", 40, ""), ("prompts asked", 37, "2 answers each"),
        ("answers", 74, ""), ("candidate pairs", 74, ""), ("with replayed pairs", 94, ""),
        ("pairs", 60, ""), ("trained on", 59, ""),
    ]  # fmt: skip
    assert [(drop.reason, drop.count) for _, drop in found.drops()] == [
        ("not drawn", 40), ("too long", 3), ("identical", 30), ("replay share", 4), ("too long", 1),
    ]  # fmt: skip
    assert [(gain.name, gain.count) for gain in found.gains()] == [("replayed", 20)]
    html = report(layout).html
    assert "Added: 20 replayed." in html
    assert "0, added: replayed" in html


def test_the_flow_says_where_answers_are_paired_by_rank(tmp_path: Path) -> None:
    layout, base = write_run(tmp_path / "run", 0), {"model": made_runs.outside("base")}
    counts = {"drawn": 10, "prompts": 10, "rows": 40}
    made_runs.make(layout, 0, "generate", base, counts=counts)
    config = {"pair": {"policy": "best_vs_worst"}}
    counts = {"candidates": 30, "pairs": 10, "dropped_surplus": 18, "dropped_tie": 2}
    made_runs.make(layout, 0, "pair", base, counts=counts, config=config)
    found = flow(collect(layout.root).iterations[0])
    assert found is not None
    check_adds_up(found)
    assert [(level.name, level.count, level.becomes) for level in found.levels] == [
        ("prompts drawn", 10, "4 answers each"), ("answers", 40, "paired by rank"),
        ("candidate pairs", 30, ""), ("pairs", 10, ""),
    ]  # fmt: skip
    report(layout)


def test_the_flow_ends_where_the_run_stands(tmp_path: Path) -> None:
    layout = write_run(tmp_path / "run", 0)
    refs = {"model": made_runs.outside("base")}
    made_runs.make(layout, 0, "generate", refs, counts={"rows": 0})
    found = flow(collect(layout.root).iterations[0])
    assert found is not None
    assert [(level.name, level.count) for level in found.levels] == [("answers", 0)]
    assert "Iteration 0: 0 answers. Left out: nothing." in report(layout).html


def test_the_most_memory_that_a_stage_had_is_told(page: Page) -> None:
    text = page.text()
    assert "3 GB" in text
    assert "By stage stage artifacts time tokens tokens/s GPU hours" in text


def test_times_tokens_and_gpu_hours_add_up_by_stage_and_iteration(tmp_path: Path) -> None:
    layout = write_run(tmp_path / "run", 2)
    base = {"model": made_runs.outside("base")}
    made_runs.make(layout, 1, "pool-1", base)
    view = collect(layout.root)
    pieces = [("start", piece) for piece in view.before]
    pieces += [(str(t.index), piece) for t in view.iterations for piece in t.pieces]
    taken: dict[tuple[str, str], list[int]] = {}
    for i, (where, piece) in enumerate(pieces):  # any two sums of powers of two differ
        seconds = {"0": 1800, "1": 900}[where] if piece.name == "train" else 2**i
        made_runs.charge(layout.root / piece.path, wall_s=seconds, tokens=3 * 2**i)
        stage = "generate" if piece.name == "pool-1" else piece.name
        for of in (("stage", stage), ("iteration", where), ("stage", "all")):
            sums = taken.get(of, [0, 0, 0])
            taken[of] = [a + b for a, b in zip(sums, (1, seconds, 3 * 2**i), strict=True)]
    gpu_hours = {("stage", "train"): 1.5, ("stage", "all"): 1.5,
                 ("iteration", "0"): 1.0, ("iteration", "1"): 0.5}  # fmt: skip
    found = costs(collect(layout.root))
    of_stages = {("stage", cost.name): cost for cost in (*found.stages, found.total)}
    of_iterations = {("iteration", cost.name): cost for cost in found.iterations}
    known = of_stages | of_iterations
    assert {of: [c.artifacts, c.seconds, c.tokens] for of, c in known.items()} == taken
    assert {of: c.gpu_hours for of, c in known.items() if c.gpu_hours is not None} == gpu_hours
    page = report(layout)
    for kind, table in zip(("stage", "iteration"), tables_of(page, "cost"), strict=True):
        shown = {(kind, row[0]): row[1:6] for row in table[1:]}
        assert shown == {of: cost_cells(c) for of, c in known.items() if of[0] == kind}
    assert [row[5] for row in tables_of(page, "cost")[1]] == ["GPU hours", "–", "1.00", "0.50"]
    assert "GPU hours 1.50" in page.text()
    words = ", ".join(f"{c.name} {numbers.seconds(c.seconds)}" for c in found.stages)
    assert told(charts_of(page, "cost")[0][1]) == f"Wall time by stage: {words}."


def cost_cells(cost: Cost) -> list[str]:
    """Artifacts, time, tokens, tokens a second and GPU hours, as a table tells them."""
    rate = numbers.number(round(cost.tokens / cost.seconds))
    hours = "–" if cost.gpu_hours is None else f"{cost.gpu_hours:.2f}"
    return [f"{cost.artifacts}", numbers.seconds(cost.seconds), f"{cost.tokens:,}", rate, hours]


def test_settings_that_change_by_iteration_are_told_as_the_artifacts_were_made(
    tmp_path: Path,
) -> None:
    layout = write_run(tmp_path / "run", 1)
    other = load_recipe(None, ["promote.metric=sampled_accuracy", "train.beta=0.5"])
    write_iteration(layout, other, 1)
    found = changes(collect(layout.root))
    assert [(row.name, row.values) for row in found] == [("train.beta", ("0.1", "0.5"))]


def test_a_refused_player_and_its_alarms_are_told(made: RunLayout, page: Page) -> None:
    text = page.text()
    assert [each.outcome for each in collect(made.root).iterations] == [
        "promoted", "refused", "champion",
    ]  # fmt: skip
    assert "iteration 1, evaluate: length_drift refuse answers are twice as long" in text


def test_alarms_of_an_iteration_that_is_not_decided_are_told(tmp_path: Path) -> None:
    layout = write_run(tmp_path / "run", 0)
    refs = {"model": made_runs.outside("base")}
    made_runs.make(layout, 0, "generate", refs, counts={}, metrics={"cut_off_share": 0.9})
    text = report(layout).text()
    assert "generated_cut_off" in text
    assert "(not decided yet)" in text
    assert {rule.name for rule in RULES} >= {"generated_cut_off"}


def test_the_start_is_not_called_a_champion(run: RunLayout) -> None:
    for iteration, rival in ((0, run.start_evaluation), (2, run.stage(0, "evaluate"))):
        place = run.stage(iteration, "promote")
        decision = json.loads((place / "decision.json").read_bytes())
        decision["gain"] = {"metric": "sampled_accuracy", "gain": 0.1, "low": 0.0, "high": 0.2}
        shutil.rmtree(place)
        refs = {"champion_evaluation": made_runs.ref(run, rival)}
        made_runs.make(run, iteration, "promote", refs, files={"decision.json": decision})
    said = re.findall(r"the \w+'s 25\.0%|Against the \w+, example", report(run).text())
    assert said == [
        "the champion's 25.0%", "Against the champion, example",  # of the last iteration
        "the champion's 25.0%",
        "the start's 25.0%", "Against the start, example",
    ]  # fmt: skip


def test_the_gates_verdict_is_shown_as_a_tree(run: RunLayout) -> None:
    figures = {
        "metric": "sampled_accuracy", "rival": "start/evaluate", "value": 0.4, "rival_value": 0.25,
        "gain": 0.15, "low": 0.05, "high": 0.25, "confidence": 0.95, "p_value": 0.0123,
        "method": "mcnemar", "examples": 40, "wins": 6, "losses": 0, "ties": 34,
    }  # fmt: skip
    better = {"kind": "better", "passed": True, "text": "it is better", "figures": figures,
              "children": []}  # fmt: skip
    failed = {"kind": "at_least", "passed": False, "text": "it is too low", "figures": {},
              "children": []}  # fmt: skip
    tree = {"kind": "any", "passed": True, "text": "", "figures": {}, "children": [better, failed]}
    shutil.rmtree(run.stage(2, "promote"))
    made_runs.decide(run, 2, verdict=tree, gain=figures)
    text = report(run).text()
    assert "Passed: Any of these" in text
    assert "Passed: Better it is better" in text
    assert "Failed: At least it is too low" in text
    assert "gain +15.0 points 95% interval +5.0 to +25.0 points one-sided p 0.012 " in text
    assert "gain +15.0 points 95% bounds +5.0 to +25.0 points one-sided p 0.012 " in text


def judged(asked: dict[str, Any], mine: list[float], theirs: list[float]) -> tuple[str, str]:
    """The sentence of a gate's condition, and its figures in the report."""
    ids = [f"p{i}" for i in range(len(mine))]
    columns = [Column(ids, np.array(each), np.ones(len(each))) for each in (mine, theirs)]
    player, rival = (
        Measured(where, {"accuracy": column.mean()}, {"accuracy": column})
        for where, column in zip(("001/evaluate", "start/evaluate"), columns, strict=True)
    )
    rivals = {"champion": Rival("start", {"quiz": rival})}
    condition = ConditionConfig.model_validate(asked)
    found = judge(condition, Evidence({"quiz": player}, rivals))
    written = verdict(json.loads(json.dumps(found.as_dict())), numbers.Units())
    assert written is not None
    assert written.text == found.text
    return found.text, "; ".join(f"{name} {text}" for name, text in written.figures)


def test_a_conditions_figures_are_told_as_in_its_sentence() -> None:
    not_worse = {"not_worse": {"metric": "quiz.accuracy", "margin": 0.05}}
    wrong = [0.0] * 79
    text, box = judged(not_worse, [1.0, *wrong], [0.0, *wrong])  # 1 of 80 is 1.25 points
    assert "may be worse than the start's by 5 points or more" in text or "is not worse" in text
    assert ": +1.3 points (95% lower bound " in text
    assert "gain +1.3 points" in box
    assert "margin 5 points" in box
    assert "score test p " in text
    assert "method score test" in box
    text, box = judged(not_worse, [0.5, 0.75, *wrong], [0.25, 0.25, *wrong])
    assert "by 0.05 or more: +0.00926 (95% lower bound " in text
    assert "value 0.01543; rival's value 0.006173; gain +0.00926" in box
    assert "margin 0.05" in box
    assert "points" not in text + box
    assert re.search(r"p ([\d.e-]+),", text)[1] in box  # type: ignore[index]
    better = {"better": {"metric": "quiz.accuracy", "by": 0.01}}
    text, box = judged(better, [1.0] * 20 + wrong, [0.0] * 20 + wrong)
    assert "by more than 1 point" in text
    assert "to exceed 1 point" in box
    least = {"at_least": {"metric": "quiz.accuracy", "value": 0.8}}
    text, box = judged(least, [1.0, *wrong], [0.0, *wrong])
    assert text == "quiz.accuracy is 0.0125, which is below 0.8"
    assert box == "metric quiz.accuracy; value 0.0125; at least 0.8"


@pytest.mark.parametrize("value", [0.0125, 0.1625 - 0.15, 0.2625 - 0.25, 0.0125 + 1e-15])
def test_a_half_is_rounded_away_from_zero_whatever_its_last_bits(value: float) -> None:
    assert gain_told(value, "mcnemar") == "+1.3"
    assert gain_told(-value, "mcnemar") == "-1.3"
    assert numbers.Units().difference("quiz.accuracy", value) == "+1.3"
    assert gain_told(value / 10 + 0.01, "bootstrap") == "+0.0113"


@pytest.mark.parametrize("value", [0.0, -0.0, -1e-9, 1e300, -1e300, 5e-324, 123456.5])
def test_any_gain_can_be_told(value: float) -> None:
    assert float(gain_told(value, "bootstrap")) == pytest.approx(value, rel=5e-3, abs=1e-320)
    assert gain_told(value, "mcnemar")[0] in "+-"
    assert (gain_told(value, "mcnemar")[0] == "-") == (value < 0)


@pytest.mark.parametrize(
    "junk",
    [None, 7, "x", [], {}, {"kind": None, "children": [None, 3, {}]},
     {"figures": [1], "children": {"a": 1}, "passed": "yes"}],
)  # fmt: skip
def test_a_verdict_of_any_shape_can_be_shown(run: RunLayout, junk: Any) -> None:
    found = verdict(junk, numbers.Units())
    assert (found is None) == (not isinstance(junk, dict))
    shutil.rmtree(run.stage(2, "promote"))
    made_runs.decide(run, 2, verdict=junk, gain=junk)
    assert not collect(run.root).problems
    report(run)


# -- Runs in any state ----------------------------------------------------------------------------


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path / "run")
    start_or_resume(layout, load_recipe(None))
    text = report(layout).text()
    assert "No iteration was begun" in text
    assert "Nothing was trained yet" in text


def test_a_place_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no run directory"):
        write_report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("last", ["generate", "pair", "score", "train", "evaluate"])
def test_a_run_that_stopped_after_a_stage(run: RunLayout, last: str) -> None:
    stages = ["generate", "pair", "score", "train", "evaluate", "promote"]
    for stage in stages[stages.index(last) + 1 :]:
        shutil.rmtree(run.stage(2, stage))
    text = report(run).text()
    assert f"Iteration 2 stands after {last}" in text
    assert "What could not be read" not in text or last in ("generate", "pair", "score")


def test_a_run_in_a_folder_whose_name_is_no_text(run: RunLayout) -> None:
    moved = run.root.with_name(os.fsdecode(b"caf\xe9"))
    run.root.rename(moved)
    written = write_report(moved, moved.parent / "report.html")
    assert (written.iterations, written.problems) == (3, ())


def test_a_run_that_was_rolled_back_says_so(run: RunLayout) -> None:
    rollback(run)
    view = collect(run.root)
    assert [t.outcome for t in view.iterations] == ["champion", "refused", "rolled back"]
    assert "was promoted and rolled back" in report(run).text()


def test_a_run_without_a_champion_says_so(tmp_path: Path) -> None:
    text = report(write_run(tmp_path / "run", 1, refused=(0,))).text()
    assert "was not promoted: there is no champion yet" in text
    assert "the run stops there" in text


@pytest.mark.parametrize(
    ("promoted", "words"),
    [
        (1, ["the run tries again from the champion, with a lower learning rate",
             "the run tries again from the champion, with a lower learning rate",
             "the run stops there, after 2 retries with a lower learning rate"]),
        (0, ["the run tries again from the start, with a lower learning rate",
             "the run tries again from the start, with a lower learning rate",
             "the run stops there, after 2 retries with a lower learning rate"]),
    ],
)  # fmt: skip
def test_retries_are_counted_as_the_run_counts_them(
    tmp_path: Path, promoted: int, words: list[str]
) -> None:
    overrides = ["promote.on_refusal=retry", "promote.retry.times=2", "model.path=base"]
    layout = write_run(tmp_path / "run", promoted, *overrides)
    recipe = load_recipe(None, overrides)
    for iteration, expected in enumerate(words, promoted):
        write_iteration(layout, recipe, iteration, promoted=False, from_champion=True)
        [said] = headline(collect(layout.root)).following
        assert said == f"The player of iteration {iteration} was refused; {expected}."
        is_last = iteration - promoted == 2
        with pytest.raises(GateRefusedError, match="2 retries") if is_last else nullcontext():
            opponent_of(layout, recipe, iteration + 1)


def test_a_refused_player_without_a_champion_leads_back_to_the_start(tmp_path: Path) -> None:
    layout = write_run(tmp_path / "run", 1, "promote.on_refusal=champion", refused=(0,))
    assert "was refused; the run goes on from the start." in report(layout).text()


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x55]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [flipped, lambda data: data[: len(data) // 2]])
def test_whatever_is_damaged_the_rest_is_told_and_the_damage_named(
    run: RunLayout, damage: Callable[[bytes], bytes]
) -> None:
    files = sorted(p for p in run.root.rglob("*") if p.is_file() and not p.name.startswith("."))
    read = {"metrics.parquet", "examples.parquet", "report.json", "decision.json", "run.json",
            "metrics.json", "intervals.json", "measures.parquet", "manifest.json",
            "champion"}  # fmt: skip
    for file in files:
        if file.parts[-3] == "000" or file.name not in read:
            continue  # iterations 1 and 2 have the same files
        data = file.read_bytes()
        file.write_bytes(damage(data))
        view = collect(run.root)
        named = file.parent.name if file.name not in ("run.json", "champion") else file.name
        assert any(named in problem for problem in view.problems), file
        assert not any(str(run.root) in problem for problem in view.problems)
        file.write_bytes(data)
    assert not collect(run.root).problems


def test_a_damaged_pointer_is_not_told_as_no_champion(run: RunLayout) -> None:
    run.champion.write_text("garbage")
    page = report(run)
    text = page.text()
    assert "there is no champion yet" not in text
    assert "The player of iteration 2 was evaluated last; the pointer is damaged" in text
    assert "<dt>Champion</dt><dd>not known</dd>" in part(page, "summary")


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        (["iterations/002/evaluate"], "is the champion. It has no evaluation with sampled_accuracy "
         "or greedy_accuracy or human_logprob_per_token that can be read."),
        (["start/evaluate"], "is the champion. The start has no evaluation with sampled_accuracy"),
        (["start/evaluate", "iterations/002/evaluate"], "Neither it nor the start has"),
    ],
)  # fmt: skip
def test_the_side_that_lacks_its_evaluation_is_named(
    run: RunLayout, gone: list[str], words: str
) -> None:
    for place in gone:
        shutil.rmtree(run.root / place)
    assert words in report(run).text()


def test_a_suite_that_the_start_is_never_asked_is_not_missing_there(tmp_path: Path) -> None:
    layout = write_run(
        tmp_path / "run", 1, "suites.duel={kind: win_rate}", "suites.sums={kind: task}"
    )
    paths = [piece.path for piece in collect(layout.root).pieces() if "suite-" in piece.path]
    assert paths == [
        "start/suite-sums", "iterations/000/suite-duel", "iterations/000/suite-sums",
    ]  # fmt: skip


def test_a_page_of_a_run_with_a_damaged_recipe_and_pointer(run: RunLayout) -> None:
    for file in (run.record, run.champion):
        file.write_bytes(flipped(file.read_bytes()))
    text = report(run).text()
    assert "run.json is damaged" in text
    assert "champion is damaged" in text
    assert "The recipe in run.json cannot be read" in text
    assert "0.6931 → 0.2931" in text


def test_a_champion_that_was_made_anew_is_no_champion(run: RunLayout) -> None:
    shutil.rmtree(run.stage(2, "train"))
    refs = made_runs.inputs(run, 2, pairs="score")
    made_runs.make(run, 2, "train", refs, counts={"pairs": 3}, config={"seed": 1})
    view = collect(run.root)
    assert view.champion_iteration() is None
    assert view.iterations[2].outcome == "promoted"
    [problem] = view.problems
    assert problem.startswith("champion points to iterations/002/train with key ")
    assert headline(view).tone == "bad"
    found = ancestry(view)
    assert found is not None
    assert found.steps[0].problems == (problem,)
    assert "is the champion" not in report(run).text()


def test_a_damaged_manifest_on_the_way_is_named_within_the_run(run: RunLayout) -> None:
    manifest = run.stage(0, "pair") / "manifest.json"
    manifest.write_bytes(flipped(manifest.read_bytes()))
    page = report(run)
    assert str(run.root.resolve()) not in page.html
    assert any("iterations/000/pair/manifest.json" in text for text in page.inside("strong"))


def test_an_attempt_that_was_cut_off_is_told(run: RunLayout) -> None:
    shutil.rmtree(run.stage(2, "promote"))
    (run.stage(2, "promote").parent / ".promote.0123456789abcdef.partial").mkdir()
    assert "Cut off before the end: iterations/002/promote" in report(run).text()


# -- A page that is safe to open ------------------------------------------------------------------


def test_the_policy_allows_this_pages_scripts_and_styles_alone(page: Page) -> None:
    policies = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    assert len(policies) == 1
    parts = dict(part.split(" ", 1) for part in policies[0].split("; "))
    assert parts.pop("default-src") == "'none'"
    assert parts.pop("img-src") == "data:"
    assert {parts.pop("base-uri"), parts.pop("form-action")} == {"'none'"}
    for tag in ("script", "style"):
        code = re.findall(rf"<{tag}>(.*?)</{tag}>", page.html, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(c.encode()).digest()).decode() for c in code]
        assert parts.pop(f"{tag}-src") == " ".join(f"'sha256-{each}'" for each in hashes)
    assert not parts, "a file asks nobody for anything"


def test_no_element_asks_for_anything_or_carries_code(page: Page) -> None:
    kinds = {tag for tag, _ in page.elements}
    assert not kinds & {"img", "iframe", "object", "embed", "base", "audio", "video", "image"}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert "style" not in attributes, (tag, attributes)
        assert "src" not in attributes
        target = attributes.get("href", "#")
        assert target.startswith("#") or (tag, target) == ("link", "data:,")
    for script in page.all("script"):
        assert script.get("type", "") in ("", "application/json")


def test_hostile_names_and_texts_stay_text(tmp_path: Path) -> None:
    texts = [*ATTACKS, *hostile_texts(40, huge=200)]
    storable = [text.encode("utf-8", "replace").decode() for text in texts]
    calm, wild = (write_run(tmp_path / name, 1) for name in ("calm", "wild <b>&\"'"))
    for layout, used in ((calm, ["x"] * len(storable)), (wild, storable)):
        shutil.rmtree(layout.stage(0, "promote"))
        tree = {"kind": used[0], "passed": True, "text": used[1], "children": [],
                "figures": {used[2]: used[3], "metric": used[4], "value": 0.5}}  # fmt: skip
        made_runs.decide(
            layout, 0, reasons=used, metric=used[0], verdict=tree,
            alarms=[dict.fromkeys(("stage", "name", "action", "text"), text) for text in used],
        )  # fmt: skip
    plain, page = report(calm), report(wild)
    shape = [(tag, sorted(a.keys() - {"open"})) for tag, a in page.elements if tag != "title"]
    assert shape == [
        (tag, sorted(a.keys() - {"open"})) for tag, a in plain.elements if tag != "title"
    ]
    for text in ATTACKS[:5]:
        assert text in page.text()
    page.html.encode("utf-8")


def test_a_metric_of_any_name_can_be_drawn() -> None:
    for name in [*ATTACKS, *hostile_texts(20, huge=100)]:
        line = Line("player", (0.0, 1.0), (0.5, 0.6))
        panel = Lines(name, (line,), x_label=name, x_names=((0.0, name), (1.0, "1")))
        Page(draw(panel))
        assert "<script" not in draw(panel)
        draw(Bars(name, ((name, 1.0, "1 s"),)))


@pytest.mark.parametrize(
    "ys",
    [(1.0, math.inf, 2.0), (math.nan,) * 3, (1e308, -1e308, 0.0), (0.0,) * 3, (1e-300, 2e-300, 0)],
)
def test_a_training_that_diverged_can_be_drawn(ys: tuple[float, ...]) -> None:
    line = Line("player", (0.0, 1.0, 2.0), ys, ys, ys)
    assert "<svg" in draw(Lines("d", (line,), "step"))


def test_no_character_is_left_that_a_page_may_not_hold() -> None:
    assert printable_page("a\ud800\x00\x1b\x85b\n\t") == "a\\ud800\ufffd\ufffd\ufffdb\n\t"


# -- For everybody --------------------------------------------------------------------------------


def test_ids_are_single_and_what_refers_to_them_finds_them(page: Page) -> None:
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = [a[name] for _, a in page.elements for name in ("aria-labelledby", "for") if name in a]
    wanted += [a["href"][1:] for _, a in page.elements if a.get("href", "").startswith("#")]
    wanted += re.findall(r"url\(#([^)]+)\)", page.html)
    assert set(wanted) <= set(ids)


def test_headings_are_in_order(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_every_chart_has_a_text_and_every_table_a_caption(page: Page) -> None:
    charts = page.all("svg")
    assert len(charts) > 20
    for chart in charts:
        assert chart["role"] == "img"
        assert len(chart["aria-label"]) > 30
    assert len(page.all("caption")) == len(page.all("table"))
    assert page.all("html")[0]["lang"] == "en"
    assert next(a["href"] for a in page.all("a")) == "#main"


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def themes() -> Iterator[dict[str, str]]:
    css = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    blocks = re.findall(r"\{([^{}]*--bg:[^{}]*)\}", css)
    for block in blocks:
        yield dict(re.findall(r"(--[\w-]+):\s*(#[0-9a-f]{6});", block))


def test_texts_and_lines_stand_out_in_every_theme() -> None:
    found = list(themes())
    assert len(found) == 3, "light, dark by the system, dark by choice"
    assert found[1] == found[2]
    for theme in found:
        for ground in ("--bg", "--surface"):
            for role in set(ROLES) - {"line", "surface"}:
                assert contrast(theme[f"--{role}"], theme[ground]) >= 4.5, (role, ground)
            for i in range(6):
                assert contrast(theme[f"--ramp-{i}"], theme[ground]) >= 3, (i, ground)


# -- Bytes and files ------------------------------------------------------------------------------


def test_the_same_run_gives_the_same_bytes_in_any_process_and_place(
    made: RunLayout, tmp_path: Path
) -> None:
    write_report(made.root, tmp_path / "first.html")
    first = (tmp_path / "first.html").read_bytes()
    shutil.copytree(made.root, tmp_path / "elsewhere" / made.root.name)
    script = (
        "import sys; from pathlib import Path; from stages.report import write_report; "
        "write_report(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    subprocess.run(
        [sys.executable, "-c", script, "elsewhere/a run", "again.html"],
        check=True, cwd=tmp_path,
        env=os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C",
                          "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert (tmp_path / "again.html").read_bytes() == first


def test_a_report_replaces_an_earlier_one_and_leaves_nothing_beside_it(
    made: RunLayout, tmp_path: Path
) -> None:
    out = tmp_path / "report.html"
    out.write_text("<!DOCTYPE html>\n<p>old")
    written = write_report(made.root, out)
    assert written.size_bytes == out.stat().st_size > 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(ConfigError, match="is a directory"):
        write_report(made.root, tmp_path)


def test_a_report_makes_the_folder_that_it_is_written_to(made: RunLayout, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder" / "report.html"
    assert write_report(made.root, out).size_bytes == out.stat().st_size
    with pytest.raises(ConfigError, match="a file stands where a folder is needed"):
        write_report(made.root, out / "report.html")


def test_nothing_but_a_page_is_replaced_and_no_artifact_touched(run: RunLayout) -> None:
    before, found = run.record.read_bytes(), verify(run.root).problems
    with pytest.raises(ConfigError, match="is no HTML page, so it is not replaced"):
        write_report(run.root, run.record)
    assert run.record.read_bytes() == before
    with pytest.raises(ConfigError, match="lies in the artifact"):
        write_report(run.root, run.stage(0, "train") / "report.html")
    write_report(run.root, run.root / "report.html")
    assert verify(run.root).problems == found, "a report may lie in its run"


def test_a_report_writes_nothing_into_the_run(run: RunLayout) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.root.rglob("*")}
    report(run)
    assert {p: p.stat().st_mtime_ns for p in run.root.rglob("*")} == before


def test_a_panel_is_drawn_once() -> None:
    drawer = Drawer()
    line = Line("player", (0.0,), (1.0,))
    panel = Lines("d", (line,), "x")
    same = Lines("d", (line,), "x")
    assert drawer.draw(panel) is drawer.draw(same)
    assert not re.search("#0a0[bc]", str(drawer.draw(panel))), "every mark became a class"
    assert "style=" not in drawer.draw(panel)


@pytest.mark.parametrize(
    "words", [[], ["--out", "x.html", "--serve"], ["--out", "x", "--port", "1"]]
)
def test_the_command_takes_a_file_or_a_server(made: RunLayout, words: list[str]) -> None:
    found = CliRunner().invoke(app, ["report", str(made.root), *words])
    assert found.exit_code == 2
    assert "give either --out FILE.html, or --serve" in found.stderr


def test_the_command_tells_what_it_wrote(made: RunLayout, tmp_path: Path) -> None:
    out = tmp_path / "x.html"
    found = CliRunner().invoke(app, ["report", str(made.root), "--out", str(out)])
    assert (found.exit_code, found.stdout) == (0, "")
    assert found.stderr.startswith(f"{out}: 3 iterations, 0.")


def test_the_command_writes_a_page_to_stdout(
    made: RunLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, ["report", str(made.root), "--out", "-"])
    assert (found.exit_code, found.stderr) == (0, "")
    write_report(made.root, tmp_path / "x.html")
    assert found.stdout_bytes == (tmp_path / "x.html").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["x.html"]


def test_only_the_report_loads_matplotlib(made: RunLayout) -> None:
    script = (
        "import sys; from typer.testing import CliRunner; from spin_cli.app import app; "
        "found = CliRunner().invoke(app, ['status', sys.argv[1]]); "
        "assert found.exit_code == 0, found; print('matplotlib' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(made.root)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.split() == ["False"]


# -- Numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("sampled_accuracy", 0.9305, "93.0%"), ("human_logprob_per_token", -0.00364, "−0.003640"),
        ("sums.pass@4", 1.0, "100.0%"), ("arc.acc,none", 0.25, "25.0%"),
        ("x.acc_stderr", 0.25, "0.2500"), ("heldout_kl", 1234567.0, "1,234,567"),
        ("heldout_length_explained", 0.5, "0.5000"), ("heldout_kl", 1e-12, "1.000e-12"),
        ("mt.score", 7.25, "7.250"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_people(name: str, value: float, shown: str) -> None:
    assert numbers.Units().metric(name, value) == shown


@pytest.mark.parametrize("reward", ["python", "model", "exact"])
def test_rewards_of_any_scale_are_no_percentages(tmp_path: Path, reward: str) -> None:
    overrides = [
        f"reward.name={reward}", "reward.python.file=x.py", "reward.model.path=x",
        "suites.sums={kind: task}", "suites.right={kind: task, reward: {name: gsm8k}}",
        "suites.mmlu={kind: lm_eval, tasks: [mmlu]}",
    ]  # fmt: skip
    layout = write_run(tmp_path / "run", 1, *overrides)
    units, is_share = collect(layout.root).units, reward == "exact"
    for name in ("sampled_accuracy", "greedy_accuracy", "sums.accuracy", "sums.greedy_accuracy"):
        assert units.is_share(name) is is_share, name
    for name in ("heldout_reward_accuracy", "right.accuracy", "sums.pass@4", "sums.cut_off_share"):
        assert units.is_share(name), name
    shutil.rmtree(layout.stage(0, "promote"))
    made_runs.decide(layout, 0, value=1.05, gain={"metric": "sampled_accuracy", "gain": 0.25})
    text = report(layout).text()
    assert ("the start: +0.05" in text) is not is_share
    assert ("the start: +5.0 points" in text) is is_share
    assert ("sampled_accuracy 1.050," in text) is not is_share
    assert ("gain +0.25" in text) is not is_share
    assert ("gain +25.0 points" in text) is is_share


def test_json_of_a_decision_is_what_the_page_reads(made: RunLayout) -> None:
    decision = json.loads((made.stage(2, "promote") / "decision.json").read_bytes())
    assert collect(made.root).iterations[2].decision == decision


def test_an_evaluation_that_was_copied_within_the_run_costs_once(tmp_path: Path) -> None:
    layout = write_run(tmp_path / "run", 1)
    before = costs(collect(layout.root)).total
    evaluation, copy = layout.stage(0, "evaluate"), layout.stage(1, "evaluate")
    shutil.copytree(evaluation, copy)
    after = costs(collect(layout.root)).total
    assert (after.seconds, after.artifacts) == (before.seconds, before.artifacts)
