"""MT-Bench: two turns, FastChat's files, and scores that come back only to their own answers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spin_cli.app import app
from stages import suite
from stages.artifacts import Manifest, open_artifact, read_rows
from stages.config import EngineConfig, RunConfig
from stages.data.measures import read_measures
from stages.data.rows import DROPPED, SUITE_EXAMPLES
from stages.engines import gpus_used
from stages.errors import ConfigError, InputError
from stages.suites.base import SuiteInputs
from stages.suites.mt_bench import TEMPERATURES, read_questions, temperature_of
from tests.evaluations import Replies

# Made up, in the form of FastChat's question.jsonl.
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Write again."]},
    {"question_id": 111, "category": "math", "turns": ["Add 1 and 1.", "Double it."]},
    {"question_id": 141, "category": "stem", "turns": ["Why?", "Why so?"], "reference": ["x"]},
    {"question_id": 200, "category": "my own", "turns": ["Hm?", "Hm?"]},
]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(questions: Path | None, **settings: Any) -> RunConfig:
    section = {"kind": "mt_bench", "max_new_tokens": 24, **settings}
    if questions is not None:
        section["questions"] = str(questions)
    return RunConfig.model_validate({"suites": {"mt": section}})


def ask(out: Path, questions: Path, model: Path, by: Any, /, **settings: Any) -> Manifest:
    return suite.run(
        config(questions, **settings), SuiteInputs("mt", str(model)), out, open_engine=by.open
    )


def read_back(out: Path, answers: Path | None, judged: Path, **inputs: Any) -> Manifest:
    given = SuiteInputs("mt", answers=answers, judged=judged, **inputs)
    return suite.run(config(None), given, out)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "question.jsonl", QUESTIONS)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> tuple[Path, Replies]:
    """Answers to all questions, and the engine that gave them; answer N/T is `A N T`."""
    folder = tmp_path_factory.mktemp("asked")
    engine = Replies(tiny_model_dir, lambda request: "A " + request.replace("/", " "))
    ask(folder / "out", write_lines(folder / "q.jsonl", QUESTIONS), tiny_model_dir, engine)
    return folder / "out", engine


def exported(answers: Path) -> tuple[str, list[dict[str, Any]]]:
    """The name of the model in FastChat's files, and the lines of its answers."""
    [file] = open_artifact(answers).files("model_answer/")
    return file.stem, [json.loads(line) for line in file.read_text().splitlines()]


def judgements(answers: Path, **scores: float) -> list[dict[str, Any]]:
    """What FastChat's gen_judgment writes: all turns get 5, but for qN_T."""
    name, rows = exported(answers)
    return [
        {
            "question_id": row["question_id"], "model": name,
            "judge": ["gpt-4", f"single-v1{'-multi-turn' * (turn - 1)}"],
            "user_prompt": "[Question]…", "judgment": f"Rating: [[{turn}]]",
            "score": scores.get(f"q{row['question_id']}_{turn}", 5), "turn": turn, "tstamp": 1.5,
        }
        for turn in (1, 2)
        for row in rows
    ]  # fmt: skip


def test_the_second_turn_is_asked_with_the_first_answer_before_it(
    asked: tuple[Path, Replies],
) -> None:
    _, engine = asked
    assert engine.opened == 1
    assert sorted(engine.asked) == sorted(f"{q['question_id']}/{t}" for q in QUESTIONS
                                          for t in (1, 2))  # fmt: skip
    assert engine.asked["81/1"][0].endswith("user: Write.\nassistant: ")
    assert "user: Write.\nassistant: A 81 1" in engine.asked["81/2"][0]
    assert engine.asked["81/2"][0].endswith("user: Write again.\nassistant: ")


def test_temperatures_are_fastchats_by_category(asked: tuple[Path, Replies]) -> None:
    _, engine = asked
    drawn = {name: sampling.temperature for name, (_, sampling) in engine.asked.items()}
    assert drawn == {
        "81/1": 0.7, "81/2": 0.7, "111/1": 0.0, "111/2": 0.0, "141/1": 0.1, "141/2": 0.1,
        "200/1": 0.7, "200/2": 0.7,
    }  # fmt: skip
    section: Any = config(None, temperature=0.3).suites["mt"]
    assert temperature_of("my own", section) == 0.3
    assert temperature_of("math", section) == TEMPERATURES["math"] == 0.0


