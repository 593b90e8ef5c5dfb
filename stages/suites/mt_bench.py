"""mt_bench: MT-Bench's two-turn questions (Zheng et al. 2023, arXiv 2306.05685), judged elsewhere.

Questions and answers have FastChat's format, so that its `gen_judgment` (single-answer grading) can
be run on the answers, and the file that it writes is read back.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages import engines
from stages.artifacts import Manifest, Outcome, Plan, Workspace, produce
from stages.artifacts.keys import sha256_bytes, sha256_text
from stages.artifacts.tables import Row
from stages.config import MtBenchSuiteConfig
from stages.data.chat import chat_fingerprints
from stages.data.measures import Measure, usual_range, write_measures
from stages.data.statistics import Interval
from stages.engines.base import Completion, Engine, Request
from stages.errors import InputError
from stages.model.source import ModelSource
from stages.progress import Progress, progress
from stages.suites import exchange
from stages.suites.answering import Asked, Asker
from stages.suites.base import STAGE, SuiteWork
from stages.suites.exchange import Answer, Judgement
from stages.suites.kept import AnswerShard, ask_for

FORMAT_VERSION = 1
KIND = "mt_bench"
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""FastChat's, by category (fastchat/llm_judge/common.py)."""
TURNS = 2
LEAST_SCORE, MOST_SCORE = 1.0, 10.0
NO_SCORE = -1
"""What FastChat writes where its judge's reply holds no rating."""
_SLACK = 64  # an answer read as text again may have other tokens than were drawn


@dataclass(frozen=True)
class Question:
    """One question of MT-Bench."""

    question_id: int | str
    category: str
    turns: tuple[str, str]


_Answers = dict[tuple[int | str, int], Answer]
"""By question id and turn, from 1."""


def run(work: SuiteWork, suite: MtBenchSuiteConfig) -> Manifest:
    """Ask the model, or read back what a judge found of its answers.

    Asked: `model_answer/NAME.jsonl` for FastChat, and metrics `mean_tokens` and `cut_off_share` of
    answers, `unasked_share` of those turns that did not fit, each a question.
    Read back: `score`, the mean over judged turns, from 1 to 10, `score_turn_1`, `score_turn_2`,
    and `score_CATEGORY`; an example is a question, since its two turns are no independent ones.

    Raises:
        ConfigError: the recipe names no questions.
        InputError: a file cannot be read, is no such file, or is about other answers.
    """
    if work.inputs.judged is not None:
        return _read_back(work, work.inputs.judged)
    return _ask(work, suite)


def read_questions(data: bytes, path: Path) -> list[Question]:
    """Return the questions of a question.jsonl.

    Raises:
        InputError: a row is no question of two turns, or an id comes twice; or there is none.
    """
    questions: list[Question] = []
    for row in exchange.parse_lines(data, path):
        where = f"{path}, question {exchange.shown(row.get('question_id'), 40)}"
        question_id = exchange.field(row, "question_id", (int, str), where)
        category = exchange.field(row, "category", str, where)
        turns = exchange.field(row, "turns", list, where)
        if len(turns) != TURNS or not all(isinstance(turn, str) and turn for turn in turns):
            raise InputError(f"{where}: turns is no list of {TURNS} texts; mend the file")
        questions.append(Question(question_id, category, (turns[0], turns[1])))
    if len({str(one.question_id) for one in questions}) < len(questions) or not questions:
        what = "has no question" if not questions else "has a question_id twice"
        raise InputError(f"{path} {what}; is it FastChat's question.jsonl?")
    return questions


def temperature_of(category: str, suite: MtBenchSuiteConfig) -> float:
    """Return at which temperature a category is answered."""
    return TEMPERATURES.get(category, suite.temperature)


def _questions_of(work: SuiteWork, suite: MtBenchSuiteConfig) -> tuple[list[Question], str]:
    """Return the questions, and the SHA-256 of their file."""
    option = f"suites.{work.inputs.name}.questions"
    path = exchange.named_file(suite.questions, option, "FastChat's question.jsonl")
    data = exchange.read_file(path, option)
    return read_questions(data, path), sha256_bytes(data)


def _ask(work: SuiteWork, suite: MtBenchSuiteConfig) -> Manifest:
    inputs, config, model = work.inputs, work.config, exchange.asked_model(work)
    questions, digest = _questions_of(work, suite)
    plan = Plan(
        stage=STAGE,
        format_version=FORMAT_VERSION,
        config={
            "suite": inputs.name,
            **suite.identity(),
            "questions_sha256": digest,
            "seed": config.seed,
            "engine": work.config.answering_engine(suite.engine).identity(),
            "chat": config.chat.identity(),
        },
        inputs={"model": model.ref},
        fingerprints=chat_fingerprints(model.path, config.chat),
    )

    def fill(space: Workspace) -> Outcome:
        answers = _Interview(work, suite, model, questions, space).answers()
        gpus = engines.gpus_used(work.config.answering_engine(suite.engine))
        return _write_answers(space, inputs.name, questions, answers, plan.key, gpus)

    return produce(work.out, plan, fill, resumable=True, reuse=True)


