"""prepare: data of any accepted form becomes prompts, human responses, and a held-out part.

    spin prepare --source train.jsonl --out data prepare.format=gsm8k

Rows are read once, spilled in a form that sorts by prompt id, sorted outside memory, and written
group by group; so memory does not grow with the data. The disk holds about twice the text of the
source meanwhile.

Which prompts are held out (and which are kept under `max_prompts`) depends on the prompts alone:
not on the order of rows, and on purpose not on the run's seed. Runs of several seeds are compared
on the same held-out prompts, and so are the runs of two people who have the same data.
"""

import itertools
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from stages.artifacts import (
    Manifest,
    Outcome,
    Plan,
    TableWriter,
    Workspace,
    count_rows,
    locks,
    produce,
    read_batches,
    read_manifest,
)
from stages.artifacts.files import inner_path, make_folder, writing
from stages.artifacts.keys import sha256_text
from stages.artifacts.manifest import MANIFEST_NAME
from stages.artifacts.produce import check_outside_artifacts
from stages.config import ContaminationConfig, PrepareConfig, RunConfig
from stages.data.contamination import HeldoutNgrams, prompt_texts, response_texts
from stages.data.formats import (
    PROMPT_ID_DIGITS,
    Adapter,
    Gsm8k,
    MalformedRowError,
    Message,
    Messages,
    PromptResponse,
    prompt_id,
)
from stages.data.inputs import PrepareInputs, find_inputs
from stages.data.rows import CONTAMINATION, DROPPED, DROPPED_FILE, PROMPTS
from stages.data.sorting import LineSorter
from stages.data.sources import (
    HubSource,
    RawRow,
    Source,
    commit_name,
    is_data_file,
)
from stages.errors import InputError
from stages.progress import progress
from stages.remote import Remote, is_url, local_path, open_remote

log = logging.getLogger("spin")

FORMAT_VERSION = 1
REASONS = (
    "duplicate",
    "same_prompt",
    "in_heldout",
    "not_drawn",
    "empty_prompt",
    "empty_response",
    "malformed",
)
"""Why a row is in no part; docs/data.md explains each."""

CONTAMINATION_NAME = "contamination.parquet"
DRAW_SALT = "spin-heldout"
FETCHERS = 4
SOURCES = ("source", "heldout_source")
PART_ROWS = 100_000
PATIENCE_ROWS = 1000
"""A source whose first rows are all malformed, this many, is refused without reading on."""

HELDOUT_SIDE, TRAIN_SIDE = 0, 1
"""Sort order of the rows of one prompt: those of `heldout_source` come first."""
_NO_ID = " " * PROMPT_ID_DIGITS  # sorts before every id
_EVERY = "~"  # sorts after every draw
_ORDINAL_DIGITS = 14
_GOOD_AT = PROMPT_ID_DIGITS + 1 + _ORDINAL_DIGITS
_GOOD = b"+"
_encode = json.JSONEncoder(ensure_ascii=False).encode


def run(config: RunConfig, out: Path) -> Manifest:
    """Make the data artifact `out`: train-*.parquet, heldout-*.parquet and dropped.parquet.

    With a held-out part also contamination.parquet, unless `prepare.contamination.ngram` is 0.

    Returns:
        Its manifest; `counts` has rows_in, train, heldout and dropped_REASON for every reason,
        and rows_in is the sum of the others. `metrics` has contaminated_prompt_share and
        contaminated_ngram_share; see `HeldoutNgrams.metrics`.

    Raises:
        ConfigError: the settings name no source, or contradict each other.
        InputError: the data cannot be read, is not of its format, or is too little.
    """
    with _local(config.prepare, out) as (section, marks):
        fingerprints = _recorded(section, out, marks)
        inputs = None
        if fingerprints is None:
            inputs = find_inputs(section, _known_commits(out))
            fingerprints = {"source": inputs.source.fingerprint}
            if inputs.heldout_source is not None:
                fingerprints["heldout_source"] = inputs.heldout_source.fingerprint
        plan = Plan(
            stage="prepare",
            format_version=FORMAT_VERSION,
            config={"prepare": section.identity()},
            inputs={},
            fingerprints=fingerprints,
        )
        return produce(out, plan, lambda workspace: _fill(workspace, section, inputs, marks))


