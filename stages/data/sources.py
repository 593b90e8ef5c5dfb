"""Where raw rows come from: local files, a data set of the Hugging Face hub, the built-in task.

Everything is streamed: at most a batch of rows, or one long row, is in memory. A local data set is
read by this module alone, so that a message can name the line; only the hub needs `datasets`.
"""

import csv
import glob
import gzip
import itertools
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, cast

import pyarrow as pa
import pyarrow.parquet as pq

from stages.artifacts.keys import canonical_json, sha256_file, sha256_text
from stages.data.formats import Column, bare, missing_column, quoted
from stages.data.word_sums import Style, word_sums
from stages.errors import InputError

log = logging.getLogger("spin")

Values = dict[str, Any]

BATCH_ROWS = 1024
CHUNK_CHARACTERS = 2**20
LONGEST_ELEMENT_CHARACTERS = 16 * 2**20
HUB_TIMEOUT_S = 20.0

# What `datasets` takes for marks of a split in the name of a file or folder.
_SPLIT_WORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_SHARD_OF_SPLIT = re.compile(r"(\w+(?:\.\w+)*?)-\d{5}-of-\d{5}.*", re.ASCII)
_WORD = re.compile(r"[a-z]+")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_METADATA = frozenset(
    {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
)
# What stands before an element of a JSON list, or ends the list.
_LIST_LEAD = re.compile(r"\s*(\[\s*\]|[\[,\]])\s*")


class RawRow(NamedTuple):
    """A row as it lies in its source."""

    origin: str
    """The file's name inside the source, or the data set's id."""
    row_index: int
    """From 0 within the origin."""
    values: Mapping[str, Any]


class Source(Protocol):
    """Rows, and what they are the rows of."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for equal rows in equal order under equal origins, wherever they lie."""
        ...

    def rows(self, columns: Sequence[Column]) -> Iterator[RawRow]:
        """Stream all rows in source order; columns other than `columns` may be left out.

        Raises:
            InputError: something cannot be read, or has no such column or one of another type.
        """
        ...


def open_source(
    source: str,
    *,
    split: str,
    subset: str | None,
    revision: str | None,
    setting: str,
    known_commits: Mapping[str, str],
) -> Source:
    """Find what `source` names: a file, a glob, a folder, or else a data set of the hub.

    Args:
        split: of a folder or a hub data set; a file or a glob is read whole.
        subset: of a folder (a folder inside it) or a hub data set.
        revision: of a hub data set.
        setting: what the user calls this source, for messages.
        known_commits: commits that hub data sets were resolved to before; see `commit_name`.

    Raises:
        InputError: there is no such thing, or it has no such split.
    """
    path, shown = Path(source), f"{setting}={source}"
    if path.is_file():
        return FileSource(path.name, (SourceFile.of(path, path.name, shown),))
    if path.is_dir():
        files = _folder_files(path, split, subset, shown)
        return FileSource(path.resolve().name, files, has_splits=True)
    if path.exists():
        raise InputError(f"{shown} is no file or folder; save its content to a file first")
    if glob.has_magic(source):
        return FileSource(source.rpartition("/")[2], _matching_files(source, shown))
    if _HUB_ID.fullmatch(source) and _kind(source) is None:
        commit = known_commits.get(commit_name(source, revision))
        commit = commit or _resolve_commit(source, revision, shown)
        return HubSource(source, subset, split, revision, commit)
    raise InputError(f"{shown} does not exist; correct the path")


# Local files


@dataclass(frozen=True)
class SourceFile:
    """One local file of rows."""

    path: Path
    name: str
    """Relative to its source, `/` between folders; what `source` says in the rows."""
    kind: str

    @classmethod
    def of(cls, path: Path, name: str, shown: str) -> "SourceFile":
        """Return the file, its kind taken from its name.

        Raises:
            InputError: it is of no kind that can be read.
        """
        kind = _kind(name)
        if kind is None:
            raise InputError(
                f"{shown}: {bare(name)} is of no known kind; name a file ending in "
                f"{', '.join(_READERS)} (text also with .gz)"
            )
        # A file system may hold names that are no text; columns of a table cannot.
        return cls(path, os.fsencode(name).decode("utf-8", "backslashreplace"), kind)


@dataclass(frozen=True)
class FileSource:
    """One or more local files of one kind, in the order of their names."""

    name: str
    files: tuple[SourceFile, ...]
    has_splits: bool = False

    @cached_property
    def _contents(self) -> list[tuple[str, int, str]]:
        """Name, size in bytes and SHA-256 of each file."""
        found = []
        for file in self.files:
            with _readable(file.path):
                found.append((file.name, file.path.stat().st_size, sha256_file(file.path)))
        return found

    @cached_property
    def fingerprint(self) -> str:
        """Hash over the names and SHA-256 of the files."""
        return sha256_text(canonical_json([[name, digest] for name, _, digest in self._contents]))

    def rows(self, columns: Sequence[Column]) -> Iterator[RawRow]:
        """Stream the rows of all files; see `Source`."""
        for file, (_, size_bytes, _) in zip(self.files, self._contents, strict=True):
            for index, values in enumerate(_READERS[file.kind](file.path, columns)):
                yield RawRow(file.name, index, values)
            if file.path.stat().st_size != size_bytes:
                raise InputError(
                    f"{file.path} changed while it was read; wait until it is written, "
                    "then run it again"
                )


def is_data_file(name: str) -> bool:
    """Tell whether a file below a folder, by its relative path, is looked at at all."""
    plain = not _is_hidden(Path(name))
    return plain and (_kind(name) is not None or Path(name).name in _METADATA)


def _kind(name: str) -> str | None:
    suffix = Path(name.removesuffix(".gz")).suffix.lower()
    suffix = ".jsonl" if suffix == ".ndjson" else suffix
    packed = name.endswith(".gz") and suffix in (".parquet", ".arrow")
    return suffix if suffix in _READERS and not packed else None


def _matching_files(pattern: str, shown: str) -> tuple[SourceFile, ...]:
    parts = Path(pattern).parts
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), parts))
    root = Path(*fixed)
    found = root.glob("/".join(parts[len(fixed) :]))
    names = [path.relative_to(root) for path in found if path.is_file()]
    visible = [name.as_posix() for name in names if not _is_hidden(name)]
    if not visible:
        raise InputError(f"{shown} matches no file; correct the pattern")
    return _of_one_kind([SourceFile.of(root / name, name, shown) for name in visible], shown)


