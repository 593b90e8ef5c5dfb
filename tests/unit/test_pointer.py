"""The pointer: moves once a decision, goes back step by step, is old or new to every reader."""

import shutil
import threading
from pathlib import Path

import pytest

from stages.artifacts import Outcome, Plan, Workspace, produce
from stages.artifacts.locks import hold, lock_path
from stages.artifacts.pointer import (
    Pointer,
    PointerEntry,
    move_again,
    move_pointer,
    read_pointer,
    roll_back,
)
from stages.errors import BusyError, ConfigError, CorruptError, InputError
from tests.faults.strace_tools import Point, commit_points, needs_strace, run_killed, spread


def entry(path: str, decision_key: str | None = None, key: str | None = None) -> PointerEntry:
    return PointerEntry(
        path=path, key=key or plan(path).key, reason="better", decision_key=decision_key or path
    )


def plan(name: str) -> Plan:
    return Plan("train", 1, {"name": name}, {})


def make(folder: Path, name: str, of: str | None = None) -> None:
    """Make the artifact `name`, or in its place the one that another name stands for."""

    def fill(space: Workspace) -> Outcome:
        space.file("weights").write_text(of or name)
        return Outcome(counts={})

    produce(folder / name, plan(of or name), fill)


@pytest.fixture
def champion(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        make(tmp_path, name)
    return tmp_path / "champion"


def where(champion: Path) -> str | None:
    pointer = read_pointer(champion)
    return pointer.path if pointer else None


def test_a_pointer_that_was_never_moved_is_none(champion: Path) -> None:
    assert read_pointer(champion) is None


def test_a_move_is_read_back_with_its_history(champion: Path) -> None:
    assert move_pointer(champion, entry("a"))
    assert move_pointer(champion, entry("b"))
    pointer = read_pointer(champion)
    assert pointer is not None
    assert (pointer.path, pointer.key) == ("b", plan("b").key)
    assert pointer.history == [entry("a"), entry("b")]
    assert champion.read_text() == pointer.to_text()


def test_a_decision_moves_the_pointer_once(champion: Path) -> None:
    move_pointer(champion, entry("a", "decision 0"))
    move_pointer(champion, entry("b", "decision 1"))
    before = champion.read_bytes()
    assert not move_pointer(champion, entry("a", "decision 0"))
    assert champion.read_bytes() == before


def test_a_roll_back_is_not_undone_by_the_decision_run_again(champion: Path) -> None:
    move_pointer(champion, entry("a"))
    move_pointer(champion, entry("b"))
    roll_back(champion)
    assert not move_pointer(champion, entry("b"))
    assert where(champion) == "a"


def test_roll_backs_go_one_target_further_each(champion: Path) -> None:
    for name in ("a", "b", "c"):
        move_pointer(champion, entry(name))
    assert roll_back(champion).path == "b"
    pointer = roll_back(champion)
    assert (pointer.path, pointer.key) == ("a", plan("a").key)
    assert [e.path for e in pointer.history] == ["a", "b", "c", "b", "a"]
    assert pointer.history[-1].reason == "rolled back from b"
    assert read_pointer(champion) == pointer
    with pytest.raises(InputError, match="no other was promoted before it; .* delete"):
        roll_back(champion)
    assert read_pointer(champion) == pointer


def test_a_roll_back_goes_to_another_target_not_to_the_same_again(champion: Path) -> None:
    move_pointer(champion, entry("a", "1"))
    move_pointer(champion, entry("b", "2"))
    move_pointer(champion, entry("b", "3"))
    assert roll_back(champion).path == "a"


def test_a_move_after_a_roll_back_builds_on_where_it_went(champion: Path) -> None:
    for name in ("a", "b"):
        move_pointer(champion, entry(name))
    roll_back(champion)
    move_pointer(champion, entry("c"))
    assert roll_back(champion).path == "a"


def test_nothing_to_roll_back(champion: Path) -> None:
    with pytest.raises(InputError, match="does not exist, so nothing was promoted"):
        roll_back(champion)


def test_a_roll_back_to_what_is_gone_is_refused(champion: Path) -> None:
    move_pointer(champion, entry("a"))
    move_pointer(champion, entry("b"))
    shutil.rmtree(champion.parent / "a")
    with pytest.raises(InputError, match="cannot go back to a, which does not exist any more"):
        roll_back(champion)
    assert where(champion) == "b"


class TestBrokenTargets:
    """Names, sizes and key are checked before the pointer goes back; hashes are not."""

    @pytest.mark.parametrize("way", ["back", "again"])
    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            ("no weights", "a/weights is missing; delete .*/a and run its stage again"),
            ("cut weights", "a/weights has 0 bytes, its manifest says 1"),
            ("a stranger", "a/stranger does not belong there"),
            ("no manifest", "it has no manifest.json; delete .*/a and run its stage again"),
            ("damaged manifest", "a/manifest.json is damaged"),
            ("another", "[0-9a-f]{12} was promoted, [0-9a-f]{12} is there now"),
        ],
    )
    def test_none_is_gone_back_to(
        self, champion: Path, damage: str, message: str, way: str
    ) -> None:
        if way == "again":
            move_pointer(champion, entry("c"))
        move_pointer(champion, entry("a"))
        _ = roll_back(champion) if way == "again" else move_pointer(champion, entry("b"))
        before = champion.read_bytes()
        folder = champion.parent / "a"
        match damage:
            case "no weights":
                (folder / "weights").unlink()
            case "cut weights":
                (folder / "weights").write_text("")
            case "a stranger":
                (folder / "stranger").touch()
            case "no manifest":
                (folder / "manifest.json").unlink()
            case "damaged manifest":
                (folder / "manifest.json").write_text("{")
            case _:
                shutil.rmtree(folder)
                make(champion.parent, "a", of="other")
        with pytest.raises(CorruptError, match=f"champion cannot go back to a: .*{message}"):
            _ = roll_back(champion) if way == "back" else move_again(champion, "a")
        assert champion.read_bytes() == before


