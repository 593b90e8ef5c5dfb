"""produce: made once, never overwritten, resumed by shards, refused with a reason."""

import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from stages.artifacts import (
    Outcome,
    Workspace,
    count_rows,
    open_artifact,
    produce,
    read_manifest,
    run_root,
)
from stages.artifacts.files import files_below, inner_path, make_folder, write_durably, writing
from stages.artifacts.manifest import FileEntry
from stages.artifacts.produce import first_difference
from stages.artifacts.shards import ShardStore
from stages.errors import ConfigError, CorruptError, DivergedError, NoSpaceError, SpinError
from tests.artifact_tools import fill_shards, hashes, input_ref, make, plan, write_table

produce_module = sys.modules["stages.artifacts.produce"]


def never(workspace: Workspace) -> Outcome:
    raise AssertionError("a finished artifact is not made again")


def test_an_artifact_holds_its_files_and_nothing_else(tmp_path: Path) -> None:
    manifest = make(tmp_path / "out")
    assert files_below(tmp_path / "out") == [
        "manifest.json", "notes/about.txt", "part-00000.parquet", "part-00001.parquet",
        "part-00002.parquet", "timings.txt",
    ]  # fmt: skip
    assert [f.rows for f in manifest.files if f.path.startswith("part")] == [40, 40, 40]
    assert [f.path for f in manifest.files if f.volatile] == ["timings.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.lock", "out"]
    assert manifest == read_manifest(tmp_path / "out")


def test_a_finished_artifact_is_found_not_made(tmp_path: Path, caplog) -> None:
    first = make(tmp_path / "out")
    caplog.set_level(logging.INFO, logger="spin")
    assert produce(tmp_path / "out", plan(), never) == first
    assert f"pair: already done ({tmp_path / 'out'})" in caplog.messages


def test_equal_plans_make_equal_bytes(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert read_manifest(tmp_path / "a").content() == read_manifest(tmp_path / "b").content()


def test_volatile_files_do_not_count_as_content(tmp_path: Path) -> None:
    def fill(seconds: str) -> Callable[[Workspace], Outcome]:
        def write(workspace: Workspace) -> Outcome:
            outcome = fill_shards()(workspace)
            workspace.file("timings.txt").write_text(seconds)
            return outcome

        return write

    a = produce(tmp_path / "a", plan(), fill("1 s"))
    b = produce(tmp_path / "b", plan(), fill("2 s"))
    assert a.content() == b.content()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"seed": 0, "train": {"beta": 0.2}}}, "train.beta: 0.1 there, 0.2 now;"),
        ({"config": {"seed": 0, "train": {}}}, "train.beta: 0.1 there, absent now;"),
        ({"config": {"seed": None, "train": {"beta": 0.1}}}, "seed: 0 there, null now;"),
        ({"inputs": {"data": input_ref(key="other")}}, "input data changed: data;"),
        ({"fingerprints": {"chat": "other"}}, "fingerprint changed: chat;"),
        ({"format_version": 2}, "format version 1 there, 2 now;"),
        ({"stage": "score"}, "it is the output of pair, not of score;"),
    ],
)
def test_other_settings_are_refused_with_the_field(tmp_path: Path, change, message) -> None:
    base = plan(inputs={"data": input_ref()}, fingerprints={"chat": "one"})
    make(tmp_path / "out", base)
    with pytest.raises(ConfigError) as refused:
        produce(tmp_path / "out", replace(base, **change), never)
    assert message in str(refused.value)
    assert "nothing is overwritten" in str(refused.value)
    assert refused.value.exit_code == 2


def test_long_values_that_differ_look_different() -> None:
    old = {**plan().key_fields(), "config": {"system": "a" * 100 + "b"}}
    new = {**plan().key_fields(), "config": {"system": "a" * 100 + "c"}}
    there, now = first_difference(old, new).removeprefix("system: ").split(" there, ")
    assert there != now.removesuffix(" now")


