"""What lineage and diff print."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from spin_cli.screen import fill, put, safe, terminal_width
from spin_cli.steps import MAX_FIGURES, ordered
from stages.artifacts.keys import KEY_CHARS
from stages.difference import ArtifactDifference, Change, Difference
from stages.lineage import Lineage, Node, made_with

_VALUE_CHARS = 60
_PLACE_CHARS = 30  # beside a key, which with its kind takes the rest
_MIN_WIDTH = 20
"""Of text beside branches, however deep they are."""
_HASH = re.compile(r"[0-9a-f]{32,}")
_PLACE = re.compile(r"(.*) \((key|content) ([^()]*)\)")


def tree_lines(found: Lineage) -> Iterator[str]:
    """Yield a lineage as a tree, each artifact above what it was made from.

    What was told of before is only named. Names come from files and recipes, so every line is
    one line.
    """
    common = _common(found)
    made = ", ".join(f"{name} {version}" for name, version in common.items())
    yield f"all made with {made}" if made else "made with nothing in common"
    yield f"{found.seconds():,.1f} s in all"
    told: set[str] = set()
    # (node, the input's name, what stands before its line, what stands before those below it)
    ahead = [(found.nodes[end], "", "", "") for end in reversed(found.ends)]
    while ahead:
        node, name, lead, below = ahead.pop()
        again = node.id in told
        yield _line(
            f"{lead}{f'{name}: ' if name else ''}{_title(node)}{' (above)' if again else ''}"
        )
        if again:
            continue
        told.add(node.id)
        rest = below + ("│  " if node.inputs else "   ")
        yield from (_line(rest + text) for text in _details(node, common))
        inputs = list(node.inputs.items())
        for position, (inner, node_id) in reversed(list(enumerate(inputs))):
            last = position == len(inputs) - 1
            branch = below + ("└─ " if last else "├─ ")
            ahead.append((found.nodes[node_id], inner, branch, below + ("   " if last else "│  ")))


def put_tree(found: Lineage) -> None:
    """Print a lineage as a tree; on a terminal long lines go on below, beside the branches."""
    width = terminal_width()
    for line in tree_lines(found):
        if width is None:
            put(line)
            continue
        lead = re.match(r"[│├└─ ]*", line)
        assert lead is not None, "it matches nothing, too"
        below = lead[0].replace("├─", "│ ").replace("└─", "  ")
        room = max(_MIN_WIDTH, width - len(lead[0]))
        for place, part in enumerate(fill(line[lead.end() :], room).split("\n")):
            put(f"{below if place else lead[0]}{part}")


def dot_lines(found: Lineage) -> Iterator[str]:
    """Yield a lineage as a graph in Graphviz's language; arrows lead from an input to its use."""
    yield "digraph lineage {"
    yield "  node [shape=box];"
    for node in found.nodes.values():
        label = "\\n".join([_dot_text(node.path), node.key[:KEY_CHARS]])
        yield f'  {_dot_id(node.id)} [label="{label}"{", color=red" if node.problems else ""}];'
    for node in found.nodes.values():
        for name, other in node.inputs.items():
            yield f'  {_dot_id(other)} -> {_dot_id(node.id)} [label="{_dot_text(name)}"];'
    yield "}"


def difference_lines(found: Difference) -> Iterator[str]:
    """Yield what differs; what is the same is only said to be so."""
    yield _line(f"A: {found.one}")
    yield _line(f"B: {found.other}")
    if found.recipe:
        yield "recipe:"
        yield from (f"  {_change(change)}" for change in found.recipe)
    for name, letter in [
        *((name, "A") for name in found.only_one),
        *((name, "B") for name in found.only_other),
    ]:
        yield _line(f"{name}: only in {letter}")
    for each in found.artifacts:
        yield from _artifact_lines(each)
    for name, problem in found.problems.items():
        yield _line(f"{name}: PROBLEM: {problem}")
    if found.kind != "artifact":
        yield from _metric_lines(found)