class TestAgain:
    """A roll-back is undone only when people ask for it, and then as if it had not been."""

    @pytest.fixture
    def back(self, champion: Path) -> Path:
        """A pointer that went to a, to b, and back."""
        for name in ("a", "b"):
            move_pointer(champion, entry(name))
        roll_back(champion)
        return champion

    def test_the_pointer_goes_there_again_and_says_why(self, back: Path) -> None:
        pointer = move_again(back, "b")
        assert read_pointer(back) == pointer
        assert (pointer.path, pointer.key) == ("b", plan("b").key)
        last = pointer.history[-1]
        assert (last.reason, last.decision_key) == ("promoted again: better", "b")
        assert last.at is not None
        assert [e.path for e in pointer.trail()] == ["a", "b"]

    def test_a_roll_back_after_it_goes_to_where_it_was_before(self, back: Path) -> None:
        move_pointer(back, entry("c"))
        pointer = move_again(back, "b")
        assert [e.path for e in pointer.trail()] == ["a", "c", "b"]
        assert roll_back(back).path == "c"
        assert roll_back(back).path == "a"

    def test_it_can_be_done_as_often_as_it_is_undone(self, back: Path) -> None:
        for _ in range(3):
            assert move_again(back, "b").history[-1].reason == "promoted again: better"
            assert roll_back(back).path == "a"
        assert not move_pointer(back, entry("b")), "the decision moved it once"

    def test_who_was_not_rolled_back_is_refused_and_told_why(self, back: Path) -> None:
        move_pointer(back, entry("c"))
        before = back.read_bytes()
        for decision, message in {
            "c": "points to c already",
            "a": "went on from a to c, and was never rolled back from it",
            "d": "was never moved by this decision",
        }.items():
            with pytest.raises(ConfigError, match=message):
                move_again(back, decision)
        assert back.read_bytes() == before

    def test_without_a_pointer_there_is_nothing_to_do_again(self, champion: Path) -> None:
        with pytest.raises(ConfigError, match="was never moved by this decision"):
            move_again(champion, "a")
        assert not champion.exists()


def test_flipped_bits_and_truncations_are_noticed(champion: Path) -> None:
    move_pointer(champion, entry("a"))
    good = champion.read_bytes()
    for bit in range(0, 8 * len(good), 3):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        champion.write_bytes(data)
        with pytest.raises(CorruptError, match="champion is damaged .*; delete .*champion"):
            read_pointer(champion)
    for size in range(0, len(good), 3):
        champion.write_bytes(good[:size])
        with pytest.raises(CorruptError):
            read_pointer(champion)


def test_a_damaged_pointer_is_not_moved_over(champion: Path) -> None:
    champion.write_text("{}")
    with pytest.raises(CorruptError):
        move_pointer(champion, entry("a"))
    assert champion.read_text() == "{}"


