"""verify: every byte, every manifest, and the chain between them."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from spin_cli.loop import carry_on
from stages.errors import InputError
from stages.layout import RunLayout
from stages.recipe import load_recipe
from stages.run_record import start_or_resume
from stages.verify import verify
from tests import fake_stages

RECIPE = load_recipe(None, ["sft.init=random"])


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunLayout]:
    layout = RunLayout(tmp_path / "run")
    start_or_resume(layout, RECIPE)
    with fake_stages.installed():
        carry_on(layout, RECIPE, 2)
        yield layout


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def problem(run: RunLayout) -> str:
    """The one problem that verify finds."""
    problems = verify(run.root).problems
    assert len(problems) == 1, problems
    return problems[0]


def test_a_sound_run(run: RunLayout) -> None:
    report = verify(run.root)
    assert report.problems == []
    assert report.artifacts == 3 + 2 * 6
    assert report.files >= report.artifacts
    assert report.to_json()["ok"] is True


def test_one_artifact_by_itself(run: RunLayout) -> None:
    assert verify(run.data).artifacts == 1
    flip(run.data / "config.json")
    assert len(verify(run.data).problems) == 1


def test_threads_find_the_same(run: RunLayout) -> None:
    for iteration in range(2):
        flip(run.stage(iteration, "train") / "config.json")
    assert verify(run.root, threads=1).problems == verify(run.root, threads=8).problems
    assert len(verify(run.root).problems) == 2


def test_every_flipped_bit_is_found(run: RunLayout) -> None:
    files = sorted(p for p in run.root.rglob("*") if p.is_file() and not p.name.startswith("."))
    for path in files:
        before = path.read_bytes()
        flip(path)
        assert verify(run.root).problems, path
        path.write_bytes(before)
    assert verify(run.root).problems == []


def test_a_flipped_bit_is_named_with_its_remedy(run: RunLayout) -> None:
    flip(run.stage(0, "train") / "config.json")
    assert "000/train/config.json is damaged" in problem(run)
    assert f"delete {run.stage(0, 'train')} and run its stage again" in problem(run)


def test_a_truncated_a_missing_and_an_extra_file(run: RunLayout) -> None:
    path = run.stage(0, "train") / "config.json"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert f"has {len(data) - 1} bytes, its manifest says {len(data)}" in problem(run)
    path.unlink()
    assert "config.json is missing" in problem(run)
    path.write_bytes(data)
    (path.parent / "extra").touch()
    assert "extra does not belong there" in problem(run)


def test_a_missing_manifest_is_a_problem_not_a_missing_artifact(run: RunLayout) -> None:
    (run.stage(1, "promote") / "manifest.json").unlink()
    assert "promote holds decision.json but no manifest.json" in problem(run)


def test_an_input_that_is_gone(run: RunLayout) -> None:
    shutil.rmtree(run.stage(0, "pair"))
    assert "000/score: its input pairs (iterations/000/pair) is not in the run" in problem(run)


def test_an_input_that_was_replaced_by_another(run: RunLayout) -> None:
    shutil.rmtree(run.stage(1, "pair"))
    shutil.copytree(run.stage(0, "pair"), run.stage(1, "pair"))
    found = verify(run.root).problems
    assert any("001/score: its input pairs" in p and "is another artifact now" in p for p in found)


def test_an_input_with_other_bytes_under_the_same_key(
    run: RunLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run.stage(1, "evaluate")
    shutil.rmtree(out)
    monkeypatch.setitem(fake_stages.accuracy_by_model, "iterations/001/train", 0.1)
    shutil.copytree(run.stage(1, "promote"), run.root / "kept")
    shutil.rmtree(run.stage(1, "promote"))
    carry_on(run, RECIPE, 2)
    shutil.rmtree(run.stage(1, "promote"))
    shutil.move(run.root / "kept", run.stage(1, "promote"))
    assert "its input evaluation (iterations/001/evaluate) was made anew" in problem(run)


def test_a_pointer_without_its_target(run: RunLayout) -> None:
    for stage in ("train", "evaluate", "promote"):
        shutil.rmtree(run.stage(1, stage))
    assert "001/train does not exist" in problem(run)


def test_a_pointer_to_another_artifact(run: RunLayout) -> None:
    for stage in ("evaluate", "promote", "train"):
        shutil.rmtree(run.stage(1, stage))
    shutil.copytree(run.stage(0, "train"), run.stage(1, "train"))
    assert any("points to iterations/001/train with key" in p for p in verify(run.root).problems)


def test_locks_and_unfinished_attempts_are_no_problem(run: RunLayout) -> None:
    partial = run.root / "iterations/002/.train.0123456789abcdef.partial"
    partial.mkdir(parents=True)
    (partial / "part-00000.parquet").touch()
    (run.root / "iterations/002/.train.lock").touch()
    assert verify(run.root).problems == []


def test_a_link_in_an_artifact_is_a_problem(run: RunLayout, tmp_path: Path) -> None:
    path = run.stage(0, "train") / "config.json"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert verify(run.root).problems


def test_what_is_neither_run_nor_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is neither an artifact nor a run"):
        verify(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        verify(tmp_path / "none")
