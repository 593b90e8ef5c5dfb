"""lineage: what an artifact was made from, down to data and commit, read off the manifests.

Nothing is recomputed and no file but manifests is read: `spin verify` hashes bytes.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stages.artifacts import InputRef, Manifest, read_manifest
from stages.artifacts.files import inner_path
from stages.artifacts.keys import KEY_CHARS
from stages.artifacts.manifest import MANIFEST_NAME
from stages.artifacts.pointer import read_pointer
from stages.config import EngineConfig, RunConfig, SftConfig
from stages.errors import CorruptError, InputError, SpinError
from stages.subjects import Subject


@dataclass(frozen=True)
class Node:
    """One thing that was read or made: an artifact, or what came from outside of the run."""

    path: str
    """Relative to the run; of what lies outside, the name that its reader was given."""
    inside_run: bool
    key: str
    content: str
    manifest: Manifest | None
    """None for what lies outside, and for an artifact that is not there any more."""
    problems: tuple[str, ...] = ()
    """Why the chain cannot be trusted, or told, from here."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """From the name of an input to the id of its node."""
    is_damaged: bool = False
    """Its manifest is there and cannot be read; the key and content are those it was used with."""

    @property
    def id(self) -> str:
        """What tells two nodes apart: an artifact that was made anew is two."""
        return f"{self.path}@{self.key}/{self.content}"

    def settings(self) -> dict[str, Any]:
        """Return the settings that decided it, but for those that are the schema's defaults."""
        return notable_settings(self.manifest.config) if self.manifest else {}

    def sources(self) -> dict[str, Any]:
        """Return where prepared data came from: names, hub commits, hashes of the files."""
        made = self.manifest
        if made is None or made.stage != "prepare":
            return {}
        names = ("source", "heldout_source", "commits")
        found: dict[str, Any] = {name: made.info[name] for name in names if name in made.info}
        return {**found, "fingerprints": made.fingerprints}

    def to_json(self) -> dict[str, Any]:
        """Return the node as plain JSON values."""
        made = self.manifest
        found: dict[str, Any] = {
            "path": self.path,
            "inside_run": self.inside_run,
            "stage": made.stage if made else None,
            "key": self.key,
            "content": self.content,
            "problems": list(self.problems),
            "inputs": dict(self.inputs),
        }
        if made is not None:
            found |= {
                "settings": self.settings(),
                "sources": self.sources(),
                "counts": made.counts,
                "metrics": made.metrics,
                "versions": made.versions,
                "git": made.git,
                "cost": made.cost.model_dump(mode="json"),
            }
        return found


@dataclass(frozen=True)
class Lineage:
    """All that led to some artifacts."""

    root: Path | None
    """The run; None outside of runs."""
    ends: tuple[str, ...]
    """The ids of the artifacts that were asked about."""
    nodes: Mapping[str, Node]
    """By id; each after its inputs."""

    def made(self) -> Iterator[tuple[Node, Manifest]]:
        """Yield the nodes whose manifest is known, each after its inputs."""
        for node in self.nodes.values():
            if node.manifest is not None:
                yield node, node.manifest

    def versions(self) -> dict[str, Counter[str]]:
        """Return, for Python, each library and `commit`, how many artifacts each was used for."""
        found: dict[str, Counter[str]] = {}
        for _, manifest in self.made():
            for name, version in made_with(manifest).items():
                found.setdefault(name, Counter())[version] += 1
        return found

    def seconds(self) -> float:
        """Return what all artifacts took together."""
        return sum(manifest.cost.wall_s for _, manifest in self.made())

    def problems(self) -> list[str]:
        """Return the problems of all nodes, each with its place."""
        return [f"{node.path}: {p}" for node in self.nodes.values() for p in node.problems]

    def damage(self) -> list[str]:
        """Return what is wrong with the manifests that are damaged."""
        return [p for node in self.nodes.values() if node.is_damaged for p in node.problems]

    def to_json(self) -> dict[str, Any]:
        """Return the lineage as plain JSON values; paths in it are relative to the run."""
        return {
            "ends": list(self.ends),
            "nodes": {
                name: {**node.to_json(), "problems": [self.relative(p) for p in node.problems]}
                for name, node in self.nodes.items()
            },
            "seconds": round(self.seconds(), 3),
            "problems": [self.relative(problem) for problem in self.problems()],
        }

    def relative(self, text: str) -> str:
        """Return a text with the paths in it relative to the run; where it lies is left out."""
        return text if self.root is None else without_root(text, self.root)


def lineage(subject: Subject) -> Lineage:
    """Return what made an artifact; of an iteration, what made all that nothing else in it uses.

    Of a run it is its champion, or before there is one all that nothing else in it uses. A damaged
    manifest among them is a problem at its place, as one on the way is.

    Raises:
        InputError: the run or the iteration holds no finished artifact.
        CorruptError: the manifest of the one artifact that was asked about is damaged.
    """
    root = subject.layout.root if subject.layout else None
    if subject.artifact is not None:
        return _with_pointer(trace([subject.artifact], root), subject)
    sound, damaged = _ends(subject)
    found = trace(sound, root)
    nodes = {node.id: node for node in damaged if node.path not in _damaged_places(found)}
    found = replace(found, ends=(*found.ends, *nodes), nodes={**found.nodes, **nodes})
    return _with_pointer(found, subject)


