"""alpaca_eval: AlpacaEval's instructions (Li et al. 2023), judged elsewhere.

Instructions and answers have AlpacaEval's format, so that its command can be run on the answers,
and the annotations that it writes are read back.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.artifacts import Manifest, Outcome, Plan, Workspace, produce
from stages.artifacts.keys import sha256_bytes
from stages.artifacts.tables import Row
from stages.config import AlpacaEvalSuiteConfig
from stages.data.chat import chat_fingerprints
from stages.data.measures import Measure, write_measures
from stages.engines import gpus_used
from stages.engines.base import Completion
from stages.errors import InputError
from stages.model.source import ModelSource
from stages.suites import exchange
from stages.suites.base import STAGE, SuiteWork
from stages.suites.exchange import Answer, Judgement
from stages.suites.wins import Win, measured_wins, range_of_wins

FORMAT_VERSION = 1
KIND = "alpaca_eval"
OUTPUTS = "outputs.json"
DRAW = 0
"""What older annotations say of a tie; newer ones say 1.5."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of AlpacaEval."""

    prompt_id: str
    text: str
    dataset: str
    """Where AlpacaEval took it from, such as `koala`."""


def run(work: SuiteWork, suite: AlpacaEvalSuiteConfig) -> Manifest:
    """Ask the model, or read back what the annotator preferred.

    Asked: `outputs.json` for `alpaca_eval --model_outputs`, and metrics `mean_tokens` and
    `cut_off_share` of answers.
    Read back: the metrics of `measured_wins` against the annotator's reference, lengths in
    characters, and `win_rate_DATASET`.

    Raises:
        ConfigError: the recipe names no instructions.
        InputError: a file cannot be read, is no such file, or is about other answers.
    """
    if work.inputs.judged is not None:
        return _read_back(work, work.inputs.judged)
    return _ask(work, suite)


def read_instructions(data: bytes, path: Path) -> list[Instruction]:
    """Return the instructions of a file; their ids are their places in it.

    Raises:
        InputError: it holds none, or something else.
    """
    found = []
    for number, row in enumerate(exchange.parse_list(data, path)):
        where = f"{path}, instruction {number}"
        text = exchange.field(row, "instruction", str, where)
        dataset = exchange.field(row, "dataset", str, where) if "dataset" in row else ""
        found.append(Instruction(f"{number:05d}", text, dataset))
    if not found:
        raise InputError(f"{path} has no instruction; is it AlpacaEval's alpaca_eval.json?")
    return found


def _ask(work: SuiteWork, suite: AlpacaEvalSuiteConfig) -> Manifest:
    inputs, config, model = work.inputs, work.config, exchange.asked_model(work)
    option = f"suites.{inputs.name}.instructions"
    path = exchange.named_file(suite.instructions, option, "AlpacaEval's alpaca_eval.json")
    data = exchange.read_file(path, option)
    instructions = read_instructions(data, path)
    plan = Plan(
        stage=STAGE,
        format_version=FORMAT_VERSION,
        config={
            "suite": inputs.name,
            **suite.identity(),
            "instructions_sha256": sha256_bytes(data),
            "seed": config.seed,
            "engine": work.config.answering_engine(suite.engine).identity(),
            "chat": config.chat.identity(),
        },
        inputs={"model": model.ref},
        fingerprints=chat_fingerprints(model.path, config.chat),
    )

    def fill(space: Workspace) -> Outcome:
        answers = _answers(work, suite, model, instructions, space)
        gpus = gpus_used(work.config.answering_engine(suite.engine))
        return _write_answers(space, inputs.name, instructions, answers, plan.key, gpus)

    return produce(work.out, plan, fill, resumable=True, reuse=True)


def _answers(
    work: SuiteWork,
    suite: AlpacaEvalSuiteConfig,
    model: ModelSource,
    instructions: Sequence[Instruction],
    space: Workspace,
) -> dict[str, Answer]:
    """Return the answer to every instruction, by prompt id."""
    asker = work.asker(model, suite, space, suite.engine)
    rows: list[Row] = [
        {
            "prompt_id": one.prompt_id,
            "messages": [{"role": "user", "content": one.text}],
            "response": "",
        }
        for one in instructions
    ]
    asked, _ = asker.askable(model, rows)
    if not asked:
        raise InputError(
            f"suite {work.inputs.name}: none of {len(rows)} instructions fits the model; lower "
            f"suites.{work.inputs.name}.max_new_tokens"
        )
    done: dict[str, Completion] = {
        prompt_id: answer for prompt_id, _, answer in asker.answers(model, asked, 1, greedy=False)
    }
    texts = asker.renderer.texts([answer.token_ids for answer in done.values()])
    text_of = dict(zip(done, texts, strict=True))
    return {
        one.prompt_id: Answer(
            text_of.get(one.prompt_id),
            len(done[one.prompt_id].token_ids) if one.prompt_id in done else 0,
            done[one.prompt_id].finish_reason if one.prompt_id in done else None,
            asker.sample_seed(one.prompt_id, 0),
        )
        for one in instructions
    }


