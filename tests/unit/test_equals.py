"""An artifact that the run has already is copied, and never a damaged one."""

import logging
from pathlib import Path

import pytest

from stages.artifacts import Manifest, Outcome, Plan, Workspace, open_artifact, produce
from stages.artifacts.equals import artifact_folders
from stages.artifacts.manifest import MANIFEST_NAME
from tests.artifact_tools import input_ref, plan, write_table

FILES = ["inner/text.txt", "rows.parquet", "timings.txt"]


def make(out: Path, a_plan: Plan | None = None, made: list[Path] | None = None) -> Manifest:
    def fill(space: Workspace) -> Outcome:
        assert made is not None, f"{out} is made anew"
        made.append(out)
        write_table(space.file("rows.parquet"))
        space.file("inner/text.txt").write_text("plain\n")
        space.file("timings.txt").write_text("7 s\n")
        return Outcome(counts={"rows": 40}, metrics={"loss": 0.5}, volatile=frozenset([FILES[2]]))

    return produce(out, a_plan or plan(), fill, reuse=True)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with an artifact at start/evaluate."""
    (tmp_path / "run.json").write_text("{}")
    make(tmp_path / "start" / "evaluate", made=[])
    return tmp_path


def test_an_equal_artifact_is_copied_byte_by_byte(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    out = run / "iterations" / "000" / "evaluate"
    manifest = make(out)
    source = run / "start" / "evaluate"
    assert manifest == open_artifact(source).manifest
    for name in [*FILES, MANIFEST_NAME]:
        assert (out / name).read_bytes() == (source / name).read_bytes()
        assert not (out / name).samefile(source / name)
    assert sorted(f.path for f in manifest.files) == FILES
    open_artifact(out).files()
    assert f"taken from {source}, which has the same key" in caplog.text
    assert sorted(p.name for p in out.parent.iterdir()) == [".evaluate.lock", "evaluate"]


@pytest.mark.parametrize("name", [*FILES, MANIFEST_NAME])
def test_a_damaged_artifact_is_not_taken(
    run: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = run / "start" / "evaluate" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    made: list[Path] = []
    make(run / "other", made=made)
    assert made == [run / "other"]
    open_artifact(run / "other").files()
    assert "start/evaluate is not taken for its equal: " in caplog.text
    assert "is damaged" in caplog.text
    assert make(run / "third") == open_artifact(run / "other").manifest  # the good one is found


@pytest.mark.parametrize("name", FILES)
def test_an_artifact_that_lacks_a_file_is_not_taken(run: Path, name: str) -> None:
    (run / "start" / "evaluate" / name).unlink()
    made: list[Path] = []
    make(run / "other", made=made)
    assert made


def test_only_the_same_key_and_the_same_bytes_of_inputs_are_equal(run: Path) -> None:
    made: list[Path] = []
    given = plan(inputs={"data": input_ref()})
    make(run / "a", plan(config={"seed": 1}), made)
    make(run / "b", given, made)
    make(run / "c", plan(inputs={"data": input_ref(content="other bytes")}), made)
    assert [place.name for place in made] == ["a", "b", "c"]
    make(run / "d", given)


def test_the_copy_names_its_inputs_as_they_were_given(run: Path) -> None:
    make(run / "a", plan(inputs={"data": input_ref(path="data")}), [])
    copied = make(run / "b", plan(inputs={"data": input_ref(path="again/data")}))
    assert copied.inputs["data"].path == "again/data"
    assert open_artifact(run / "b").manifest == copied


def test_nothing_is_looked_for_outside_of_the_run(run: Path, tmp_path_factory) -> None:
    made: list[Path] = []
    make(tmp_path_factory.mktemp("no-run") / "out", made=made)
    other = tmp_path_factory.mktemp("other-run")
    (other / "run.json").write_text("{}")
    (other / "link").symlink_to(run / "start")
    make(other / "out", made=made)
    assert len(made) == 2


def test_unfinished_attempts_are_no_artifacts(run: Path) -> None:
    hidden = run / ".out.0123456789abcdef.partial"
    hidden.mkdir()
    (hidden / MANIFEST_NAME).write_bytes((run / "start/evaluate" / MANIFEST_NAME).read_bytes())
    assert list(artifact_folders(run)) == [run / "start" / "evaluate"]


def test_without_reuse_nothing_is_copied(run: Path) -> None:
    made: list[str] = []

    def fill(space: Workspace) -> Outcome:
        made.append("it")
        return Outcome(counts={})

    produce(run / "other", plan(), fill)
    assert made
