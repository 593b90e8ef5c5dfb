"""What is told before the first stage, and what is left of a run that never began."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages import tracking
from stages.errors import ConfigError, InputError
from stages.layout import RunLayout
from tests import fake_stages
from tests.pipeline.test_run_loop import fakes, run, spin

__all__ = ["fakes"]  # a fixture
RECIPE = """
name: example
sft: {init: random}
reward: {name: gsm8k}
promote: {metric: sampled_accuracy}
suites:
  quiz: {kind: task, data: {source: recipe://quiz.jsonl, format: gsm8k}}
  duel: {kind: win_rate}
"""


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fakes: None) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    yield
    fake_stages.before_fill.clear()
    logging.getLogger("spin").handlers.clear()


def fail(error: Exception, at: str) -> None:
    """Let a stage fail."""

    def hook(stage: str, out: Path) -> None:
        if stage == at:
            raise error

    fake_stages.before_fill.append(hook)


def test_a_project_that_was_moved_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    project = tmp_path / "old"
    project.mkdir()
    (project / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(project)
    run(iterations=1)
    monkeypatch.chdir(project.rename(tmp_path / "new"))
    fake_stages.calls.clear()
    run(iterations=2)
    assert fake_stages.calls[0] == "001/generate"


def test_a_tracker_that_is_not_installed_ends_the_command_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next command, without it, is no other recipe of the same run."""
    monkeypatch.setitem(tracking.LIBRARIES, "tensorboard", ("no_such_library",))
    told = run("tracking.trackers=[tensorboard]", "train.beta=0.5", expect=2)
    assert "no_such_library is not installed" in told.stderr
    assert not Path("a").exists()
    run(iterations=1)


def test_a_new_run_whose_settings_are_refused_leaves_no_record() -> None:
    fail(ConfigError("not so"), "prepare")
    run("train.beta=0.5", expect=2)
    assert not RunLayout(Path("a")).record.exists()
    fake_stages.before_fill.clear()
    run(iterations=1)


@pytest.mark.parametrize(
    ("error", "at"),
    [
        (ConfigError("not so"), "evaluate"),  # there is data by now
        (InputError("not there"), "prepare"),  # may be there the next time
    ],
)
def test_one_that_has_begun_keeps_it(error: Exception, at: str) -> None:
    fail(error, at)
    run("train.beta=0.5", expect=error.exit_code)  # type: ignore[attr-defined]
    assert RunLayout(Path("a")).record.exists()
    assert "started with another recipe" in run(expect=2).stderr


def test_one_that_was_begun_by_init_keeps_it() -> None:
    spin("init", "a", "--config", "recipe.yaml")
    fail(ConfigError("not so"), "prepare")
    run(expect=2)
    assert RunLayout(Path("a")).record.exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("promote.metric=sampled_acuracy", "no such metric; did you mean sampled_accuracy?"),
        (
            "promote.gate={at_least: {metric: duel.win_rat, value: 0.5}}",
            "did you mean win_rate?",
        ),
        ("promote.gate={better: {metric: duel.win_rate}}", "is a comparison itself"),
        ("promote.gate={at_least: {metric: sampled_accuracy, value: 80}}", "write 0.8"),
        ("iterations.1.promote.metric=nosuch", "promote.metric=nosuch"),
    ],
)
def test_what_can_never_be_measured_is_told_before_anything_is_made(
    word: str, message: str
) -> None:
    for words in ((), ("--dry-run",), ("--rules",)):
        assert message in " ".join(run(word, *words, expect=2).stderr.split())
    assert not Path("a").exists()
    assert not fake_stages.calls


def test_what_the_start_shows_is_told_with_how_to_go_on() -> None:
    """The fakes measure nothing but accuracies of the start."""
    for word in ("promote.metric=sampled_entropy", "promote.gate={length_within: {share: 0.1}}"):
        told = " ".join(run(word, run=word[:12], expect=2).stderr.split())
        assert told.endswith("; change it with --amend, since the run has begun")
        run("--amend", run=word[:12], iterations=1)
