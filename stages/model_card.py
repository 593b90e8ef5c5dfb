"""The model card of an export: Markdown with Hugging Face's front matter.

Names come from recipes, data files and the hub, and a card is rendered as HTML by others: every
such text stands in a code span, where Markdown and HTML mean nothing, or in a fenced block.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

TAGS = ("spin", "self-play")
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
PAPER = "https://arxiv.org/abs/2401.01335"
_MAX_CHARS = 300
# Control characters, line and paragraph ends, and marks that reverse or hide text.
_UNSAFE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]+"
)


@dataclass(frozen=True)
class Evaluated:
    """What one evaluation found."""

    label: str
    metrics: Mapping[str, Any]
    intervals: Mapping[str, Sequence[float | None]]
    is_exported: bool = False
    """Whether it is of the model that the card is of."""


@dataclass(frozen=True)
class Played:
    """One iteration that led to the model, or was played beside it."""

    iteration: int
    opponent: str
    key: str
    pairs: str
    own_settings: Mapping[str, Any]
    """Settings of training that are not the same in all iterations."""
    commit: str
    verdict: str
    """`champion`, `promoted`, `rolled back`, `refused`, `not decided`, or `not known`."""
    reasons: Sequence[str]
    led_here: bool


@dataclass(frozen=True)
class Data:
    """One prepared data set."""

    place: str
    key: str
    content: str
    counts: Mapping[str, int]
    sources: Mapping[str, Any]


@dataclass(frozen=True)
class Card:
    """Everything that a card says."""

    run: str
    """The name of the recipe."""
    iteration: int
    is_champion: bool
    key: str
    merged: bool
    """Whether adapters were merged into the weights."""
    game: Mapping[str, Any]
    """Policy of the pairs, loss, β."""
    start: str
    """The model that the game started from."""
    base_model: str | None
    """Its id on the hub, where it is from there."""
    datasets: Sequence[str]
    """Ids on the hub."""
    measured: Mapping[str, Sequence[Evaluated]]
    """By the name of the suite; empty for the run's own evaluation."""
    columns: Mapping[str, Sequence[str]]
    """The metrics that are shown, likewise."""
    played: Sequence[Played]
    data: Sequence[Data]
    versions: Mapping[str, Sequence[str]]
    """Python, libraries and the code's commit, each with all versions that were used."""
    settings: Mapping[str, Any]
    """Those of the iteration that are not the schema's defaults, by dotted name."""
    artifact: str
    """The model's place in its run."""
    problems: Sequence[str] = field(default_factory=list)
    """Of the lineage."""


def model_card(card: Card) -> str:
    """Return the text of README.md."""
    parts = [
        _front_matter(card),
        _what_it_is(card),
        _use(),
        _figures(card),
        _decisions(card),
        _lineage(card),
        _settings(card),
        _reproduce(card),
        _limits(card),
    ]
    return "\n".join(parts)


def code(text: object, *, in_table: bool = False) -> str:
    """Return any text as a code span of one line, which shows it and means nothing."""
    clean = _UNSAFE.sub(" ", str(text)).strip() or "(nothing)"
    if len(clean) > _MAX_CHARS:
        clean = f"{clean[: _MAX_CHARS - 1]}…"
    longest = max((len(run) for run in re.findall("`+", clean)), default=0)
    fence, pad = "`" * (longest + 1), " " if longest else ""
    if in_table:  # GitHub's tables end a cell at any | without a \, in code spans too
        clean = clean.replace("\\", "\\ ").replace("|", "\\|") if "|" in clean else clean
    return f"{fence}{pad}{clean}{pad}{fence}"


def cell(text: object) -> str:
    """Return any text as a cell of a table."""
    return code(text, in_table=True)


