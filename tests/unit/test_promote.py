"""The gate, the pointer that follows it, and who plays whom after a refusal."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from spin_cli.app import app
from stages import promote
from stages.alarms import FiredAlarm
from stages.artifacts import (
    Manifest,
    Outcome,
    Plan,
    Workspace,
    open_artifact,
    produce,
    read_manifest,
)
from stages.artifacts.json_file import write_object
from stages.artifacts.manifest import InputRef
from stages.artifacts.pointer import read_pointer
from stages.config import PromoteConfig
from stages.data.measures import Measure, write_measures
from stages.decisions import is_rolled_back, opponent_of, outcome, read_decision
from stages.errors import ConfigError, CorruptError, GateRefusedError, InputError
from stages.evidence import find_evidence, recorded_evidence
from stages.layout import RunLayout
from stages.recipe import Recipe, load_recipe
from stages.run_record import start_or_resume

METRIC = "sampled_accuracy"
GATE = [f"promote.metric={METRIC}", "promote.min_gain=0.05"]


def new_run(folder: Path, *overrides: str) -> tuple[RunLayout, Recipe]:
    layout = RunLayout(folder / "run")
    recipe = load_recipe(None, ["sft.init=random", *GATE, *overrides])
    start_or_resume(layout, recipe)
    make(layout.sft, "sft")
    evaluate(layout, layout.sft, layout.start_evaluation, {METRIC: 0.6})
    return layout, recipe


def make(
    out: Path,
    stage: str,
    files: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    **inputs: InputRef,
) -> Manifest:
    def fill(workspace: Any) -> Outcome:
        for name, value in (files or {"config.json": {"of": str(out)}}).items():
            write_object(workspace.file(name), value)
        return Outcome(counts={}, metrics=metrics or {})

    # evaluations have one way of measuring, and differ by their models
    config = {} if stage == "evaluate" else {"out": out.parent.name + out.name}
    return produce(out, Plan(stage, 1, config, inputs), fill)


def evaluate(layout: RunLayout, model: Path, out: Path, metrics: dict[str, Any]) -> None:
    ref = open_artifact(model).input_ref(layout.root)
    make(out, "evaluate", {"metrics.json": metrics}, model=ref)


def play(layout: RunLayout, iteration: int, accuracy: float | None) -> None:
    """Make an iteration up to its evaluation."""
    model = layout.stage(iteration, "train")
    make(model, "train")
    evaluate(layout, model, layout.stage(iteration, "evaluate"), {METRIC: accuracy})


def decide(layout: RunLayout, recipe: Recipe, iteration: int) -> bool:
    inputs = find_evidence(layout, recipe.for_iteration(iteration).promote, iteration)
    out = layout.stage(iteration, "promote")
    promote.run(recipe.for_iteration(iteration), inputs, out)
    return read_decision(out).promoted


def decided_run(folder: Path, *accuracies: float) -> tuple[RunLayout, Recipe]:
    """A run with an iteration for each accuracy, decided one after the other."""
    layout, recipe = new_run(folder)
    for iteration, accuracy in enumerate(accuracies):
        play(layout, iteration, accuracy)
        decide(layout, recipe, iteration)
    return layout, recipe


def champion(layout: RunLayout) -> str | None:
    pointer = read_pointer(layout.champion)
    return pointer.path if pointer else None


@pytest.mark.parametrize(
    ("gate", "value", "before", "promoted", "reason"),
    [
        ({}, 0.1, 0.9, True, "a is 0.1"),
        ({"min_value": 0.5}, 0.5, None, True, "reaches min_value 0.5"),
        ({"min_value": 0.5}, 0.4999, None, False, "is below min_value 0.5"),
        ({"min_gain": 0.1}, 0.3, 0.2, True, "gain of 0.1 on the champion's 0.2 reaches"),
        ({"min_gain": 0.1}, 0.29, 0.2, False, "is below min_gain 0.1"),
        ({"min_gain": 0.0}, 0.2, 0.2, True, "reaches min_gain 0"),
        ({"min_gain": -0.1}, 0.15, 0.2, True, "reaches min_gain -0.1"),
        ({"min_gain": 0.1}, 0.3, None, True, "no champion's value to compare with"),
        ({"min_value": 0.5, "min_gain": 0.1}, 0.6, 0.55, False, "is below min_gain"),
        ({"min_value": 0.7, "min_gain": 0.1}, 0.6, 0.4, False, "is below min_value"),
        ({}, None, 0.2, False, "not a finite number"),
        ({}, float("nan"), 0.2, False, "not a finite number"),
        ({"min_value": 0.1}, float("inf"), 0.2, False, "not a finite number"),
        ({}, 3, None, True, "a is 3"),
    ],
)
def test_the_gate(
    gate: dict[str, float], value: float | None, before: float | None, promoted: bool, reason: str
) -> None:
    champion = None if before is None else {"a": before}
    decision = promote.decide(PromoteConfig(metric="a", **gate), {"a": value}, champion, "here")
    assert decision.promoted is promoted
    assert reason in "; ".join(decision.reasons)
    assert decision.value is None or decision.value == value


def test_what_refuses_comes_first_and_what_holds_is_marked() -> None:
    gate = PromoteConfig(metric="a", min_value=0.5, min_gain=0.1)
    refused = promote.decide(gate, {"a": 0.6}, {"a": 0.55}, "here", [REFUSED])
    assert [reason.split(",")[0] for reason in refused.reasons] == [
        "alarm human_fall: human responses fell",
        "the gain of 0.05 on the champion's 0.55 is below min_gain 0.1",
        "passed: a is 0.6",
    ]
    promoted = promote.decide(gate, {"a": 0.7}, {"a": 0.55}, "here")
    assert promoted.reasons[0] == "a is 0.7, which reaches min_value 0.5"
    assert not any("passed" in reason for reason in promoted.reasons)
    gate = PromoteConfig(metric="a", min_gain=0.1)
    assert promote.decide(gate, {"a": 0.6}, {"a": 0.55}, "here").reasons[-1] == "a is 0.6"


def test_the_tree_has_what_was_asked_and_no_more() -> None:
    def kinds(value: float | None, **gate: float) -> list[tuple[str, bool]]:
        tree = promote.decide(PromoteConfig(metric="a", **gate), {"a": value}, None, "x").verdict
        assert tree is not None
        return [(child["kind"], child["passed"]) for child in tree["children"]]

    assert kinds(0.56) == [("alarms_clear", True)]
    assert kinds(0.56, min_value=0.5) == [("alarms_clear", True), ("min_value", True)]
    assert kinds(None) == kinds(None, min_gain=0.1) == [("alarms_clear", True), ("number", False)]


def test_a_champions_nan_is_nothing_to_compare_with() -> None:
    decision = promote.decide(
        PromoteConfig(metric="a", min_gain=0.1), {"a": 1}, {"a": None}, "here"
    )
    assert (decision.promoted, decision.champion_value) == (True, None)


NOTED = FiredAlarm("divergence", "evaluate", 0.3, 0.25, "note", "far from its opponent")
REFUSED = FiredAlarm("human_fall", "evaluate", 0.2, 0.1, "refuse", "human responses fell")
STOPPED = FiredAlarm("chosen_fall", "train", 0.2, 0.1, "stop", "chosen responses fell")


@pytest.mark.parametrize(
    ("alarms", "promoted", "reasons"),
    [
        ([], True, ["a is 1"]),
        ([NOTED], True, ["a is 1"]),
        ([NOTED, REFUSED], False, ["alarm human_fall: human responses fell", "a is 1"]),
        ([STOPPED], False, ["alarm chosen_fall: chosen responses fell", "a is 1"]),
    ],
)
def test_an_alarm_refuses_whatever_the_metric_says(
    alarms: list[FiredAlarm], promoted: bool, reasons: list[str]
) -> None:
    decision = promote.decide(PromoteConfig(metric="a"), {"a": 1}, None, "here", alarms)
    assert (decision.promoted, decision.reasons) == (promoted, reasons)
    assert decision.alarms == [asdict(alarm) for alarm in alarms]


class TestAlarmsOnTheWay:
    """Figures of stages far from promote decide too; the walk goes by manifests alone."""

    def chain(self, layout: RunLayout, **metrics: dict[str, Any]) -> None:
        """Make iteration 0, each stage with the metrics of its name."""

        def made(stage: str, **inputs: str) -> None:
            refs = {
                name: open_artifact(layout.stage(0, of)).input_ref(layout.root)
                for name, of in inputs.items()
            }
            figures = metrics.get(stage, {})
            files = {"metrics.json": {METRIC: 0.9} | figures} if stage == "evaluate" else None
            make(layout.stage(0, stage), stage, files, figures, **refs)

        made("generate")
        made("pair", generations="generate")
        made("score", pairs="pair")
        made("train", pairs="score")
        made("evaluate", model="train")

    @pytest.mark.parametrize(
        ("stage", "metrics", "name"),
        [
            ("generate", {"cut_off_share": 0.9}, "generated_cut_off"),
            ("pair", {"identical_share": 1.0}, "identical_share"),
            ("train", {"chosen_fall": 0.4}, "chosen_fall"),
            ("evaluate", {"heldout_reward_accuracy": 1.0}, "heldout_saturated"),
        ],
    )
    @pytest.mark.parametrize("action", ["note", "refuse"])
    def test_each_stage_is_found(
        self, stage: str, metrics: dict[str, float], name: str, action: str, tmp_path: Path
    ) -> None:
        layout, recipe = new_run(tmp_path, f"alarms.{name}.action={action}")
        self.chain(layout, **{stage: metrics})
        assert decide(layout, recipe, 0) is (action == "note")
        (alarm,) = read_decision(layout.stage(0, "promote")).alarms
        assert (alarm["name"], alarm["stage"], alarm["action"]) == (name, stage, action)
        assert champion(layout) == ("iterations/000/train" if action == "note" else None)

    def test_a_threshold_amended_later_keeps_what_was_decided(self, tmp_path: Path) -> None:
        layout, recipe = new_run(tmp_path)
        self.chain(layout, train={"chosen_fall": 0.4})
        words = ["alarms.chosen_fall.action=refuse"]
        assert not decide(layout, recipe.with_overrides(words), 0)
        assert not decide(layout, recipe, 0)
        alarms = read_manifest(layout.stage(0, "promote")).info["alarms"]
        assert alarms["chosen_fall"] == {"threshold": 0.05, "action": "refuse"}

    def test_a_stage_that_was_made_anew_is_refused(self, tmp_path: Path) -> None:
        layout, recipe = new_run(tmp_path)
        self.chain(layout)
        place = layout.stage(0, "pair")
        for file in place.iterdir():
            file.unlink()
        make(place, "pair", {"config.json": {"other": 1}})
        with pytest.raises(InputError, match="pair was made anew since the player was trained"):
            decide(layout, recipe, 0)

    def test_what_was_deleted_to_save_room_is_said_and_left_out(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        layout, recipe = new_run(tmp_path)
        self.chain(layout, generate={"cut_off_share": 0.9}, pair={"identical_share": 1.0})
        shutil.rmtree(layout.stage(0, "generate"))
        assert decide(layout, recipe, 0)
        assert "000/generate is gone: what alarms it set off is not known" in caplog.text
        names = [a["name"] for a in read_decision(layout.stage(0, "promote")).alarms]
        assert names == ["identical_share"]

    def test_a_decision_of_before_there_were_alarms_can_be_read(self, tmp_path: Path) -> None:
        layout, _ = new_run(tmp_path)
        old = asdict(promote.decide(PromoteConfig(metric="a"), {"a": 1}, None, "here"))
        del old["alarms"]
        make(layout.stage(0, "promote"), "promote", {"decision.json": old})
        assert read_decision(layout.stage(0, "promote")).alarms == []


def test_an_unknown_metric_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"promote\.metric=c: here has no such metric; it has a, b"
    ):
        promote.decide(PromoteConfig(metric="c"), {"b": 1, "a": 2}, None, "here")


@pytest.mark.parametrize("value", ["high", True, [1]])
def test_a_metric_that_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="which is no number"):
        promote.decide(PromoteConfig(metric="a"), {"a": value}, None, "here")


def test_the_first_player_is_compared_with_the_start(tmp_path: Path) -> None:
    layout, recipe = new_run(tmp_path)
    play(layout, 0, 0.7)
    assert decide(layout, recipe, 0)
    decision = read_decision(layout.stage(0, "promote"))
    assert (decision.value, decision.champion_value, decision.min_gain) == (0.7, 0.6, 0.05)
    pointer = read_pointer(layout.champion)
    assert pointer is not None
    assert pointer.path == "iterations/000/train"
    assert pointer.key == open_artifact(layout.stage(0, "train")).manifest.key
    decision_key = open_artifact(layout.stage(0, "promote")).manifest.key
    assert pointer.history[0].decision_key == decision_key


def test_a_later_player_is_compared_with_the_champion_not_the_last(tmp_path: Path) -> None:
    layout, recipe = new_run(tmp_path)
    for iteration, accuracy in enumerate([0.8, 0.5, 0.7]):
        play(layout, iteration, accuracy)
    assert [decide(layout, recipe, t) for t in range(3)] == [True, False, False]
    assert read_decision(layout.stage(2, "promote")).champion_value == 0.8
    assert champion(layout) == "iterations/000/train"


def test_nan_is_refused_and_moves_nothing(tmp_path: Path) -> None:
    layout, recipe = new_run(tmp_path)
    play(layout, 0, None)
    assert not decide(layout, recipe, 0)
    assert champion(layout) is None


def test_deciding_again_changes_nothing(tmp_path: Path) -> None:
    layout, recipe = new_run(tmp_path)
    for iteration, accuracy in enumerate([0.7, 0.8]):
        play(layout, iteration, accuracy)
        assert decide(layout, recipe, iteration)
    before = layout.champion.read_bytes()
    assert decide(layout, recipe, 0)
    assert decide(layout, recipe, 1)
    assert layout.champion.read_bytes() == before


def test_a_kill_between_decision_and_pointer_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, recipe = new_run(tmp_path)
    play(layout, 0, 0.7)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(promote, "move_pointer", die)
        decide(layout, recipe, 0)
    assert read_decision(layout.stage(0, "promote")).promoted
    assert champion(layout) is None
    assert decide(layout, recipe, 0)
    assert champion(layout) == "iterations/000/train"


def test_a_lost_pointer_is_made_again_by_deciding_again(tmp_path: Path) -> None:
    layout, recipe = decided_run(tmp_path, 0.7, 0.8)
    layout.champion.unlink()
    decide(layout, recipe, 0)
    decide(layout, recipe, 1)
    assert champion(layout) == "iterations/001/train"


def test_a_deleted_decision_is_made_again_against_the_same_champion(tmp_path: Path) -> None:
    layout, recipe = decided_run(tmp_path, 0.7, 0.8)
    out = layout.stage(1, "promote")
    key = open_artifact(out).manifest.key
    for file in out.iterdir():
        file.unlink()
    out.rmdir()
    assert decide(layout, recipe, 1)
    assert open_artifact(out).manifest.key == key
    pointer = read_pointer(layout.champion)
    assert pointer is not None
    assert len(pointer.history) == 2


def test_a_roll_back_is_not_undone_by_deciding_again(tmp_path: Path) -> None:
    layout, recipe = decided_run(tmp_path, 0.7, 0.8)
    left, now = promote.rollback(layout)
    assert (left, now.path) == ("iterations/001/train", "iterations/000/train")
    assert [entry.path for entry in now.history] == [
        "iterations/000/train", "iterations/001/train", "iterations/000/train",
    ]  # fmt: skip
    decide(layout, recipe, 0)
    decide(layout, recipe, 1)
    assert champion(layout) == "iterations/000/train"


def spin(*words: object, expect: int) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words], prog_name="spin")
    assert result.exit_code == expect, f"{words}: {result.output}"
    return result


class TestTheCommandAfterARollBack:
    """What cron repeats moves nothing and says so; people undo a roll-back by a word of its own."""

    def test_promoting_again_is_6_and_names_the_way_forward(self, tmp_path: Path) -> None:
        layout, _ = decided_run(tmp_path, 0.7, 0.8)
        words = ["promote", layout.root, "--iteration", 1]
        spin(*words, expect=0)
        spin("promote", layout.root, "--rollback", expect=0)
        before = layout.champion.read_bytes()
        for _ in range(2):
            (line,) = spin(*words, expect=6).stderr.splitlines()[-1:]
            assert line.endswith(
                "iteration 1 was promoted, and rolled back since: the champion is "
                f"iterations/000/train; to undo that: spin promote {layout.root} --iteration 1 "
                "--again"
            )
            shutil.rmtree(layout.stage(1, "promote"))  # decided anew, it is the same decision
        assert layout.champion.read_bytes() == before
        spin("promote", layout.root, "--iteration", 0, expect=0)

    def test_again_undoes_it_as_if_it_had_not_been(self, tmp_path: Path) -> None:
        layout, recipe = decided_run(tmp_path, 0.7, 0.8)
        words = ["promote", layout.root, "--iteration", 1]
        spin("promote", layout.root, "--rollback", expect=0)
        assert is_rolled_back(layout, 1, read_pointer(layout.champion))
        said = spin(*words, "--again", expect=0)
        assert "champion was iterations/000/train, is iterations/001/train again" in said.stderr
        assert "promoted again: " in said.stdout.splitlines()[-1]
        pointer = read_pointer(layout.champion)
        assert not is_rolled_back(layout, 1, pointer)
        assert [outcome(layout, t, promoted=True, pointer=pointer) for t in range(2)] == [
            "promoted", "champion",
        ]  # fmt: skip
        assert opponent_of(layout, recipe, 2).model == str(layout.stage(1, "train"))
        spin(*words, expect=0)
        _, now = promote.rollback(layout)
        assert now.path == "iterations/000/train"
        spin(*words, expect=6)

    def test_who_needs_no_again_is_told_so(self, tmp_path: Path) -> None:
        layout, _ = decided_run(tmp_path, 0.7, 0.8, 0.1)
        play(layout, 3, 0.9)
        before = layout.champion.read_bytes()
        for iteration, code, message in (
            (0, 2, "went on from iterations/000/train to iterations/001/train, and was never"),
            (1, 2, "points to iterations/001/train already; there is nothing to do"),
            (2, 6, "iteration 2 is not promoted: the gain of -0.7 on the champion's 0.8"),
            (3, 3, f"iteration 3 is not decided yet; run: spin promote {layout.root} --iter"),
        ):
            words = ["promote", layout.root, "--iteration", iteration, "--again"]
            assert message in spin(*words, expect=code).stderr
        assert layout.champion.read_bytes() == before

    @pytest.mark.parametrize(
        "words",
        [["--again"], ["--rollback", "--again"], ["--iteration", "0", "--json"],
         ["--iteration", "0", "--again", "--export", "out"]],
    )  # fmt: skip
    def test_flags_that_do_not_go_together(self, words: list[str]) -> None:
        assert "goes with --" in spin("promote", "run", *words, expect=2).stderr

    @pytest.mark.parametrize("way", [["--rollback"], ["--iteration", "1", "--again"]])
    def test_a_run_that_is_damaged_is_left_as_it_is(self, tmp_path: Path, way: list[str]) -> None:
        layout, _ = decided_run(tmp_path, 0.7, 0.8)
        if "--again" in way:
            promote.rollback(layout)
        before = layout.champion.read_bytes()
        layout.record.write_text("{")
        assert "run.json is damaged" in spin("promote", layout.root, *way, expect=4).stderr
        assert layout.champion.read_bytes() == before

    @pytest.mark.parametrize("way", [["--rollback"], ["--iteration", "1", "--again"]])
    def test_a_broken_player_is_not_gone_back_to(self, tmp_path: Path, way: list[str]) -> None:
        layout, _ = decided_run(tmp_path, 0.7, 0.8)
        if "--again" in way:
            promote.rollback(layout)
        target = layout.stage(0 if "--rollback" in way else 1, "train")
        (target / "config.json").unlink()
        before = layout.champion.read_bytes()
        said = spin("promote", layout.root, *way, expect=4)
        assert f"{target}/config.json is missing; delete {target}" in said.stderr
        assert said.stdout == ""
        assert layout.champion.read_bytes() == before

    def test_the_history_marks_the_champion_and_comes_as_json(self, tmp_path: Path) -> None:
        layout, _ = new_run(tmp_path)
        words = ["promote", layout.root, "--history"]
        empty = spin(*words, "--json", expect=0).stdout
        assert json.loads(empty) == {"champion": None, "history": []}
        assert "no champion yet" in spin(*words, expect=0).stderr
        layout, _ = decided_run(tmp_path / "other", 0.7, 0.8)
        promote.rollback(layout)
        words = ["promote", layout.root, "--history"]
        lines = spin(*words, expect=0).stdout.splitlines()
        assert [line[:4] for line in lines] == ["  0 ", "  1 ", "* 2 "]
        found = json.loads(spin(*words, "--json", expect=0).stdout)
        pointer = read_pointer(layout.champion)
        assert pointer is not None
        assert found["champion"] == "iterations/000/train"
        assert found["history"] == [entry.model_dump() for entry in pointer.history]


def test_the_start_is_called_the_start_in_reasons(tmp_path: Path) -> None:
    layout, _ = decided_run(tmp_path, 0.7, 0.71)
    first, second = ("; ".join(read_decision(layout.stage(t, "promote")).reasons) for t in (0, 1))
    assert "on the start's 0.6 reaches min_gain" in first
    assert "on the champion's 0.7 is below min_gain" in second


def test_the_one_after_a_roll_back_has_to_beat_the_champion_of_then(tmp_path: Path) -> None:
    layout, recipe = decided_run(tmp_path, 0.7, 0.9)
    promote.rollback(layout)
    play(layout, 2, 0.8)
    assert decide(layout, recipe, 2)
    assert read_decision(layout.stage(2, "promote")).champion_value == 0.7


def test_on_refusal_is_no_part_of_a_decision(tmp_path: Path) -> None:
    layout, recipe = new_run(tmp_path)
    play(layout, 0, 0.1)
    assert not decide(layout, recipe, 0)
    assert not decide(layout, recipe.with_overrides(["promote.on_refusal=player"]), 0)
    with pytest.raises(ConfigError, match=r"promote\.min_gain: 0\.05 there, 0\.01 now"):
        decide(layout, recipe.with_overrides(["promote.min_gain=0.01"]), 0)


def test_a_model_from_elsewhere_is_not_promoted(tmp_path: Path) -> None:
    layout, recipe = new_run(tmp_path)
    make(tmp_path / "model", "train")
    out = layout.stage(0, "evaluate")
    evaluate(layout, tmp_path / "model", out, {METRIC: 1.0})
    with pytest.raises(InputError, match="is of model, which is no model in this run"):
        promote.run(
            recipe.for_iteration(0), promote.PromoteInputs(out, None), layout.stage(0, "promote")
        )


def test_a_player_that_changed_since_its_evaluation_is_not_promoted(tmp_path: Path) -> None:
    layout, recipe = new_run(tmp_path)
    play(layout, 0, 0.7)
    model = layout.stage(0, "train")
    for file in model.iterdir():
        file.unlink()
    make(model, "train", {"config.json": {"other": 1}})
    with pytest.raises(InputError, match="is not the model that .* is of"):
        decide(layout, recipe, 0)
    assert champion(layout) is None


def test_promotion_needs_a_run(tmp_path: Path) -> None:
    inputs = promote.PromoteInputs(tmp_path / "evaluate", None)
    with pytest.raises(ConfigError, match="lies in no run directory"):
        promote.run(load_recipe(None).for_iteration(), inputs, tmp_path / "promote")


def test_a_damaged_decision_is_no_decision(tmp_path: Path) -> None:
    layout, recipe = new_run(tmp_path)
    play(layout, 0, 0.7)
    decide(layout, recipe, 0)
    path = layout.stage(0, "promote") / "decision.json"
    path.write_bytes(path.read_bytes().replace(b"0.7", b"0.9"))
    with pytest.raises(CorruptError, match=r"decision\.json is damaged"):
        read_decision(layout.stage(0, "promote"))


class TestWhoPlaysWhom:
    def after(self, tmp_path: Path, accuracies: list[float], policy: str) -> tuple[Any, Any]:
        layout, recipe = new_run(tmp_path, f"promote.on_refusal={policy}")
        for iteration, accuracy in enumerate(accuracies):
            play(layout, iteration, accuracy)
            decide(layout, recipe, iteration)
        return layout, recipe

    def test_iteration_0_plays_the_start(self, tmp_path: Path) -> None:
        layout, recipe = new_run(tmp_path)
        found = opponent_of(layout, recipe, 0)
        assert (found.model, found.evaluation) == (str(layout.sft), str(layout.start_evaluation))

    def test_without_sft_iteration_0_plays_the_recipes_model(self, tmp_path: Path) -> None:
        layout = RunLayout(tmp_path)
        found = opponent_of(layout, load_recipe(None, ["model.path=a/b", "model.revision=r"]), 0)
        assert (found.model, found.revision) == ("a/b", "r")
        with pytest.raises(ConfigError, match="no model to start from"):
            opponent_of(layout, load_recipe(None), 0)

    def test_a_promoted_player_is_the_next_opponent(self, tmp_path: Path) -> None:
        layout, recipe = self.after(tmp_path, [0.7], "stop")
        found = opponent_of(layout, recipe, 1)
        assert found.model == str(layout.stage(0, "train"))
        assert found.evaluation == str(layout.stage(0, "evaluate"))

    def test_a_refusal_stops_the_run(self, tmp_path: Path) -> None:
        layout, recipe = self.after(tmp_path, [0.7, 0.7], "stop")
        with pytest.raises(GateRefusedError, match=r"iteration 1 was not promoted.*min_gain 0\.05"):
            opponent_of(layout, recipe, 2)

    def test_or_the_champion_plays_on(self, tmp_path: Path) -> None:
        layout, recipe = self.after(tmp_path, [0.8, 0.7], "champion")
        assert opponent_of(layout, recipe, 2).model == str(layout.stage(0, "train"))

    def test_which_is_the_start_while_there_is_none(self, tmp_path: Path) -> None:
        layout, recipe = self.after(tmp_path, [0.1], "champion")
        assert opponent_of(layout, recipe, 1).model == str(layout.sft)

    def test_or_the_refused_player_does(self, tmp_path: Path) -> None:
        layout, recipe = self.after(tmp_path, [0.8, 0.7], "player")
        assert opponent_of(layout, recipe, 2).model == str(layout.stage(1, "train"))

    @pytest.mark.parametrize(("policy", "iteration"), [("champion", 0), ("player", 1)])
    def test_rolled_back_counts_as_refused(
        self, policy: str, iteration: int, tmp_path: Path
    ) -> None:
        layout, recipe = self.after(tmp_path, [0.7, 0.8], policy)
        promote.rollback(layout)
        assert opponent_of(layout, recipe, 2).model == str(layout.stage(iteration, "train"))

    def test_rolled_back_stops_where_refusals_stop(self, tmp_path: Path) -> None:
        layout, recipe = self.after(tmp_path, [0.7, 0.8], "stop")
        promote.rollback(layout)
        with pytest.raises(GateRefusedError, match="rolled back since"):
            opponent_of(layout, recipe, 2)

    def test_an_iteration_that_began_keeps_its_opponent(self, tmp_path: Path) -> None:
        layout, recipe = self.after(tmp_path, [0.7, 0.8], "stop")
        ref = open_artifact(layout.stage(1, "train")).input_ref(layout.root)
        make(layout.stage(2, "generate"), "generate", model=ref)
        promote.rollback(layout)
        found = opponent_of(layout, recipe, 2)
        assert found.model == str(layout.stage(1, "train"))
        assert found.evaluation == str(layout.stage(1, "evaluate"))

    def test_an_undecided_iteration_has_no_successor(self, tmp_path: Path) -> None:
        layout, recipe = new_run(tmp_path)
        with pytest.raises(InputError, match="iteration 0 is not decided yet; run: spin promote"):
            opponent_of(layout, recipe, 1)


class TestGates:
    """Conditions on paired examples, on artifacts of a run."""

    def run(self, folder: Path, gate: str, *more: str) -> tuple[RunLayout, Recipe]:
        layout = RunLayout(folder / "run")
        words = ["sft.init=random", f"promote.metric={METRIC}", f"promote.gate={gate}", *more]
        recipe = load_recipe(None, words)
        start_or_resume(layout, recipe)
        make(layout.sft, "sft")
        self.measure(layout, layout.sft, layout.start_evaluation, range(60))
        return layout, recipe

    def measure(
        self,
        layout: RunLayout,
        model: Path,
        out: Path,
        right: Iterable[int],
        stage: str = "evaluate",
        settings: dict[str, Any] | None = None,
        **inputs: InputRef,
    ) -> None:
        """Evaluate a model that answers those of 200 prompts right."""
        known = set(right)
        found = [Measure(f"p{i}", METRIC, float(i in known)) for i in range(200)]

        def fill(space: Workspace) -> Outcome:
            metrics = write_measures(space, found, {"sampled_mean_tokens": 20.0})
            return Outcome(counts={}, metrics=metrics)

        refs = {"model": open_artifact(model).input_ref(layout.root), **inputs}
        produce(out, Plan(stage, 3, {"asked": str(out.name), **(settings or {})}, refs), fill)

    def play(
        self, layout: RunLayout, iteration: int, right: Iterable[int], opponent: Path | None = None
    ) -> None:
        model = layout.stage(iteration, "train")
        ref = open_artifact(opponent or layout.sft).input_ref(layout.root)
        make(model, "train", model=ref)
        out = layout.stage(iteration, "evaluate")
        self.measure(layout, model, out, right, opponent=ref)

    def test_a_decision_holds_every_figure_and_the_gain(self, tmp_path: Path) -> None:
        layout, recipe = self.run(tmp_path, f"{{better: {{metric: {METRIC}}}}}")
        self.play(layout, 0, range(80))
        assert decide(layout, recipe, 0)
        decision = read_decision(layout.stage(0, "promote"))
        assert decision.reasons == [
            f"{METRIC} is 0.4",
            f"{METRIC} is better than the start's: +10.0 points (95% lower bound +7.0), McNemar p "
            "4.8e-07, 20 won, 0 lost of 200",
        ]
        assert decision.verdict is not None
        assert decision.verdict["kind"] == "all"
        kinds = [child["kind"] for child in decision.verdict["children"]]
        assert kinds == ["alarms_clear", "better"], "and none that nobody set"
        figures = decision.verdict["children"][1]["figures"]
        assert (figures["wins"], figures["rival"], figures["method"]) == (
            20, "start/evaluate", "mcnemar",
        )  # fmt: skip
        assert decision.gain is not None
        assert (decision.gain["gain"], decision.gain["confidence"]) == (pytest.approx(0.1), 0.95)
        assert decision.gain["rival"] == "start/evaluate"

    @pytest.mark.parametrize("metric", ["heldout_reward_accuracy", "duel.win_rate"])
    def test_a_comparison_is_compared_with_no_rivals(self, metric: str, tmp_path: Path) -> None:
        duel = "suites.duel={kind: win_rate, reward: {name: gsm8k}}"
        layout, recipe = self.run(tmp_path, "null", duel)
        self.play(layout, 0, range(80))
        for kind in ("better: {", "not_worse: {margin: 0.1, ", "length_within: {share: 0.1, "):
            asked = recipe.with_overrides([f"promote.gate={{{kind}metric: {metric}}}}}"])
            with pytest.raises(ConfigError, match=f"compares {metric} with a rival's, but it is a"):
                decide(layout, asked, 0)
        assert not layout.stage(0, "promote").exists()

    def test_a_gain_is_told_without_any_gate(self, tmp_path: Path) -> None:
        layout, recipe = self.run(tmp_path, "null", "promote.min_gain=0.01")
        self.play(layout, 0, range(55))
        assert not decide(layout, recipe, 0)
        decision = read_decision(layout.stage(0, "promote"))
        assert decision.gain is not None
        assert (decision.gain["losses"], decision.gain["gain"]) == (5, pytest.approx(-0.025))
        assert decision.verdict is not None
        failed = [c["kind"] for c in decision.verdict["children"] if not c["passed"]]
        assert failed == ["min_gain"]

    def test_each_rival_is_found(self, tmp_path: Path) -> None:
        each = ", ".join(
            f"{{not_worse: {{metric: {METRIC}, margin: 0.9, against: {rival}}}}}"
            for rival in ("champion", "opponent", "start")
        )
        gate = f"{{all: [{each}]}}"
        layout, recipe = self.run(tmp_path, gate, "promote.on_refusal=player")
        self.play(layout, 0, range(80))
        assert decide(layout, recipe, 0)
        # refused for its accuracy, and yet the next opponent
        self.play(layout, 1, range(70), layout.stage(0, "train"))
        assert not decide(layout, recipe.with_overrides(["promote.min_value=0.39"]), 1)
        self.play(layout, 2, range(90), layout.stage(1, "train"))
        assert decide(layout, recipe, 2)
        decision = read_decision(layout.stage(2, "promote"))
        assert decision.verdict is not None
        asked = decision.verdict["children"][-1]["children"]
        assert [(c["figures"]["against"], c["figures"]["rival"]) for c in asked] == [
            ("champion", "iterations/000/evaluate"), ("opponent", "iterations/001/evaluate"),
            ("start", "start/evaluate"),
        ]  # fmt: skip
        inputs = read_manifest(layout.stage(2, "promote")).inputs
        assert {name: ref.path for name, ref in inputs.items() if name != "evaluation"} == {
            "champion_evaluation": "iterations/000/evaluate",
            "opponent_evaluation": "iterations/001/evaluate",
            "start_evaluation": "start/evaluate",
        }

    def test_a_decision_stays_what_it_was_whoever_is_champion_now(self, tmp_path: Path) -> None:
        layout, recipe = self.run(tmp_path, f"{{better: {{metric: {METRIC}}}}}")
        for iteration, right in enumerate([80, 110]):
            self.play(layout, iteration, range(right))
            assert decide(layout, recipe, iteration)
        keys = [read_manifest(layout.stage(t, "promote")).key for t in range(2)]
        promote.rollback(layout)
        for iteration in range(2):
            assert decide(layout, recipe, iteration)
        assert keys == [read_manifest(layout.stage(t, "promote")).key for t in range(2)]
        found = recorded_evidence(layout, read_manifest(layout.stage(1, "promote")))
        assert found == find_evidence(layout, recipe.for_iteration(1).promote, 1)

    def test_a_suite_is_asked_of_both(self, tmp_path: Path) -> None:
        suite = "suites.gsm={kind: task, reward: {name: gsm8k}}"
        gate = f"{{better: {{metric: gsm.{METRIC}}}}}"
        layout, recipe = self.run(tmp_path, gate, suite)
        self.play(layout, 0, range(60))
        with pytest.raises(
            InputError, match=r"asks for .*000/suite-gsm, which is missing; make it"
        ):
            decide(layout, recipe, 0)
        place, model = layout.suite(0, "gsm"), layout.stage(0, "train")
        self.measure(layout, model, place, range(50), "suite")
        with pytest.raises(InputError, match=r"asks for .*start/suite-gsm, which is missing"):
            decide(layout, recipe, 0)
        self.measure(layout, layout.sft, layout.suite(None, "gsm"), range(30), "suite")
        assert decide(layout, recipe, 0)
        assert f"gsm.{METRIC} is better than the start's: +10.0" in champion_reason(layout)
        inputs = read_manifest(layout.stage(0, "promote")).inputs
        assert {"suite_gsm", "champion_suite_gsm"} <= inputs.keys()
        found = recorded_evidence(layout, read_manifest(layout.stage(0, "promote")))
        assert found == find_evidence(layout, recipe.for_iteration(0).promote, 0)

    def test_a_suite_of_another_model_is_refused(self, tmp_path: Path) -> None:
        suite = "suites.gsm={kind: task, reward: {name: gsm8k}}"
        gate = f"{{at_least: {{metric: gsm.{METRIC}, value: 0.1}}}}"
        layout, recipe = self.run(tmp_path, gate, suite)
        self.play(layout, 0, range(60))
        self.measure(layout, layout.sft, layout.suite(0, "gsm"), range(50), "suite")
        with pytest.raises(InputError, match="suite-gsm is not of the model that"):
            decide(layout, recipe, 0)

    @pytest.mark.parametrize("gate", [f"{{better: {{metric: {METRIC}}}}}", "null"])
    def test_what_was_measured_in_another_way_is_no_rival(self, gate: str, tmp_path: Path) -> None:
        layout, recipe = self.run(tmp_path, gate)
        model, out = layout.stage(0, "train"), layout.stage(0, "evaluate")
        make(model, "train")
        self.measure(layout, model, out, range(80), settings={"reward": {"name": "other"}})
        if gate == "null":  # nothing asks for a gain, and so none is told
            assert decide(layout, recipe, 0)
            assert read_decision(layout.stage(0, "promote")).gain is None
            return
        with pytest.raises(InputError, match="was made with another reward than"):
            decide(layout, recipe, 0)

    def test_alarms_and_gates_are_told_together(self, tmp_path: Path) -> None:
        gate = f"{{any: [{{better: {{metric: {METRIC}}}}}, {{alarms_clear: note}}]}}"
        layout, recipe = self.run(tmp_path, gate)
        self.play(layout, 0, range(58))
        assert decide(layout, recipe, 0)
        assert "no alarm fired" in champion_reason(layout)


def champion_reason(layout: RunLayout) -> str:
    pointer = read_pointer(layout.champion)
    assert pointer is not None
    return pointer.history[-1].reason
