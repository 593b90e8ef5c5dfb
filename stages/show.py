"""show: what an artifact is and what its rows look like, read for people; nothing is written.

Tables are streamed: what is held is a batch, and the rows that will be shown.
"""

import heapq
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.artifacts import Artifact, Manifest, count_rows, read_batches, read_manifest, run_root
from stages.artifacts.files import inner_path
from stages.artifacts.json_file import read_object
from stages.artifacts.manifest import MANIFEST_NAME, check_listing
from stages.artifacts.pointer import read_pointer
from stages.artifacts.tables import Row
from stages.data.aligned import SortedTable, aligned
from stages.data.rows import DROPPED_FILE, PROMPTS
from stages.decisions import is_rolled_back
from stages.errors import ConfigError, CorruptError, InputError, SpinError
from stages.layout import RunLayout
from stages.subjects import START, Subject, find_subject

SORTS = ("margin", "reward", "length", "prompt")
MAIN_TABLE = {
    "prepare": "train",
    "generate": "part",
    "reward": "part",
    "pair": "part",
    "score": "part",
    "sft": "metrics",
    "train": "metrics",
    "evaluate": "examples",
    "suite": "examples",
}
"""The table that is shown where none is named, by stage."""
PAIRED = ("pair", "score", "evaluate", "suite")
"""Stages whose rows hold responses to compare."""
MARGINS = (
    ("human_margin", "opponent_margin"),
    ("chosen_reward", "rejected_reward"),
    ("reference_chosen_logprob", "reference_rejected_logprob"),
)
"""Columns whose difference is a margin; the first that a table has is its own."""
_REWARDS = ("chosen_reward", "sampled_reward", "reward", "score")
_BATCH_ROWS = 1024
_NO_PROMPTS = "the prompts are not in this run"
_DAMAGED_PROMPTS = "the prompts cannot be shown: what leads to them is damaged"


@dataclass(frozen=True)
class Query:
    """Which rows are wanted."""

    rows: int = 3
    offset: int = 0
    sort: str | None = None
    reverse: bool = False
    find: str | None = None
    prompt_id: str | None = None
    """Or its beginning."""
    file: str | None = None
    dropped: bool = False


@dataclass(frozen=True)
class Found:
    """Rows of one table."""

    table: str
    rows: list[Row]
    """With `prompt` as messages where it is known, and tokens as their number."""
    sorted_by: str | None = None
    """What the rows were sorted by, in words."""
    notes: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    """What kept the prompts from being shown."""


def find_shown(place: str, *, pairs: bool = False) -> Path | dict[str, Any]:
    """Return the artifact that a text names, or what is known of the run that it names.

    Args:
        place: an artifact, RUN/champion, RUN, RUN:ITERATION, or RUN:start.
        pairs: an artifact with pairs will be looked at: of an iteration, take the furthest one.

    Raises:
        InputError: there is no such thing.
        ConfigError: pairs of a whole run are asked for.
    """
    subject = find_subject(place)
    if subject.artifact is not None:
        return subject.artifact
    layout, iteration = subject.layout, subject.iteration
    assert layout is not None, "runs and iterations have a layout"
    if subject.kind == "run":
        begun = layout.iterations()
        if pairs:
            last = max(begun, default=0)
            raise ConfigError(f"{place} is a whole run; name an iteration, such as {place}:{last}")
        return {
            "run": str(layout.root),
            "iterations": begun,
            **_champion(layout),
            "artifacts": _artifacts(subject),
        }
    folder = subject.folder()
    if not pairs:
        return {
            "run": str(layout.root),
            "iteration": START if iteration is None else iteration,
            "artifacts": _artifacts(subject),
        }
    if iteration is None:
        raise InputError(f"{place} has no pairs; name an iteration, such as {layout.root}:0")
    for stage in ("score", "pair"):
        if (folder / stage / MANIFEST_NAME).is_file():
            return folder / stage
    raise InputError(f"{folder} has no pairs yet; go on: spin run … --run {layout.root}")


def _champion(layout: RunLayout) -> dict[str, Any]:
    """Return {champion: its path, or None; champion_reason}, or {champion_problem}."""
    try:
        pointer = read_pointer(layout.champion)
    except SpinError as error:
        return {"champion_problem": str(error)}
    if pointer is None:
        return {"champion": None}
    return {"champion": pointer.path, "champion_reason": pointer.history[-1].reason}


