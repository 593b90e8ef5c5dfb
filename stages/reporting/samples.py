"""The samples browser of the report: held-out prompts with every answer to them, side by side.

The rows of each evaluation go into the page as columns of JSON, packed with gzip and base64 (about
a third of the plain text), and the browser unpacks only the evaluation that is looked at. Packed
or not, they stand in elements that no browser runs, and in letters that end no element.
"""

import base64
import gzip
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from stages.artifacts import Artifact, count_rows, open_artifact, read_batches, read_rows
from stages.artifacts.manifest import MANIFEST_NAME
from stages.data.rows import EXAMPLES, PROMPTS
from stages.errors import SpinError
from stages.layout import RunLayout

TEMPLATES = Path(__file__).parent / "templates"

_TEXTS = {"sampled": "player", "opponent_sample": "opponent", "greedy": "greedy"}
# Column of EXAMPLES → column of the page.
_PLAIN = {
    "sampled_finish_reason": "player_finish",
    "opponent_sample_finish_reason": "opponent_finish",
    "greedy_finish_reason": "greedy_finish",
    "sampled_reward": "player_reward",
    "opponent_sample_reward": "opponent_reward",
    "greedy_reward": "greedy_reward",
    "human_margin": "human_margin",
    "opponent_margin": "opponent_margin",
}
_SHORT_PROMPT = 2_000
"""So many characters of a prompt are kept, however many prompts there are."""
_LENGTHS = {
    "human_token_ids": "human_tokens",
    "sampled_token_ids": "player_tokens",
    "opponent_sample_token_ids": "opponent_tokens",
}


@dataclass(frozen=True)
class Limits:
    """What bounds the size of the page."""

    rows: int = 10_000
    """Samples of one evaluation."""
    characters_per_text: int = 20_000
    """What is longer is cut, and says so."""
    characters: int = 40_000_000
    """Of all answers in the page; every evaluation gets an equal part."""


@dataclass(frozen=True)
class SamplesBlock:
    """A part of the page. `css` and `js` are the texts whose hashes its policy has to allow."""

    html: Markup
    """A `<section id="samples">` with a heading of level 2."""
    css: str
    js: str
    rows: int = 0
    """Samples in it, of all evaluations."""
    left_out: int = 0
    """Samples that the limits leave out."""
    problems: tuple[str, ...] = ()
    """What is damaged and therefore missing, one line each; the page says them too."""


@dataclass(frozen=True)
class _Evaluation:
    """One evaluation, as the page holds it."""

    name: str
    """What links call it: `start`, or the iteration's number."""
    label: str
    player: str
    opponent: str | None
    rows: int
    left_out: int
    columns: dict[str, list[Any] | None]


@dataclass
class _Prompts:
    """The prompts that some evaluation asked, numbered as they come."""

    numbers: dict[str, int] = field(default_factory=dict)
    humans: list[Any] = field(default_factory=list)

    def number(self, prompt_id: str, human: Any) -> int:
        """Return a prompt's number; a new prompt gets the next."""
        found = self.numbers.setdefault(prompt_id, len(self.numbers))
        if found == len(self.humans):
            self.humans.append(human)
        return found


def samples_block(
    layout: RunLayout, *, verify: bool = True, limits: Limits | None = None
) -> SamplesBlock:
    """Return the browser of all samples that the run's evaluations hold, the start's too.

    Where an evaluation has more rows than `limits` allow, its first ones are taken. Rows stand in
    the order of their prompts' ids, which are hashes: so they are a random choice, and the same
    prompts in every evaluation. An iteration that was not evaluated yet is left out, and so is a
    damaged evaluation, of which `problems` tells.

    Args:
        layout: the run.
        verify: whether files are checked against their manifests' hashes.
        limits: None stands for `Limits()`.
    """
    limits = limits or Limits()
    prompts, problems = _Prompts(), list[str]()
    places = list(_places(layout))
    evaluations = []
    for name, place in places:
        with _telling(problems, layout):
            artifact = open_artifact(place, stages=("evaluate",), verify=verify)
            share = limits.characters // len(places)
            evaluations.append(_evaluation(name, artifact, prompts, limits, share))
    texts: Sequence[Any] = [None] * len(prompts.numbers)
    with _telling(problems, layout):
        if prompts.numbers:
            texts = _prompt_texts(layout, verify, prompts, limits, problems)
    packed = {
        "samples-prompts": _packed(
            {"ids": list(prompts.numbers), "prompts": texts, "humans": prompts.humans}
        ),
        **{f"samples-of-{e.name}": _packed(e.columns) for e in evaluations},
    }
    template = _environment().get_template("samples.html")
    html = template.render(
        evaluations=evaluations,
        index=script_json([_described(e) for e in evaluations]),
        packed={name: script_json(text) for name, text in packed.items()},
        problems=problems,
    )
    return SamplesBlock(
        html=Markup(html),  # the template escapes all that is put into it
        css=(TEMPLATES / "samples.css").read_text(encoding="utf-8"),
        js=(TEMPLATES / "samples.js").read_text(encoding="utf-8"),
        rows=sum(e.rows for e in evaluations),
        left_out=sum(e.left_out for e in evaluations),
        problems=tuple(problems),
    )