def block(text: str, language: str = "") -> str:
    """Return a fenced block; no run of backticks in `text` can end it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def _front_matter(card: Card) -> str:
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(TAGS),
    }
    if card.base_model is not None and HUB_ID.fullmatch(card.base_model):
        front |= {"base_model": card.base_model, "base_model_relation": "finetune"}
    datasets = [name for name in card.datasets if HUB_ID.fullmatch(name)]
    if datasets:
        front["datasets"] = datasets
    return f"---\n{yaml.safe_dump(front, width=10**6)}---\n"


def _what_it_is(card: Card) -> str:
    policy, loss = card.game.get("policy"), card.game.get("loss")
    game = (
        "the human responses of its data over its opponent's own answers"
        if policy == "human_vs_self"
        else f"better answers over worse ones (pairs: {code(policy)})"
    )
    who = (
        "It is the champion of its run."
        if card.is_champion
        else "**It is not the champion of its run**; see the decisions below."
    )
    merged = " Its adapters (LoRA) were merged into the weights." if card.merged else ""
    return (
        f"# {code(card.run)}, iteration {card.iteration}\n\n"
        f"A language model made by [self-play fine-tuning]({PAPER}) with spin: in each iteration "
        f"the player starts from its opponent's weights, learns to prefer {game} (loss "
        f"{code(loss)}, β {code(card.game.get('beta'))}), and becomes the next opponent. The game "
        f"started from {code(card.start)}. {who}{merged}\n"
    )


def _use() -> str:
    return (
        "## Use\n\n"
        "A plain folder of safetensors, tokenizer and chat template, which transformers and vLLM "
        "open; it needs no code of its own.\n\n"
        + block(
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n'
            'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
            "python",
        )
    )


def _figures(card: Card) -> str:
    lines = [
        "## Figures\n",
        "On held-out prompts, with 95% intervals over prompts where a metric is a mean of them; "
        "other seeds of training are not in them.\n",
    ]
    for suite, rows in card.measured.items():
        columns = [c for c in card.columns.get(suite, ()) if any(c in row.metrics for row in rows)]
        if not columns:
            continue
        lines.append(f"Suite {code(suite)}:\n" if suite else "Of the run's own evaluation:\n")
        lines.append(_row(["model", *map(cell, columns)]))
        lines.append(_row(["---", *["---:"] * len(columns)]))
        for row in rows:
            label = f"**{row.label}**" if row.is_exported else row.label
            lines.append(_row([label, *(_figure(row, name) for name in columns)]))
        more = len({name for row in rows for name in row.metrics} - {*columns})
        lines.append(f"\nAnd {more} more metrics, found in the run.\n" if more else "")
    if len(lines) == 2:
        lines.append("None of its iterations was evaluated.\n")
    return "\n".join(lines)


def _figure(row: Evaluated, name: str) -> str:
    value, interval = row.metrics.get(name), row.intervals.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–"
    low, high = interval if interval and len(interval) == 2 else (None, None)
    around = "" if low is None or high is None else f" [{low:.3g}, {high:.3g}]"
    return f"{value:.4g}{around}"


def _decisions(card: Card) -> str:
    lines = ["## Decisions of the gate\n", _row(["iteration", "decision", "why"]),
             _row(["---:", "---", "---"])]  # fmt: skip
    for each in card.played:
        why = "<br>".join(cell(reason) for reason in each.reasons) or "–"
        lines.append(_row([str(each.iteration), each.verdict, why]))
    return "\n".join(lines) + "\n"


def _lineage(card: Card) -> str:
    lines = ["## Lineage\n"]
    titles = ["iteration", "opponent", "player (key)", "pairs (key)", "settings of its own", "code"]
    lines += [_row(titles), _row(["---:", *["---"] * (len(titles) - 1)])]
    for each in card.played:
        if each.led_here:
            own = ", ".join(f"{name}={value}" for name, value in each.own_settings.items())
            cells = [each.opponent, each.key, each.pairs, own, each.commit]
            shown = [cell(text) if text else "–" for text in cells]
            lines.append(_row([str(each.iteration), *shown]))
    lines += ["", _row(["data", "key", "hash of its files", "rows", "source"]),
              _row(["---"] * 5)]  # fmt: skip
    for data in card.data:
        counts = ", ".join(f"{name} {count}" for name, count in data.counts.items() if count)
        sources = "; ".join(
            f"{n} {json.dumps(v, ensure_ascii=False)}" for n, v in data.sources.items() if v
        )
        cells = [data.place, data.key, data.content, counts, sources]
        lines.append(_row(list(map(cell, cells))))
    made = "; ".join(f"{name} {', '.join(used)}" for name, used in card.versions.items())
    lines += ["", f"Made with {_code_words(made)}.\n"]
    lines += [f"- Problem: {code(problem)}" for problem in card.problems]
    lines.append("`lineage.json` has all of it: every artifact on the way with its key, hashes, "
                 "settings, versions and cost.\n")  # fmt: skip
    return "\n".join(lines)


def _code_words(text: str) -> str:
    return "; ".join(code(part) for part in text.split("; "))


def _settings(card: Card) -> str:
    # ASCII, so that control characters and marks that hide text stand there as escapes
    text = yaml.safe_dump(dict(card.settings), width=10**6, sort_keys=False)
    return (
        "## Settings\n\nThose that are not the schema's defaults, in this iteration:\n\n"
        + block(text, "yaml")
    )


def _reproduce(card: Card) -> str:
    return (
        "## Reproduce\n\nWith the run's directory (`spin pull` fetches one), the code at the "
        "commit above, and the same versions:\n\n"
        + block(f"spin reproduce RUN/{card.artifact} --in AGAIN", "sh")
        + "\nIt makes every artifact on the way again and compares. On one kind of CPU with one "
        "number of threads all bytes agree; on GPUs sampled tokens vary with batching, and the "
        "figures agree within a tolerance that it states.\n"
    )


def _limits(card: Card) -> str:
    alone = "" if len(card.measured) > 1 else " No other task was measured."
    return (
        "## Limits\n\n"
        "- Self-play moves a model towards its data; it adds no knowledge that neither the start "
        "model nor the data has.\n"
        f"- The figures are of held-out prompts of the same kind as the training prompts.{alone}\n"
        "- Intervals of two models that overlap do not mean that the models cannot be told apart: "
        "look at the difference on the same examples and its own interval, as in the decisions "
        "above or by `spin compare`. One run is one seed.\n"
        "- Nothing was done about safety, bias or truthfulness beyond what the start model and "
        "the data bring.\n"
        "- Licences of the start model and of the data hold for this model too; none is claimed "
        "here.\n"
    )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
