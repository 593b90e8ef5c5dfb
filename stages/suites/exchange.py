"""Answers that others gave or judge: taken from artifacts, handed to outside judges, and read back.

For an outside judge a suite is asked twice: first the model, whose answers are an artifact with a
file in the judge's own format; then, with `judged`, the judge's file, which becomes an evaluation
of that model.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.artifacts import (
    Artifact,
    InputRef,
    Manifest,
    Outcome,
    Plan,
    TableWriter,
    Workspace,
    open_artifact,
    produce,
    read_rows,
    run_root,
)
from stages.artifacts.keys import sha256_bytes, sha256_text
from stages.artifacts.tables import Row
from stages.data.measures import Measure, RangeOf, write_measures
from stages.data.rows import DROPPED, SUITE_EXAMPLES
from stages.errors import ConfigError, InputError
from stages.model.source import ModelSource
from stages.suites.base import STAGE, SuiteWork

GENERATOR = "generator"
"""In the manifest's info: what a judge's files call the model."""
_NO_WORD = re.compile(r"[^a-z0-9]+")
_log = logging.getLogger("spin")


@dataclass(frozen=True)
class Answer:
    """What a model answered."""

    text: str | None
    """None where it could not be asked."""
    num_tokens: int
    finish_reason: str | None
    seed: int


@dataclass(frozen=True)
class Judgement:
    """What an outside judge found of one answer."""

    score: float | None
    """None where the judge could not tell."""
    judge: str
    text: str | None
    """What it said."""
    other: str | None = None
    """What the answer was compared with."""
    other_by: str | None = None
    """Whose answer that is."""


@dataclass(frozen=True)
class Exported:
    """Answers that were handed to a judge."""

    name: str
    """Of the suite."""
    generator: str
    """What the judge's files call the model."""
    rows: list[Row]
    """The answers, rows of SUITE_EXAMPLES."""


def read_file(path: Path, option: str) -> bytes:
    """Return a file that the user names.

    Args:
        option: what names it, for the message.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{option} {path} cannot be read ({error.strerror}); correct the path"
        ) from None


def named_file(path: str | None, option: str, what: str) -> Path:
    """Return a file that the recipe names.

    Raises:
        ConfigError: it names none.
    """
    if path is None:
        raise ConfigError(f"{option} is not set; set it to {what}")
    return Path(path)


def parse_lines(data: bytes, path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file with one a line; blank lines are left out.

    Raises:
        InputError: a line holds something else.
    """
    found = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        value = _parsed(line)
        if not isinstance(value, dict):
            raise InputError(f"{path} line {number} holds no JSON object; mend the file")
        found.append(value)
    return found


