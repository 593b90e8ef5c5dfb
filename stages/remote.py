"""Places that are no local paths: folders of objects at an fsspec URL (s3://, gs://, …).

Credentials and options come from where the libraries look themselves (AWS_*, the FSSPEC_* variables
and files): none is taken here, so none can be written or shown.

An object appears whole or not at all. A small one is one request; a large one is sent in parts that
become an object by a last request, which is not made when the content broke off; a file (file://)
is written aside, flushed and renamed.
"""

import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stages.artifacts.files import fsync_path, make_folder, temporary_path
from stages.artifacts.keys import canonical_json, sha256_text
from stages.errors import ConfigError, CorruptError, InputError, NoSpaceError, SpinError

CHUNK_BYTES = 8 * 2**20
"""What is read, hashed and sent at a time; an object up to this size is one request."""
PART_BYTES = 16 * 2**20
MAX_PARTS = 9000  # S3 takes 10,000
_READ_AHEAD = 2
_LOCAL = ("file", "local")
# Where folders are only names, and making one could make a bucket.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss"}
_S3 = ("s3", "s3a")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs",
             "abfss": "adlfs", "az": "adlfs", "sftp": "paramiko", "ssh": "paramiko"}  # fmt: skip
_SHA256 = "spin-sha256"
_REASON_CHARS = 200
_NOT_ALLOWED = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")


def is_url(text: str) -> bool:
    """Tell whether `text` names a place by a URL rather than by a local path or a hub id."""
    return "://" in text


def local_path(url: str) -> Path | None:
    """Return the path that a file:// URL names, None for another URL."""
    scheme, _, path = url.partition("://")
    return Path(path) if scheme in _LOCAL and path.startswith("/") else None