def _folder_files(
    folder: Path, split: str, subset: str | None, shown: str
) -> tuple[SourceFile, ...]:
    root = folder
    if subset is not None:
        root = folder / subset
        if not root.is_dir():
            raise InputError(
                f"{shown} has no folder {bare(subset)}; correct prepare.subset, or leave it unset"
            )
    if (root / "dataset_dict.json").is_file():  # a DatasetDict of `datasets`, saved to disk
        splits = _saved_record(root / "dataset_dict.json")["splits"]
        if split not in splits:
            raise InputError(_no_split(shown, split, splits))
        root = root / split
    if (root / "state.json").is_file():  # a Dataset, saved to disk; other files are its caches
        state = _saved_record(root / "state.json")
        names = [Path(str(entry["filename"])).name for entry in state["_data_files"]]
    else:
        names = _data_files_below(root)
        names = _files_of_split(names, split, shown)
    if not names:
        raise InputError(
            f"{shown} holds no file ending in {', '.join(_READERS)}; name the folder of the data"
        )
    return _of_one_kind([SourceFile.of(root / name, name, shown) for name in names], shown)


def _saved_record(path: Path) -> dict[str, Any]:
    wanted = "splits" if path.name == "dataset_dict.json" else "_data_files"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {wanted: list(record[wanted])}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} is not what `datasets` saves; save the data set again (save_to_disk)"
        ) from None


