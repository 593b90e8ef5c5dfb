"""Making the next item while the last one is used."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
_END = object()


def ahead(items: Iterator[A]) -> Iterator[A]:
    """Yield the items, each made by a thread of its own while the one before is used.

    It pays where that work leaves Python, as tokenizers and Arrow do. What it raises comes to the
    user, at its place; one item more than the user has is held.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        coming = thread.submit(next, items, _END)
        while (item := coming.result()) is not _END:
            coming = thread.submit(next, items, _END)
            yield item  # type: ignore[misc]