class _Interview:
    """Both turns of all questions, asked with one engine."""

    def __init__(
        self,
        work: SuiteWork,
        suite: MtBenchSuiteConfig,
        model: ModelSource,
        questions: Sequence[Question],
        space: Workspace,
    ) -> None:
        asker = work.asker(model, suite, space, suite.engine)
        self._suite, self._model, self._questions = suite, model, questions
        self._asker, self._room = asker, self._longest(asker)

    def answers(self) -> _Answers:
        """Ask, turn by turn, categories of one temperature together."""
        asker, found = self._asker, _Answers()
        with (
            engines.running(
                asker.open_engine,
                asker.engine,
                self._model.path,
                asker.scratch,
                max_model_len=self._room,
                pad_token_id=asker.renderer.pad_token_id,
            ) as engine,
            progress(asker.stage, total=TURNS * len(self._questions), unit="answers") as bar,
        ):
            for turn in range(1, TURNS + 1):
                for temperature in sorted({self._temperature(one) for one in self._questions}):
                    found |= self._turn(engine, turn, temperature, found, bar)
        return found

    def _temperature(self, question: Question) -> float:
        return temperature_of(question.category, self._suite)

    def _turn(
        self, engine: Engine, turn: int, temperature: float, before: _Answers, bar: Progress
    ) -> _Answers:
        asker = self._asker
        group = [one for one in self._questions if self._temperature(one) == temperature]
        open_ones = [
            one for one in group if turn == 1 or before[one.question_id, 1].text is not None
        ]
        rows = [_prompt(one, turn, before) for one in open_ones]
        asked, _ = asker.askable(self._model, rows)
        limit = self._room - self._suite.max_new_tokens
        fitting = [one for one in asked if len(one.prompt_token_ids) <= limit]
        name = f"answers-{turn}-{temperature}"
        given = {
            done.request_id: done
            for done in self._generate(engine, name, fitting, temperature, bar)
        }
        texts = asker.renderer.texts([done.token_ids for done in given.values()])
        text_of = dict(zip(given, texts, strict=True))
        return {
            (one.question_id, turn): self._answer(
                one, turn, given.get(_id(one, turn)), text_of.get(_id(one, turn))
            )
            for one in group
        }

    def _generate(
        self, engine: Engine, name: str, asked: Sequence[Asked], temperature: float, bar: Progress
    ) -> Iterator[Completion]:
        """Yield the answers: those of a cut-off attempt, or new ones, kept under a name."""
        requests = [
            Request(a.prompt_id, a.prompt_token_ids, self._asker.sample_seed(a.prompt_id, 0))
            for a in asked
        ]
        kept = AnswerShard(self._asker.space, name, requests)
        if not requests:
            return
        if kept.is_done:
            bar.skip(len(requests))
            yield from kept.read()
            return
        for done in ask_for([kept], engine, self._asker.sampling_at(temperature)):
            bar.advance(1, len(done.token_ids))
            yield done

    def _answer(
        self, question: Question, turn: int, done: Completion | None, text: str | None
    ) -> Answer:
        seed = self._asker.sample_seed(_id(question, turn), 0)
        if done is None:
            return Answer(None, 0, None, seed)
        return Answer(text, len(done.token_ids), done.finish_reason, seed)

    def _longest(self, asker: Asker) -> int:
        """Return the most tokens that a whole conversation can have, as far as there is room."""
        room = asker.room(self._model)
        shortest = {(one.question_id, 1): Answer("x", 1, "stop", 0) for one in self._questions}
        rows = [_prompt(one, TURNS, shortest) for one in self._questions]
        asked, _ = asker.askable(self._model, rows)
        longest = max((len(one.prompt_token_ids) for one in asked), default=room)
        return min(room, longest + TURNS * self._suite.max_new_tokens + _SLACK)


def _id(question: Question, turn: int) -> str:
    return f"{question.question_id}/{turn}"


def _prompt(question: Question, turn: int, before: Mapping[Any, Answer]) -> Row:
    """Return a turn as a row of PROMPTS, with what was said before it."""
    messages = [{"role": "user", "content": question.turns[0]}]
    if turn == TURNS:
        said = before[question.question_id, 1].text
        messages += [
            {"role": "assistant", "content": said or ""},
            {"role": "user", "content": question.turns[1]},
        ]
    return {"prompt_id": _id(question, turn), "messages": messages, "response": ""}


def _write_answers(
    space: Workspace,
    name: str,
    questions: Sequence[Question],
    answers: _Answers,
    key: str,
    gpus: int,
) -> Outcome:
    rows = [
        exchange.answer_row(_id(q, turn), q.category, prompt, answers[q.question_id, turn])
        for q in questions
        for turn, prompt in enumerate(q.turns, 1)
    ]
    counts = exchange.write_answers(space, name, rows)
    generator = exchange.generator_name(key, rows)
    exported = exchange.lines(_model_answer(q, answers, generator) for q in questions)
    space.file(f"model_answer/{generator}.jsonl").write_bytes(exported)
    return Outcome(
        counts=counts,
        metrics=write_measures(space, _measured_answers(questions, answers), {}),
        info={exchange.GENERATOR: generator, "gpus": gpus},
        tokens=sum(answer.num_tokens for answer in answers.values()),
    )