def make_adapter(section: PrepareConfig) -> Adapter:
    """Return the adapter for the format that the settings name."""
    match section.format:
        case "messages":
            return Messages(section.messages_column)
        case "prompt_response":
            return PromptResponse(section.prompt_column, section.response_column)
        case "gsm8k":
            return Gsm8k(section.strip_calculator)
        case "word_sums":
            return PromptResponse()


def _known_commits(out: Path) -> dict[str, str]:
    """Return what the finished artifact at `out` resolved revisions to.

    An unpinned data set thus stays at the commit of its first use: running a finished command
    again needs no network, and a push to the hub cannot break a run half way.
    """
    if not (out / MANIFEST_NAME).is_file():
        return {}
    return dict(read_manifest(out).info.get("commits", {}))


# Sources at a URL


@contextmanager
def _local(
    section: PrepareConfig, out: Path
) -> Iterator[tuple[PrepareConfig, dict[str, str | None]]]:
    """Yield the settings with copies on this disk for sources at a URL, and the marks of those.

    The copies lie beside `out` while the block runs, and are not made where `out` was made from the
    same objects; a mark changes whenever an object does (see `Remote.mark`).

    Raises:
        BusyError: another process fetches for `out`.
        InputError: there is nothing at a URL, or it cannot be read.
    """
    urls = {name: url for name in SOURCES if is_url(url := getattr(section, name) or "")}
    if not urls:
        yield section, {}
        return
    check_outside_artifacts(out)
    places: dict[str, str] = {}
    marks: dict[str, str | None] = {}
    folder = out.parent / f".{out.name}.source"
    with locks.hold(locks.lock_path(folder), f"{out} (its sources)"), writing(out):
        shutil.rmtree(folder, ignore_errors=True)  # of a command that was killed
        try:
            remotes = {}
            for name, url in urls.items():
                path = local_path(url)
                if path is not None:
                    places[name] = str(path)
                else:
                    remotes[name] = open_remote(url)
                    marks[name] = remotes[name].mark()
            if _recorded(section, out, marks) is None:
                for name, remote in remotes.items():
                    places[name] = str(_fetch(remote, folder / name, f"prepare.{name}"))
            yield section.model_copy(update=places), marks
        except InputError as error:  # the reader knows the copies only
            raise InputError(_with_urls(str(error), places, urls)) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _with_urls(text: str, places: Mapping[str, str], urls: Mapping[str, str]) -> str:
    for name, place in places.items():
        text = text.replace(place, urls[name].rstrip("/"))
    return text


def _fetch(remote: Remote, folder: Path, setting: str) -> Path:
    """Copy the data files at a URL into a folder; return the copy of the file or folder itself.

    Raises:
        InputError: there are none.
    """
    top = folder / remote.url.rpartition("/")[2]
    sizes = {name: size for name, size in remote.files().items() if not name or is_data_file(name)}
    if not sizes:
        raise InputError(
            f"{setting}={remote.url} holds no data file; name a file, or the folder of the data"
        )
    total = sum(sizes.values())
    with progress("fetch", total=total, unit="bytes") as bar, ThreadPoolExecutor(FETCHERS) as ahead:
        for name, size_bytes in sizes.items():
            path = inner_path(folder, f"{top.name}/{name}" if name else top.name,
                              named_by=remote.url)  # fmt: skip
            make_folder(path.parent)
            with path.open("xb") as file:
                for chunk in remote.chunks(name, size_bytes, ahead):
                    file.write(chunk)
                    bar.advance(len(chunk))
    return top


def _recorded(
    section: PrepareConfig, out: Path, marks: Mapping[str, str | None]
) -> dict[str, str] | None:
    """Return the fingerprints of the finished artifact at `out`, None where they may have changed.

    Known to hold are those of sources that are all at a URL, of which no object has changed since:
    so a finished artifact is recognized without fetching them again.
    """
    named = {name for name in SOURCES if getattr(section, name) is not None}
    if not marks or marks.keys() != named or None in marks.values():
        return None
    if not (out / MANIFEST_NAME).is_file():
        return None
    manifest = read_manifest(out)
    read = named | ({"heldout_source"} if section.heldout_split is not None else set())
    same = manifest.info.get("marks") == marks and manifest.fingerprints.keys() == read
    return dict(manifest.fingerprints) if same else None


