"""Durable files: written, flushed, renamed, and only then believed."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from stages.errors import ConfigError, CorruptError, NoSpaceError, SpinError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_FOLDER = (errno.EEXIST, errno.ENOTDIR)
# pyarrow says "[errno 28]" and safetensors "(os error 28)" in errors that carry no errno.
_NO_ROOM_TEXT = re.compile(rf"\b(errno|os error) ({'|'.join(map(str, _NO_ROOM))})\b", re.IGNORECASE)
# File systems that cannot flush a directory say so; they order their entries by themselves.
_CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Say in one line what the disk refused while the block wrote at `place`.

    Errors that the disk did not cause pass through as they are.

    Raises:
        NoSpaceError: the disk is full, a quota is spent, or a file reached its size limit.
        ConfigError: `place` may not be written, or a file stands where a folder is needed.
        SpinError: the device failed, or the process has too many files open.
    """
    try:
        yield
    except SpinError:
        raise
    except Exception as error:
        if _out_of_room(error):
            raise NoSpaceError(
                f"{place}: no room to write ({_first_line(error)}); free some space or raise the "
                "quota, then run the same command again: what was finished is kept"
            ) from error
        if not isinstance(error, OSError):
            raise
        reason = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        if error.errno in _FORBIDDEN and _concerns(error, place):
            raise ConfigError(
                f"{place} cannot be written ({reason}); mend its permissions or name another place"
            ) from error
        if error.errno in _NO_FOLDER and _concerns(error, place):
            raise ConfigError(
                f"{place} cannot be made ({reason}): a file stands where a folder is needed; "
                "name another place"
            ) from error
        if error.errno == errno.EIO:
            raise SpinError(
                f"{place}: the disk failed ({reason}); check the device, then run the same "
                "command again"
            ) from error
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise SpinError(
                f"{place}: too many open files ({reason}); raise the limit (ulimit -n), then run "
                "the same command again"
            ) from error
        raise


def _out_of_room(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return True
        if _NO_ROOM_TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _concerns(error: OSError, place: Path) -> bool:
    """Tell whether an error names `place`, a folder above it, or a hidden helper beside it."""
    if not isinstance(error.filename, str):
        return False
    culprit, place = Path(error.filename).absolute(), place.absolute()
    if place.is_relative_to(culprit):
        return True
    if not culprit.is_relative_to(place.parent):
        return False
    beside = culprit.relative_to(place.parent).parts[0]
    return beside == place.name or beside.startswith(f".{place.name}.")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def fsync_path(path: Path) -> None:
    """Flush a file's bytes, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in _CANNOT_FLUSH):
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, so that a crash forgets none of their entries."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        fsync_path(folder.parent)


def write_durably(path: Path, text: str) -> None:
    """Write `text` to `path` so that a crash leaves the old bytes or the new, never a mixture.

    The caller is the only writer: it holds a lock, or the place is its own.

    Raises:
        NoSpaceError, ConfigError, SpinError: what the disk refused; see `writing`.
    """
    with writing(path):
        replace_text(path, text)


def replace_text(path: Path, text: str) -> None:
    """Do the work of `write_durably`; errors are for a caller who can name the place better."""
    temporary = temporary_path(path)
    temporary.unlink(missing_ok=True)  # of a writer that was killed
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell
            temporary.unlink()
        raise
    fsync_path(path.parent)


def temporary_path(path: Path) -> Path:
    """Return the hidden sibling in which `path` is written before it is renamed."""
    return path.with_name(f".{path.name}.tmp")


def inner_path(root: Path, relative: str, *, named_by: str = "its manifest") -> Path:
    """Return `root / relative`, for a relative path that stays inside `root`.

    Args:
        named_by: what names the path, for the message.

    Raises:
        CorruptError: `relative` is absolute, has `..`, or leaves `root` through a symbolic link.
    """
    pure = PurePosixPath(relative)
    plain = not pure.is_absolute() and ".." not in pure.parts and str(pure) == relative
    if plain and relative != "." and "\0" not in relative:
        path = root / relative
        if path.resolve().is_relative_to(root.resolve()) and not path.is_symlink():
            return path
    raise CorruptError(
        f"{root}: {named_by} names {relative!r}, which is no plain path inside it; "
        "it was tampered with: delete it and make it again"
    )


def files_below(root: Path) -> list[str]:
    """Return the relative POSIX paths of all files below `root`, sorted.

    Raises:
        CorruptError: there is a symbolic link or a special file among them.
    """
    found = []
    for folder, folder_names, file_names in os.walk(root, onerror=_raise):
        here = Path(folder)
        for name in [*folder_names, *file_names]:
            path = here / name
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise CorruptError(f"{path}: not a plain file; artifacts hold no links: delete it")
        found += [(here / name).relative_to(root).as_posix() for name in file_names]
    return sorted(found)


def _raise(error: OSError) -> None:
    """Report a folder that cannot be listed, which os.walk would pass over in silence."""
    raise error