def test_an_input_made_anew_with_other_bytes_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "out", plan(inputs={"data": input_ref(content="old")}))
    with pytest.raises(ConfigError, match=r"input data changed: data \(data\) was made anew"):
        produce(tmp_path / "out", plan(inputs={"data": input_ref(content="new")}), never)


def test_shards_are_not_resumed_over_an_input_made_anew(tmp_path: Path) -> None:
    written: list[int] = []
    cut_off(tmp_path / "out", plan(inputs={"data": input_ref(content="old")}), after=2)
    make(tmp_path / "out", plan(inputs={"data": input_ref(content="new")}), written=written.append)
    assert written == [0, 1, 2]


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link", "link to a folder"])
def test_what_is_no_artifact_is_never_overwritten(tmp_path: Path, kind) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "folder":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    else:
        out.symlink_to(tmp_path / "elsewhere")
        if kind == "link to a folder":
            (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ConfigError, match="exists and is no artifact; nothing is overwritten"):
        produce(out, plan(), never)
    assert out.is_symlink() or out.read_text() == "mine" if kind != "folder" else any(out.iterdir())


def test_an_empty_folder_is_free(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out")
    assert len(hashes(tmp_path / "out")) == 4


def test_the_current_folder_is_refused(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(ConfigError, match="is the folder you are in; name a folder in it"):
        produce(Path(), plan(), never)


def test_a_place_inside_an_artifact_is_refused_and_leaves_it_whole(tmp_path: Path) -> None:
    before = hashes(make(tmp_path / "out") and tmp_path / "out")
    with pytest.raises(ConfigError, match="lies inside the finished artifact"):
        make(tmp_path / "out" / "inner" / "deeper")
    assert hashes(tmp_path / "out") == before


def test_a_manifest_of_something_else_above_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "a web app"}')
    make(tmp_path / "out")


def cut_off(out: Path, a_plan, after: int) -> None:
    """Make `after` shards, then fail."""

    def stop(shard: int) -> None:
        if shard == after - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(out, a_plan, written=stop)


def test_resume_after_an_interruption_keeps_finished_shards(tmp_path: Path) -> None:
    written: list[int] = []
    cut_off(tmp_path / "out", plan(), after=2)
    make(tmp_path / "out", written=written.append)
    make(tmp_path / "unbroken")
    assert written == [2]
    assert hashes(tmp_path / "out") == hashes(tmp_path / "unbroken")


def test_shards_of_another_division_do_not_stay(tmp_path: Path) -> None:
    """Five shards, cut off; then the same rows as three: no row is there twice."""

    def five_then_stop(workspace: Workspace) -> Outcome:
        fill_shards(num_shards=5, rows=24)(workspace)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        produce(tmp_path / "out", plan(), five_then_stop, resumable=True)
    make(tmp_path / "out")
    make(tmp_path / "unbroken")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "unbroken")


def test_a_damaged_shard_is_made_again(tmp_path: Path) -> None:
    written: list[int] = []
    cut_off(tmp_path / "out", plan(), after=2)
    (shard,) = tmp_path.glob(".out.*.partial/part-00000.parquet")
    data = bytearray(shard.read_bytes())
    data[50] ^= 1
    shard.write_bytes(data)
    make(tmp_path / "out", written=written.append)
    make(tmp_path / "unbroken")
    assert written == [0, 2]
    assert hashes(tmp_path / "out") == hashes(tmp_path / "unbroken")


def test_without_resume_nothing_of_a_failed_attempt_stays(tmp_path: Path) -> None:
    def fail(workspace: Workspace) -> Outcome:
        fill_shards()(workspace)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        produce(tmp_path / "out", plan(), fail)
    assert [p.name for p in tmp_path.iterdir()] == [".out.lock"]


def test_a_failed_attempt_keeps_shards_only(tmp_path: Path) -> None:
    def fail(workspace: Workspace) -> Outcome:
        fill_shards()(workspace)
        workspace.file("half.bin").write_text("half")
        (workspace.path / "link").symlink_to("half.bin")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        produce(tmp_path / "out", plan(), fail, resumable=True)
    (partial,) = tmp_path.glob(".out.*.partial")
    assert [n for n in files_below(partial) if not n.startswith(".shards/")] == [
        "part-00000.parquet", "part-00001.parquet", "part-00002.parquet",
    ]  # fmt: skip