def _fill(
    workspace: Workspace,
    section: PrepareConfig,
    inputs: PrepareInputs | None,
    marks: Mapping[str, str | None],
) -> Outcome:
    assert inputs is not None, f"{workspace.path}: its artifact was deleted meanwhile"
    adapter = make_adapter(section)
    with TemporaryDirectory(prefix="spill-", dir=workspace.path) as spill:
        rows = LineSorter(Path(spill, "rows"))
        ordinals = itertools.count()
        if inputs.heldout_source is not None:
            _collect(inputs.heldout_source, HELDOUT_SIDE, adapter, rows, ordinals)
        _collect(inputs.source, TRAIN_SIDE, adapter, rows, ordinals)
        sorted_rows = rows.finish()
        limits = _draw(sorted_rows, section, inputs, Path(spill, "draws"))
        counts = _write(workspace, sorted_rows, limits)
    info = _provenance(inputs) | ({"marks": dict(marks)} if marks else {})
    if not counts["heldout"] or not section.contamination.ngram:
        return Outcome(counts=counts, info=info)
    found = _look_for_contamination(workspace, section.contamination.ngram)
    _warn_of_contamination(found, section.contamination)
    return Outcome(
        counts=counts,
        metrics=found.metrics(),
        info=info | {"common_ngrams": found.num_common},
    )


def _provenance(inputs: PrepareInputs) -> dict[str, Any]:
    sources = {"source": inputs.source, "heldout_source": inputs.heldout_source}
    names = {name: source.name for name, source in sources.items() if source is not None}
    commits = {
        commit_name(source.name, source.revision): source.commit
        for source in sources.values()
        if isinstance(source, HubSource)
    }
    return {**names, "commits": commits}


# Rows on their way


class _Row(NamedTuple):
    """A row between reading and writing: adapted, or to be dropped already."""

    prompt_id: str
    """Empty for a row that has no prompt."""
    side: int
    origin: str
    row_index: int
    reason: str
    """Why it is dropped; empty for a row that is a good example."""
    text: str
    """The response, or for a row to be dropped what is wrong with it."""
    messages: list[Message]
    """The prompt; empty for a row to be dropped."""

    def to_line(self, ordinal: int) -> bytes:
        """Return the line that sorts by prompt id, side, and order of reading."""
        key = f"{self.prompt_id or _NO_ID}{self.side}{ordinal:0{_ORDINAL_DIGITS}d}"
        mark = "-" if self.reason else "+"
        return f"{key}{mark}{_encode(self[2:])}\n".encode()

    @classmethod
    def from_line(cls, line: bytes) -> "_Row":
        """Return the row that `to_line` wrote."""
        text = line.decode()
        head, side = text[:PROMPT_ID_DIGITS].strip(), int(text[PROMPT_ID_DIGITS])
        return cls(head, side, *json.loads(text[_GOOD_AT + 1 :]))

    @property
    def place(self) -> str:
        """The row's name in messages."""
        return f"{self.origin} row {self.row_index}"


def _collect(
    source: Source, side: int, adapter: Adapter, rows: LineSorter, ordinals: Iterator[int]
) -> None:
    """Read all rows of one source into the sorter.

    Raises:
        InputError: there is none, or (of the first `PATIENCE_ROWS`) none that is not malformed.
    """
    num_rows = num_malformed = 0
    first = ""
    for raw in source.rows(adapter.columns):
        row = _adapt(raw, side, adapter)
        rows.add(row.to_line(next(ordinals)))
        num_rows += 1
        if row.reason == "malformed":
            num_malformed += 1
            first = first or f"{row.place}: {row.text}"
            if num_malformed == num_rows == PATIENCE_ROWS:
                break
    if num_rows == 0:
        raise InputError(f"prepare: {source.name} holds no rows; name another source")
    if num_malformed == num_rows:
        raise InputError(
            f"prepare: all of the first {num_rows} rows of {source.name} are malformed; {first}"
        )
    log.info("prepare: read %d rows of %s", num_rows, source.name)


def _adapt(raw: RawRow, side: int, adapter: Adapter) -> _Row:
    try:
        example = adapter(raw.values)
    except MalformedRowError as error:
        return _Row("", side, raw.origin, raw.row_index, "malformed", str(error), [])
    reason = example.emptiness()
    if reason == "empty_prompt":
        return _Row("", side, raw.origin, raw.row_index, reason, "the prompt is blank", [])
    identity = prompt_id(example.messages)
    if reason == "empty_response":
        return _Row(identity, side, raw.origin, raw.row_index, reason, "the response is blank", [])
    return _Row(identity, side, raw.origin, raw.row_index, "", example.response, example.messages)