@dataclass(frozen=True)
class Remote:
    """A folder at a URL, or one object; made by `open_remote`."""

    url: str
    root: str
    """What the file system calls it."""
    protocol: str
    fs: Any
    for_writing: bool
    _made: set[str] = field(default_factory=set)

    def shown(self, relative: str) -> str:
        """Return the URL of one object, for messages."""
        return f"{self.url}/{relative}" if relative else self.url

    def files(self) -> dict[str, int]:
        """Return the objects below, from relative path to size in bytes; none is an empty folder.

        Where the URL is itself an object, its relative path is "".

        Raises:
            ConfigError, InputError, SpinError: see `open_remote`.
        """
        return {name: int(info["size"]) for name, info in self._objects().items()}

    def mark(self) -> str | None:
        """Return what changes whenever an object below does, None where the store has no ETags."""
        tags = {name: info.get("ETag") for name, info in self._objects().items()}
        if not all(isinstance(tag, str) and tag for tag in tags.values()):
            return None
        return sha256_text(canonical_json([self.url, tags]))

    def _objects(self) -> dict[str, Mapping[str, Any]]:
        with self._speaking():
            self.fs.invalidate_cache()
            try:
                found: Mapping[str, Mapping[str, Any]] = self.fs.find(self.root, detail=True)
            except FileNotFoundError:
                if self.protocol in _OBJECT_STORES:
                    raise  # the bucket itself
                return {}
        return {
            name.removeprefix(self.root).removeprefix("/"): info
            for name, info in found.items()
            if info["type"] == "file" and not (name.endswith("/") and not info["size"])
        }

    def sent_sha256(self, relative: str) -> str | None:
        """Return the SHA-256 that `write` was told of an object's whole content, if it is kept.

        S3 keeps it with the object: whoever replaces the object replaces or removes it. Other
        stores have no place for it that fsspec knows.
        """
        if self.protocol not in _S3:
            return None
        with self._speaking():
            found = self.fs.metadata(self._at(relative)).get(_SHA256)
        return found if isinstance(found, str) else None

    def read(self, relative: str, size: int) -> bytes:
        """Return the content of an object of `size` bytes.

        Raises:
            CorruptError: it has another size now.
        """
        return b"".join(self.chunks(relative, size))

    def chunks(self, relative: str, size: int, ahead: Executor | None = None) -> Iterator[bytes]:
        """Yield the content of an object of `size` bytes, and never more.

        Args:
            ahead: where the next chunks are fetched while one is at work.

        Raises:
            CorruptError: it has another size now.
        """
        starts = iter(range(0, size, CHUNK_BYTES))
        waiting: deque[Future[bytes]] = deque()
        try:
            for start in starts:
                if ahead is None:
                    yield self._range(relative, start, size)
                    continue
                waiting.append(ahead.submit(self._range, relative, start, size))
                if len(waiting) > _READ_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def write(self, relative: str, size: int, chunks: Iterable[bytes], sha256: str) -> None:
        """Make an object of `size` bytes, or replace it, as soon as `chunks` has ended.

        Should `chunks` raise, nothing is made.

        Args:
            sha256: of the content, kept where the store can; see `sent_sha256`.
        """
        path, kept = self._at(relative), {}
        if self.protocol in _S3:
            kept = {"Metadata": {_SHA256: sha256}}
        self._make_folder_of(path)
        if self.protocol in _LOCAL:
            self._write_file(Path(path), chunks)
        elif size <= CHUNK_BYTES:
            data = b"".join(chunks)
            with self._speaking():
                self.fs.pipe_file(path, data, **kept)
        else:
            self._write_parts(path, size, chunks, kept)

    def create(self, relative: str, data: bytes) -> bool:
        """Make a small object; False where there is one already, which is left alone.

        Where two make it at once: S3 lets one of them; of other stores that is not known.
        """
        path = self._at(relative)
        self._make_folder_of(path)
        with self._speaking():
            self.fs.invalidate_cache()
            if self.fs.exists(path):
                return False
            if self.protocol not in _S3:
                self.replace(relative, data)
                return True
            try:
                self.fs.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
        return True

    def replace(self, relative: str, data: bytes) -> None:
        """Make a small object, or replace it."""
        path = self._at(relative)
        self._make_folder_of(path)
        if self.protocol in _LOCAL:
            self._write_file(Path(path), [data])
            return
        with self._speaking():
            self.fs.pipe_file(path, data)

    def _at(self, relative: str) -> str:
        return f"{self.root}/{relative}" if relative else self.root

    def _range(self, relative: str, start: int, size: int) -> bytes:
        end = min(start + CHUNK_BYTES, size)
        with self._speaking():
            try:
                data: bytes = self.fs.cat_file(self._at(relative), start=start, end=end)
            except FileNotFoundError:
                raise CorruptError(
                    f"{self.shown(relative)} is gone; somebody deleted it just now: look there, "
                    "then run the same command again"
                ) from None
        if len(data) != end - start:
            raise CorruptError(
                f"{self.shown(relative)} has not the {size} bytes that were listed; somebody "
                "changed it just now: look there, then run the same command again"
            )
        return data

    def _make_folder_of(self, path: str) -> None:
        folder = path.rpartition("/")[0]
        if self.protocol in _OBJECT_STORES or folder in self._made:
            return
        with self._speaking():
            if self.protocol in _LOCAL:
                make_folder(Path(folder))
            else:
                self.fs.makedirs(folder, exist_ok=True)
        self._made.add(folder)

    def _write_file(self, path: Path, chunks: Iterable[bytes]) -> None:
        temporary = temporary_path(path)
        with self._speaking():
            temporary.unlink(missing_ok=True)  # of a writer that was killed
            file = temporary.open("xb")
        try:
            with file:
                for chunk in chunks:
                    with self._speaking():
                        file.write(chunk)
                with self._speaking():
                    file.flush()
                    os.fsync(file.fileno())
            with self._speaking():
                temporary.rename(path)
                fsync_path(path.parent)
        except BaseException:
            with suppress(OSError):  # the first error is the one to tell
                temporary.unlink()
            raise

    def _write_parts(
        self, path: str, size: int, chunks: Iterable[bytes], kept: Mapping[str, Any]
    ) -> None:
        block_size = max(PART_BYTES, -(-size // MAX_PARTS))
        with self._speaking():
            file = self.fs.open(path, "wb", block_size=block_size, autocommit=False, **kept)
            with suppress(ValueError):  # fsspec keeps it for a transaction that there is not
                self.fs.transaction.files.remove(file)
        if not (hasattr(file, "commit") and hasattr(file, "discard")):
            raise ConfigError(
                f"{self.url}: its file system ({self.protocol}) can show half an object; push to "
                "another"
            )
        try:
            for chunk in chunks:
                with self._speaking():
                    file.write(chunk)
            with self._speaking():
                file.close()
                file.commit()
        except BaseException:
            with suppress(Exception):  # the first error is the one to tell
                file.discard()
            with suppress(AttributeError):
                file.closed = True  # or its end would send the rest
            raise

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        with _speaking(self.url, self.for_writing):
            yield


def open_remote(url: str, *, for_writing: bool = False) -> Remote:
    """Return the place that a URL names; nothing is asked of it yet.

    Raises:
        ConfigError: it is no URL, holds a secret, or its library is not installed. Of this and
            of what is done there later: it may not be written, or has no such bucket.
        InputError: it may not be read, or there is no such bucket.
        SpinError: it cannot be reached, or it failed.
        NoSpaceError: it is full.
    """
    _check(url)
    scheme = url.partition("://")[0]
    import fsspec

    with _speaking(url, for_writing):
        try:
            fs, root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            package = _PACKAGES.get(scheme)
            remedy = "pip install 'spin-selfplay[s3]'" if package == "s3fs" else (
                f"pip install {package}" if package else str(error)
            )  # fmt: skip
            raise ConfigError(f"{url}: the library for {scheme}:// is missing; {remedy}") from None
        except ValueError as error:
            raise ConfigError(f"{url}: {_one_line(error)}; correct the URL") from None
    root = root.rstrip("/")
    if not root:
        raise ConfigError(f"{url} names no folder; name one, such as {scheme}://bucket/folder")
    return Remote(url.rstrip("/"), root, scheme, fs, for_writing)


def _check(url: str) -> None:
    """Check that a URL is one, and safe to be shown."""
    if not is_url(url):
        raise ConfigError(
            f"{url} is no URL; name one, such as s3://bucket/folder or file:///folder"
        )
    scheme, _, rest = url.partition("://")
    host = urlsplit(f"x://{rest}").netloc
    if ":" in host.rpartition("@")[0]:
        raise ConfigError(
            f"the {scheme}:// URL holds a password, which others could read off the process list; "
            "leave it out and set it in the environment of its library"
        )
    if "?" in rest or "#" in rest:
        raise ConfigError(
            f"the {scheme}:// URL has a part after ? or #, where secrets may stand; leave it out"
        )
    if "::" in url or ".." in rest.split("/") or "\0" in url:
        raise ConfigError(f"{url} is no plain URL; name one, such as s3://bucket/folder")


@contextmanager
def _speaking(url: str, for_writing: bool) -> Iterator[None]:
    """Turn what a store or its library raises into one line; each has exceptions of its own."""
    refused: Callable[[str], SpinError] = ConfigError if for_writing else InputError
    doing = "written" if for_writing else "read"
    try:
        yield
    except SpinError:
        raise
    except FileNotFoundError as error:
        raise refused(
            f"{url} cannot be {doing} ({_one_line(error)}): there is no such place; correct the "
            "URL, or make the bucket"
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                f"{url}: no room to write; free some space there, then run the same command "
                "again: what was finished is kept"
            ) from error
        if isinstance(error, PermissionError) or type(error).__name__ in _NOT_ALLOWED:
            raise refused(
                f"{url} may not be {doing} ({_one_line(error)}); check the permissions there, "
                "and the credentials in the environment"
            ) from error
        if isinstance(error, NotADirectoryError | IsADirectoryError | FileExistsError):
            raise refused(
                f"{url} cannot be {doing} ({_one_line(error)}): a file stands where a folder is "
                "needed; correct the URL"
            ) from error
        raise SpinError(
            f"{url} cannot be reached, or failed ({_one_line(error)}); check the network and its "
            "settings, then run the same command again: what was finished is kept"
        ) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        secret = os.environ.get(name)
        text = text.replace(secret, "***") if secret else text
    return text[:_REASON_CHARS]