def test_answers_are_exported_as_fastchat_writes_them(asked: tuple[Path, Replies]) -> None:
    out, _ = asked
    name, rows = exported(out)
    assert re.fullmatch(r"spin-[0-9a-f]{12}", name)
    assert name == open_artifact(out).manifest.info["generator"]
    assert [row["question_id"] for row in rows] == [81, 111, 141, 200]
    for row in rows:
        number = row["question_id"]
        assert row["choices"] == [{"index": 0, "turns": [f"A {number} 1", f"A {number} 2"]}]
        assert row["model_id"] == name
        assert row["tstamp"] == 0.0
    assert len({row["answer_id"] for row in rows}) == 4
    found = list(read_rows([open_artifact(out).file("examples.parquet")], SUITE_EXAMPLES))
    assert [(r["prompt_id"], r["task"], r["prompt"], r["response"]) for r in found[:2]] == [
        ("81/1", "writing", "Write.", "A 81 1"), ("81/2", "writing", "Write again.", "A 81 2"),
    ]  # fmt: skip
    assert all(row["score"] is None for row in found)
    assert open_artifact(out).manifest.metrics["unasked_share"] == 0


def test_asking_again_gives_the_same_bytes(
    tmp_path: Path, questions: Path, tiny_model_dir: Path, asked: tuple[Path, Replies]
) -> None:
    engine = Replies(tiny_model_dir, lambda request: "A " + request.replace("/", " "))
    again = ask(tmp_path / "again", questions, tiny_model_dir, engine)
    assert again.content() == open_artifact(asked[0]).manifest.content()
    write_lines(questions, QUESTIONS[:3])
    fewer = ask(tmp_path / "fewer", questions, tiny_model_dir, engine)
    hotter = ask(tmp_path / "hotter", questions, tiny_model_dir, engine, temperature=0.9)
    assert len({again.key, fewer.key, hotter.key}) == 3


def test_an_interview_that_was_cut_off_goes_on_where_it_was(
    tmp_path: Path, questions: Path, tiny_model_dir: Path, asked: tuple[Path, Replies]
) -> None:
    def dies(request: str) -> str:
        if request == "141/2":
            raise KeyboardInterrupt
        return "A " + request.replace("/", " ")

    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path / "out", questions, tiny_model_dir, Replies(tiny_model_dir, dies))
    engine = Replies(tiny_model_dir, lambda request: "A " + request.replace("/", " "))
    resumed = ask(tmp_path / "out", questions, tiny_model_dir, engine)
    assert sorted(engine.asked) == ["141/2", "200/2", "81/2"]
    assert resumed.content() == open_artifact(asked[0]).manifest.content()


def test_sampling_and_engine_are_the_suites_own(
    tmp_path: Path, questions: Path, tiny_model_dir: Path, asked: tuple[Path, Replies]
) -> None:
    engine = Replies(tiny_model_dir, lambda _: "A")
    own = {"top_p": 0.5, "top_k": 3, "max_new_tokens": 9, "engine": {"dtype": "float32"}}
    ask(tmp_path / "out", questions, tiny_model_dir, engine, **own)
    assert {(s.top_p, s.top_k, s.max_new_tokens) for _, s in engine.asked.values()} == {(0.5, 3, 9)}
    assert engine.config.dtype == "float32"
    assert asked[1].config.dtype == "auto"


def test_scores_come_back_overall_by_turn_and_by_category(
    tmp_path: Path, asked: tuple[Path, Replies]
) -> None:
    answers, _ = asked
    rows = judgements(answers, q81_1=9, q81_2=7.5, q111_1=1, q141_2=10)
    rows += [row | {"model": "vicuna-13b", "score": 2} for row in rows]  # FastChat keeps all in one
    manifest = read_back(tmp_path / "out", answers, write_lines(tmp_path / "gpt-4.jsonl", rows))
    wanted = {
        "score": (9 + 7.5 + 1 + 5 + 5 + 10 + 5 + 5) / 8,
        "score_turn_1": 5.0, "score_turn_2": 6.875,
        "score_writing": 8.25, "score_math": 3.0, "score_stem": 7.5, "score_my_own": 5.0,
    }  # fmt: skip
    assert manifest.metrics == pytest.approx(wanted)
    assert manifest.counts == {"answers": 8}
    assert manifest.info["judge"] == "gpt-4"
    assert manifest.inputs["model"] == open_artifact(answers).manifest.inputs["model"]
    columns = read_measures(open_artifact(tmp_path / "out"))
    assert columns["score"].example_ids == ["81", "111", "141", "200"]
    intervals = json.loads(open_artifact(tmp_path / "out").file("intervals.json").read_text())
    assert intervals["score_turn_2"][1] == 10.0  # Student's t would give 10.7
    told = [end for name in wanted for end in intervals[name] if end is not None]
    assert all(1 <= end <= 10 for end in told)
    found = read_rows([open_artifact(tmp_path / "out").file("examples.parquet")], SUITE_EXAMPLES)
    scores = {row["prompt_id"]: (row["score"], row["scored_by"]) for row in found}
    assert scores["81/2"] == (7.5, "gpt-4")
    said = open_artifact(tmp_path / "out").file("judgements.jsonl").read_text()
    assert "Rating: [[2]]" in said
    assert "tstamp" not in said