def _artifact_lines(each: ArtifactDifference) -> Iterator[str]:
    key = "same key" if each.same_key else "another key"
    content = "same bytes" if each.same_bytes else "other bytes"
    yield _line(f"{each.name}: {key}, {content}")
    for part, changes in each.parts().items():
        if part == "files":
            more = f" and {len(changes) - MAX_FIGURES} more" if len(changes) > MAX_FIGURES else ""
            names = ", ".join(change.name for change in changes[:MAX_FIGURES])
            yield _line(f"  bytes of: {names}{more}")
            continue
        yield f"  {part}:"
        yield from (f"    {_change(change)}" for change in changes)


def _metric_lines(found: Difference) -> Iterator[str]:
    """Yield the metrics of all evaluations that differ, side by side."""
    rows = [
        (each.name, change)
        for each in found.artifacts
        for change in each.metrics
        if change.delta is not None and _is_evaluation(each.name)
    ]
    if rows:
        yield "evaluations, B minus A:"
    for name, change in rows:
        yield _line(f"  {name}  {change.name} {change.delta:+.4g}")


def _is_evaluation(name: str) -> bool:
    last = name.rpartition("/")[2]
    return last == "evaluate" or last.startswith("suite-")


def _change(change: Change) -> str:
    delta = f" ({change.delta:+.4g})" if change.delta is not None else ""
    return _line(f"{change.name}: {_value(change.one)} → {_value(change.other)}{delta}")


def _title(node: Node) -> str:
    if not node.inside_run:
        return f"{node.path}  from outside of the run, key {_key(node.key)}"
    made = node.manifest
    stage = (
        f"{made.stage}, key {_key(node.key)}, {made.cost.wall_s:,.1f} s" if made else _state(node)
    )
    return f"{node.path}  {stage}"


def _state(node: Node) -> str:
    return "damaged" if node.is_damaged else "gone"


def _key(key: str) -> str:
    kind, colon, digits = key.rpartition(":")  # folder:…, hub:…
    return f"{kind}{colon}{digits[:KEY_CHARS]}"


def _details(node: Node, common: Mapping[str, str]) -> Iterator[str]:
    for problem in node.problems:
        yield f"PROBLEM: {problem}"
    made = node.manifest
    if made is None:
        return
    sources = {n: v for n, v in node.sources().items() if v}
    for name, values in (
        ("data", sources),
        ("settings", node.settings()),
        ("figures", ordered(made)),
    ):
        shown = [f"{n} {_value(v)}" for n, v in values.items()]
        if name == "figures" and len(shown) > MAX_FIGURES:
            shown[MAX_FIGURES:] = [f"and {len(shown) - MAX_FIGURES} more"]
        if values:
            yield f"{name}: " + ", ".join(shown)
    others = {n: v for n, v in made_with(made).items() if common.get(n) != v}
    if others:
        yield "made with " + ", ".join(f"{n} {v}" for n, v in others.items())


def _common(found: Lineage) -> dict[str, str]:
    """Return the versions that every artifact was made with."""
    total = len(list(found.made()))
    common = {}
    for name, used in found.versions().items():
        version, times = used.most_common(1)[0]
        if times == total:
            common[name] = version
    return common


def _value(value: Any) -> str:
    if isinstance(value, float):
        text = f"{value:.6g}"
    elif isinstance(value, str):
        text = _short(value)
    else:
        text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _VALUE_CHARS else f"{text[: _VALUE_CHARS - 1]}…"


def _short(text: str) -> str:
    """Return a hash, or a place with its key, with the first digits of the hash alone."""
    if _HASH.fullmatch(text):
        return text[:KEY_CHARS]
    found = _PLACE.fullmatch(text)
    if not found:
        return text
    place, kind, key = found.groups()
    shown = place if len(place) <= _PLACE_CHARS else f"{place[: _PLACE_CHARS - 1]}…"
    return f"{shown} ({kind} {_key(key)})"


def _line(text: str) -> str:
    """Return a text as one line without what could steer a terminal."""
    return " ".join(safe(text).split("\n"))


def _dot_id(node_id: str) -> str:
    return f'"{_dot_text(node_id)}"'


def _dot_text(text: str) -> str:
    return _line(text).replace("\\", "\\\\").replace('"', '\\"')