def parse_list(data: bytes, path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file that holds a list of them.

    Raises:
        InputError: it holds something else.
    """
    value = _parsed(data)
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise InputError(f"{path} holds no JSON list of objects; mend the file")
    return value


def _parsed(data: bytes) -> Any:
    """Return what JSON says; None where it is none, or is nested too deeply to be read."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def shown(value: object, most: int = 60) -> str:
    """Return a value of an outside file for a message: on one line, short, and valid Unicode."""
    try:
        text = value if isinstance(value, str) else json.dumps(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    text = " ".join(text[: 10 * most].split())  # what comes after is not shown
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= most else f"{text[:most]}…"


def field(row: Mapping[str, Any], name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Return a field of an outside file's row.

    Raises:
        InputError: it is not there, or no `kind`.
    """
    value = row.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        said = json.dumps(value) if isinstance(value, str) else value
        seen = f"is {shown(said)}" if name in row else "is not there"
        raise InputError(f"{where}: {name} {seen}; is it the file you meant?")
    check_text(value, f"{where}: {name}")
    return value


def check_text(value: object, where: str) -> None:
    """Check that a text, or the texts of a list, can be written to a table.

    Raises:
        InputError: one holds half of a surrogate pair.
    """
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise InputError(f"{where} is no valid Unicode; mend the file") from None


def lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return rows as JSON lines, ASCII: a lone surrogate in an answer stays what it is."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def word(text: str) -> str:
    """Return a category of an outside file as a part of a metric's name."""
    return _NO_WORD.sub("_", text.lower()).strip("_") or "other"


def generator_name(key: str, rows: Iterable[Row]) -> str:
    """Return what a judge's files call a model that gave these very answers.

    The key alone does not say which they are: an engine may draw others under the same settings.

    Args:
        key: that of the artifact.
        rows: the answers, rows of SUITE_EXAMPLES.
    """
    answers = [[row["prompt_id"], row["response"]] for row in rows]
    return f"spin-{sha256_text(json.dumps([key, answers]))[:12]}"


def file_ref(path: Path, data: bytes) -> InputRef:
    """Return an outside file as an input of an artifact."""
    digest = sha256_bytes(data)
    name = path.name.encode("utf-8", "replace").decode()
    return InputRef(path=name, inside_run=False, key=f"file:{digest}", content=digest)


def open_answers(work: SuiteWork, kind: str) -> Artifact:
    """Open the answers that were judged.

    Raises:
        ConfigError: none are given.
        InputError: they are another suite's.
    """
    inputs = work.inputs
    work.refuse_all_but("model", "revision", "data", "answers", "judged")
    if inputs.answers is None:
        raise ConfigError(
            f"--judged needs --answers, the artifact that the judged answers were taken from; make "
            f"it with: spin evaluate --suite {inputs.name} --model M --out DIR"
        )
    found = open_artifact(inputs.answers, stages=(STAGE,), verify=work.config.verify)
    if found.manifest.config.get("kind") != kind or "answers" in found.manifest.inputs:
        raise InputError(
            f"{found.path} holds no answers that were made for {kind} to judge; make them with: "
            f"spin evaluate --suite {inputs.name} --model M --out DIR"
        )
    return found


def asked_model(work: SuiteWork) -> ModelSource:
    """Find the model that is asked.

    Raises:
        ConfigError: none is named; or answers are given, but not what the judge found of them.
        InputError, CorruptError: see `resolve_model`.
    """
    inputs = work.inputs
    work.refuse_all_but("model", "revision", "data", "answers")
    if inputs.answers is not None:
        raise ConfigError(
            f"suites.{inputs.name} takes --answers together with --judged FILE, what the judge "
            "found; leave --answers out to ask the model"
        )
    return work.model()


def model_of(answers: Artifact, out: Path) -> InputRef:
    """Return the model that gave some answers, as an input of the artifact `out`."""
    return moved(answers.manifest.inputs["model"], answers.path, run_root(out))


def moved(ref: InputRef, holder: Path, root: Path | None) -> InputRef:
    """Return an input of the artifact `holder` as one of an artifact in the run `root`."""
    theirs = run_root(holder)
    same_run = root is not None and theirs is not None and theirs.resolve() == root.resolve()
    return ref if same_run else ref.model_copy(update={"inside_run": False})


def check_model(work: SuiteWork, answers: Artifact) -> None:
    """Check that answers are those of the model that was named, if one was.

    Raises:
        InputError: they are another's.
    """
    if work.inputs.model is None:
        return
    if work.model().ref.key != answers.manifest.inputs["model"].key:
        raise InputError(
            f"{answers.path} holds the answers of another model than {work.inputs.model}; leave "
            "--model out, or give that model's answers"
        )


def answer_row(prompt_id: str, task: str, prompt: str, answer: Answer) -> Row:
    """Return an answer as a row of SUITE_EXAMPLES."""
    return dict.fromkeys(SUITE_EXAMPLES.names) | {
        "prompt_id": prompt_id,
        "task": task,
        "sample": 0,
        "prompt": prompt,
        "response": answer.text,
        "response_tokens": answer.num_tokens if answer.text is not None else None,
        "finish_reason": answer.finish_reason,
        "seed": answer.seed,
    }


def write_answers(space: Workspace, name: str, rows: Sequence[Row]) -> dict[str, int]:
    """Write examples.parquet, and those that could not be asked to unscored.parquet; count them.

    Raises:
        InputError: none could be asked.
    """
    unasked = [row["prompt_id"] for row in rows if row["response"] is None]
    remedy = f"lower suites.{name}.max_new_tokens"
    if len(unasked) == len(rows):
        raise InputError(f"suite {name}: none of {len(rows)} questions fits the model; {remedy}")
    if unasked:
        _log.warning(
            "suite %s: %d of %d questions do not fit the model and are exported with empty "
            "answers; %s", name, len(unasked), len(rows), remedy,
        )  # fmt: skip
    detail = "it, or what was said before it, does not fit the model"
    why = [{"prompt_id": one, "reason": "not_asked", "detail": detail} for one in unasked]
    _write_tables(space, rows, why)
    return {"answers": len(rows), **({"unasked": len(unasked)} if unasked else {})}


def read_back(
    work: SuiteWork,
    kind: str,
    format_version: int,
    path: Path,
    fill: Callable[[Workspace, bytes, Exported], Outcome],
) -> Manifest:
    """Make an evaluation of answers of what a judge found.

    Args:
        path: the judge's file.
        fill: given the workspace, the file's bytes and the answers.

    Raises:
        InputError: there are no such answers, or the file cannot be read.
    """
    answers = open_answers(work, kind)
    data = read_file(path, "--judged")
    check_model(work, answers)
    name = work.inputs.name
    plan = Plan(
        stage=STAGE,
        format_version=format_version,
        # What was asked, and how, is that of the answers.
        config={**answers.manifest.config, "suite": name},
        inputs={
            "model": model_of(answers, work.out),
            "answers": answers.input_ref(work.root),
            "judged": file_ref(path, data),
        },
        fingerprints=answers.manifest.fingerprints,
    )
    generator = str(answers.manifest.info[GENERATOR])

    def fill_with_answers(space: Workspace) -> Outcome:
        rows = list(read_rows([answers.file("examples.parquet")], SUITE_EXAMPLES))
        return fill(space, data, Exported(name, generator, rows))

    return produce(work.out, plan, fill_with_answers)


def write_judged(
    space: Workspace,
    exported: Exported,
    found: Mapping[str, Judgement],
    measured: Callable[[Sequence[Row]], Iterable[Measure]],
    range_of: RangeOf,
) -> Outcome:
    """Write the answers with their scores, those without to unscored.parquet, and the measures.

    Args:
        found: by prompt id, of known prompts only.
        measured: of rows that all have a score.
        range_of: what is measured; see `write_measures`.

    Raises:
        InputError: no answer has a score.
    """
    name, rows = exported.name, exported.rows
    unscored = [
        {"prompt_id": row["prompt_id"], "reason": reason, "detail": detail}
        for row in rows
        for reason, detail in _why_unscored(found.get(row["prompt_id"]))
    ]
    if len(unscored) == len(rows):
        raise InputError(
            f"suite {name}: the judge's file holds no score of any answer; look at what it said"
        )
    if unscored:
        _log.warning(
            "suite %s: %d of %d answers have no score, such as %s (%s); they are left out",
            name, len(unscored), len(rows), unscored[0]["prompt_id"], unscored[0]["reason"],
        )  # fmt: skip
    judged = [
        row | {"score": one.score, "scored_by": one.judge, "other": one.other}
        for row in rows
        if (one := found.get(row["prompt_id"])) is not None
    ]
    _write_tables(space, judged, unscored)
    said = ({"prompt_id": key, **vars(one)} for key, one in sorted(found.items()))
    space.file("judgements.jsonl").write_bytes(lines(said))
    measures = measured([row for row in judged if row["score"] is not None])
    metrics = write_measures(space, measures, {}, range_of)
    reasons = [row["reason"] for row in unscored]
    one = next(iter(found.values()))
    return Outcome(
        counts={
            "answers": len(rows) - len(unscored),
            **{f"dropped_{reason}": reasons.count(reason) for reason in sorted(set(reasons))},
        },
        metrics=metrics,
        info={"judge": one.judge, **({"reference": one.other_by} if one.other_by else {})},
    )


def check_one_judge(found: Mapping[str, Judgement], path: Path) -> None:
    """Check that all judgements are one judge's, of comparisons with one model.

    Raises:
        InputError: they are not.
    """
    judges = sorted({one.judge for one in found.values()})
    references = sorted({one.other_by or "" for one in found.values()})
    for what, several in (("judges", judges), ("models compared with", references)):
        if len(several) > 1:
            raise InputError(
                f"{path} has several {what} ({', '.join(map(shown, several[:5]))}); leave one of "
                "them"
            )


def _why_unscored(judgement: Judgement | None) -> Iterator[tuple[str, str]]:
    """Yield reason and detail where there is no score."""
    if judgement is None:
        yield "not_judged", "the judge's file does not have it"
    elif judgement.score is None:
        yield "unparsable", "the judge's reply holds no score"


def _write_tables(space: Workspace, rows: Sequence[Row], unscored: Sequence[Row]) -> None:
    with TableWriter(space.file("examples.parquet"), SUITE_EXAMPLES) as table:
        table.extend(rows)
    if unscored:
        with TableWriter(space.file("unscored.parquet"), DROPPED) as table:
            table.extend(unscored)