def _artifacts(subject: Subject) -> list[dict[str, Any]]:
    """Return {path, stage, name, seconds, decision} of artifacts in the order of their making.

    `name` is that of a suite, `decision` what promote decided, in words. Names and sizes of files
    are checked. Where something cannot be read there is a `problem`; such come last.
    """
    layout = subject.layout
    assert layout is not None, "runs and iterations have a layout"
    found: list[tuple[tuple[bool, int, str, str], dict[str, Any]]] = []
    for path in subject.artifacts().values():
        place, at = layout.relative(path), ""
        about: dict[str, Any] = {"path": str(path)}
        try:
            artifact, damage = open_shown(path)
            at = artifact.manifest.cost.started_at
            about |= _listed(artifact, damage, layout)
        except SpinError as error:
            damage = [str(error)]
        if damage:
            about["problem"] = damage[0]
        number = layout.iteration_of(place)
        found.append(((bool(damage), -1 if number is None else number, at, place), about))
    return [about for _, about in sorted(found, key=lambda each: each[0])]


def _listed(artifact: Artifact, damage: list[str], layout: RunLayout) -> dict[str, Any]:
    """Return what is said of an artifact among others."""
    manifest = artifact.manifest
    decision = _object(artifact, "decision.json", damage) if not damage else None
    words = None
    if decision is not None:
        reasons = "; ".join(map(str, decision.get("reasons") or []))
        words = "promoted" if decision.get("promoted") else f"refused: {reasons}"
        if decision.get("promoted") and _is_rolled_back(artifact.path, layout):
            words = "promoted, and rolled back since"
    return {
        "stage": manifest.stage,
        "name": _suite_name(manifest),
        "seconds": manifest.cost.wall_s,
        "decision": words,
    }


def _is_rolled_back(decision: Path, layout: RunLayout) -> bool:
    """Tell whether the pointer was taken back from the player of a decision."""
    iteration = layout.iteration_of(layout.relative(decision))
    try:
        pointer = read_pointer(layout.champion)
    except SpinError:  # told of the run itself, as its `champion_problem`
        return False
    return iteration is not None and is_rolled_back(layout, iteration, pointer)


def _suite_name(manifest: Manifest) -> Any:
    return manifest.config.get("suite") if manifest.stage == "suite" else None


def open_shown(path: Path, *, verify: bool = True) -> tuple[Artifact, list[str]]:
    """Open an artifact, also a damaged one, whose manifest is sound; return what is wrong with it.

    Raises:
        InputError: there is no artifact.
        CorruptError: its manifest is damaged.
    """
    artifact = Artifact(path, read_manifest(path), verify)
    try:
        check_listing(path, artifact.manifest)
    except (CorruptError, OSError) as error:
        return artifact, [str(error)]
    return artifact, []


def describe(artifact: Artifact) -> dict[str, Any]:
    """Return what an artifact is as plain JSON values, without its rows.

    `files` has one entry a table or other file: {name, files, rows, size_bytes, columns}; columns
    are null for what is no table, or cannot be read. `damage` lists what could not be read.
    """
    manifest = artifact.manifest
    damage: list[str] = []
    dropped = _dropped(artifact.manifest)
    return {
        "path": str(artifact.path),
        "stage": manifest.stage,
        "key": manifest.key,
        "name": _suite_name(manifest),
        "made": {
            "at": manifest.cost.started_at,
            "seconds": manifest.cost.wall_s,
            "tokens": manifest.cost.tokens,
            "peak_memory_bytes": manifest.cost.peak_memory_bytes,
        },
        "inputs": {name: ref.path for name, ref in manifest.inputs.items()},
        "counts": {n: v for n, v in manifest.counts.items() if not n.startswith("dropped_")},
        "dropped": dropped,
        "metrics": _metrics(artifact, damage),
        "decision": _object(artifact, "decision.json", damage),
        "info": manifest.info,
        "files": [_about(artifact, name, damage) for name in _groups(manifest)],
        "damage": damage,
    }


def _dropped(manifest: Manifest) -> dict[str, int]:
    counts = manifest.counts.items()
    return {n.removeprefix("dropped_"): v for n, v in counts if n.startswith("dropped_") and v}


def _metrics(artifact: Artifact, damage: list[str]) -> dict[str, Any]:
    """Return {metric: {value, low, high}}; the bounds only where they are known."""
    bounds = _object(artifact, "intervals.json", damage) or {}
    found: dict[str, Any] = {}
    for name, value in artifact.manifest.metrics.items():
        found[name] = {"value": _plain(value)}
        pair = bounds.get(name)
        if isinstance(pair, list) and len(pair) == 2:
            found[name] |= {"low": pair[0], "high": pair[1]}
    return found