# The draw


@dataclass(frozen=True)
class _Limits:
    """Which prompts are drawn: those whose draw is at most the limit of their part."""

    own_heldout: bool
    """The held-out prompts are drawn from the source itself."""
    heldout: str
    train: str

    def part(self, row: _Row) -> str:
        """Return the part of a prompt's first good row: train, heldout or not_drawn."""
        draw = draw_of(row.prompt_id)
        if self.own_heldout:
            parts = [("heldout", self.heldout), ("train", self.train)]
        elif row.side == HELDOUT_SIDE:
            parts = [("heldout", self.heldout)]
        else:
            parts = [("train", self.train)]
        return next((name for name, limit in parts if draw <= limit), "not_drawn")


def draw_of(identity: str) -> str:
    """Return a prompt's place in the draw; the smallest are drawn first. No seed: see the top."""
    return sha256_text(f"{DRAW_SALT}/{identity}")


def _draw(
    sorted_rows: Path, section: PrepareConfig, inputs: PrepareInputs, folder: Path
) -> _Limits:
    """Find the draws up to which prompts are held out, and up to which they are trained on.

    Without a held-out source the training prompts follow the held-out ones in one and the same
    order, so a larger `heldout_size` holds out the same prompts and more.

    Raises:
        InputError: there are fewer prompts than are wanted.
    """
    draws = LineSorter(folder)
    num_prompts = Counter[int]()
    for identity, side in _prompts(sorted_rows):
        num_prompts[side] += 1
        draws.add(f"{side}{draw_of(identity)}\n".encode())
    _check_enough(num_prompts, section.heldout_size, inputs)
    own_heldout = inputs.heldout_source is None
    sorted_draws = draws.finish()
    heldout_side = TRAIN_SIDE if own_heldout else HELDOUT_SIDE
    heldout = _nth_draw(sorted_draws, heldout_side, section.heldout_size)
    train = _EVERY
    if section.max_prompts is not None:
        before = section.heldout_size if own_heldout else 0
        train = _nth_draw(sorted_draws, TRAIN_SIDE, before + section.max_prompts)
    return _Limits(own_heldout, heldout, train)


def _prompts(sorted_rows: Path) -> Iterator[tuple[str, int]]:
    """Stream each prompt that has a good row, with the side of the first such row."""
    previous = b""
    with sorted_rows.open("rb") as file:
        for line in file:
            head = line[:PROMPT_ID_DIGITS]
            if line[_GOOD_AT : _GOOD_AT + 1] == _GOOD and head != previous:
                previous = head
                yield head.decode(), int(line[PROMPT_ID_DIGITS : PROMPT_ID_DIGITS + 1])


def _nth_draw(sorted_draws: Path, side: int, n: int) -> str:
    """Return the n-th smallest draw of a side, counted from 1; "" for n = 0, else every draw."""
    if n == 0:
        return ""
    with sorted_draws.open(encoding="ascii") as file:
        of_side = (line[1:].rstrip() for line in file if int(line[0]) == side)
        return next(itertools.islice(of_side, n - 1, None), _EVERY)


def _check_enough(num_prompts: Counter[int], heldout_size: int, inputs: PrepareInputs) -> None:
    source, heldout_source = inputs.source, inputs.heldout_source
    num_train, num_heldout = num_prompts[TRAIN_SIDE], num_prompts[HELDOUT_SIDE]
    if heldout_source is None:
        if num_train < heldout_size + 1:
            raise InputError(
                f"prepare: {source.name} has {num_train} different prompts with a response; "
                f"prepare.heldout_size={heldout_size} and one to train on need "
                f"{heldout_size + 1}: use more data, or a smaller prepare.heldout_size"
            )
        return
    if not num_train:
        raise InputError(
            f"prepare: {source.name} has no prompt with a response that the held-out source "
            f"{heldout_source.name} ({num_heldout} prompts) does not have too; name another "
            "prepare.heldout_source, or unset it to draw from the source"
        )
    if heldout_size and not num_heldout:
        raise InputError(
            f"prepare: the held-out source {heldout_source.name} has no prompt with a response; "
            "name another prepare.heldout_source"
        )
    if num_heldout < heldout_size:
        log.warning(
            "prepare: %s has %d prompts, fewer than prepare.heldout_size=%d: all are held out",
            heldout_source.name,
            num_heldout,
            heldout_size,
        )