def half_committed(tmp_path: Path) -> Path:
    """An attempt that was killed between its manifest and its rename."""
    make(tmp_path / "out")
    closed = tmp_path / f".out.{plan().attempt_key[:16]}.closed.partial"
    (tmp_path / "out").rename(closed)
    return closed


def test_an_attempt_that_lacks_only_the_rename_is_published(tmp_path: Path) -> None:
    half_committed(tmp_path)
    produce(tmp_path / "out", plan(), never)
    assert len(hashes(tmp_path / "out")) == 4


@pytest.mark.parametrize("damage", ["file", "manifest", "missing", "extra"])
def test_a_damaged_attempt_is_made_again_not_published(tmp_path: Path, damage, caplog) -> None:
    partial = half_committed(tmp_path)
    if damage == "missing":
        (partial / "timings.txt").unlink()
    elif damage == "extra":
        (partial / "extra").write_text("x")
    else:
        victim = partial / ("manifest.json" if damage == "manifest" else "part-00001.parquet")
        data = bytearray(victim.read_bytes())
        data[20] ^= 4
        victim.write_bytes(data)
    make(tmp_path / "out")
    assert "pair: a cut-off attempt is made again" in caplog.text
    make(tmp_path / "unbroken")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "unbroken")


def test_other_unfinished_attempts_are_named_and_left(tmp_path: Path, caplog) -> None:
    out = tmp_path / "out[1]*"  # glob characters are no pattern here
    cut_off(out, plan(config={"seed": 1}), after=1)
    make(out)
    assert "holds an unfinished attempt with other settings or inputs" in caplog.text
    assert len(list(tmp_path.glob("*.partial"))) == 1


def test_an_extra_file_in_a_finished_artifact_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "out")
    (tmp_path / "out" / "extra").write_text("x")
    with pytest.raises(CorruptError, match="extra does not belong there; delete"):
        produce(tmp_path / "out", plan(), never)


def test_a_metric_that_is_no_number_is_not_committed(tmp_path: Path) -> None:
    def fill(workspace: Workspace) -> Outcome:
        return Outcome(counts={}, metrics={"loss": float("nan")})

    with pytest.raises(DivergedError, match="pair: its metric loss is nan"):
        produce(tmp_path / "out", plan(), fill)
    assert not (tmp_path / "out").exists()


def test_a_volatile_file_must_exist(tmp_path: Path) -> None:
    def fill(workspace: Workspace) -> Outcome:
        return Outcome(counts={}, volatile=frozenset({"timing.parquet"}))

    with pytest.raises(AssertionError, match=r"timing\.parquet"):
        produce(tmp_path / "out", plan(), fill)


def test_a_link_in_an_artifact_is_refused(tmp_path: Path) -> None:
    def fill(workspace: Workspace) -> Outcome:
        (workspace.path / "link").symlink_to("/etc/passwd")
        return Outcome(counts={})

    with pytest.raises(CorruptError, match="artifacts hold no links"):
        produce(tmp_path / "out", plan(), fill)


def test_files_can_be_read_by_whom_the_folder_lets_in(tmp_path: Path) -> None:
    def fill(workspace: Workspace) -> Outcome:
        workspace.file("private").touch(mode=0o600)
        return Outcome(counts={})

    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            produce(tmp_path / str(mask), plan(), fill)
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / str(mask) / "private").stat().st_mode) == mode


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="a file stands where a folder is needed"):
        make(tmp_path / "file" / "out")