def _object(artifact: Artifact, name: str, damage: list[str]) -> dict[str, Any] | None:
    if not any(entry.path == name for entry in artifact.manifest.files):
        return None
    try:
        return dict(read_object(artifact, name))
    except SpinError as error:
        damage.append(str(error))
        return None


def _groups(manifest: Manifest) -> dict[str, list[str]]:
    """Return the files by what they are called together: shards of a table share a name."""
    found: dict[str, list[str]] = {}
    for entry in manifest.files:
        stem, dash, number = entry.path.removesuffix(".parquet").rpartition("-")
        is_shard = entry.path.endswith(".parquet") and dash and number.isdecimal()
        found.setdefault(f"{stem}-*.parquet" if is_shard else entry.path, []).append(entry.path)
    return found


def _about(artifact: Artifact, name: str, damage: list[str]) -> dict[str, Any]:
    members = _groups(artifact.manifest)[name]
    entries = [e for e in artifact.manifest.files if e.path in set(members)]
    rows = [entry.rows for entry in entries if entry.rows is not None]
    columns = None
    if name.endswith(".parquet"):
        try:
            schema = _schema(artifact.path / members[0])
            columns = {each.name: str(each.type) for each in schema}
        except SpinError as error:
            damage.append(str(error))
    return {
        "name": name,
        "files": len(members),
        "rows": sum(rows) if rows else None,
        "size_bytes": sum(entry.size_bytes for entry in entries),
        "columns": columns,
    }


def _schema(path: Path) -> pa.Schema:
    """Return the schema of a table.

    Raises:
        CorruptError: it is no Parquet.
    """
    count_rows([path])  # tells what is wrong with a damaged file
    return pq.read_schema(path)


# -- Rows -----------------------------------------------------------------------------------------


def read_shown(artifact: Artifact, query: Query) -> Found:
    """Return some rows of one table of an artifact.

    Raises:
        InputError: there is no such table, or its rows have nothing to be sorted by.
        CorruptError: a file of the table is damaged.
    """
    name, members = _table(artifact, query)
    if not name.endswith(".parquet"):
        return Found(name, _first_lines(artifact, name, query))
    num_rows = sum(e.rows or 0 for e in artifact.manifest.files if e.path in members)
    if not num_rows:
        return Found(name, [])
    paths = [artifact.path / member for member in members]
    schema = _schema(paths[0])
    key = _sort_key(paths, schema, query.sort, artifact)
    own = _stream(artifact, members, schema)
    damage: list[str] = []
    if "prompt_id" not in schema.names:
        spread = key is None and not query.offset and query.find is None
        tables = _with_prompts(own, schema, artifact, None)
        chosen = _spread(tables, num_rows, query.rows) if spread else None
        data = None
    else:
        chosen, data = None, _data_of(artifact, schema, damage)
        tables = _with_prompts(own, schema, artifact, data)
    if chosen is None:
        kept = _matching(tables, query)
        if key is not None:
            chosen = _best(kept, query, key.value)
        else:
            backwards = query.sort == "prompt" and query.reverse
            chosen = _last(kept, query) if backwards else _first(kept, query)
    notes = _notes(artifact, query)
    if not (data is not None or _has_prompts(schema) or "prompt_id" not in schema.names):
        notes.append(_DAMAGED_PROMPTS if damage else _NO_PROMPTS)
    words = key.words if key else query.sort and "prompt_id"
    return Found(name, [_shown(row) for row in chosen], words, notes, damage)


def _notes(artifact: Artifact, query: Query) -> list[str]:
    """Return where else there is something to be found, if only one of several tables is read."""
    if query.file is not None or not (query.find or query.prompt_id):
        return []
    main = MAIN_TABLE.get(artifact.manifest.stage)
    names = [name.split(".")[0].split("-")[0] for name in _groups(artifact.manifest)]
    others = [name for name in names if name in ("train", "heldout") and name != main]
    return [f"in {main} alone; also: --file {name}" for name in others]


