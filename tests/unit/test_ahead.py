"""The next item is made meanwhile; nothing else differs from a plain loop."""

import threading
from collections.abc import Iterator

import pytest

from stages.data.ahead import ahead


def test_items_come_in_order_and_the_next_is_made_meanwhile() -> None:
    made = [threading.Event() for _ in range(4)]

    def items() -> Iterator[int]:
        for number in range(4):
            made[number].set()
            yield number

    seen = []
    for item in ahead(items()):
        assert made[min(item + 1, 3)].wait(5), "nobody makes the next one"
        seen.append(item)
    assert seen == [0, 1, 2, 3]
    assert list(ahead(iter(()))) == []


def test_what_making_raises_comes_at_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no second one")

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(ValueError, match="no second one"):
        next(found)