def test_a_place_that_may_not_be_written() -> None:
    with tempfile.TemporaryDirectory() as name:  # tmp_path is closed to other users
        folder = Path(name)
        folder.chmod(0o555)
        root = os.geteuid() == 0  # who may write anywhere
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(ConfigError, match="cannot be written"):
                make(folder / "out")
        finally:
            if root:
                os.seteuid(0)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device"), NoSpaceError),
        (OSError(122, "Disk quota exceeded"), NoSpaceError),
        (OSError("[errno 28] Error writing bytes to file"), NoSpaceError),
        (RuntimeError("I/O error: No space left on device (os error 28)"), NoSpaceError),
        (OSError(5, "Input/output error"), SpinError),
        (OSError(24, "Too many open files"), SpinError),
        (OSError(30, "Read-only file system", "/runs/.out.lock"), ConfigError),
    ],
)
def test_what_the_disk_refuses_is_told_in_one_line(error, expected) -> None:
    with pytest.raises(SpinError) as told, writing(Path("/runs/out")):
        raise error
    assert type(told.value) is expected
    assert "/runs/out" in str(told.value)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("line 28"),
        FileNotFoundError(2, "No such file", "/input"),
        PermissionError(13, "Permission denied", "/input/part-00000.parquet"),
        CorruptError("as it was"),
    ],
)
def test_errors_of_others_pass_as_they_are(error) -> None:
    with pytest.raises(type(error)) as told, writing(Path("/runs/out")):
        raise error
    assert told.value is error


def test_an_error_that_was_caused_by_a_full_disk_is_one_of_a_full_disk() -> None:
    with pytest.raises(NoSpaceError), writing(Path("out")):
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RuntimeError("could not save") from error