def _first_lines(artifact: Artifact, name: str, query: Query) -> list[Row]:
    """Return the content of a JSON file, or some lines of one with an object a line.

    Raises:
        InputError: it is a file of another kind, which is not read.
        CorruptError: it is no JSON.
    """
    ending = Path(name).suffix
    if ending not in (".json", ".jsonl"):
        raise InputError(
            f"{artifact.path / name} is no table and no JSON; tables are "
            f"{', '.join(_tables(_groups(artifact.manifest))) or 'none'}"
        )
    try:
        with artifact.file(name).open(encoding="utf-8", errors="replace") as file:
            lines = islice(file, query.offset, query.offset + query.rows)
            found = (
                [json.loads(line) for line in lines] if ending == ".jsonl" else [json.load(file)]
            )
    except (ValueError, RecursionError):
        raise CorruptError(
            f"{artifact.path / name} is no JSON; delete {artifact.path} and run its stage again"
        ) from None
    return [content if isinstance(content, dict) else {"content": content} for content in found]


def _tables(groups: Mapping[str, Any]) -> list[str]:
    return [name for name in groups if name.endswith((".parquet", ".json", ".jsonl"))]


def has_table(manifest: Manifest) -> bool:
    """Tell whether an artifact has a table that is shown where none is named."""
    name = MAIN_TABLE.get(manifest.stage)
    return name is not None and any(
        name == each.split(".")[0].split("-")[0] for each in _groups(manifest)
    )


def _table(artifact: Artifact, query: Query) -> tuple[str, list[str]]:
    """Return the name and the files of the table that is asked for."""
    groups = _groups(artifact.manifest)
    where = f"{artifact.path} ({artifact.manifest.stage})"
    if query.dropped:
        no_dropped = DROPPED_FILE not in groups and "unscored.parquet" in groups
        wanted = query.file or ("unscored" if no_dropped else "dropped")
    else:
        wanted = query.file or MAIN_TABLE.get(artifact.manifest.stage, "part")
    for name in (wanted, f"{wanted}.parquet", f"{wanted}-*.parquet"):
        if name in groups:
            return name, groups[name]
    if any(wanted in members for members in groups.values()):
        return wanted, [wanted]
    tables = _tables(groups)
    if query.dropped and query.file is None:
        raise InputError(f"{where} keeps no table of what it dropped; its counts say how much")
    if query.file is None:
        raise InputError(
            f"{where} has no table of rows to show; name a file by --file: "
            f"{', '.join(tables) or 'it has none'}"
        )
    raise InputError(f"{where} has no table {wanted}; it has {', '.join(tables) or 'none'}")


