"""status: what a run holds, read while it goes on and however it was left."""

import errno
import fcntl
import io
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spin_cli.app import app
from spin_cli.compare_commands import _value
from spin_cli.loop import carry_on
from spin_cli.views import _cells, put_status
from stages.artifacts import Outcome, Plan, Workspace, locks, produce, read_manifest
from stages.artifacts.json_file import write_object
from stages.compare import Value
from stages.ending import ending_noted
from stages.errors import BusyError, CorruptError, DivergedError, InputError
from stages.headlines import longer_side
from stages.layout import RunLayout
from stages.promote import rollback
from stages.recipe import Recipe, load_recipe
from stages.reporting.numbers import Units
from stages.run_record import start_or_resume
from stages.status import stage_state, status
from tests import fake_stages

STAGES = ["generate", "pair", "score", "train", "evaluate", "promote"]
RANKED = ["pair.policy=best_vs_worst", "reward.name=gsm8k", "generate.num_samples=2"]


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fake_stages.installed():
        yield


def a_run(folder: Path, iterations: int = 1, *overrides: str) -> tuple[RunLayout, Recipe]:
    recipe = load_recipe(None, ["sft.init=random", *overrides])
    layout = RunLayout(folder / "run")
    start_or_resume(layout, recipe)
    carry_on(layout, recipe, iterations)
    return layout, recipe


def states(layout: RunLayout, iteration: int = 0) -> dict[str, str]:
    stages = status(layout.root)["iterations"][iteration]["stages"]
    return {name: stage["state"] for name, stage in stages.items()}


def test_a_decision_that_was_rolled_back_says_so(tmp_path: Path) -> None:
    layout, _ = a_run(tmp_path, 2)
    assert [row["rolled_back"] for row in status(layout.root)["iterations"]] == [False, False]
    rollback(layout)
    assert [row["rolled_back"] for row in status(layout.root)["iterations"]] == [False, True]
    rows = CliRunner().invoke(app, ["status", str(layout.root)]).stdout.splitlines()
    assert rows[-1].endswith("rolled back")
    assert rows[-2].endswith("champion")


def test_suites_and_their_intervals_are_told(tmp_path: Path) -> None:
    layout, _ = a_run(tmp_path, 1, "suites.sums={kind: task}", "reward.name=gsm8k")
    found = status(layout.root)
    expected = {"sampled_accuracy": 0.6, "greedy_accuracy": 1.0}
    assert found["start"]["suites"] == {"sums": {"metrics": expected, "intervals": {}}}
    assert found["iterations"][0]["suites"]["sums"]["metrics"]["sampled_accuracy"] == 0.7
    assert found["iterations"][0]["stages"]["suite-sums"]["state"] == "done"
    lines = CliRunner().invoke(app, ["status", str(layout.root)]).stdout.splitlines()
    assert lines[-4] == "suite sums"
    assert lines[-1].split() == ["0", "100.0%", "70.0%"]