def test_write_durably_leaves_no_temporary_after_an_error(tmp_path: Path) -> None:
    write_durably(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        write_durably(tmp_path / "a", "\ud800")
    assert (tmp_path / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_write_durably_takes_the_place_of_a_left_over_temporary(tmp_path: Path) -> None:
    (tmp_path / ".a.tmp").symlink_to(tmp_path / "victim")
    write_durably(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
    assert not (tmp_path / "victim").exists()


def test_make_folder_makes_parents_and_bears_what_is_there(tmp_path: Path, monkeypatch) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path)
    make_folder(Path("c/d"))
    assert (tmp_path / "c" / "d").is_dir()


@pytest.mark.parametrize("path", ["", ".", "..", "/etc/passwd", "a/../../b", "a//b", "./a", "a\0b"])
def test_inner_path_refuses_what_is_no_plain_path_inside(tmp_path: Path, path) -> None:
    with pytest.raises(CorruptError, match="no plain path inside"):
        inner_path(tmp_path, path)


def test_inner_path_refuses_links_out(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    with pytest.raises(CorruptError):
        inner_path(tmp_path / "root", "link/file")
    assert inner_path(tmp_path / "root", "a/b") == tmp_path / "root" / "a" / "b"


def test_run_root_is_the_nearest_folder_with_a_run_record(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert run_root(tmp_path / "iterations" / "000" / "pair") == tmp_path
    (tmp_path / "iterations").mkdir()
    (tmp_path / "iterations" / "run.json").write_text("{}")
    assert run_root(tmp_path / "iterations" / "000" / "pair") == tmp_path / "iterations"


def test_git_state_of_code_that_the_checkout_does_not_track(tmp_path: Path, monkeypatch) -> None:
    """A virtual environment in another project must not pass for that project's commit."""
    root = Path(__file__).parents[2]
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    shutil.copytree(root / "stages", tmp_path / "stages")
    script = "from stages.artifacts.produce import git_state; print(git_state())"
    state = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert state.stdout.strip() == "{'commit': None, 'dirty': None}"
    subprocess.run([*git, "add", "stages"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "y"], check=True)
    elsewhere = tmp_path / "elsewhere"
    subprocess.run(["git", "init", "-q", str(elsewhere)], check=True)
    monkeypatch.setenv("GIT_DIR", str(elsewhere / ".git"))  # as a git hook sets it
    (tmp_path / "stages" / "errors.py").open("a").write("# changed\n")
    state = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "'dirty': True" in state.stdout
    assert "None" not in state.stdout


def test_an_artifact_opens_only_as_the_stage_it_is(tmp_path: Path) -> None:
    make(tmp_path / "out")
    with pytest.raises(SpinError, match="is the output of 'pair', but score or train is needed"):
        open_artifact(tmp_path / "out", stages=("score", "train"))


def test_parquet_rows_are_counted_in_the_manifest(tmp_path: Path) -> None:
    def fill(workspace: Workspace) -> Outcome:
        write_table(workspace.file("a.parquet"), num_rows=0)
        write_table(workspace.file("b.parquet"), num_rows=5000)
        return Outcome(counts={})

    assert [f.rows for f in produce(tmp_path / "out", plan(), fill).files] == [0, 5000]


def test_a_worker_who_comes_late_finds_the_attempt_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was passed over, hung, and goes on while the maker hashes the files."""
    store: list[ShardStore] = []

    def fill(space: Workspace) -> Outcome:
        store.append(space.shards)
        space.shards.write("part-00000.parquet", "ids", lambda path: write_table(path, num_rows=3))
        return Outcome(counts={"rows": 3})

    refused = []

    def late(folder: Path, *rest: Any) -> FileEntry:
        for name in ("part-00000.parquet", "part-00009.parquet"):
            with pytest.raises(FileNotFoundError) as caught:
                store[0].write(name, "ids", lambda path: write_table(path, num_rows=5))
            refused.append(caught.value)
        return whole(folder, *rest)

    whole = produce_module._file_entry
    monkeypatch.setattr(produce_module, "_file_entry", late)
    produce(tmp_path / "out", plan(), fill, resumable=True)
    assert len(refused) == 2
    artifact = open_artifact(tmp_path / "out", verify=True)
    assert [path.name for path in artifact.files("part-")] == ["part-00000.parquet"]
    assert count_rows(artifact.files("part-")) == 3
    assert not list(tmp_path.glob(".out.*.partial"))


def test_a_shard_that_was_damaged_before_the_commit_is_made_anew(tmp_path: Path) -> None:
    made = []

    def fill(space: Workspace) -> Outcome:
        for name in ("part-00000.parquet", "part-00001.parquet"):
            if not space.shards.done(name, "ids"):
                made.append(name)
                space.shards.write(name, "ids", lambda path: write_table(path, num_rows=3))
        if len(made) == 2:
            with (space.path / "part-00001.parquet").open("r+b") as file:
                file.seek(20)
                file.write(b"x")
        return Outcome(counts={"rows": 6})

    with pytest.raises(CorruptError, match=r"part-00001.parquet was damaged since it was written"):
        produce(tmp_path / "out", plan(), fill, resumable=True)
    produce(tmp_path / "out", plan(), fill, resumable=True)
    assert made == ["part-00000.parquet", "part-00001.parquet", "part-00001.parquet"]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_helpers_who_look_in_at_the_end_disturb_nothing(tmp_path: Path) -> None:
    """Each round several look for work without a pause, and leave scratch behind."""
    for number in range(30):
        out, ended = tmp_path / str(number), threading.Event()

        def fill(space: Workspace) -> Outcome:
            for k in range(20):
                write = partial(write_table, num_rows=2)
                space.shards.write(f"part-{k:05d}.parquet", "ids", write)
            return Outcome(counts={"rows": 40})

        def scratch(space: Workspace) -> None:
            with suppress(OSError), TemporaryDirectory(dir=space.scratch) as folder:
                Path(folder, "weights").write_text("x" * 1000)

        def look_in(out: Path = out, ended: threading.Event = ended) -> None:
            while not ended.is_set():
                produce_module._assist(out, plan(), scratch)

        helpers = [threading.Thread(target=look_in) for _ in range(3)]
        for helper in helpers:
            helper.start()
        try:
            produce(out, plan(), fill, resumable=True)
        finally:
            ended.set()
            for helper in helpers:
                helper.join()
        assert len(hashes(out)) == 20
    assert not list(tmp_path.glob(".*.partial"))