def test_the_command_line_reads_judgements_back_without_a_model(
    tmp_path: Path, asked: tuple[Path, Replies]
) -> None:
    answers, _ = asked
    judged = write_lines(tmp_path / "j.jsonl", judgements(answers, q81_1=9))
    recipe = tmp_path / "recipe.yaml"
    # The recipe's own model is another one, and not asked for.
    recipe.write_text("model: {path: nowhere}\nsuites: {mt: {kind: mt_bench}}\n")
    words = ["evaluate", "--suite", "mt", "--config", recipe, "--answers", answers,
             "--judged", judged, "--out", tmp_path / "out"]  # fmt: skip
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    assert open_artifact(tmp_path / "out").manifest.metrics["score_writing"] == 7


def test_what_has_no_rating_is_left_out_and_counted(
    tmp_path: Path, asked: tuple[Path, Replies], caplog: pytest.LogCaptureFixture
) -> None:
    answers, _ = asked
    rows = judgements(answers, q81_1=9, q81_2=-1)
    rows = [r for r in rows if (r["question_id"], r["turn"]) != (111, 1)]
    manifest = read_back(tmp_path / "out", answers, write_lines(tmp_path / "j.jsonl", rows))
    # As FastChat counts: the mean over the turns that have a score.
    assert manifest.metrics["score"] == pytest.approx((9 + 5 * 5) / 6)
    assert manifest.metrics["score_writing"] == 9
    assert manifest.counts == {"answers": 6, "dropped_not_judged": 1, "dropped_unparsable": 1}
    file = open_artifact(tmp_path / "out").file("unscored.parquet")
    assert [(r["prompt_id"], r["reason"]) for r in read_rows([file], DROPPED)] == [
        ("81/2", "unparsable"), ("111/1", "not_judged"),
    ]  # fmt: skip
    assert "2 of 8 answers have no score" in caplog.text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": "vicuna-13b"}, r"does not judge spin-\w+, .*it has vicuna-13b"),
        ({"model_1": "a", "model_2": "b"}, "compares pairs of models; judge single answers"),
        ({"score": 11}, "score 11 is not from 1 to 10"),
        ({"score": 0}, "score 0 is not from 1 to 10"),
        ({"score": "9"}, 'score is "9"'),
        ({"score": None}, "score is null"),
        ({"turn": 3}, "which was not asked"),
        ({"question_id": 82}, "which was not asked"),
        ({"judge": ["me", "v1"]}, r"has several judges \(gpt-4, me\)"),
        ({"judge": None}, "question 81: judge is null"),
        ({"judge": [None, "v1"]}, "question 81: judge is null"),
        ({"judge": []}, r"question 81: judge is \[\]"),
        ({"judge": "half a \ud83d"}, "question 81: judge is no valid Unicode"),
        ({"judge": "me " * 90}, r"has several judges \(gpt-4, (me ){20}…\)"),
        ({"score": 10**400}, r"score 10{59}… is not from 1 to 10"),
        ({"score": float("nan")}, "score NaN is not from 1 to 10"),
        ({"turn": 10**400}, r"judges 81/10{56}… \(question"),
        ({"model": "half a \ud83d"}, r"does not judge spin-\w+, .*it has half a \\ud83d\)"),
        ({"model": ["x"] * 90}, r"does not judge spin-\w+, .*it has .{60}…\)"),
    ],
)
def test_judgements_of_something_else_are_refused(
    tmp_path: Path, asked: tuple[Path, Replies], change: dict[str, Any], text: str
) -> None:
    rows = judgements(asked[0])
    everywhere = "model" in change
    changed = [row | change if everywhere or i == 0 else row for i, row in enumerate(rows)]
    with pytest.raises(InputError, match=text) as told:
        read_back(tmp_path / "out", asked[0], write_lines(tmp_path / "j.jsonl", changed))
    assert_one_line(told.value)


def assert_one_line(error: InputError) -> None:
    assert "\n" not in str(error)
    str(error).encode()  # it can be shown
    assert error.exit_code == 3


def test_other_answers_under_the_same_settings_have_another_name(
    tmp_path: Path, questions: Path, tiny_model_dir: Path, asked: tuple[Path, Replies]
) -> None:
    """An engine may draw others: what a judge said of those is not taken for these."""
    engine = Replies(tiny_model_dir, lambda request: "B " + request)
    drawn = ask(tmp_path / "drawn", questions, tiny_model_dir, engine)
    answers, _ = asked
    assert drawn.key == open_artifact(answers).manifest.key
    judged = write_lines(tmp_path / "j.jsonl", judgements(answers))
    with pytest.raises(InputError, match=r"does not judge spin-\w+, whose answers these are"):
        read_back(tmp_path / "out", tmp_path / "drawn", judged)