# Writing


def _write(workspace: Workspace, sorted_rows: Path, limits: _Limits) -> dict[str, int]:
    """Write all parts in the order of prompt ids, and count."""
    counts = Counter[str]()
    with (
        closing(_Parts(workspace, "train")) as train,
        closing(_Parts(workspace, "heldout")) as heldout,
        TableWriter(workspace.file(DROPPED_FILE), DROPPED) as dropped,
    ):
        parts = {"train": train, "heldout": heldout}
        for row, part, detail in _fates(sorted_rows, limits):
            counts["rows_in"] += 1
            if part in parts:
                counts[part] += 1
                parts[part].append(row)
            else:
                counts[f"dropped_{part}"] += 1
                text = f"{row.place}: {detail}"
                dropped.append({"prompt_id": row.prompt_id, "reason": part, "detail": text})
    names = ["rows_in", "train", "heldout", *(f"dropped_{reason}" for reason in REASONS)]
    assert set(counts) <= set(names), f"prepare counted {sorted(counts)}"
    return {name: counts[name] for name in names}


def _fates(sorted_rows: Path, limits: _Limits) -> Iterator[tuple[_Row, str, str]]:
    """Stream every row with its part or drop reason, and for dropped ones the detail."""
    first: _Row | None = None
    with sorted_rows.open("rb") as file:
        for row in map(_Row.from_line, file):
            if row.reason:
                yield row, row.reason, row.text
            elif first is None or row.prompt_id != first.prompt_id:
                first, part = row, limits.part(row)
                yield row, part, "beyond the number of prompts wanted"
            elif row.side != first.side:
                yield row, "in_heldout", f"its prompt is in the held-out source ({first.place})"
            elif row.text == first.text:
                yield row, "duplicate", f"same prompt and response as {first.place}"
            else:
                yield row, "same_prompt", f"another response to the prompt of {first.place}"


class _Parts:
    """The files of one part, each of at most `PART_ROWS` rows."""

    def __init__(self, workspace: Workspace, name: str) -> None:
        self._workspace = workspace
        self._name = name
        self._num_files = 0
        self._num_rows = 0
        self._writer: TableWriter | None = None

    def append(self, row: _Row) -> None:
        if self._writer is None or self._num_rows == PART_ROWS:
            self.close()
            path = self._workspace.file(f"{self._name}-{self._num_files:05d}.parquet")
            self._writer = TableWriter(path, PROMPTS)
            self._num_files += 1
            self._num_rows = 0
        self._num_rows += 1
        self._writer.append(
            {
                "prompt_id": row.prompt_id,
                "messages": row.messages,
                "response": row.text,
                "source": row.origin,
                "source_row": row.row_index,
            }
        )

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


# Contamination


def _look_for_contamination(workspace: Workspace, ngram: int) -> HeldoutNgrams:
    """Write contamination.parquet: each held-out prompt with what of it stands in training rows."""
    heldout, train = (
        sorted(workspace.path.glob(f"{part}-*.parquet")) for part in ("heldout", "train")
    )
    ids, texts = [], []
    for batch in read_batches(heldout, PROMPTS, columns=["prompt_id", "messages"]):
        ids += batch["prompt_id"].to_pylist()
        texts.append(prompt_texts(batch["messages"]))
    found = HeldoutNgrams(ids, texts, ngram)
    with progress("contamination", total=count_rows(train), unit="rows") as bar:
        for batch in read_batches(train, PROMPTS, columns=["prompt_id", "messages", "response"]):
            found.scan(
                batch["prompt_id"],
                prompt_texts(batch["messages"]),
                response_texts(batch["response"]),
            )
            bar.advance(batch.num_rows)
    with TableWriter(workspace.file(CONTAMINATION_NAME), CONTAMINATION) as table:
        table.append_batch(found.report())
    return found


def _warn_of_contamination(found: HeldoutNgrams, section: ContaminationConfig) -> None:
    share = found.metrics()["contaminated_prompt_share"]
    if share > section.warn_share:
        log.warning(
            "prepare: %d of %d held-out prompts (%.1f%%) stand in training rows, in part or as a "
            "whole; a result on them may be memory: see %s in the data, and take those rows out of "
            "the source (or raise prepare.contamination.warn_share=%g)",
            round(share * len(found.ids)), len(found.ids), 100 * share, CONTAMINATION_NAME,
            section.warn_share,
        )  # fmt: skip
