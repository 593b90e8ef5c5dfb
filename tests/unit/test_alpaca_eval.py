"""AlpacaEval: instructions out, annotations in, and win rates with and without length."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages import suite
from stages.artifacts import Manifest, open_artifact, read_rows
from stages.config import EngineConfig, RunConfig
from stages.data.measures import read_measures
from stages.data.rows import DROPPED, SUITE_EXAMPLES
from stages.engines import gpus_used
from stages.errors import ConfigError, InputError
from stages.suites.base import SuiteInputs
from stages.suites.length_control import length_controlled
from tests.evaluations import Replies

# Made up, in the form of AlpacaEval's alpaca_eval.json; one instruction comes twice.
INSTRUCTIONS = [
    {"instruction": "Name a colour.", "output": "Red.", "dataset": "koala"},
    {"instruction": "Name a fish.", "dataset": "koala"},
    {"instruction": "Say hello.", "dataset": "helpful_base"},
    {"instruction": "Say hello.", "dataset": "helpful_base"},
]
ANSWERS = ["Blue", "A carp, which lives in ponds", "Hello there", "Hello there"]
REFERENCE = ["Red is a colour", "Trout", "Hi", "Hello you"]


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def config(instructions: Path | None, **settings: Any) -> RunConfig:
    section = {"kind": "alpaca_eval", "max_new_tokens": 48, **settings}
    if instructions is not None:
        section["instructions"] = str(instructions)
    return RunConfig.model_validate({"suites": {"alpaca": section}})


def ask(out: Path, instructions: Path, model: Path, by: Replies, /, **settings: Any) -> Manifest:
    given = SuiteInputs("alpaca", str(model))
    return suite.run(config(instructions, **settings), given, out, open_engine=by.open)


def read_back(out: Path, answers: Path, annotations: Any) -> Manifest:
    judged = write_json(out.with_suffix(".json"), annotations)
    return suite.run(config(None), SuiteInputs("alpaca", answers=answers, judged=judged), out)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("asked")
    engine = Replies(tiny_model_dir, lambda request: ANSWERS[int(request.partition("/")[0])])
    instructions = write_json(folder / "alpaca_eval.json", INSTRUCTIONS)
    ask(folder / "out", instructions, tiny_model_dir, engine)
    [prompt, sampling] = engine.asked["00001/0"]
    assert prompt.endswith("user: Name a fish.\nassistant: ")
    assert (sampling.temperature, sampling.max_new_tokens) == (1.0, 48)
    return folder / "out"


def exported(answers: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        open_artifact(answers).file("outputs.json").read_text()
    )
    return found


def annotated(
    answers: Path, preferences: list[float | None], **change: Any
) -> list[dict[str, Any]]:
    """What AlpacaEval writes."""
    rows = zip(exported(answers), REFERENCE, preferences, strict=True)
    return [
        {
            "instruction": row["instruction"], "output_1": reference, "generator_1": "gpt4_1106",
            "dataset": row["dataset"], "output_2": row["output"], "generator_2": row["generator"],
            "annotator": "weighted_alpaca_eval_gpt4_turbo", "preference": preference,
            "time_per_example": 0.7, "raw_completion": "m", **change,
        }
        for row, reference, preference in rows
    ]  # fmt: skip


def test_answers_are_exported_as_alpaca_eval_reads_them(answers: Path) -> None:
    name = open_artifact(answers).manifest.info["generator"]
    assert re.fullmatch(r"spin-[0-9a-f]{12}", name)
    assert exported(answers) == [
        {"instruction": row["instruction"], "output": text, "generator": name,
         "dataset": row["dataset"]}
        for row, text in zip(INSTRUCTIONS, ANSWERS, strict=True)
    ]  # fmt: skip
    found = list(read_rows([open_artifact(answers).file("examples.parquet")], SUITE_EXAMPLES))
    assert [(r["prompt_id"], r["task"], r["response"]) for r in found[:2]] == [
        ("00000", "koala", ANSWERS[0]), ("00001", "koala", ANSWERS[1]),
    ]  # fmt: skip
    assert open_artifact(answers).manifest.metrics["cut_off_share"] == 0


def test_sampling_and_engine_are_the_suites_own(tmp_path: Path, tiny_model_dir: Path) -> None:
    engine = Replies(tiny_model_dir, lambda _: "A")
    own = {"temperature": 0.5, "top_p": 0.4, "top_k": 3, "max_new_tokens": 9,
           "engine": {"dtype": "float32"}}  # fmt: skip
    file = write_json(tmp_path / "alpaca_eval.json", INSTRUCTIONS)
    manifest = ask(tmp_path / "out", file, tiny_model_dir, engine, **own)
    [drawn] = {sampling for _, sampling in engine.asked.values()}
    assert (drawn.temperature, drawn.top_p, drawn.top_k, drawn.max_new_tokens) == (0.5, 0.4, 3, 9)
    assert engine.config.dtype == "float32"
    write_json(file, INSTRUCTIONS[:3])
    assert ask(tmp_path / "b", file, tiny_model_dir, engine, **own).key != manifest.key


def test_preferences_come_back_as_win_rates(tmp_path: Path, answers: Path) -> None:
    manifest = read_back(tmp_path / "out", answers, annotated(answers, [1.25, 2, 1.5, 1.0]))
    wins = [0.25, 1.0, 0.5, 0.0]
    controlled = length_controlled(
        np.array(wins),
        np.array([len(text) for text in ANSWERS], float),
        np.array([len(text) for text in REFERENCE], float),
    )
    assert manifest.metrics == pytest.approx(
        {
            "win_rate": np.mean(wins),
            "length_controlled_win_rate": controlled.mean(),
            "tie_share": 0.25,
            "identical_share": 0.0,
            "mean_characters": np.mean([len(text) for text in ANSWERS]),
            "other_mean_characters": np.mean([len(text) for text in REFERENCE]),
            "win_rate_koala": 0.625,
            "win_rate_helpful_base": 0.25,
        }
    )
    assert manifest.info == {
        "judge": "weighted_alpaca_eval_gpt4_turbo",
        "reference": "gpt4_1106",
    }
    artifact = open_artifact(tmp_path / "out")
    assert manifest.inputs["model"] == open_artifact(answers).manifest.inputs["model"]
    assert read_measures(artifact)["win_rate"].values.tolist() == wins
    intervals = json.loads(artifact.file("intervals.json").read_text())
    assert (intervals["win_rate"], intervals["win_rate_koala"]) == ([0.0, 1.0], [0.0, 1.0])
    assert intervals["length_controlled_win_rate"][0] < 0
    rows = list(read_rows([artifact.file("examples.parquet")], SUITE_EXAMPLES))
    assert [(row["score"], row["other"]) for row in rows] == list(zip(wins, REFERENCE, strict=True))


@pytest.mark.parametrize(("value", "win"), [(0, 0.5), (1.5, 0.5), (1, 0.0), (2, 1.0)])
def test_a_draw_is_half_a_win_in_old_files_too(
    tmp_path: Path, answers: Path, value: float, win: float
) -> None:
    manifest = read_back(tmp_path / "out", answers, annotated(answers, [value] * 4))
    assert manifest.metrics["win_rate"] == win


@pytest.mark.parametrize("null", [None, float("nan")])
def test_a_preference_that_is_null_is_left_out_and_counted(
    tmp_path: Path, answers: Path, null: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    rows = annotated(answers, [2, null, 2, 1])[:3]
    manifest = read_back(tmp_path / "out", answers, rows)
    assert manifest.metrics["win_rate"] == 1.0
    assert manifest.counts == {"answers": 2, "dropped_not_judged": 1, "dropped_unparsable": 1}
    file = open_artifact(tmp_path / "out").file("unscored.parquet")
    assert [(r["prompt_id"], r["reason"]) for r in read_rows([file], DROPPED)] == [
        ("00001", "unparsable"), ("00003", "not_judged"),
    ]  # fmt: skip
    assert "2 of 4 answers have no score" in caplog.text
    with pytest.raises(InputError, match="holds no score of any answer"):
        read_back(tmp_path / "none", answers, annotated(answers, [null] * 4))


def test_answers_are_known_by_their_texts_where_the_annotator_gave_another_name(
    tmp_path: Path, answers: Path
) -> None:
    rows = annotated(answers, [2, 2, 1, 1], generator_2="my model")
    rows += [row | {"generator_2": "another", "output_2": "its answer"} for row in rows]
    assert read_back(tmp_path / "out", answers, rows).metrics["win_rate"] == 0.5


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"generator_2": "x", "output_2": "y"}, r"does not judge spin-\w+.*\(it has x\)"),
        ({"output_2": "another text"}, "annotation 0: its output_2 is not what spin-"),
        ({"preference": 3}, "annotation 0: preference 3 is not from 1 to 2"),
        ({"preference": 10**400}, "annotation 0: preference 10{59}… is not from 1 to 2"),
        ({"preference": float("inf")}, "preference Infinity is not from 1 to 2"),
        ({"annotator": None}, "annotation 0: annotator is null"),
        ({"annotator": "half a \ud83d"}, "annotator is no valid Unicode"),
        ({"generator_1": ["x"]}, r'generator_1 is \["x"\]'),
        ({"generator_1": "half a \ud83d"}, "generator_1 is no valid Unicode"),
        ({"generator_2": "\ud83d", "output_2": "y"}, r"does not judge spin-.*\(it has \\ud83d\)"),
        ({"preference": 0.5}, "preference 0.5 is not from 1 to 2"),
        ({"preference": "2"}, 'preference is "2"'),
        ({"output_1": None}, "output_1 is null"),
        ({"output_1": "\udfff"}, "output_1 is no valid Unicode"),
    ],
)
def test_annotations_of_something_else_are_refused(
    tmp_path: Path, answers: Path, change: dict[str, Any], text: str
) -> None:
    with pytest.raises(InputError, match=text) as told:
        read_back(tmp_path / "out", answers, annotated(answers, [2, 2, 2, 2], **change))
    str(told.value).encode()  # it can be shown
    assert len(str(told.value).replace(str(tmp_path), "")) < 250


def test_an_annotator_need_not_know_whose_the_reference_is(tmp_path: Path, answers: Path) -> None:
    rows = annotated(answers, [2, 2, 2, 2], generator_1=None)
    made = read_back(tmp_path / "out", answers, rows)
    assert made.info == {"judge": "weighted_alpaca_eval_gpt4_turbo"}


def test_other_answers_under_the_same_settings_have_another_name(
    tmp_path: Path, tiny_model_dir: Path, answers: Path
) -> None:
    """An engine may draw others: what an annotator said of those is not taken for these."""
    engine = Replies(tiny_model_dir, lambda request: "Another")
    file = write_json(tmp_path / "alpaca_eval.json", INSTRUCTIONS)
    drawn = ask(tmp_path / "out", file, tiny_model_dir, engine)
    assert drawn.key == open_artifact(answers).manifest.key
    assert drawn.info["generator"] != open_artifact(answers).manifest.info["generator"]
    assert drawn.info["gpus"] == gpus_used(EngineConfig())


def test_one_annotator_one_reference_and_one_annotation_an_answer(
    tmp_path: Path, answers: Path
) -> None:
    rows = annotated(answers, [2, 2, 2, 2])
    for name, change in (("judges", "annotator"), ("models compared with", "generator_1")):
        mixed = [rows[0] | {change: "another"}, *rows[1:]]
        with pytest.raises(InputError, match=f"has several {name} "):
            read_back(tmp_path / change, answers, mixed)
    with pytest.raises(InputError, match="annotation 4: this answer is judged twice"):
        read_back(tmp_path / "twice", answers, [*rows, rows[2]])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{}", "holds no JSON list"),
        pytest.param("[" * 200_000, "holds no JSON list", id="nested"),
        ("[1]", "holds no JSON list"),
        ("[]", "has no instruction"),
        ('[{"instruction": 5}]', "instruction 0: instruction is 5"),
    ],
)
def test_instructions_of_another_form_are_refused(
    tmp_path: Path, tiny_model_dir: Path, content: str, text: str
) -> None:
    file = tmp_path / "alpaca_eval.json"
    file.write_text(content)
    engine = Replies(tiny_model_dir, lambda _: "x")
    with pytest.raises(InputError, match=text):
        ask(tmp_path / "out", file, tiny_model_dir, engine)


def test_instructions_must_be_named(tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="suites.alpaca.instructions is not set"):
        suite.run(config(None), SuiteInputs("alpaca", str(tiny_model_dir)), tmp_path / "out")


def test_an_instruction_that_does_not_fit_is_exported_empty_and_told(
    tmp_path: Path, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = {"instruction": "word " * 500, "dataset": "koala"}
    file = write_json(tmp_path / "alpaca_eval.json", [INSTRUCTIONS[0], long])
    engine = Replies(tiny_model_dir, lambda _: "Blue")
    manifest = ask(tmp_path / "out", file, tiny_model_dir, engine)
    assert [row["output"] for row in exported(tmp_path / "out")] == ["Blue", ""]
    assert manifest.counts == {"answers": 2, "unasked": 1}
    assert "1 of 2 questions do not fit the model" in caplog.text