def _data_files_below(root: Path) -> list[str]:
    names = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    return [
        name.as_posix()
        for name in names
        if _kind(name.name) is not None and name.name not in _METADATA and not _is_hidden(name)
    ]


def _is_hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def _files_of_split(names: list[str], split: str, shown: str) -> list[str]:
    """Return the files of a split, or all files where no name is marked with a split."""
    splits = {name: _split_of(name) for name in names}
    if not any(splits.values()):
        return names
    wanted = [
        name
        for name in names
        if splits[name] in (split, _SPLIT_WORDS.get(split))
        or split in (part.partition(".")[0] for part in name.split("/"))
    ]
    if not wanted:
        raise InputError(_no_split(shown, split, sorted({s for s in splits.values() if s})))
    if len(wanted) < len(names):
        log.info("%s: reading split %s: %s", shown, split, ", ".join(sorted(wanted)))
    return wanted


def _split_of(name: str) -> str | None:
    """Return the split that a file's name, or else its folder's, is marked with.

    `data/train_sft-00000-of-00003.parquet` is of train_sft, `test.jsonl` and `test/a.csv` of test.
    """
    *folders, last = name.split("/")
    shard = _SHARD_OF_SPLIT.fullmatch(last)
    if shard and any(word in _SPLIT_WORDS for word in _WORD.findall(shard[1].lower())):
        return _SPLIT_WORDS.get(shard[1].lower(), shard[1])
    for part in (last, *reversed(folders)):
        for word in _WORD.findall(part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return None


def _no_split(shown: str, split: str, splits: Sequence[str]) -> str:
    there = ", ".join(bare(str(name)) for name in splits) or "none"
    return (
        f"{shown} has no split {bare(split)}; splits there: {there}; set prepare.split or "
        "prepare.heldout_split to one of them, or name its files"
    )


def _of_one_kind(files: list[SourceFile], shown: str) -> tuple[SourceFile, ...]:
    kinds = sorted({file.kind for file in files})
    if len(kinds) > 1:
        raise InputError(
            f"{shown} holds files of several kinds ({', '.join(kinds)}); name those of one kind, "
            f"such as {shown.partition('=')[2].rstrip('/')}/*{kinds[0]}"
        )
    return tuple(sorted(files, key=lambda file: file.name))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn the errors of reading bytes into one line."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is a damaged gzip file ({error}); fetch it again") from None
    except PermissionError:
        raise InputError(f"{path} may not be read; change its permissions") from None


@contextmanager
def _open_bytes(path: Path) -> Iterator[IO[bytes]]:
    open_file = gzip.open if path.suffix == ".gz" else open
    with _readable(path), open_file(path, "rb") as stream:
        yield cast("IO[bytes]", stream)


@contextmanager
def _open_text(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    with _open_bytes(path) as stream:
        try:
            yield TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} is not UTF-8 text ({error.reason}); convert it to UTF-8"
            ) from None


def _json_lines(path: Path, columns: Sequence[Column]) -> Iterator[Values]:
    with _open_bytes(path) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.isspace() or not text:
                    continue
                values = json.loads(text)
            except UnicodeDecodeError:
                raise InputError(
                    f"{path} line {number} is not UTF-8 text; convert the file to UTF-8"
                ) from None
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{path} line {number} is no valid JSON ({_reason(error)}); correct the line"
                ) from None
            yield _json_object(values, f"{path} line {number}")


def _json(path: Path, columns: Sequence[Column]) -> Iterator[Values]:
    """Read a .json file: one list of objects, or JSON lines."""
    with _open_text(path) as stream:
        start = stream.read(CHUNK_CHARACTERS).lstrip()[:1]
    return _json_list(path) if start == "[" else _json_lines(path, columns)


