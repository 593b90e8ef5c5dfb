"""What `spin show` prints: lines, in colour where a terminal reads them.

Whatever came from a model, a file or a path goes through `safe`, and stands further to the right
than any word of ours, so that no text can pass for one.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spin_cli.screen import has_styles, put, safe, terminal_width
from stages.artifacts.keys import KEY_CHARS
from stages.show import MARGINS, Found, Query
from stages.subjects import START

if TYPE_CHECKING:
    from rich.text import Text

PIPED_WIDTH = 100
"""Where no terminal reads it, so that output does not depend on one."""
SIDE_BY_SIDE_WIDTH = 120
MAX_LINES = 6
_ROUNDING = 1e-15  # a bound of an interval may be 2e-19, and means 0
_LABEL = 12
_MAX_FILES = 40
_FIRST_FIGURES = ("gain", "low", "high", "p_value", "wins", "losses", "ties")
"""Of a condition, before the others."""
_ROLES = {"system": "dim", "user": "cyan", "assistant": "green"}
_TEXTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "human": ("human", "green", ("human_tokens", "human_reward", "human_logprob",
                                 "opponent_human_logprob", "human_margin")),
    "chosen": ("chosen", "green", ("chosen_source", "chosen_tokens", "chosen_reward",
                                   "reference_chosen_logprob")),
    "rejected": ("rejected", "red", ("rejected_source", "rejected_tokens", "rejected_reward",
                                     "reference_rejected_logprob")),
    "sampled": ("player", "magenta", ("sampled_tokens", "sampled_finish_reason", "sampled_reward",
                                      "sampled_logprob")),
    "greedy": ("greedy", "magenta", ("greedy_finish_reason", "greedy_reward")),
    "opponent_sample": ("opponent", "red", (
        "opponent_sample_tokens", "opponent_sample_finish_reason", "opponent_sample_reward",
        "opponent_sample_logprob", "player_opponent_sample_logprob", "opponent_margin")),
    "response": ("response", "magenta", ("response_tokens", "finish_reason", "score", "scored_by")),
    "other": ("other", "red", ()),
    "detail": ("detail", "", ()),
    "text": ("text", "", ()),
}  # fmt: skip
"""Column → what it is called, its colour, and the columns that tell of it."""
_PAIRS = (
    ("chosen", "rejected"),
    ("human", "sampled", "opponent_sample"),
    ("human", "response", "other"),
)
_DULL = {"prompt_tokens", "seed", "sampled_seed", "num_token_logprobs"}
"""Columns that say little to people; --json has them."""
_FIGURES = {"p_value": "one-sided p"}
"""What figures of a decision are called, where the name alone does not say it."""


def put_places(found: Mapping[str, Any]) -> None:
    """Print what a run, or an iteration of it, holds, and what to look at next."""
    run = found["run"]
    put(f"{run}: {_part(found.get('iteration'))}")
    for each in found["artifacts"]:
        if "problem" in each:
            put(f"  DAMAGED     {each['problem']}")
            continue
        stage = f"suite {each['name']}" if each["name"] else each["stage"]
        decision = f"  {each['decision']}" if each["decision"] else ""
        put(_one_line(f"  {stage:<10} {each['seconds']:8.1f} s  {each['path']}{decision}"))
    if not found["artifacts"]:
        put("  nothing is done yet")
    _put_champion(found)
    begun = found.get("iterations")
    if begun is not None:
        further = f", one iteration: spin show {run}:{begun[-1]}" if begun else ""
        put(f"stages and figures: spin status {run}{further}")
    elif found["artifacts"]:
        pairs = f"; its pairs: spin show {run}:{found['iteration']} --pairs"
        put(f"one of them: spin show PATH{pairs if found['iteration'] != START else ''}")


def _part(iteration: int | str | None) -> str:
    """Return which part of a run is shown, in words."""
    if iteration is None:
        return "a run"
    return "before the first iteration" if iteration == START else f"iteration {iteration}"


def _put_champion(found: Mapping[str, Any]) -> None:
    if "champion_problem" in found:
        put(f"  DAMAGED     {found['champion_problem']}")
    elif found.get("champion"):
        put(_one_line(f"champion: {found['champion']} ({found['champion_reason']})"))
    elif "champion" in found:
        put("champion: none yet")


def put_artifact(about: Mapping[str, Any], *, brief: bool) -> None:
    """Print what an artifact is.

    Args:
        brief: one line of it, as rows are what was asked for.
    """
    lines = _Lines()
    stage = f"{about['stage']} {about['name']}" if about["name"] else about["stage"]
    lines.add(
        [(f"{stage}  ", "bold"), (about["path"], ""), (f"  {about['key'][:KEY_CHARS]}", "dim")]
    )
    if not brief:
        made = about["made"]
        cost = [f"{made['at']} in {made['seconds']:.1f} s"]
        cost += [f"{made['tokens']:,} tokens"] if made["tokens"] else []
        cost += [f"peak {_size(made['peak_memory_bytes'])}"] if made["peak_memory_bytes"] else []
        lines.entry("made", ", ".join(cost))
        for name, path in about["inputs"].items():
            lines.entry("from", f"{name} {path}")
        lines.entry("counts", _listed(about["counts"]))
        lines.entry("dropped", _listed(about["dropped"]))
        _add_metrics(lines, about["metrics"])
        if about["decision"] is not None:
            _add_decision(lines, about["decision"])
        _add_files(lines, about["files"])
    for problem in about["damage"]:
        lines.entry("DAMAGED", problem, style="bold red")
    lines.put()


def put_rows(found: Found, query: Query, *, pairs: bool, full: bool) -> None:
    """Print rows, each a block of its texts, or a table where they are numbers."""
    lines = _Lines()
    title = found.table + (f", by {found.sorted_by}" if found.sorted_by else "")
    lines.add([("", "")])
    lines.add([(title, "bold"), *((f" ({note})", "dim") for note in found.notes)])
    if not found.rows:
        lines.entry("", "no such row" if _is_narrowed(query) else "no rows")
    texts = any(isinstance(v, str | list | dict) for row in found.rows for v in row.values())
    if found.table.endswith(".json"):
        for row in found.rows:
            lines.text(json.dumps(row, indent=1, ensure_ascii=False), "", None)
    elif found.rows and not texts:
        _add_numbers(lines, found.rows)
    else:
        for place, row in enumerate(found.rows, query.offset + 1):
            _add_row(lines, place, row, pairs, None if full else MAX_LINES)
    lines.put()


def _is_narrowed(query: Query) -> bool:
    return bool(query.find or query.prompt_id or query.offset)


# -- Parts ----------------------------------------------------------------------------------------


def _add_metrics(lines: "_Lines", metrics: Mapping[str, Any]) -> None:
    known = {name: each for name, each in metrics.items() if each["value"] is not None}
    width = max(map(len, known), default=0)
    for place, (name, each) in enumerate(sorted(known.items())):
        text = f"{name:<{width}}  {_number(each['value'])}"
        if each.get("low") is not None:
            text += f"  [{_number(each['low'])}, {_number(each['high'])}]"
        lines.entry("metrics" if not place else "", text)


def _add_decision(lines: "_Lines", decision: Mapping[str, Any]) -> None:
    """Add a decision, its alarms and its conditions, each sentence once.

    A reason that a condition or an alarm tells below it is not told beside the decision.
    """
    promoted = bool(decision.get("promoted"))
    word, style = ("promoted", "bold green") if promoted else ("refused", "bold red")
    lines.entry("decision", word, style=style)
    alarms, verdict = decision.get("alarms") or [], decision.get("verdict")
    below = {f"alarm {alarm.get('name')}: {alarm.get('text')}" for alarm in alarms}
    below |= set(_leaves(verdict)) if isinstance(verdict, Mapping) else set()
    for reason in map(str, decision.get("reasons") or []):
        if not {reason, reason.removeprefix("passed: ")} & below:
            lines.entry("", reason)
    for alarm in alarms:
        lines.entry("alarm", f"{alarm.get('name')} ({alarm.get('action')}): {alarm.get('text')}")
    gain = decision.get("gain")
    if isinstance(gain, Mapping):
        lines.entry("gain", _listed(gain))
    if isinstance(verdict, Mapping):
        _add_verdict(lines, verdict, 0, has_alarms=bool(alarms))


def _leaves(verdict: Mapping[str, Any]) -> Iterator[str]:
    """Yield the sentences of the conditions that are made of no others."""
    if not verdict.get("children"):
        yield str(verdict.get("text"))
    for child in verdict.get("children") or []:
        yield from _leaves(child)


def _add_verdict(
    lines: "_Lines", verdict: Mapping[str, Any], depth: int, *, has_alarms: bool
) -> None:
    """Add a condition, and those that it is made of, further to the right.

    Args:
        has_alarms: alarms stand above, each with its sentence.
    """
    passed, said = bool(verdict.get("passed")), str(verdict.get("text"))
    word = "passed" if passed else "failed"
    children = verdict.get("children") or []
    # A condition that is made of others says their sentences again, and so do the alarms'.
    is_told = any(str(child.get("text")) in said for child in children)
    is_told |= has_alarms and not passed and verdict.get("kind") == "alarms_clear"
    text = f"{word}  {verdict.get('kind')}{'' if is_told else f': {said}'}"
    style = "green" if passed else "red"
    lines.entry("verdict" if not depth else "", text, style, indent=2 * depth, hanging=8)
    figures = verdict.get("figures")
    if isinstance(figures, Mapping) and figures:
        first = {name: figures[name] for name in _FIRST_FIGURES if name in figures}
        lines.entry("", _listed({**first, **figures}), "dim", indent=2 * depth + 8)
    for child in children:
        _add_verdict(lines, child, depth + 1, has_alarms=has_alarms)


def _add_files(lines: "_Lines", files: Sequence[Mapping[str, Any]]) -> None:
    for place, each in enumerate(files[:_MAX_FILES]):
        several = f"  {each['files']} files" if each["files"] > 1 else ""
        rows = f"  {each['rows']:,} rows" if each["rows"] is not None else ""
        text = f"{each['name']}{several}{rows}  {_size(each['size_bytes'])}"
        lines.entry("files" if not place else "", text)
        if each["columns"]:
            shown = ", ".join(f"{n} {_kind(t)}" for n, t in each["columns"].items())
            lines.entry("", f"  {shown}", style="dim")
    if len(files) > _MAX_FILES:
        lines.entry("", f"and {len(files) - _MAX_FILES} more")


def _kind(name: str) -> str:
    """Return an Arrow type in fewer words."""
    if name.startswith("list<"):
        inner = name.removeprefix("list<").removesuffix(">").partition(": ")[2]
        return "list of " + ("structs" if inner.startswith("struct") else inner.split(" ")[0])
    return name


def _add_numbers(lines: "_Lines", rows: Sequence[Mapping[str, Any]]) -> None:
    """Add a table of numbers, as many columns as fit beside each other."""
    columns = {n: [n, *(_number(row[n]) for row in rows)] for n in rows[0]}
    widths = {name: max(map(len, cells)) for name, cells in columns.items()}
    key, *others = columns
    while others:
        taken, room = [key], lines.width - 2 - widths[key]
        while others and (room >= widths[others[0]] + 2 or len(taken) == 1):
            room -= widths[others[0]] + 2
            taken.append(others.pop(0))
        for place in range(len(rows) + 1):
            cells = [columns[name][place].rjust(widths[name]) for name in taken]
            lines.add([("  " + "  ".join(cells), "bold" if not place else "")])


def _add_row(
    lines: "_Lines", place: int, row: Mapping[str, Any], pairs: bool, max_lines: int | None
) -> None:
    """Add a row: a heading with its numbers, then its texts."""
    shown = [name for name in _TEXTS if isinstance(row.get(name), str)]
    if pairs:
        wanted: tuple[str, ...] = next((p for p in _PAIRS if row.keys() >= set(p[:2])), ())
        shown = [name for name in wanted if name in shown]
    said = {"prompt_id", "prompt", *_DULL, *_TEXTS}
    said |= {note for _, _, notes in _TEXTS.values() for note in notes if row.keys() & {note}}
    rest = {n: v for n, v in row.items() if n not in said and v is not None}
    margin = _margin(row)
    heading = [(f"{place:>3}  ", "dim"), (str(row.get("prompt_id", ""))[:16], "bold")]
    heading += [(f"  margin {_number(margin)}", "bold")] if margin is not None else []
    lines.add([*heading, (f"  {_listed(rest)}", "dim")])
    for role, text in _messages(row.get("prompt")):
        lines.labelled(role, _ROLES.get(role, "cyan"), text, max_lines)
    if pairs and len(shown) == 2 and lines.is_wide:
        lines.beside([(_TEXTS[n][0], _TEXTS[n][1], _notes(row, n), row[n]) for n in shown],
                     max_lines)  # fmt: skip
        return
    for name in shown:
        label, style, _ = _TEXTS[name]
        lines.labelled(label, style, row[name], max_lines, note=_notes(row, name))


def _margin(row: Mapping[str, Any]) -> float | None:
    for high, low in MARGINS:
        if row.get(high) is not None and row.get(low) is not None:
            return float(row[high] - row[low])
    return None


def _messages(prompt: Any) -> Iterator[tuple[str, str]]:
    if isinstance(prompt, str):
        yield "prompt", prompt
    for message in prompt if isinstance(prompt, list) else []:
        yield str(message["role"]), str(message["content"])


def _notes(row: Mapping[str, Any], name: str) -> str:
    """Return what the columns beside a text say of it, without repeating its name."""
    words = []
    for column in _TEXTS[name][2]:
        value = row.get(column)
        if value is None:
            continue
        if column.endswith("_tokens"):
            words.append(f"{value} tokens")
        elif isinstance(value, str):
            words.append(value)
        else:
            words.append(f"{column.replace(f'{name}_', '').replace('_', ' ')} {_number(value)}")
    return ", ".join(words)


def _listed(values: Mapping[str, Any]) -> str:
    known = {n: v for n, v in values.items() if v is not None}
    return ", ".join(f"{_FIGURES.get(name, name)} {_figure(name, v)}" for name, v in known.items())


def _figure(name: str, value: Any) -> str:
    """Return a figure of a gate; a p value may be as small as it likes."""
    return f"{value:.2g}" if name == "p_value" else _number(value)


def _number(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "-"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**12 else str(value)
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) > _ROUNDING else "0"
    return str(value)


def _size(size_bytes: int) -> str:
    size, unit = float(size_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


# -- Lines ----------------------------------------------------------------------------------------


class _Lines:
    """Lines for stdout; styles are for a terminal only."""

    def __init__(self) -> None:
        from rich.console import Console

        self._has_styles = has_styles()
        self.width = max(40, terminal_width() or PIPED_WIDTH)
        self._console: Console = Console(
            width=self.width, force_terminal=self._has_styles, highlight=False
        )
        self._lines: list[Text] = []

    @property
    def is_wide(self) -> bool:
        """Tell whether two texts fit beside each other."""
        return self.width >= SIDE_BY_SIDE_WIDTH

    def add(self, parts: Sequence[tuple[str, str]]) -> None:
        """Add one line, cut to the width."""
        from rich.text import Text

        line = Text.assemble(*((_one_line(text), style) for text, style in parts))
        line.truncate(self.width, overflow="ellipsis")
        self._lines.append(line)

    def entry(
        self, label: str, text: str, style: str = "", *, indent: int = 0, hanging: int = 0
    ) -> None:
        """Add what a label says, on as many lines as it takes; nothing where there is no text.

        Args:
            indent: of all its lines.
            hanging: of the lines after the first, besides.
        """
        if not text:
            return
        indent = min(indent, self.width // 3)
        body = self._wrapped(_one_line(text), style, None, _LABEL + indent + hanging)
        for place, line in enumerate(body):
            line.pad_left(indent + (hanging if place else 0))
        self._put_beside(label, "dim", body)

    def text(self, text: str, style: str, max_lines: int | None) -> None:
        """Add a text of several lines."""
        self._put_beside("", "", self._wrapped(text, style, max_lines, _LABEL))

    def labelled(
        self, label: str, style: str, text: str, max_lines: int | None, note: str = ""
    ) -> None:
        """Add a text under its label, and what is to be noted of it."""
        if note:
            noted = self._wrapped(_one_line(note), "dim", None, _LABEL)
            self._put_beside(label, f"bold {style}".strip(), noted)
            label = ""
        body = self._wrapped(text, style, max_lines, _LABEL)
        self._put_beside(label, f"bold {style}".strip(), body)

    def beside(self, texts: Sequence[tuple[str, str, str, str]], max_lines: int | None) -> None:
        """Add texts (label, style, note, text) in columns."""
        from rich.text import Text

        indent, gap = 5, 3
        room = (self.width - indent - gap * (len(texts) - 1)) // len(texts)
        columns = []
        for label, style, note, text in texts:
            head = Text.assemble((label, f"bold {style}"), (f"  {_one_line(note)}", "dim"))
            head.truncate(room, overflow="ellipsis")
            columns.append([head, *self._wrapped(text, style, max_lines, self.width - room)])
        for place in range(max(map(len, columns))):
            line = Text(" " * indent)
            for number, column in enumerate(columns):
                cell = column[place] if place < len(column) else Text("")
                if number < len(columns) - 1:
                    cell.pad_right(max(0, room + gap - cell.cell_len))
                line.append_text(cell)
            self._lines.append(line)

    def put(self) -> None:
        """Write them all."""
        for line in self._lines:
            if self._has_styles:
                self._console.print(line, no_wrap=True, crop=False, overflow="ignore")
            else:
                put(line.plain.rstrip())

    def _put_beside(self, label: str, style: str, body: Sequence["Text"]) -> None:
        from rich.text import Text

        for place, line in enumerate(body):
            word = Text(f"  {_one_line(label) if not place else ''}", style)
            word.truncate(_LABEL - 1, overflow="ellipsis")
            word.pad_right(_LABEL - word.cell_len)
            self._lines.append(Text.assemble(word, line))

    def _wrapped(self, text: str, style: str, max_lines: int | None, taken: int) -> list["Text"]:
        """Return a text as lines that fit beside what is `taken`; cut where it has too many."""
        from rich.text import Text

        room = max(20, self.width - taken)
        clean = safe(text).expandtabs(4)
        shown = clean if max_lines is None else clean[: room * max_lines]
        lines: list[Text] = []
        for part in shown.split("\n"):
            if max_lines is not None and len(lines) > max_lines:
                break
            lines += Text(part, style).wrap(self._console, room) if part else [Text("")]
        if max_lines is not None and (len(lines) > max_lines or len(shown) < len(clean)):
            note = f"… cut; {len(clean):,} characters in all: --full"
            lines = [*lines[:max_lines], Text(note, "dim")]
        return lines if clean else [Text("(empty)", "dim")]


def _one_line(text: str) -> str:
    """Return a text without line breaks."""
    return " ".join(safe(text).split("\n"))
