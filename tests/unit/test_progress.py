"""Progress on a terminal and elsewhere."""

import io
import logging
import sys

import pytest

from stages import progress as module
from stages.progress import Progress, duration, progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_tell_speed_and_time_left(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="spin")
    bar = Progress("generate", 4000, "rows", clock=clock)
    for _ in range(20):
        clock.now += 1.0
        bar.advance(100, 2500)
    assert [r.getMessage() for r in caplog.records] == [
        "generate: 1,000/4,000 rows (25%), 2,500 tokens/s, 30 s left",
        "generate: 2,000/4,000 rows (50%), 2,500 tokens/s, 20 s left",
    ]


def test_what_an_earlier_attempt_did_is_no_speed(clock: Clock) -> None:
    bar = Progress("generate", 1000, "rows", done=800, clock=clock)
    assert bar.line() == "generate: 800/1,000 rows (80%)"
    clock.now = 10.0
    bar.advance(50)
    assert bar.seconds_left == pytest.approx(30.0)


def test_the_remark_comes_last(clock: Clock) -> None:
    bar = Progress("train", 10, "steps", clock=clock)
    clock.now = 2.0
    bar.note("loss 0.52")
    bar.advance(5)
    assert bar.line() == "train: 5/10 steps (50%), 2 s left, loss 0.52"


def test_nothing_to_do_is_all_done(clock: Clock) -> None:
    assert Progress("score", 0, "pairs", clock=clock).line() == "score: 0/0 pairs (100%)"


def test_the_end_is_told_only_after_other_lines(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="spin")
    for step_s, lines in ((0.1, 0), (6.0, 3)):
        caplog.clear()
        bar = Progress("score", 4, "pairs", clock=clock)
        for _ in range(4):
            clock.now += step_s
            bar.advance(1)
        bar.finish()
        assert len(caplog.records) == lines
    assert caplog.records[-1].getMessage() == "score: 4/4 pairs (100%), 24 s in all"


def test_no_terminal_no_bar(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="spin")
    monkeypatch.setattr(module, "PLAIN_EVERY_S", 0.0)
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress("sft", total=2, unit="steps") as bar:
        bar.advance(1, 100)
    assert "sft: 1/2 steps (50%)" in caplog.text
    assert stderr.getvalue() == "", "lines go through the log alone"


def test_a_terminal_gets_a_bar_and_no_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="spin")
    monkeypatch.setattr(module, "PLAIN_EVERY_S", 0.0)
    monkeypatch.setenv("COLUMNS", "160")
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress("sft", total=2, unit="steps") as bar:
        bar.note("loss [red]0.5[/x]")
        bar.advance(1, 100)
    shown = stderr.getvalue()
    assert "sft" in shown
    assert "1/2 steps" in shown
    assert "loss [red]0.5[/x]" in shown, "a remark is text, not markup"
    assert not caplog.records


def test_an_error_passes_through(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyError), progress("sft", total=2, unit="steps"):
        raise KeyError


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (245, "4:05"), (3599.7, "1:00:00"),
     (7650, "2:07:30")],
)  # fmt: skip
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