def test_who_is_asked_says_how_many_gpus(
    tmp_path: Path, questions: Path, tiny_model_dir: Path, asked: tuple[Path, Replies]
) -> None:
    assert open_artifact(asked[0]).manifest.info["gpus"] == gpus_used(EngineConfig())
    engine = Replies(tiny_model_dir, lambda _: "A")
    made = ask(
        tmp_path / "out", questions, tiny_model_dir, engine, engine={"name": "vllm", "gpus": 3}
    )
    assert made.info["gpus"] == 3


def test_a_turn_that_is_judged_twice_is_refused(
    tmp_path: Path, asked: tuple[Path, Replies]
) -> None:
    rows = judgements(asked[0])
    with pytest.raises(InputError, match="question 81: turn 1 is judged twice"):
        read_back(tmp_path / "out", asked[0], write_lines(tmp_path / "j.jsonl", [*rows, rows[0]]))


def test_a_file_that_is_none_is_refused(tmp_path: Path, asked: tuple[Path, Replies]) -> None:
    broken = tmp_path / "j.jsonl"
    broken.write_text('{"model": "x"}\n\n[1]\n')
    with pytest.raises(InputError, match="line 3 holds no JSON object"):
        read_back(tmp_path / "out", asked[0], broken)
    broken.write_text("[" * 200_000)
    with pytest.raises(InputError, match="line 1 holds no JSON object"):
        read_back(tmp_path / "out", asked[0], broken)
    with pytest.raises(InputError, match="--judged .* cannot be read"):
        read_back(tmp_path / "out", asked[0], tmp_path / "nowhere")


def test_answers_and_judgements_go_together(
    tmp_path: Path, questions: Path, tiny_model_dir: Path, asked: tuple[Path, Replies]
) -> None:
    answers, _ = asked
    judged = write_lines(tmp_path / "j.jsonl", judgements(answers))
    with pytest.raises(ConfigError, match="--judged needs --answers"):
        read_back(tmp_path / "out", None, judged)
    read_back(tmp_path / "judged", answers, judged)
    with pytest.raises(InputError, match="holds no answers that were made for mt_bench"):
        read_back(tmp_path / "out", tmp_path / "judged", judged)
    with pytest.raises(ConfigError, match="takes --answers together with --judged"):
        suite.run(config(questions), SuiteInputs("mt", "m", answers=answers), tmp_path / "out")
    read_back(tmp_path / "named", answers, judged, model=str(tiny_model_dir))
    with pytest.raises(ConfigError, match="suites.mt.questions is not set"):
        suite.run(config(None), SuiteInputs("mt", str(tiny_model_dir)), tmp_path / "out")


def test_a_turn_that_does_not_fit_is_exported_empty_and_told(
    tmp_path: Path, questions: Path, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The model has 512 positions: what is said before the second turn leaves no room for it."""
    long = "Write of " + "words " * 190
    write_lines(questions, [QUESTIONS[0], QUESTIONS[1] | {"turns": ["Go.", long]}])
    engine = Replies(tiny_model_dir, lambda request: "1 2 3 4 5 6 7 8 9 10" * 3)
    manifest = ask(tmp_path / "out", questions, tiny_model_dir, engine, max_new_tokens=300)
    _, rows = exported(tmp_path / "out")
    assert rows[1]["choices"][0]["turns"][1] == ""
    assert rows[1]["choices"][0]["turns"][0] != ""
    assert manifest.counts == {"answers": 4, "unasked": 1}
    assert manifest.metrics["unasked_share"] == 0.25
    assert "1 of 4 questions do not fit the model" in caplog.text


def test_the_real_questions_are_read_and_all_their_categories_have_a_temperature() -> None:
    file = Path(__file__).parents[1] / "data/mt_bench/question.jsonl"
    found = read_questions(file.read_bytes(), file)
    assert {question.category for question in found} == TEMPERATURES.keys()
    assert all(len(question.turns) == 2 for question in found)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"question_id": 1, "category": "math", "turns": ["one"]}, "turns is no list of 2 texts"),
        ({"question_id": 1, "category": "math", "turns": ["a", 2]}, "turns is no list of 2 texts"),
        ({"question_id": 1, "turns": ["a", "b"]}, "category is not there"),
        ({"question_id": 1, "category": "math", "turns": ["a", "\ud800"]}, "no valid Unicode"),
        ({"question_id": "81", "category": "math", "turns": ["a", "b"]}, "question_id twice"),
    ],
)
def test_questions_of_another_form_are_refused(
    tmp_path: Path, row: dict[str, Any], text: str
) -> None:
    file = write_lines(tmp_path / "q.jsonl", [QUESTIONS[0], row])
    with pytest.raises(InputError, match=text):
        read_questions(file.read_bytes(), file)