def _write_answers(
    space: Workspace,
    name: str,
    instructions: Sequence[Instruction],
    answers: Mapping[str, Answer],
    key: str,
    gpus: int,
) -> Outcome:
    rows = [
        exchange.answer_row(i.prompt_id, i.dataset or KIND, i.text, answers[i.prompt_id])
        for i in instructions
    ]
    counts = exchange.write_answers(space, name, rows)
    generator = exchange.generator_name(key, rows)
    exported = [
        {
            "instruction": one.text,
            "output": answers[one.prompt_id].text or "",
            "generator": generator,
            "dataset": one.dataset,
        }
        for one in instructions
    ]
    space.file(OUTPUTS).write_text(json.dumps(exported, indent=1) + "\n", encoding="ascii")
    return Outcome(
        counts=counts,
        metrics=write_measures(space, _measured_answers(answers), {}),
        info={exchange.GENERATOR: generator, "gpus": gpus},
        tokens=sum(answer.num_tokens for answer in answers.values()),
    )


def _measured_answers(answers: Mapping[str, Answer]) -> Iterator[Measure]:
    for prompt_id, answer in answers.items():
        if answer.text is not None:
            yield Measure(prompt_id, "mean_tokens", answer.num_tokens)
            yield Measure(prompt_id, "cut_off_share", float(answer.finish_reason == "length"))


def _read_back(work: SuiteWork, path: Path) -> Manifest:
    def fill(space: Workspace, data: bytes, exported: exchange.Exported) -> Outcome:
        annotations = exchange.parse_list(data, path)
        found = preferences(annotations, path, exported.generator, exported.rows)
        return exchange.write_judged(space, exported, found, _measured_preferences, range_of_wins)

    return exchange.read_back(work, KIND, FORMAT_VERSION, path, fill)


def preferences(
    annotations: Sequence[dict[str, Any]],
    path: Path,
    generator: str,
    rows: Sequence[Row],
) -> dict[str, Judgement]:
    """Return what annotations say of our answers, by prompt id.

    AlpacaEval's `preference` is 1 for the reference (`output_1`), 2 for the model (`output_2`),
    1.5 (formerly 0) for a tie, or between for an annotator that is not sure.

    Args:
        generator: what our answers are called in the file; where `--name` gave them another name,
            they are known by their texts.
        rows: our answers, rows of SUITE_EXAMPLES.

    Raises:
        InputError: the file is not about these answers, has one twice, or several annotators or
            references; or a preference is none.
    """
    waiting: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        waiting[row["prompt"], row["response"] or ""].append(row["prompt_id"])
    named = [row for row in annotations if row.get("generator_2") == generator]
    found: dict[str, Judgement] = {}
    for number, row in enumerate(named or annotations):
        where = f"{path}, annotation {number}"
        instruction = exchange.field(row, "instruction", str, where)
        key = instruction, exchange.field(row, "output_2", str, where)
        if key not in waiting:
            if named:
                raise InputError(
                    f"{where}: its output_2 is not what {generator} answered; judge {OUTPUTS} of "
                    "these answers"
                )
            continue
        if not waiting[key]:
            raise InputError(f"{where}: this answer is judged twice; leave one annotation")
        found[waiting[key].pop(0)] = _preference(row, where)
    if not found:
        names = sorted({exchange.shown(row.get("generator_2")) for row in annotations})
        raise InputError(
            f"{path} does not judge {generator}, whose answers these are (it has "
            f"{', '.join(names[:5]) or 'nothing'}); run: alpaca_eval --model_outputs {OUTPUTS}"
        )
    exchange.check_one_judge(found, path)
    return found


def _preference(row: Mapping[str, Any], where: str) -> Judgement:
    value, text = row.get("preference"), row.get("raw_completion")
    if isinstance(value, float) and math.isnan(value):  # pandas' null
        value = None
    if value is not None:
        value = exchange.field(row, "preference", (int, float), where)
        if value != DRAW and not 1 <= value <= 2:
            raise InputError(
                f"{where}: preference {exchange.shown(value)} is not from 1 to 2; mend the file"
            )
        value = 0.5 if value == DRAW else float(value) - 1
    return Judgement(
        score=value,
        judge=exchange.field(row, "annotator", str, where),
        text=text if isinstance(text, str) else None,
        other=exchange.field(row, "output_1", str, where),
        other_by=_name_of_other(row, where),
    )


def _name_of_other(row: Mapping[str, Any], where: str) -> str | None:
    """Return whose answer ours was compared with; AlpacaEval does not know it of every file."""
    if row.get("generator_1") is None:
        return None
    name: str = exchange.field(row, "generator_1", str, where)
    return name


def _measured_preferences(rows: Sequence[Row]) -> Iterator[Measure]:
    yield from measured_wins(
        [Win(r["prompt_id"], r["score"], r["response"] or "", r["other"]) for r in rows]
    )
    for row in rows:
        if row["task"] != KIND:
            yield Measure(row["prompt_id"], f"win_rate_{exchange.word(row['task'])}", row["score"])
