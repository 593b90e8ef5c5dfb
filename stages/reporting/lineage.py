"""What the champion was made of, down to data and commit; read from manifests alone."""

from collections.abc import Mapping
from dataclasses import dataclass

from stages.artifacts import InputRef, Manifest
from stages.reporting.collect import RunView


@dataclass(frozen=True)
class Node:
    """An artifact, and what it was made of."""

    role: str
    """What it is to the one above it, such as pairs or model."""
    path: str
    stage: str | None
    """None for an input from outside the run, and one that is not there any more."""
    key: str
    commit: str | None
    at: str | None
    """When it was begun."""
    note: str
    """What is not as it should be, or that it was shown above."""
    children: tuple["Node", ...] = ()


@dataclass(frozen=True)
class Lineage:
    """The tree, and what the artifacts of the run were made with."""

    root: Node | None
    commits: tuple[tuple[str, int], ...]
    """Commit (`+` where files had been changed) and how many artifacts it made."""
    versions: tuple[tuple[str, str], ...]
    """Library and version; several versions where artifacts differ."""


def lineage(view: RunView) -> Lineage:
    """Return the tree of the champion, or while there is none of the last player."""
    manifests = view.manifests()
    root = view.pointer.path if view.pointer else _last_player(view)
    tree = None
    if root is not None:
        present = manifests.get(root)
        key = present.key if present else view.pointer.key if view.pointer else ""
        ref = InputRef(
            path=root,
            inside_run=True,
            key=key,
            content=present.content() if present else "",
        )
        tree = _node("champion" if view.pointer else "last player", ref, manifests, set())
    return Lineage(tree, _commits(manifests), _versions(manifests))


def _node(role: str, ref: InputRef, manifests: Mapping[str, Manifest], seen: set[str]) -> Node:
    if not ref.inside_run:
        return Node(role, ref.path, None, ref.key, None, None, "from outside the run")
    manifest = manifests.get(ref.path)
    if manifest is None:
        return Node(role, ref.path, None, ref.key, None, None, "not in the run any more")
    facts = (manifest.stage, ref.key, _commit(manifest), manifest.cost.started_at)
    if (manifest.key, manifest.content()) != (ref.key, ref.content):
        return Node(role, ref.path, *facts, "made anew since, with other bytes")
    if ref.path in seen:
        return Node(role, ref.path, *facts, "as above" if manifest.inputs else "")
    seen.add(ref.path)
    children = (_node(name, below, manifests, seen) for name, below in manifest.inputs.items())
    return Node(role, ref.path, *facts, "", tuple(children))


def _last_player(view: RunView) -> str | None:
    trained = [t.piece("train") for t in view.iterations if t.manifest("train") is not None]
    last = trained[-1] if trained else None
    return last.path if last else None


def _commit(manifest: Manifest) -> str | None:
    commit = manifest.git.get("commit")
    return f"{commit}{'+' if manifest.git.get('dirty') else ''}" if commit else None


def _commits(manifests: Mapping[str, Manifest]) -> tuple[tuple[str, int], ...]:
    found: dict[str, int] = {}
    for manifest in manifests.values():
        commit = _commit(manifest) or "not known"
        found[commit] = found.get(commit, 0) + 1
    return tuple(found.items())


def _versions(manifests: Mapping[str, Manifest]) -> tuple[tuple[str, str], ...]:
    found: dict[str, dict[str, None]] = {}
    for manifest in manifests.values():
        for name, version in manifest.versions.items():
            found.setdefault(name, {})[version] = None
    return tuple((name, ", ".join(versions)) for name, versions in sorted(found.items()))