def _stream(
    artifact: Artifact,
    members: Sequence[str],
    schema: pa.Schema,
    columns: Sequence[str] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of some files, the hash of each checked when its turn comes."""
    for member in members:
        path = artifact.file(member)
        yield from read_batches([path], schema, columns=columns, batch_rows=_BATCH_ROWS)


def _with_prompts(
    own: Iterator[pa.RecordBatch], schema: pa.Schema, artifact: Artifact, data: Artifact | None
) -> Iterator[pa.Table]:
    """Yield rows, some thousand at a time, token lists as their lengths, their prompts joined."""
    counted = (_counted(batch) for batch in own)
    if data is None:
        yield from (pa.Table.from_batches([batch]) for batch in counted)
        return
    columns = ["prompt_id", "messages"]
    asked = pa.schema([PROMPTS.field(name) for name in columns])
    tables = [SortedTable(counted, _counted_schema(schema), artifact.path)]
    for part in _parts_asked(artifact.manifest):  # each is sorted by itself
        members = [e.path for e in data.manifest.files if e.path.startswith(part)]
        tables.append(SortedTable(_stream(data, members, PROMPTS, columns), asked, data.path))
    for rows, *found in aligned(tables):
        if rows.num_rows:
            texts = pa.concat_tables(found)
            places = pc.index_in(rows["prompt_id"], texts["prompt_id"].combine_chunks())
            yield rows.append_column("prompt_messages", texts["messages"].take(places))


def _parts_asked(manifest: Manifest) -> tuple[str, ...]:
    """Return how the names of the data's files begin that have the prompts of an artifact."""
    if manifest.stage == "suite":
        return ("heldout-", "train-") if manifest.config.get("asks") == "all" else ("heldout-",)
    return ("heldout-",) if manifest.stage == "evaluate" else ("train-",)


def _spread(tables: Iterator[pa.Table], num_rows: int, wanted: int) -> list[Row]:
    """Return so many rows at equal distances, the first and the last among them."""
    places = np.unique(np.linspace(0, num_rows - 1, min(wanted, num_rows)).round().astype(int))
    rows: list[Row] = []
    start = 0
    for table in tables:
        here = places[(places >= start) & (places < start + table.num_rows)] - start
        rows += table.take(pa.array(here)).to_pylist()
        start += table.num_rows
    return rows


def _counted_schema(schema: pa.Schema) -> pa.Schema:
    return pa.schema(
        [
            pa.field(_count_name(each.name), pa.int32(), each.nullable)
            if _is_tokens(each)
            else each
            for each in schema
        ]
    )


def _counted(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return a batch with the lengths of its lists of tokens in their places."""
    arrays = [
        pc.list_value_length(batch.column(i)) if _is_tokens(each) else batch.column(i)
        for i, each in enumerate(batch.schema)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=_counted_schema(batch.schema))


def _is_tokens(column: pa.Field) -> bool:
    return bool(pa.types.is_list(column.type) and pa.types.is_primitive(column.type.value_type))


def _count_name(name: str) -> str:
    return name.replace("_token_ids", "_tokens") if name.endswith("_token_ids") else f"num_{name}"


def _has_prompts(schema: pa.Schema) -> bool:
    return "messages" in schema.names or "prompt" in schema.names


def _data_of(artifact: Artifact, schema: pa.Schema, damage: list[str]) -> Artifact | None:
    """Open the data that an artifact's rows are of, None where it is not to be had.

    What of it is damaged is added to `damage`.
    """
    if _has_prompts(schema):
        return None
    root = run_root(artifact.path)
    manifest, depth = artifact.manifest, 0
    while root is not None and depth < len(MAIN_TABLE):
        name = next((n for n in ("data", "pairs", "generations") if n in manifest.inputs), None)
        if name is None or not manifest.inputs[name].inside_run:
            return None
        try:
            place = inner_path(root, manifest.inputs[name].path)
            manifest, depth = read_manifest(place), depth + 1
            if manifest.stage == "prepare":
                check_listing(place, manifest)
                return Artifact(place, manifest, artifact.verify)
        except SpinError as error:  # damaged or gone: the rows are shown without
            damage += [str(error)] if isinstance(error, CorruptError) else []
            return None
    return None


def _matching(tables: Iterator[pa.Table], query: Query) -> Iterator[pa.Table]:
    """Yield of each table the rows that are asked for."""
    for table in tables:
        kept = table
        if query.prompt_id is not None and "prompt_id" in table.column_names:
            kept = kept.filter(pc.starts_with(kept["prompt_id"], query.prompt_id))
        if query.find is not None:
            kept = kept.filter(pa.array(_holds(kept, query.find)))
        if kept.num_rows:
            yield kept


def _holds(table: pa.Table, text: str) -> npt.NDArray[np.bool_]:
    """Tell of each row whether a text stands in it, whatever the case of its letters."""
    found = np.zeros(table.num_rows, bool)
    for name in table.column_names:
        column = table[name]
        if pa.types.is_string(column.type):
            hits = pc.match_substring(column, text, ignore_case=True)
            found |= np.asarray(pc.fill_null(hits, False))
        elif name in ("messages", "prompt_messages"):
            sought = text.casefold()
            found |= np.array(
                [any(sought in m["content"].casefold() for m in said or ())
                 for said in column.to_pylist()], bool,
            )  # fmt: skip
    return found


def _first(tables: Iterator[pa.Table], query: Query) -> list[Row]:
    rows: list[Row] = []
    skip = query.offset
    for table in tables:
        part = table.slice(min(skip, table.num_rows), query.rows - len(rows))
        skip = max(0, skip - table.num_rows)
        rows += part.to_pylist()
        if len(rows) >= query.rows:
            break
    return rows


def _last(tables: Iterator[pa.Table], query: Query) -> list[Row]:
    """Return rows counted from the end, the last one first."""
    held: list[Row] = []
    wanted = query.offset + query.rows
    for table in tables:
        part = table.slice(max(0, table.num_rows - wanted))
        held = (held + part.to_pylist())[-wanted:]
    return held[::-1][query.offset :]


@dataclass(frozen=True)
class _Key:
    """What rows are sorted by."""

    words: str
    value: Callable[[pa.Table], npt.NDArray[np.float64]]
    """NaN where a row has none."""


def _best(
    tables: Iterator[pa.Table],
    query: Query,
    value: Callable[[pa.Table], npt.NDArray[np.float64]],
) -> list[Row]:
    """Return the rows with the highest keys, or the lowest; those without one come last.

    Held are `offset + rows` rows and one batch, however long the table.
    """
    sign, wanted = (-1.0 if query.reverse else 1.0), query.offset + query.rows
    heap: list[tuple[float, int, Row]] = []
    seen = 0
    for table in tables:
        keys = value(table) * sign
        keys[np.isnan(keys)] = -math.inf
        for place in np.argsort(-keys, kind="stable")[:wanted].tolist():
            entry = (float(keys[place]), -(seen + place))
            if len(heap) == wanted and entry < heap[0][:2]:
                break
            row = table.slice(place, 1).to_pylist()[0]
            (heapq.heappush if len(heap) < wanted else heapq.heapreplace)(heap, (*entry, row))
        seen += table.num_rows
    ordered = sorted(heap, key=lambda each: each[:2], reverse=True)
    return [row for _, _, row in ordered[query.offset :]]


def _sort_key(
    paths: Sequence[Path], schema: pa.Schema, sort: str | None, artifact: Artifact
) -> _Key | None:
    """Return what to sort by; None for the table's own order, which is that of prompt ids."""
    if sort in (None, "prompt"):
        return None
    if sort not in SORTS:
        raise ConfigError(f"--sort {sort}: rows are sorted by {', '.join(SORTS)}")
    if sort == "margin":
        for high, low in MARGINS:
            if _has_values(paths, schema, high) and _has_values(paths, schema, low):
                return _difference(high, low)
        names = ["margin"]
    elif sort == "reward":
        names = list(_REWARDS)
    else:
        return _length_key(schema, artifact)
    for name in names:
        if _has_values(paths, schema, name):
            return _column(name)
    raise InputError(
        f"{artifact.path} ({artifact.manifest.stage}) has no {sort} to sort its rows by; sort by "
        "length or prompt, or show another stage: pairs have rewards where a reward ranked them, "
        "margins after score, or after evaluate"
    )


def _difference(high: str, low: str) -> _Key:
    return _Key(f"{high} - {low}", lambda t: _numbers(t, high) - _numbers(t, low))


def _column(name: str) -> _Key:
    return _Key(name, lambda t: _numbers(t, name))


def _length_key(schema: pa.Schema, artifact: Artifact) -> _Key:
    """Return the number of tokens of all responses of a row, or of characters without tokens."""
    tokens = [
        _count_name(each.name)
        for each in schema
        if _is_tokens(each) and each.name.endswith("_token_ids")
    ]
    tokens = [name for name in tokens if name not in ("prompt_tokens", "human_tokens")]
    tokens += [name for name in ("response_tokens",) if name in schema.names]
    if tokens:
        return _Key(" + ".join(tokens), lambda t: _total(_numbers(t, name) for name in tokens))
    if "response" not in schema.names:
        raise InputError(
            f"{artifact.path} ({artifact.manifest.stage}): its rows have no response whose length "
            "they could be sorted by; leave --sort out"
        )
    return _Key("characters of the response", lambda t: _characters(t["response"]))


def _characters(texts: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    return np.asarray(pc.fill_null(pc.utf8_length(texts).cast(pa.float64()), math.nan))


def _total(columns: Iterator[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """Add columns up, a missing value counting as none."""
    return np.asarray(np.nansum(np.stack(list(columns)), axis=0), np.float64)


def _numbers(table: pa.Table, name: str) -> npt.NDArray[np.float64]:
    column = table[name].cast(pa.float64())
    return np.array(pc.fill_null(column, math.nan), np.float64)


def _has_values(paths: Sequence[Path], schema: pa.Schema, name: str) -> bool:
    """Tell whether a column is there and not all null, by the statistics in the footers."""
    if name not in schema.names:
        return False
    if not pa.types.is_floating(schema.field(name).type):
        return bool(pa.types.is_integer(schema.field(name).type))
    for path in paths:
        footer = pq.read_metadata(path)
        place = footer.schema.names.index(name) if name in footer.schema.names else None
        for group in range(footer.num_row_groups):
            if place is None:
                return True
            statistics = footer.row_group(group).column(place).statistics
            if statistics is None or statistics.null_count < footer.row_group(group).num_rows:
                return True
    return False


def _shown(row: Row) -> Row:
    """Return a row as it is shown: the prompt under one name, and only what JSON can hold."""
    if "prompt_messages" in row:
        said = row.pop("prompt_messages")
        row = {"prompt_id": row["prompt_id"], "prompt": said, **row}
    elif "messages" in row:
        row = {n: row[n] for n in row if n != "messages"} | {"prompt": row["messages"]}
        row = {"prompt_id": row.pop("prompt_id"), "prompt": row.pop("prompt"), **row}
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
