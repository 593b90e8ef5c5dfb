"""What the champion was made of, down to data and commit, as the page tells it."""

from dataclasses import dataclass, replace

from stages import lineage
from stages.errors import SpinError
from stages.reporting.collect import RunView


@dataclass(frozen=True)
class Step:
    """An artifact on the way, or what came from outside the run."""

    path: str
    stage: str | None
    """None for what came from outside, and for what is not there any more."""
    key: str
    at: str | None
    """When it was begun."""
    inputs: tuple[tuple[str, str], ...]
    """What it was made of: what it is to it, and its path."""
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Ancestry:
    """All that led to one model."""

    of: str
    """champion, or last player."""
    steps: tuple[Step, ...]
    """The model first, each before what it was made of."""
    versions: tuple[tuple[str, str], ...]
    """Library (or commit) and version; where artifacts differ, how many had which."""
    problem: str | None = None
    """Why it cannot be told."""


def ancestry(view: RunView) -> Ancestry | None:
    """Return what led to the champion, or while there is none to the last player; None: neither."""
    players = [t.piece("train") for t in view.iterations if t.manifest("train") is not None]
    last = players[-1].path if players and players[-1] else None
    path = view.pointer.path if view.pointer else last
    if path is None:
        return None
    of = "champion" if view.pointer else "last player"
    root = view.layout.root.resolve()
    try:
        found = lineage.trace([root / path], root)
    except (SpinError, OSError) as error:
        return Ancestry(of, (), (), lineage.without_root(str(error), root))
    steps = [_step(node, found) for node in reversed(list(found.nodes.values()))]
    if view.champion_problem is not None:
        steps[0] = replace(steps[0], problems=(*steps[0].problems, view.champion_problem))
    versions = tuple(
        (
            name,
            ", ".join(_counted(version, count, len(counts)) for version, count in counts.items()),
        )
        for name, counts in sorted(found.versions().items(), key=lambda item: item[0] != "commit")
    )
    return Ancestry(of, tuple(steps), versions)


def _step(node: lineage.Node, found: lineage.Lineage) -> Step:
    made = node.manifest
    return Step(
        path=node.path,
        stage=made.stage if made else None,
        key=node.key,
        at=made.cost.started_at if made else None,
        inputs=tuple((name, found.nodes[each].path) for name, each in node.inputs.items()),
        problems=tuple(map(found.relative, node.problems)),
    )


def _counted(version: str, count: int, versions: int) -> str:
    return version if versions == 1 else f"{version} ({count})"