def trace(places: Sequence[Path], root: Path | None) -> Lineage:
    """Return what made some artifacts.

    Args:
        places: of the artifacts.
        root: the run that they lie in, as their paths begin.

    Raises:
        InputError, CorruptError: one of them is no artifact; what led to them may be anything.
    """
    nodes: dict[str, Node] = {}
    ends = []
    for place in places:
        manifest = read_manifest(place)
        inside = root is not None and place.is_relative_to(root)
        shown = place.relative_to(root).as_posix() if inside and root else place.name
        ref = InputRef(path=shown, inside_run=inside, key=manifest.key, content=manifest.content())
        own = _node(ref, manifest, ())
        ends.append(own.id)
        _add_with_inputs(own, root, nodes)
    return Lineage(root, tuple(ends), nodes)


def without_root(text: str, root: Path) -> str:
    """Return a text with the paths in it relative to `root`."""
    return re.sub(rf"(?<![\w./-]){re.escape(str(root))}/", "", text)


def notable_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a manifest that are not the schema's defaults, by dotted name."""
    defaults = flat(
        {
            **RunConfig().identity(),
            "sft": SftConfig().identity(),
            "engine": EngineConfig().identity(),
        }
    )
    found = flat(config)
    return {
        name: value
        for name, value in found.items()
        if value is not None and (name not in defaults or defaults[name] != value)
    }


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a tree of mappings, by dotted name."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            leaves |= flat(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def made_with(manifest: Manifest) -> dict[str, str]:
    """Return the versions that made an artifact, the code's own commit among them."""
    return code_of(manifest.git) | manifest.versions


def code_of(git: Mapping[str, Any]) -> dict[str, str]:
    """Return the commit of the code in words, under `commit`; nothing where it is not known."""
    if not git.get("commit"):
        return {}
    changed = " with uncommitted changes" if git.get("dirty") else ""
    return {"commit": f"{str(git['commit'])[:KEY_CHARS]}{changed}"}


def _with_pointer(found: Lineage, subject: Subject) -> Lineage:
    """Return a lineage with the problem that the champion is not the one that was promoted.

    Nothing else but the pointer knows the key of what it names.
    """
    layout = subject.layout
    is_named = layout is not None and Path(subject.name).is_file()
    if layout is None or not (is_named or subject.kind == "run"):
        return found
    pointer = read_pointer(layout.champion)
    nodes = dict(found.nodes)
    for node in found.nodes.values():
        if pointer and node.manifest and node.path == pointer.path and node.key != pointer.key:
            problem = (
                f"another artifact is there now (key {node.key[:KEY_CHARS]}) than was promoted "
                f"(key {pointer.key[:KEY_CHARS]})"
            )
            nodes[node.id] = replace(node, problems=(*node.problems, problem))
    return replace(found, nodes=nodes)


def _damaged_places(found: Lineage) -> set[str]:
    return {node.path for node in found.nodes.values() if node.is_damaged}


def _ends(subject: Subject) -> tuple[list[Path], list[Node]]:
    """Return the artifacts that nothing else in it uses, and nodes for those that are damaged."""
    assert subject.layout is not None, "runs and iterations have a layout"
    root = subject.layout.root
    pointer = read_pointer(subject.layout.champion) if subject.kind == "run" else None
    places = [root / pointer.path] if pointer else list(subject.artifacts().values())
    if not places:
        raise InputError(f"{subject.name} holds no finished artifact yet; see: spin status {root}")
    manifests: dict[Path, Manifest] = {}
    damaged = []
    for place in places:
        try:
            manifests[place] = read_manifest(place)
        except CorruptError as error:
            shown = place.relative_to(root).as_posix()
            ref = InputRef(path=shown, inside_run=True, key="", content="")
            damaged.append(_node(ref, None, (str(error),), is_damaged=True))
    refs = [ref for manifest in manifests.values() for ref in manifest.inputs.values()]
    used = {root / ref.path for ref in refs if ref.inside_run}
    return [place for place in manifests if place not in used], damaged


def _add_with_inputs(end: Node, root: Path | None, nodes: dict[str, Node]) -> None:
    """Add a node and all that led to it, each after its inputs.

    A stack of its own: a chain of hundreds of iterations is deeper than Python recurses.
    """
    ahead = [(end, False)]
    while ahead:
        node, is_expanded = ahead.pop()
        if node.id in nodes:
            continue
        if is_expanded:
            nodes[node.id] = node
            continue
        ahead.append((node, True))
        if node.manifest is not None:
            found = [_resolve(ref, root) for ref in node.manifest.inputs.values()]
            ahead += [(each, False) for each in reversed(found) if each.id not in nodes]


def _resolve(ref: InputRef, root: Path | None) -> Node:
    """Return the node of an input, with what is wrong with it."""
    if not ref.inside_run:
        return _node(ref, None, ())
    try:
        assert root is not None, "an artifact names inputs in its run, so it lies in one"
        place = inner_path(root, ref.path)
        manifest = read_manifest(place) if (place / MANIFEST_NAME).exists() else None
    except SpinError as error:
        is_damaged = isinstance(error, CorruptError)
        return _node(ref, None, (str(error),), is_damaged=is_damaged)
    if manifest is None:
        return _node(ref, None, ("it is not in the run any more; what made it is not known",))
    if manifest.key != ref.key:
        now = f"another artifact is there now (key {manifest.key[:KEY_CHARS]})"
        return _node(ref, None, (f"{now}; what made this one is not known",))
    if manifest.content() != ref.content:
        return _node(ref, manifest, ("it was made anew with other bytes since it was used",))
    return _node(ref, manifest, ())


def _node(
    ref: InputRef,
    manifest: Manifest | None,
    problems: tuple[str, ...],
    *,
    is_damaged: bool = False,
) -> Node:
    refs = manifest.inputs if manifest else {}
    ids = {name: _node_id(each) for name, each in refs.items()}
    return Node(ref.path, ref.inside_run, ref.key, ref.content, manifest, problems, ids, is_damaged)


def _node_id(ref: InputRef) -> str:
    return f"{ref.path}@{ref.key}/{ref.content}"
