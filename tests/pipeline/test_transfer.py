"""push and pull: what is at the other side is whole or not there, and what comes back is the same.

The store is a real S3 server on this machine, beside plain folders (file://) and memory where the
kind of store does not matter.
"""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spin_cli.loop import carry_on
from stages import transfer
from stages.artifacts import Manifest, Outcome, Workspace, locks, produce, read_manifest
from stages.artifacts.keys import sha256_bytes
from stages.artifacts.pointer import read_pointer
from stages.errors import BusyError, ConfigError, CorruptError, InputError, SpinError
from stages.layout import RunLayout
from stages.promote import rollback
from stages.recipe import load_recipe
from stages.run_record import start_or_resume
from stages.transfer import pull, push
from stages.verify import verify
from tests import artifact_tools, fake_stages

ROOT = Path(__file__).parents[2]
LIBRARIES = ROOT / ".venv" / "s3"
SECRET = "a-secret-of-these-tests"
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
    "AWS_ACCESS_KEY_ID": "someone",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
    "PYTHONPATH": f"{LIBRARIES}:{ROOT}",
}
BUCKET = "s3://bucket"
RECIPE = load_recipe(None, ["sft.init=random"])


class Store:
    """The S3 server, and `spin` with its libraries; see tests/s3_worker.py."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.s3_worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT,
        )  # fmt: skip
        self.environment = ENVIRONMENT | {"AWS_ENDPOINT_URL": self.answer()}

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, *words: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def spin(self, *words: object, code: int = 0) -> str:
        """Run a command, check its exit code, and return what it wrote."""
        done = self.ask("spin", *map(str, words))
        assert done["code"] == code, done["output"]
        assert SECRET not in done["output"]
        return str(done["output"])

    def start(self, *words: object) -> subprocess.Popen[str]:
        """Run a command in a process of its own, to be killed."""
        command = [sys.executable, "-m", "spin_cli", *map(str, words)]
        return subprocess.Popen(command, env=self.environment, cwd=ROOT, text=True,
                                stderr=subprocess.PIPE)  # fmt: skip

    def files(self, place: str) -> list[str]:
        return [key.removeprefix(f"{place}/") for key in self.ask("keys") if key.startswith(place)]

    def get(self, key: str) -> bytes:
        return base64.b64decode(self.ask("get", key))

    def put(self, key: str, data: bytes) -> None:
        self.ask("put", key, base64.b64encode(data).decode())

    def sent(self) -> list[str]:
        """The keys that were written since `forget`."""
        writes = [r for r in self.ask("requests") if r.startswith(("PUT", "POST"))]
        return [r.partition("/bucket/")[2].partition("?")[0] for r in writes]


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    if not LIBRARIES.is_dir():
        pytest.skip("needs the S3 libraries: make .venv/s3")
    found = Store()
    yield found
    found.process.stdin.close()  # type: ignore[union-attr]
    found.process.wait(10)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    artifact_tools.make(tmp_path / "made")
    return tmp_path / "made"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunLayout]:
    layout = RunLayout(tmp_path / "run")
    start_or_resume(layout, RECIPE)
    with fake_stages.installed():
        carry_on(layout, RECIPE, 1)
        yield layout


def many_files(out: Path, count: int, size: int) -> Manifest:
    def fill(workspace: Workspace) -> Outcome:
        for index in range(count):
            seed = index.to_bytes(4, "big")
            workspace.file(f"{index:04d}").write_bytes((seed * (size // 4 + 1))[:size])
        return Outcome(counts={"rows": count})

    return produce(out, artifact_tools.plan(config={"count": count, "size": size}), fill)


def bytes_of(place: Path) -> dict[str, bytes]:
    """All files but hidden ones (locks), by relative path."""
    return {
        path.relative_to(place).as_posix(): path.read_bytes()
        for path in place.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(place).parts)
    }


def flip(data: bytes) -> bytes:
    changed = bytearray(data)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


def url_of(folder: Path) -> str:
    return f"file://{folder}"


def until(condition: Any, process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, f"it ended before it was killed: {process.stderr}"
        time.sleep(0.002)


# An artifact and S3


def test_what_is_pulled_is_byte_for_byte_what_was_pushed(
    store: Store, artifact: Path, tmp_path: Path
) -> None:
    url, place = f"{BUCKET}/same", tmp_path / "pulled"
    assert "1 artifacts sent, 5 files" in store.spin("push", artifact, url)
    assert "1 artifacts fetched, 5 files" in store.spin("pull", url, place)
    assert bytes_of(place) == bytes_of(artifact)
    assert verify(place).problems == []
    assert "already there" in store.spin("pull", url, place)


def test_the_manifest_is_sent_last_and_a_second_push_sends_nothing(
    store: Store, artifact: Path
) -> None:
    store.ask("forget")
    store.spin("push", artifact, f"{BUCKET}/twice")
    sent = store.sent()
    assert sent[-1] == "twice/manifest.json"
    assert sorted(sent) == sorted(f"twice/{name}" for name in bytes_of(artifact))
    store.ask("forget")
    assert "already there" in store.spin("push", artifact, f"{BUCKET}/twice")
    assert store.sent() == []


def test_a_large_file_goes_in_parts_and_leaves_none_behind(store: Store, tmp_path: Path) -> None:
    many_files(tmp_path / "large", 1, 33 * 2**20 + 7)
    store.ask("forget")
    store.spin("push", tmp_path / "large", f"{BUCKET}/large")
    assert len(store.sent()) > 3  # create, three parts, complete, manifest
    store.spin("pull", f"{BUCKET}/large", tmp_path / "back")
    assert bytes_of(tmp_path / "back") == bytes_of(tmp_path / "large")
    path = tmp_path / "large" / "0000"
    path.write_bytes(flip(path.read_bytes()))
    output = store.spin("push", tmp_path / "large", f"{BUCKET}/damaged", code=4)
    assert str(path) in output
    assert store.files("damaged") == []
    assert store.ask("uploads") == 0


def test_a_push_killed_half_way_shows_nothing_and_goes_on(store: Store, tmp_path: Path) -> None:
    many_files(tmp_path / "many", 60, 20_000)
    url = f"{BUCKET}/killed"
    process = store.start("push", tmp_path / "many", url, "--threads", "1")
    until(lambda: len(store.files("killed")) > 5, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = store.files("killed")
    assert "manifest.json" not in there
    assert "no artifact (yet)" in store.spin("pull", url, tmp_path / "early", code=3)
    assert not (tmp_path / "early").exists()
    store.ask("forget")
    store.spin("push", tmp_path / "many", url)
    assert sorted(store.sent()) == sorted(
        f"killed/{name}" for name in bytes_of(tmp_path / "many") if name not in there
    )
    store.spin("pull", url, tmp_path / "late")
    assert bytes_of(tmp_path / "late") == bytes_of(tmp_path / "many")


def test_a_file_that_a_stranger_put_there_is_sent_again(store: Store, artifact: Path) -> None:
    right = (artifact / "timings.txt").read_bytes()
    store.put("stranger/timings.txt", flip(right))
    store.spin("push", artifact, f"{BUCKET}/stranger")
    assert store.get("stranger/timings.txt") == right


def test_a_pull_killed_half_way_goes_on_with_what_is_whole(store: Store, tmp_path: Path) -> None:
    many_files(tmp_path / "many", 70, 20_000)
    url, place = f"{BUCKET}/pulled", tmp_path / "place"
    store.spin("push", tmp_path / "many", url, "--threads", 8)
    process = store.start("pull", url, place, "--threads", "1")
    until(lambda: len(whole(tmp_path)) > 5, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not place.exists()
    kept = whole(tmp_path)
    damaged = kept[0]
    damaged.write_bytes(flip(damaged.read_bytes()))
    store.ask("forget")
    store.spin("pull", url, place)
    read = [r for r in store.ask("requests") if "pulled/0" in r]
    assert len(read) == 70 - (len(kept) - 1)
    assert bytes_of(place) == bytes_of(tmp_path / "many")
    assert not list(tmp_path.glob(".place.*.partial"))


def whole(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob(".place.*.partial/*") if not p.name.startswith("."))


def test_a_flipped_byte_at_the_server_is_found(
    store: Store, artifact: Path, tmp_path: Path
) -> None:
    store.spin("push", artifact, f"{BUCKET}/flipped")
    for name, data in bytes_of(artifact).items():
        store.put(f"flipped/{name}", flip(data))
        place = tmp_path / sha256_bytes(name.encode())
        output = store.spin("pull", f"{BUCKET}/flipped", place, code=4)
        assert f"flipped/{name}" in output
        assert not place.exists()
        store.put(f"flipped/{name}", data)
        store.spin("pull", f"{BUCKET}/flipped", place)


def test_a_missing_object_is_found_by_push_and_pull(
    store: Store, artifact: Path, tmp_path: Path
) -> None:
    store.spin("push", artifact, f"{BUCKET}/missing")
    store.ask("delete", "missing/notes/about.txt")
    for words in (("pull", f"{BUCKET}/missing", tmp_path / "p"),
                  ("push", artifact, f"{BUCKET}/missing")):  # fmt: skip
        assert "missing/notes/about.txt is missing" in store.spin(*words, code=4)
    store.ask("delete", "missing/manifest.json")
    store.spin("push", artifact, f"{BUCKET}/missing")
    store.spin("pull", f"{BUCKET}/missing", tmp_path / "p")


def test_another_artifact_is_never_overwritten(
    store: Store, artifact: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    artifact_tools.make(other, artifact_tools.plan(config={"seed": 0, "train": {"beta": 0.2}}))
    store.spin("push", artifact, f"{BUCKET}/taken")
    before = {key: store.get(f"taken/{key}") for key in store.files("taken")}
    output = store.spin("push", other, f"{BUCKET}/taken", code=2)
    assert "train.beta: 0.1 there, 0.2 now" in output
    assert {key: store.get(f"taken/{key}") for key in store.files("taken")} == before
    assert "train.beta" in store.spin("pull", f"{BUCKET}/taken", other, code=2)
    assert "another place" in store.spin("push", other, f"{BUCKET}/taken/notes", code=2)


def test_no_bucket_no_permission_no_server(store: Store, artifact: Path, tmp_path: Path) -> None:
    assert "bucket" in store.spin("push", artifact, "s3://no-such-bucket/x", code=2)
    assert "bucket" in store.spin("pull", "s3://no-such-bucket/x", tmp_path / "p", code=3)
    gone = store.environment | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "spin_cli", "pull", f"{BUCKET}/x", str(tmp_path / "p")],
        env=gone, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stderr


# A run and S3


def test_a_run_pushed_twice_sends_what_is_new_and_can_be_carried_on(
    store: Store, run: RunLayout, tmp_path: Path
) -> None:
    url, copy = f"{BUCKET}/run", RunLayout(tmp_path / "copy")
    store.spin("push", run.root, url)
    store.spin("pull", url, copy.root)
    assert bytes_of(copy.root) == bytes_of(run.root)
    assert verify(copy.root).problems == []
    fake_stages.calls.clear()
    carry_on(run, RECIPE, 2)
    store.ask("forget")
    store.spin("push", run.root, url)
    sent = store.sent()
    assert all(key.startswith(("run/iterations/001/", "run/champion")) for key in sent)
    assert sent[-1] == "run/champion"
    assert "6 artifacts fetched" in store.spin("pull", url, copy.root)
    assert bytes_of(copy.root) == bytes_of(run.root)
    fake_stages.calls.clear()
    carry_on(copy, RECIPE, 3)
    assert {call.partition("/")[0] for call in fake_stages.calls} == {"002"}
    assert verify(copy.root).problems == []


# Data from S3


def lines(count: int, word: str = "yes") -> bytes:
    rows = [{"prompt": f"question {i}", "response": f"{word} {i}"} for i in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def prepare_words(source: object, out: Path) -> list[object]:
    settings = ["prepare.format=prompt_response", "prepare.heldout_size=3"]
    return ["prepare", "--source", source, "--out", out, *settings]


def test_data_at_a_url_gives_what_the_same_files_here_give(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_bytes(lines(20, word=name))
        store.put(f"data/answers/{name}", lines(20, word=name))
    store.put("data/answers/notes.txt", b"no data")
    places = ((folder, f"{BUCKET}/data/answers"),
              (folder / "a.jsonl", f"{BUCKET}/data/answers/a.jsonl"))  # fmt: skip
    for number, (here, there) in enumerate(places):
        local, fetched = tmp_path / f"local{number}", tmp_path / f"fetched{number}"
        store.spin(*prepare_words(here, local))
        store.spin(*prepare_words(there, fetched))
        assert read_manifest(fetched).key == read_manifest(local).key
        assert artifact_tools.hashes(fetched) == artifact_tools.hashes(local)
        assert not (tmp_path / f".fetched{number}.source").exists()


def test_finished_data_is_not_fetched_again_and_changed_data_is_noticed(
    store: Store, tmp_path: Path
) -> None:
    url, out = f"{BUCKET}/changing/a.jsonl", tmp_path / "out"
    store.put("changing/a.jsonl", lines(20))
    store.spin(*prepare_words(url, out))
    store.ask("forget")
    assert "already done" in store.spin(*prepare_words(url, out))
    assert not [r for r in store.ask("requests") if r.startswith("GET /bucket/changing")]
    store.put("changing/a.jsonl", lines(20, word="no"))
    assert "fingerprint changed: source" in store.spin(*prepare_words(url, out), code=2)
    assert f"{BUCKET}/changing/none holds no data" in store.spin(
        *prepare_words(f"{BUCKET}/changing/none", tmp_path / "none"), code=3
    )
    store.put("changing/bad.jsonl", b'{"prompt": 1\n')
    assert f"{BUCKET}/changing/bad.jsonl line 1 is no valid JSON" in store.spin(
        *prepare_words(f"{BUCKET}/changing/bad.jsonl", tmp_path / "bad"), code=3
    )


# What does not depend on the store


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_other_stores(kind: str, artifact: Path, tmp_path: Path) -> None:
    url = url_of(tmp_path / "store" / "a") if kind == "file" else f"memory://{tmp_path}/a"
    assert push(artifact, url).artifacts == 1
    assert push(artifact, url).there == 1
    assert pull(url, tmp_path / "b").files == 5
    assert bytes_of(tmp_path / "b") == bytes_of(artifact)


def test_a_store_without_checksums_is_read_again_and_hashed(artifact: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    push(artifact, url_of(store))
    (store / "manifest.json").unlink()
    (store / "timings.txt").write_bytes(flip((store / "timings.txt").read_bytes()))
    assert push(artifact, url_of(store)).files == 1
    assert bytes_of(store) == bytes_of(artifact)


@pytest.mark.parametrize("name", ["part-00001.parquet", "timings.txt", "manifest.json"])
def test_a_damaged_artifact_is_not_pushed(name: str, artifact: Path, tmp_path: Path) -> None:
    (artifact / name).write_bytes(flip((artifact / name).read_bytes()))
    with pytest.raises(CorruptError, match=name):
        push(artifact, url_of(tmp_path / "store"))
    assert not (tmp_path / "store" / name).exists()
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_the_same_artifact_made_anew_is_another(artifact: Path, tmp_path: Path) -> None:
    url = url_of(tmp_path / "store")
    push(artifact, url)
    artifact_tools.make(tmp_path / "anew", rows=41)
    with pytest.raises(ConfigError, match=r"made apart from it:  file\.part-00000\.parquet"):
        push(tmp_path / "anew", url)


@pytest.mark.parametrize(
    "name", ["../outside", "/tmp/outside", "a/../../outside", "manifest.json", ".shards/a", ""]
)
def test_a_manifest_that_names_places_outside_is_refused(
    name: str, artifact: Path, tmp_path: Path
) -> None:
    manifest = read_manifest(artifact)
    entry = manifest.files[0].model_copy(update={"path": name, "size_bytes": 1})
    hostile = manifest.model_copy(update={"files": [entry]})
    store = tmp_path / "deep" / "store"
    store.mkdir(parents=True)
    (store / "x").write_text("x")
    (store / "manifest.json").write_text(hostile.to_text())
    with pytest.raises(SpinError):
        pull(url_of(store), tmp_path / "place" / "p")
    assert not (tmp_path / "place" / "p").exists()
    assert not list(tmp_path.rglob("outside"))


def test_sizes_are_checked_before_anything_is_fetched(artifact: Path, tmp_path: Path) -> None:
    push(artifact, url_of(tmp_path / "store"))
    with (tmp_path / "store" / "part-00000.parquet").open("ab") as file:
        file.truncate(2**40)  # a hole of a terabyte
    with pytest.raises(CorruptError, match="has 1099511627776 bytes, its manifest says"):
        pull(url_of(tmp_path / "store"), tmp_path / "p")
    assert not list(tmp_path.glob(".p.*.partial"))


def test_a_manifest_with_more_bytes_than_the_disk_has_room_for(
    artifact: Path, tmp_path: Path
) -> None:
    manifest = read_manifest(artifact)
    size = 2**62
    huge = manifest.model_copy(
        update={"files": [f.model_copy(update={"size_bytes": size}) for f in manifest.files]}
    )
    listing = {f.path: size for f in huge.files} | {"manifest.json": len(huge.to_text())}
    push(artifact, url_of(tmp_path / "store"))
    (tmp_path / "store" / "manifest.json").write_text(huge.to_text())
    remote = transfer.open_remote(url_of(tmp_path / "store"))
    with pytest.raises(SpinError, match="bytes free"):
        transfer._Pull(remote, tmp_path / "p", listing, 1).artifact()


def test_a_place_that_holds_something_else_is_left_alone(artifact: Path, tmp_path: Path) -> None:
    push(artifact, url_of(tmp_path / "store"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="name another place"):
        pull(url_of(tmp_path / "store"), tmp_path / "full")
    assert bytes_of(tmp_path / "full") == {"mine.txt": b"mine"}
    with pytest.raises(ConfigError, match="lies inside the finished artifact"):
        pull(url_of(tmp_path / "store"), artifact / "inside")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("some/folder", "is no URL"),
        ("s3://", "names no folder|is missing|names no"),
        ("sftp://me:hunter2@host/x", "holds a password"),
        ("https://host/x?token=hunter2", r"after \? or #"),
        ("zip://a::s3://b/c", "no plain URL"),
        ("file:///a/../b", "no plain URL"),
        ("nonsense://x/y", "nonsense"),
    ],
)
def test_urls_that_are_refused_and_never_with_their_secret(
    url: str, message: str, artifact: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        push(artifact, url)
    assert "hunter2" not in str(caught.value)


def test_push_and_pull_take_neither_the_wrong_order_nor_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the order is: spin pull URL PLACE"):
        pull("file:///x", Path("s3://bucket/x"))
    with pytest.raises(InputError, match="does not exist"):
        push(tmp_path / "nothing", url_of(tmp_path / "store"))
    with pytest.raises(InputError, match="no artifact"):
        pull(url_of(tmp_path / "store"), tmp_path / "p")


def test_a_run_that_is_carried_on_is_neither_pushed_nor_pulled_into(
    run: RunLayout, tmp_path: Path
) -> None:
    url = url_of(tmp_path / "store")
    push(run.root, url)
    with locks.hold(run.lock, "the run"):
        for transfer_of in (lambda: push(run.root, url), lambda: pull(url, run.root)):
            with pytest.raises(BusyError):
                transfer_of()


def test_a_pulled_run_is_none_before_all_of_it_is_there(run: RunLayout, tmp_path: Path) -> None:
    store, copy = tmp_path / "store", RunLayout(tmp_path / "copy")
    push(run.root, url_of(store))
    damaged = store / "iterations/000/train/config.json"
    right = damaged.read_bytes()
    damaged.write_bytes(flip(right))
    with pytest.raises(CorruptError, match="train/config.json"):
        pull(url_of(store), copy.root)
    assert (copy.stage(0, "generate") / "manifest.json").is_file()
    assert not copy.record.exists()
    assert not copy.champion.exists()
    damaged.write_bytes(right)
    report = pull(url_of(store), copy.root)
    assert report.there > 0
    assert bytes_of(copy.root) == bytes_of(run.root)


def test_a_champion_is_never_sent_back(run: RunLayout, tmp_path: Path) -> None:
    url, copy = url_of(tmp_path / "store"), RunLayout(tmp_path / "copy")
    push(run.root, url)
    pull(url, copy.root)
    carry_on(run, RECIPE, 2)
    push(run.root, url)
    before = read_pointer(tmp_path / "store" / "champion")
    with pytest.raises(ConfigError, match="a move to iterations/001/train .* get it first"):
        push(copy.root, url)
    assert read_pointer(tmp_path / "store" / "champion") == before
    carry_on(copy, RECIPE, 1)
    pull(url, copy.root)
    assert push(copy.root, url).artifacts == 0
    rollback(run)
    push(run.root, url)
    pull(url, copy.root)
    assert read_pointer(copy.champion) == read_pointer(run.champion)


def test_runs_that_went_apart_stay_apart(run: RunLayout, tmp_path: Path) -> None:
    url, copy = url_of(tmp_path / "store"), RunLayout(tmp_path / "copy")
    push(run.root, url)
    pull(url, copy.root)
    carry_on(copy, RECIPE, 2)
    push(copy.root, url)
    fake_stages.accuracy_by_model["iterations/001/train"] = 0.95
    try:
        carry_on(run, RECIPE, 2)
    finally:
        fake_stages.accuracy_by_model.clear()
    before = bytes_of(tmp_path / "store"), bytes_of(run.root)
    for transfer_of in (lambda: push(run.root, url), lambda: pull(url, run.root)):
        with pytest.raises(ConfigError, match="holds another artifact"):
            transfer_of()
    assert (bytes_of(tmp_path / "store"), bytes_of(run.root)) == before


def test_another_recipe_needs_amend(run: RunLayout, tmp_path: Path) -> None:
    url, copy = url_of(tmp_path / "store"), RunLayout(tmp_path / "copy")
    push(run.root, url)
    pull(url, copy.root)
    start_or_resume(run, load_recipe(None, ["sft.init=random", "train.beta=0.3"]), amend=True)
    with pytest.raises(ConfigError, match="train.beta: 0.1 there, 0.3 now"):
        push(run.root, url)
    push(run.root, url, amend=True)
    with pytest.raises(ConfigError, match="train.beta: 0.1 there, 0.3 now"):
        pull(url, copy.root)
    pull(url, copy.root, amend=True)
    assert bytes_of(copy.root) == bytes_of(run.root) == bytes_of(tmp_path / "store")


def test_a_run_and_an_artifact_are_not_mixed(
    run: RunLayout, artifact: Path, tmp_path: Path
) -> None:
    push(run.root, url_of(tmp_path / "run-there"))
    push(artifact, url_of(tmp_path / "artifact-there"))
    with pytest.raises(ConfigError, match="holds a run"):
        push(artifact, url_of(tmp_path / "run-there"))
    with pytest.raises(ConfigError, match="holds an artifact"):
        push(run.root, url_of(tmp_path / "artifact-there"))


def test_an_artifact_without_its_input_is_refused_at_both_ends(
    run: RunLayout, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    push(run.root, url_of(store))
    (store / "data" / "manifest.json").unlink()
    with pytest.raises(CorruptError, match="its input data is not there"):
        pull(url_of(store), tmp_path / "copy")
    run.data.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="its input data is not in the run any more"):
        push(run.root, url_of(tmp_path / "empty"))


def test_a_pulled_manifest_keeps_its_very_bytes(artifact: Path, tmp_path: Path) -> None:
    push(artifact, url_of(tmp_path / "store"))
    pull(url_of(tmp_path / "store"), tmp_path / "p")
    there, here = (
        sha256_bytes((p / "manifest.json").read_bytes()) for p in (artifact, tmp_path / "p")
    )
    assert there == here