def test_a_pointer_that_is_not_where_its_history_ends_is_damaged(champion: Path) -> None:
    astray = Pointer(format=1, path="b", key="key of b", history=[entry("a")])
    champion.write_text(astray.to_text())
    with pytest.raises(CorruptError, match="not where its history ends"):
        read_pointer(champion)


@pytest.mark.parametrize("path", ["/etc", "../other", "a/../../b", "out", ""])
def test_a_target_outside_the_run_is_refused(champion: Path, path) -> None:
    (champion.parent / "out").symlink_to("/etc")
    with pytest.raises(CorruptError, match="champion names .* no plain path inside it"):
        move_pointer(champion, entry(path, "d"))
    champion.write_text(
        Pointer(format=1, path=path, key="k", history=[entry(path, "d", "k")]).to_text()
    )
    with pytest.raises(CorruptError, match="champion names .* no plain path inside it"):
        read_pointer(champion)


def test_a_pointer_of_another_format_is_of_another_version(champion: Path) -> None:
    champion.write_text(Pointer(format=2, path="a", key="k", history=[]).to_text())
    with pytest.raises(InputError, match="pointer format 2, this spin reads 1"):
        read_pointer(champion)


def test_two_movers_at_once_are_one_too_many(champion: Path) -> None:
    with hold(lock_path(champion), "it"), pytest.raises(BusyError, match="champion is in use by"):
        move_pointer(champion, entry("a"))


def test_a_folder_in_its_place_is_no_pointer(champion: Path) -> None:
    champion.mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read_pointer(champion)


def test_readers_see_the_old_or_the_new_while_one_writes(champion: Path) -> None:
    """10,000 reads by two readers while the pointer moves: each whole, none older than the last."""
    move_pointer(champion, entry("a", "0"))
    failures: list[BaseException] = []
    seen: list[int] = []

    def read() -> None:
        try:
            last = 1
            for _ in range(5000):
                pointer = read_pointer(champion)
                assert pointer is not None
                assert len(pointer.history) >= last
                last = len(pointer.history)
            seen.append(last)
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    moves = 0
    while any(reader.is_alive() for reader in readers):
        if moves < 30:  # each makes the file longer
            moves += 1
            move_pointer(champion, entry("ab"[moves % 2], str(moves)))
        else:
            readers[0].join(0.05)
    assert not failures, failures
    assert moves > 5
    assert max(seen) > 1


def check_kill(folder: Path, point: Point, target: str) -> None:
    folder.mkdir()
    champion = prepared(folder, target)
    done = run_killed(
        point, "script_pointer.py", champion, target, "b" if target == "again" else "decision"
    )
    assert done.returncode == -9, f"{point}: {done.returncode} {done.stderr}"
    old, new = {"back": ("b", "a"), "again": ("a", "b")}.get(target, ("b", target))
    assert where(champion) in {old, new}
    if where(champion) == old:
        match target:
            case "back":
                roll_back(champion)
            case "again":
                move_again(champion, "b")
            case _:
                move_pointer(champion, entry(target))
    assert where(champion) == new
    found = sorted(p.name for p in folder.iterdir() if p.name not in (".a.lock", ".b.lock"))
    assert found == [".champion.lock", "a", "b", "champion"]


def prepared(folder: Path, target: str) -> Path:
    """A pointer before it is moved."""
    champion = folder / "champion"
    for name in ("a", "b"):
        make(folder, name)
        move_pointer(champion, entry(name))
    if target == "again":
        roll_back(champion)
    return champion


def points_of(tmp_path: Path, target: str) -> list[Point]:
    needs_strace()
    champion = prepared(tmp_path, target)
    decision = "b" if target == "again" else "decision"
    points = commit_points(tmp_path / "log", "script_pointer.py", champion, target, decision)
    assert any(p.call.startswith("rename") for p in points)
    return points


def test_kill_at_system_calls_of_a_move(tmp_path: Path) -> None:
    points = points_of(tmp_path, "c")
    renames = [p for p in points if p.call.startswith("rename")]
    others = [p for p in points if p not in renames]
    for index, point in enumerate([*renames, *spread(others, 3)]):
        check_kill(tmp_path / str(index), point, "c")


@pytest.mark.long
@pytest.mark.parametrize("target", ["c", "back", "again"])
def test_kill_at_every_system_call_of_a_move_or_roll_back(tmp_path: Path, target) -> None:
    for index, point in enumerate(points_of(tmp_path, target)):
        check_kill(tmp_path / str(index), point, target)