def _json_list(path: Path) -> Iterator[Values]:
    """Stream the objects of one JSON list, however long it is."""
    decoder = json.JSONDecoder()
    with _open_text(path) as stream:
        text, position = stream.read(CHUNK_CHARACTERS), 0
        for number in itertools.count():
            where = f"{path} element {number}"
            if len(text) - position < CHUNK_CHARACTERS:
                text, position = text[position:] + stream.read(CHUNK_CHARACTERS), 0
            lead = _LIST_LEAD.match(text, position)
            if lead is None or lead[1][0] not in ("[" if number == 0 else ",]"):
                raise InputError(
                    f"{where}: the list neither ends nor goes on there; correct or fetch the file"
                )
            if lead[1].endswith("]"):
                if text[lead.end() :].strip() or stream.read(CHUNK_CHARACTERS).strip():
                    raise InputError(f"{path} goes on after its list; correct the file")
                return
            position = lead.end()
            while True:  # an element may reach beyond the window
                try:
                    values, position = decoder.raw_decode(text, position)
                    break
                except (ValueError, RecursionError) as error:
                    fits = len(text) - position <= LONGEST_ELEMENT_CHARACTERS
                    more = stream.read(len(text)) if fits else ""
                    if not more:
                        raise InputError(
                            f"{where} is no valid JSON ({_reason(error)}); correct the file"
                        ) from None
                    text, position = text[position:] + more, 0
            yield _json_object(values, where)


def _json_object(values: Any, where: str) -> Values:
    if not isinstance(values, dict):
        raise InputError(f"{where} is {quoted(values)}, not an object; write one object a row")
    return values


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _csv(path: Path, columns: Sequence[Column]) -> Iterator[Values]:
    # Process-wide, and harmless there: the default of 128 KiB is shorter than real conversations.
    csv.field_size_limit(LONGEST_ELEMENT_CHARACTERS)
    with _open_text(path, newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = next(reader, [])
            if not header:
                return
            _check_columns(path, dict.fromkeys(header), columns)
            if len(set(header)) < len(header):
                raise InputError(f"{path} names a column twice; rename one of them")
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise InputError(
                        f"{path} line {reader.line_num} has {len(cells)} fields, its header has "
                        f"{len(header)}; correct the line, or quote its commas"
                    )
                yield dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise InputError(
                f"{path} line {reader.line_num} is no valid CSV ({error}); correct the line"
            ) from None


def _parquet(path: Path, columns: Sequence[Column]) -> Iterator[Values]:
    with _arrow_readable(path, "Parquet"), pq.ParquetFile(path) as file:
        _check_columns(path, _types(file.schema_arrow), columns)
        names = [column.name for column in columns]
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=names):
            yield from batch.to_pylist()


def _arrow(path: Path, columns: Sequence[Column]) -> Iterator[Values]:
    with _arrow_readable(path, "Arrow"), pa.OSFile(str(path), "rb") as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if is_file:
            reader = pa.ipc.open_file(stream)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:  # what `datasets` saves
            batches = reader = pa.ipc.open_stream(stream)
        _check_columns(path, _types(reader.schema), columns)
        names = [column.name for column in columns]
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield from batch.select(names).slice(start, BATCH_ROWS).to_pylist()


@contextmanager
def _arrow_readable(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path} cannot be read as {what} ({reason}); fetch or write it again"
        ) from error


def _types(schema: pa.Schema) -> dict[str, pa.DataType | None]:
    return {field.name: field.type for field in schema}


def _check_columns(
    where: Path | str, types: Mapping[str, pa.DataType | None], columns: Sequence[Column]
) -> None:
    """Check that the columns are there, of a type that can hold what is wanted.

    Raises:
        InputError: otherwise.
    """
    for column in columns:
        if column.name not in types:
            raise InputError(f"{where} has {missing_column(column, list(types))}")
        kind = types[column.name]
        if kind is not None and not _holds(kind, column.kind):
            wanted = "text" if column.kind == "text" else "a list of messages {role, content}"
            raise InputError(
                f"{where}: column {bare(column.name)} holds {kind}, {wanted} is needed; "
                f"convert it, or name another column"
            )


