"""Shards: done means these rows, these bytes, this plan."""

from collections.abc import Callable
from pathlib import Path

import pytest

from stages.artifacts.shards import ShardStore


def writer(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


def store(root: Path, key: str = "k") -> ShardStore:
    return ShardStore(root, key)


def test_a_shard_is_done_for_its_very_rows_and_plan_only(tmp_path: Path) -> None:
    store(tmp_path).write("deep/a.txt", "rows 1", writer("one"))
    assert store(tmp_path).done("deep/a.txt", "rows 1")
    assert not store(tmp_path).done("deep/a.txt", "rows 2")
    assert not store(tmp_path, "another plan").done("deep/a.txt", "rows 1")
    assert not store(tmp_path).done("a.txt", "rows 1")


def test_a_note_without_its_shard_is_work_not_done(tmp_path: Path) -> None:
    store(tmp_path).write("a.txt", "rows 1", writer("one"))
    (tmp_path / "a.txt").unlink()
    assert not store(tmp_path).done("a.txt", "rows 1")
    assert store(tmp_path).noted() == store(tmp_path).valid() == set()


def test_a_shard_without_its_note_is_work_not_done(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    assert not store(tmp_path).done("a.txt", "rows 1")
    assert store(tmp_path).valid() == set()


@pytest.mark.parametrize("note", ["", "{", "[]", "null", '{"key":"k"}', "\udcff"])
def test_a_broken_note_is_none(tmp_path: Path, note) -> None:
    store(tmp_path).write("a.txt", "rows 1", writer("one"))
    path = tmp_path / ".shards" / "a.txt.json"
    path.write_bytes(note.encode("utf-8", "surrogateescape"))
    assert not store(tmp_path).done("a.txt", "rows 1")
    assert store(tmp_path).valid() == set()


def test_changed_bytes_are_not_valid(tmp_path: Path) -> None:
    store(tmp_path).write("a.txt", "rows 1", writer("one"))
    store(tmp_path).write("b.txt", "rows 2", writer("two"))
    (tmp_path / "a.txt").write_text("One")
    assert store(tmp_path).noted() == {"a.txt", "b.txt"}
    assert store(tmp_path).valid() == {"b.txt"}
    assert store(tmp_path).with_notes({"b.txt"}) == {"b.txt", ".shards/b.txt.json"}


def test_shards_of_another_plan_are_not_valid(tmp_path: Path) -> None:
    store(tmp_path, "old").write("a.txt", "rows 1", writer("one"))
    assert store(tmp_path, "new").valid() == set()


def test_a_shard_written_again_for_other_rows_replaces_the_old(tmp_path: Path) -> None:
    store(tmp_path).write("a.txt", "rows 1", writer("one"))
    store(tmp_path).write("a.txt", "rows 2", writer("two"))
    assert not store(tmp_path).done("a.txt", "rows 1")
    assert store(tmp_path).done("a.txt", "rows 2")
    assert store(tmp_path).valid() == {"a.txt"}


def test_a_failed_write_leaves_the_old_shard_and_no_temporary(tmp_path: Path) -> None:
    store(tmp_path).write("a.txt", "rows 1", writer("one"))

    def fail(path: Path) -> None:
        path.write_text("ha")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        store(tmp_path).write("a.txt", "rows 2", fail)
    assert (tmp_path / "a.txt").read_text() == "one"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".shards", "a.txt"]
    assert store(tmp_path).done("a.txt", "rows 1")


def test_an_attempt_knows_the_shards_it_named(tmp_path: Path) -> None:
    attempt = store(tmp_path)
    attempt.write("a.txt", "rows 1", writer("one"))
    attempt.done("b.txt", "rows 2")
    assert attempt.named == {"a.txt", "b.txt"}
    assert store(tmp_path).named == set()