def script_json(value: Any) -> Markup:
    """Return JSON that is safe inside a script element: no letter of it can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _packed(value: Any) -> str:
    """Return a value as JSON, gzipped, in base64; the same text for the same value."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()


def _described(evaluation: _Evaluation) -> dict[str, Any]:
    return {
        "name": evaluation.name,
        "label": evaluation.label,
        "rows": evaluation.rows,
        "leftOut": evaluation.left_out,
    }


def _places(layout: RunLayout) -> Iterator[tuple[str, Path]]:
    """Yield the place of every finished evaluation of the run with its name, in order."""
    places = [("start", layout.start_evaluation)]
    places += [(str(t), layout.stage(t, "evaluate")) for t in layout.iterations()]
    yield from ((name, place) for name, place in places if (place / MANIFEST_NAME).is_file())


@contextmanager
def _telling(problems: list[str], layout: RunLayout) -> Iterator[None]:
    """Note what is wrong with an artifact, its path relative to the run; go on with the rest."""
    try:
        yield
    except SpinError as error:
        problems.append(str(error).replace(f"{layout.root}/", ""))


def _evaluation(
    name: str, artifact: Artifact, prompts: _Prompts, limits: Limits, characters: int
) -> _Evaluation:
    path = artifact.file("examples.parquet")
    columns = _columns(_bounded(path, limits.rows, characters, limits), prompts)
    rows = len(columns["prompt"] or [])
    inputs = artifact.manifest.inputs
    return _Evaluation(
        name=name,
        label="Start" if name == "start" else f"Iteration {name}",
        player=inputs["model"].path,
        opponent=inputs["opponent"].path if "opponent" in inputs else None,
        rows=rows,
        left_out=count_rows([path]) - rows,
        columns=columns,
    )


def _bounded(path: Path, rows: int, characters: int, limits: Limits) -> Iterator[dict[str, Any]]:
    """Yield the first rows, until there are enough of them or of their characters."""
    for number, row in enumerate(_rows(path)):
        if number >= rows:
            return
        for column in ("human", *_TEXTS):
            row[column] = _cut(row[column], limits.characters_per_text)
            characters -= _length(row[column])
        if characters < 0 and number:
            return
        yield row


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of examples.parquet; of tokens only how many there are."""
    names = ["prompt_id", "human", *_TEXTS, *_PLAIN, *_LENGTHS]
    for batch in read_batches([path], EXAMPLES, columns=names, batch_rows=512):
        columns = {name: batch.column(name) for name in names}
        for name in _LENGTHS:
            columns[name] = pc.list_value_length(columns[name])
        yield from pa.RecordBatch.from_pydict(columns).to_pylist()


def _columns(rows: Iterable[Mapping[str, Any]], prompts: _Prompts) -> dict[str, list[Any] | None]:
    """Turn rows into the page's columns; one that holds nothing at all is None."""
    names = {**_TEXTS, **_PLAIN, **_LENGTHS}
    columns: dict[str, list[Any]] = {"prompt": [], **{shown: [] for shown in names.values()}}
    for row in rows:
        columns["prompt"].append(prompts.number(row["prompt_id"], row["human"]))
        for name, shown in names.items():
            columns[shown].append(_number(row[name]))
    return {
        name: values if name == "prompt" or any(v is not None for v in values) else None
        for name, values in columns.items()
    }


def _number(value: Any) -> Any:
    """Shorten a float to the figures that anybody reads; JSON has no NaN and no infinity."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _cut(text: str | None, most: int) -> Any:
    """Return a text, or where it is too long its beginning and how long it is."""
    return text if text is None or len(text) <= most else [text[:most], len(text)]


def _length(text: Any) -> int:
    return len(text[0] if isinstance(text, list) else text or "")


def _prompt_texts(
    layout: RunLayout, verify: bool, prompts: _Prompts, limits: Limits, problems: list[str]
) -> Sequence[Any]:
    """Return the prompts in their order, each as its messages: [[role, text], …].

    Long prompts that have no room together are cut to an equal part; one that is not found is None.
    """
    room = limits.characters // len(prompts.numbers)
    most = min(limits.characters_per_text, max(room, _SHORT_PROMPT))
    data = open_artifact(layout.data, stages=("prepare",), verify=verify)
    texts: list[Any] = [None] * len(prompts.numbers)
    for row in read_rows(data.files("heldout-"), PROMPTS, columns=["prompt_id", "messages"]):
        number = prompts.numbers.get(row["prompt_id"])
        if number is not None:
            texts[number] = [[m["role"], _cut(m["content"], most)] for m in row["messages"]]
    missing = [i for i, text in zip(prompts.numbers, texts, strict=True) if text is None]
    if missing:
        problems.append(
            f"report: {len(missing)} of {len(texts)} evaluated prompts, such as {missing[0]}, are "
            f"not held out in {layout.relative(data.path)}; it was made anew since: evaluate again"
        )
    return texts