class Terminal:
    """What a command writes to a terminal of so many columns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def shows(self, layout: RunLayout, columns: int) -> list[str]:
        size = os.terminal_size((columns, 24))
        written = io.StringIO()
        with self._monkeypatch.context() as patch:
            patch.setattr("shutil.get_terminal_size", lambda: size)
            patch.setattr(sys, "stdout", written)
            patch.setattr(written, "isatty", lambda: True, raising=False)
            put_status(layout.root)
        return written.getvalue().splitlines()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    return Terminal(monkeypatch)


def refused(layout: RunLayout, *reasons: str, alarms: list[dict[str, Any]] | None = None) -> None:
    """Refuse the first iteration for these reasons."""
    out = layout.stage(0, "promote")
    shutil.rmtree(out)
    decision = {"promoted": False, "reasons": reasons, "alarms": alarms or []}

    def fill(space: Workspace) -> Outcome:
        write_object(space.file("decision.json"), decision)
        return Outcome(counts={})

    produce(out, Plan("promote", 1, {}, {}), fill)


def test_a_refusal_is_one_word_in_the_table_and_its_reasons_stand_below(
    tmp_path: Path, terminal: Terminal
) -> None:
    layout, _ = a_run(tmp_path)
    reasons = ("too long by 20 words, " * 4 + "much", "too dear by 30 coins, " * 4 + "much")
    refused(layout, *reasons)
    lines = CliRunner().invoke(app, ["status", str(layout.root)]).stdout.splitlines()
    row = lines[-3]
    assert (row.split()[0], row.split()[-1]) == ("0", "refused")
    assert len(row) < 100
    assert lines[-1] == f"iteration 0 was refused: {'; '.join(reasons)}"
    narrow = terminal.shows(layout, 60)
    start = next(i for i, line in enumerate(narrow) if line.startswith("iteration 0 was refused"))
    assert len(narrow[start:]) > 2
    assert " ".join(line.strip() for line in narrow[start:]) == " ".join(lines[-1].split())


FULL = {
    "sampled_accuracy": 0.984, "greedy_accuracy": 0.998, "identical_share": 0.821,
    "heldout_reward_accuracy": 0.581, "heldout_reward_margin": -0.021,
}  # fmt: skip


@pytest.mark.parametrize("columns", [200, 80, 50, 20])
def test_no_terminal_is_too_narrow_for_a_figure(
    tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    layout, _ = a_run(tmp_path, 2)
    found = status(layout.root)
    for row in found["iterations"]:
        row["metrics"], row["intervals"] = dict(FULL), {"sampled_accuracy": [0.82, 0.99]}
    monkeypatch.setattr("spin_cli.views.status", lambda _: found)
    lines = terminal.shows(layout, columns)
    table = lines[lines.index("") + 1 :]
    words = " ".join(table).split()
    for figure in ("98.4%", "±16.4", "99.8%", "82.1%", "58.1%", "-0.021"):
        assert words.count(figure) == 2
    assert words.count("champion") == words.count("promoted") == 1
    assert "…" not in "".join(lines)
    assert "\x1b" not in "".join(lines)
    if columns >= 80:
        assert max(map(len, table)) <= columns
        assert [line.split()[0] for line in table[-3:]] == ["start", "0", "1"]
    else:
        assert sum(line.startswith("iteration ") for line in table) == 3


def test_a_figure_stands_with_the_longer_side_of_its_interval_in_status_and_in_compare(
    tmp_path: Path,
) -> None:
    assert longer_side(0.653, 0.623, 0.682) == pytest.approx(0.030)
    units, found = Units(), {"metrics": FULL, "intervals": {"sampled_accuracy": [0.82, 0.99]}}
    assert _cells(found, {"sampled_accuracy": "quiz.accuracy"}, units) == ["98.4% ±16.4"]
    assert _value(Value(0.984, 0.82, 0.99, 9), 3) == "0.984 ±0.164"


def test_an_alarm_has_its_name_and_a_changed_rate_both_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, _ = a_run(tmp_path)
    refused(layout, "no", alarms=[{"name": "accuracy_drop", "action": "refuse", "text": "it fell"}])
    text = CliRunner().invoke(app, ["status", str(layout.root)]).stdout
    assert "\n  alarm accuracy_drop (refuse): it fell\n" in text
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    [looked_for] = re.findall(r"grep '([^']*)' >/dev/null; then echo \"The collapse", makefile)
    assert re.search(looked_for.replace("(", r"\(").replace(")", r"\)"), text)
    assert status(layout.root)["iterations"][0]["changed"] == {}
    trained = layout.stage(0, "train")
    rate = load_recipe(None).for_iteration().train.learning_rate
    shutil.rmtree(trained)
    own = {"train": {"learning_rate": rate / 2, "beta": 0.1}}
    produce(trained, Plan("train", 1, own, {}), lambda space: Outcome(counts={}))
    change = {"train.learning_rate": {"value": rate / 2, "recipe": rate}}
    assert status(layout.root)["iterations"][0]["changed"] == change
    text = CliRunner().invoke(app, ["status", str(layout.root)]).stdout
    assert f"train.learning_rate {rate / 2:.4g} instead of {rate:.4g})" in text


def test_a_finished_run(tmp_path: Path) -> None:
    layout, _ = a_run(tmp_path, 2)
    found = status(layout.root)
    assert list(found) == ["run", "champion", "ended", "start", "iterations"]
    assert found["ended"] is None
    assert found["run"] == str(layout.root)
    assert found["champion"] == "iterations/001/train"
    metrics = {"sampled_accuracy": 0.6, "greedy_accuracy": 1.0}
    assert found["start"] == {"metrics": metrics, "intervals": {}, "suites": {}}
    assert [row["index"] for row in found["iterations"]] == [0, 1]
    row = found["iterations"][1]
    assert list(row) == [
        "index", "stages", "metrics", "intervals", "suites", "decision", "rolled_back",
        "reference", "optimizer", "changed", "training", "converged",
    ]  # fmt: skip
    assert row["training"] == read_manifest(layout.stage(1, "train")).metrics
    assert (row["reference"], row["optimizer"]) == ("iterations/000/train", "fresh")
    assert row["converged"] is None
    assert list(row["stages"]) == STAGES
    for stage in row["stages"].values():
        assert list(stage) == ["state", "key", "seconds"]
        assert stage["state"] == "done"
        assert len(stage["key"]) == 64
        assert stage["seconds"] >= 0
    assert row["metrics"] == {
        "sampled_accuracy": 0.8,
        "greedy_accuracy": 1.0,
        "identical_share": 0.5,
        "heldout_reward_accuracy": 0.75,
        "heldout_reward_accuracy_stderr": 0.01,
        "heldout_reward_margin": 1.5,
        "heldout_kl": 4.0,
        "heldout_kl_stderr": 0.0,
        "heldout_identical_share": 0.5,
    }
    assert row["decision"]["promoted"] is True
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(("reward", "shown"), [("gsm8k", "60.0%"), ("python", "0.600")])
def test_a_mean_reward_of_any_scale_is_no_percentage(
    tmp_path: Path, reward: str, shown: str
) -> None:
    layout, _ = a_run(tmp_path, 1, f"reward.name={reward}", "reward.python.file=x.py")
    lines = CliRunner().invoke(app, ["status", str(layout.root)]).stdout.splitlines()
    start = next(line.split() for line in lines if line.startswith("start "))
    assert start[1] == shown


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path / "run")
    start_or_resume(layout, load_recipe(None))
    start: dict[str, Any] = {"metrics": {}, "intervals": {}, "suites": {}}
    empty = {"champion": None, "ended": None, "start": start, "iterations": []}
    assert status(layout.root) == {"run": str(layout.root), **empty}


def test_iterations_are_sorted_as_numbers(tmp_path: Path) -> None:
    layout, _ = a_run(tmp_path)
    for name in ("1000", "999", "x", ".hidden", "01"):
        (layout.root / "iterations" / name).mkdir()
    assert [row["index"] for row in status(layout.root)["iterations"]] == [0, 999, 1000]


def test_a_missing_stage(tmp_path: Path) -> None:
    layout, _ = a_run(tmp_path)
    shutil.rmtree(layout.stage(0, "promote"))
    shutil.rmtree(layout.stage(0, "evaluate"))
    assert states(layout) == dict.fromkeys(STAGES, "done") | {
        "evaluate": "missing", "promote": "missing",
    }  # fmt: skip
    row = status(layout.root)["iterations"][0]
    assert row["metrics"] == {"identical_share": 0.5}
    assert row["decision"] is None
    assert row["stages"]["evaluate"] == {"state": "missing", "key": None, "seconds": None}


def test_reward_is_there_only_where_the_game_asks_for_it(tmp_path: Path) -> None:
    layout, _ = a_run(tmp_path / "ranked", 1, *RANKED)
    assert list(states(layout)) == ["generate", "reward", *STAGES[1:]]
    shutil.rmtree(layout.stage(0, "reward"))
    assert states(layout)["reward"] == "missing"


def test_an_attempt_that_was_cut_off_is_partial(tmp_path: Path) -> None:
    layout, _ = a_run(tmp_path)
    shutil.rmtree(layout.stage(0, "train"))
    (layout.root / "iterations/000/.train.0123456789abcdef.partial").mkdir()
    assert states(layout)["train"] == "partial"


def test_a_held_lock_is_a_running_stage(tmp_path: Path) -> None:
    layout, _ = a_run(tmp_path)
    out = layout.stage(0, "train")
    shutil.rmtree(out)
    assert states(layout)["train"] == "missing"
    with locks.hold(locks.lock_path(out), str(out)):
        assert states(layout)["train"] == "running"
    assert states(layout)["train"] == "missing"


def test_a_killed_owners_note_is_no_running_stage(tmp_path: Path) -> None:
    out = tmp_path / "train"
    locks.lock_path(out).write_text('{"host": "h", "pid": 1, "command": "spin"}')
    assert stage_state(out)["state"] == "missing"


def test_status_makes_no_file_and_holds_no_lock(tmp_path: Path) -> None:
    layout, _ = a_run(tmp_path)
    shutil.rmtree(layout.stage(0, "train"))
    lock = locks.lock_path(layout.stage(0, "train"))
    lock.unlink()
    before = sorted(p for p in layout.root.rglob("*"))
    status(layout.root)
    assert sorted(p for p in layout.root.rglob("*")) == before
    lock.write_text("left by a killed owner")
    status(layout.root)
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_status_never_turns_a_starting_stage_away(tmp_path: Path) -> None:
    out = tmp_path / "train"
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            stage_state(out)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(300):
            try:
                with locks.hold(locks.lock_path(out), str(out)):
                    pass
            except BusyError as error:
                pytest.fail(f"turned away: {error}")
    finally:
        stop.set()
        watcher.join()


@pytest.mark.parametrize(
    ("stage", "file"),
    [("train", "manifest.json"), ("evaluate", "metrics.json"), ("promote", "decision.json")],
)
def test_a_changed_byte_is_corrupt(stage: str, file: str, tmp_path: Path) -> None:
    layout, _ = a_run(tmp_path)
    path = layout.stage(0, stage) / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert states(layout)[stage] == "corrupt"
    row = status(layout.root)["iterations"][0]
    assert row["stages"][stage]["key"] is None
    if stage == "evaluate":
        assert row["metrics"] == {"identical_share": 0.5}
    if stage == "promote":
        assert row["decision"] is None


def test_a_missing_or_extra_file_is_corrupt(tmp_path: Path) -> None:
    layout, _ = a_run(tmp_path)
    (layout.stage(0, "train") / "config.json").unlink()
    (layout.stage(0, "score") / "extra").touch()
    assert (states(layout)["train"], states(layout)["score"]) == ("corrupt", "corrupt")


def test_a_folder_without_a_manifest_is_corrupt(tmp_path: Path) -> None:
    layout, _ = a_run(tmp_path)
    (layout.stage(0, "train") / "manifest.json").unlink()
    assert states(layout)["train"] == "corrupt"


def test_an_empty_folder_is_missing(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    assert stage_state(tmp_path / "train")["state"] == "missing"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no run directory"):
        status(tmp_path)
    with pytest.raises(InputError, match="none does not exist"):
        status(tmp_path / "none")


def test_beside_a_run_the_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, _ = a_run(tmp_path)
    with pytest.raises(InputError, match=f"; name a run in it: {layout.root}$"):
        status(tmp_path)
    inside = layout.stage(0, "train").parent
    with pytest.raises(InputError, match=f"it lies in the run {layout.root}: name that$"):
        status(inside)
    monkeypatch.chdir(inside.parent)
    with pytest.raises(InputError, match=r"it lies in the run \.\.: name that$"):
        status(Path("000"))


def test_a_run_record_that_is_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "run.json").mkdir()
    with pytest.raises(InputError, match=r"run\.json cannot be read \(Is a directory\)"):
        status(tmp_path)


def test_a_damaged_run_record_is_told(tmp_path: Path) -> None:
    layout, _ = a_run(tmp_path)
    layout.record.write_text(layout.record.read_text().replace("sigmoid", "hinge") + " ")
    with pytest.raises(CorruptError, match=r"run\.json is damaged"):
        status(layout.root)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (DivergedError("train: step 5: loss is NaN; lower it"), 5, "train: step 5: loss is NaN"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), 7, "{place}: no room to write"),
        (ZeroDivisionError("by nought"), 1, "ZeroDivisionError: by nought"),
    ],
)
def test_how_the_last_run_ended_before_its_time_is_told_until_the_next(
    tmp_path: Path, error: BaseException, code: int, words: str
) -> None:
    run = tmp_path / "run"
    words = words.format(place=RunLayout(run).stage(0, "train"))
    command = ["run", "demo", "--run", str(run), "sft.init=random", "promote.gate=null"]

    def stop(stage: str, out: Path) -> None:
        if stage == "train":
            raise error

    fake_stages.before_fill.append(stop)
    assert CliRunner().invoke(app, command).exit_code == code
    ended = status(run)["ended"]
    assert (ended["exit_code"], ended["message"].startswith(words)) == (code, True)
    lines = CliRunner().invoke(app, ["status", str(run)]).stdout.splitlines()
    [told] = [line for line in lines if line.startswith("the last run ended at 2")]
    assert f"with exit code {code}: {words}" in told
    fake_stages.before_fill.clear()
    assert CliRunner().invoke(app, command).exit_code == 0
    assert status(run)["ended"] is None
    assert "the last run" not in CliRunner().invoke(app, ["status", str(run)]).stdout


def test_a_run_that_was_never_begun_has_no_ending(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path / "run")
    layout.root.mkdir()
    with pytest.raises(KeyboardInterrupt), ending_noted(layout):
        raise KeyboardInterrupt
    assert not layout.ending.exists()


def test_why_a_player_was_refused_is_told_once(tmp_path: Path) -> None:
    fake_stages.accuracy_by_model["iterations/000/train"] = 0.1
    run = tmp_path / "run"
    command = ["run", "demo", "--run", str(run), "sft.init=random", "promote.gate=null"]
    try:
        assert CliRunner().invoke(app, [*command, "promote.min_gain=0"]).exit_code == 6
    finally:
        fake_stages.accuracy_by_model.clear()
    text = CliRunner().invoke(app, ["status", str(run)]).stdout
    assert "with exit code 6: a player was refused\n" in text
    assert text.count("the gain of -0.5") == 1


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"at": "x"}'])
def test_a_note_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    layout, _ = a_run(tmp_path)
    layout.ending.write_text(text)
    assert status(layout.root)["ended"] is None