def _model_answer(question: Question, answers: _Answers, generator: str) -> dict[str, Any]:
    """Return a line of FastChat's model_answer files; the time is left at 0."""
    turns = [answers[question.question_id, turn].text or "" for turn in range(1, TURNS + 1)]
    answer_id = sha256_text(json.dumps([generator, question.question_id, turns]))
    return {
        "question_id": question.question_id,
        "answer_id": answer_id[:22],
        "model_id": generator,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": 0.0,
    }


def _measured_answers(questions: Sequence[Question], answers: _Answers) -> Iterator[Measure]:
    for question in questions:
        both = [answers[question.question_id, turn] for turn in range(1, TURNS + 1)]
        given = [answer for answer in both if answer.text is not None]
        example = str(question.question_id)
        yield Measure(example, "unasked_share", 1 - len(given) / TURNS)
        if given:
            cut_off = sum(answer.finish_reason == "length" for answer in given)
            tokens = sum(answer.num_tokens for answer in given)
            yield Measure(example, "mean_tokens", tokens / len(given), len(given))
            yield Measure(example, "cut_off_share", cut_off / len(given), len(given))


def _read_back(work: SuiteWork, path: Path) -> Manifest:
    def fill(space: Workspace, data: bytes, exported: exchange.Exported) -> Outcome:
        found = judgements(exchange.parse_lines(data, path), path, exported.generator)
        unknown = sorted(found.keys() - {row["prompt_id"] for row in exported.rows})
        if unknown:
            raise InputError(
                f"{path} judges {exchange.shown(unknown[0])} (question/turn), which was not asked; "
                "it is about other questions than the answers"
            )
        return exchange.write_judged(space, exported, found, _measured_scores, _range_of)

    return exchange.read_back(work, KIND, FORMAT_VERSION, path, fill)


def judgements(
    rows: Sequence[Mapping[str, Any]], path: Path, generator: str
) -> dict[str, Judgement]:
    """Return what a model_judgment file says of one model, by question id and turn (`81/1`).

    Raises:
        InputError: it says nothing of that model, is no file of single-answer grading, a turn is
            judged twice, by several judges, or with a score outside of 1 to 10.
    """
    if any("model_1" in row for row in rows):
        raise InputError(
            f"{path} compares pairs of models; judge single answers: gen_judgment --mode single"
        )
    ours = [row for row in rows if row.get("model") == generator]
    if not ours:
        others = sorted({exchange.shown(row.get("model")) for row in rows})
        raise InputError(
            f"{path} does not judge {generator}, whose answers these are (it has "
            f"{', '.join(others[:5]) or 'nothing'}); judge model_answer/{generator}.jsonl"
        )
    found: dict[str, Judgement] = {}
    for row in ours:
        where = f"{path}, question {exchange.shown(row.get('question_id'), 40)}"
        question_id = exchange.field(row, "question_id", (int, str), where)
        turn = exchange.field(row, "turn", int, where)
        if f"{question_id}/{turn}" in found:
            raise InputError(
                f"{where}: turn {exchange.shown(turn)} is judged twice; leave one judgement"
            )
        found[f"{question_id}/{turn}"] = _judgement(row, where)
    exchange.check_one_judge(found, path)
    return found


def _judgement(row: Mapping[str, Any], where: str) -> Judgement:
    score = exchange.field(row, "score", (int, float), where)
    if score != NO_SCORE and not LEAST_SCORE <= score <= MOST_SCORE:
        raise InputError(
            f"{where}: score {exchange.shown(score)} is not from 1 to 10; mend the file"
        )
    text = row.get("judgment")
    return Judgement(
        score=None if score == NO_SCORE else float(score),
        judge=_judge(row, where),
        text=text if isinstance(text, str) else None,
    )


def _judge(row: Mapping[str, Any], where: str) -> str:
    """Return the judge's model, which FastChat writes with the name of its prompt."""
    judge = row.get("judge")
    name = judge[0] if isinstance(judge, list) and judge else judge
    found: str = exchange.field({**row, "judge": name}, "judge", str, where)
    return found


def _range_of(name: str) -> Interval | None:
    """Return the range of a score, whatever its category is called."""
    is_score = name == "score" or name.startswith("score_")
    return (LEAST_SCORE, MOST_SCORE) if is_score else usual_range(name)


def _measured_scores(rows: Sequence[Row]) -> Iterator[Measure]:
    """Yield the scores of `run`, question by question, weighted by how many turns have one."""
    by_question: dict[str, list[Row]] = {}
    for row in rows:
        by_question.setdefault(row["prompt_id"].rpartition("/")[0], []).append(row)
    for question_id, turns in by_question.items():
        mean = sum(row["score"] for row in turns) / len(turns)
        yield Measure(question_id, "score", mean, len(turns))
        category = exchange.word(turns[0]["task"])
        yield Measure(question_id, f"score_{category}", mean, len(turns))
        for row in turns:
            turn = row["prompt_id"].rpartition("/")[2]
            yield Measure(question_id, f"score_turn_{turn}", row["score"])