def _holds(kind: pa.DataType, wanted: str) -> bool:
    if pa.types.is_dictionary(kind):
        return _holds(kind.value_type, wanted)
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if wanted == "messages" and is_list:
        return bool(pa.types.is_struct(kind.value_type))
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return bool(is_text or pa.types.is_string_view(kind) or pa.types.is_null(kind))


_READERS: dict[str, Callable[[Path, Sequence[Column]], Iterator[Values]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}


# The hub


def commit_name(name: str, revision: str | None) -> str:
    """Return the name under which the commit of a hub data set is remembered."""
    return f"{name}@{revision or 'main'}"


@dataclass(frozen=True)
class HubSource:
    """One split of a data set of the Hugging Face hub, at one commit; no code of it is run."""

    name: str
    subset: str | None
    split: str
    revision: str | None
    """As the user gave it."""
    commit: str

    @property
    def fingerprint(self) -> str:
        """Id, subset, split and commit."""
        return f"{self.name} subset={self.subset} split={self.split} commit={self.commit}"

    def rows(self, columns: Sequence[Column]) -> Iterator[RawRow]:
        """Stream the rows of the split; see `Source`."""
        rows = iter(self._stream(columns))
        for index in itertools.count():
            with self._reachable(f"broke off after {index} rows", "run it again"):
                values = next(rows, None)
            if values is None:
                return
            yield RawRow(self.name, index, values)

    def _stream(self, columns: Sequence[Column]) -> Any:
        import datasets  # 2 s to import, and only hub data needs it

        remedy = "correct prepare.subset, prepare.split or prepare.revision"
        with self._reachable("cannot be loaded from the hub", remedy):
            # Streaming: nothing is stored, and `datasets` has no way to run a data set's code.
            stream = datasets.load_dataset(
                self.name, self.subset, split=self.split, revision=self.commit, streaming=True
            )
        if stream.features is None:
            return stream
        schema = stream.features.arrow_schema
        _check_columns(f"data set {self.name}", _types(schema), columns)
        return stream.select_columns([column.name for column in columns])

    @contextmanager
    def _reachable(self, what: str, remedy: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each HTTP library below `datasets` has exceptions of its own
            raise InputError(
                f"data set {self.name} {what} ({_hub_reason(error)}); {remedy}"
            ) from error


def _resolve_commit(name: str, revision: str | None, shown: str) -> str:
    """Return the commit that a revision of a hub data set is at now; asks the hub."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(name, revision=revision, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # see HubSource._reachable
        raise InputError(
            f"{shown} is no file or folder here, and no data set {commit_name(name, revision)} "
            f"could be found on the hub ({_hub_reason(error)}); correct the path, or the network"
        ) from error
    assert info.sha is not None, f"the hub names no commit for {name}"
    return info.sha


def _hub_reason(error: Exception) -> str:
    """Return the first sentence of an error: the rest is advice for users of other libraries."""
    text = " ".join(str(error).split()).partition(". Please")[0]
    return text[:200] or type(error).__name__


# The built-in task


@dataclass(frozen=True)
class WordSumsSource:
    """The miniature task, as columns `prompt` and `response`."""

    num_examples: int
    style: Style
    seed: int
    skip: int = 0
    name: str = "word_sums"

    @property
    def fingerprint(self) -> str:
        """What the rows depend on."""
        return (
            f"word_sums num_examples={self.num_examples} style={self.style} "
            f"seed={self.seed} skip={self.skip}"
        )

    def rows(self, columns: Sequence[Column]) -> Iterator[RawRow]:
        """Generate the rows; see `Source`."""
        examples = word_sums(self.num_examples, self.style, self.seed, skip=self.skip)
        for index, example in enumerate(examples):
            values = {"prompt": example.prompt, "response": example.response}
            yield RawRow(self.name, index, values)
