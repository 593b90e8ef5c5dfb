"""Who is compared with whom by `evaluate`: one tokenizer, and samples that were drawn alike."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stages import evaluate
from stages.artifacts import Manifest, open_artifact, read_rows
from stages.config import RunConfig
from stages.data.rows import EXAMPLES
from stages.errors import InputError
from stages.evaluate import EvaluateInputs
from tests.evaluations import make_data
from tests.fakes import FakeEngine

HUMANS = {1: "one", 2: "two", 3: "three"}


def ask(
    out: Path, model: Path, data: Path, *against: Path, by: Any = None, **settings: Any
) -> Manifest:
    """Evaluate a model, perhaps against an opponent and with that one's evaluation."""
    values = {"evaluate": {"max_new_tokens": 8, "precision": "fp32"}, **settings}
    opponent, evaluation = (*against, None, None)[:2]
    inputs = EvaluateInputs(
        str(model),
        data,
        opponent=None if opponent is None else str(opponent),
        opponent_evaluation=evaluation,
    )
    config = RunConfig.model_validate(values)
    return evaluate.run(config, inputs, out, open_engine=(by or FakeEngine()).open)


def samples(place: Path, name: str) -> list[list[int]]:
    rows = read_rows([open_artifact(place).file("examples.parquet")], EXAMPLES)
    return [row[f"{name}_token_ids"] for row in rows]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path / "data", HUMANS)


@pytest.fixture
def theirs(tmp_path: Path, tiny_model_dir: Path, data: Path) -> Path:
    """The opponent's evaluation; it is the player itself."""
    ask(tmp_path / "theirs", tiny_model_dir, data)
    return tmp_path / "theirs"


def test_an_opponent_with_another_tokenizer_is_refused(
    tmp_path: Path, tiny_model_dir: Path, data: Path
) -> None:
    """Its tokens would be read, and scored, as the player's."""
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    file = other / "tokenizer.json"
    found = json.loads(file.read_text())
    vocab = found["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.__getitem__)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(found))
    with pytest.raises(InputError, match="has another tokenizer or other stop tokens than") as told:
        ask(tmp_path / "out", tiny_model_dir, data, other)
    assert told.value.exit_code == 3
    assert "\n" not in str(told.value)
    own = tmp_path / "own"
    ask(own, other, data)
    with pytest.raises(InputError, match="has another tokenizer"):
        ask(tmp_path / "out", tiny_model_dir, data, other, own)


def test_an_opponent_with_other_weights_or_another_template_is_welcome(
    tmp_path: Path, tiny_model_dir: Path, data: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    ask(tmp_path / "out", tiny_model_dir, data, other)


def test_samples_that_were_drawn_alike_are_not_drawn_again(
    tmp_path: Path, tiny_model_dir: Path, data: Path, theirs: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    engine = FakeEngine()
    made = ask(tmp_path / "out", tiny_model_dir, data, tiny_model_dir, theirs, by=engine)
    assert engine.answered == len(HUMANS)
    assert "opponent_evaluation" in made.inputs
    assert samples(tmp_path / "out", "opponent_sample") == samples(theirs, "sampled")
    assert not caplog.records


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"seed": 7}, "seed"),
        ({"evaluate": {"max_new_tokens": 9, "precision": "fp32"}}, "evaluate"),
        ({"chat": {"system": "Be brief."}}, "chat and chat template"),
    ],
)
def test_an_opponent_whose_samples_were_drawn_otherwise_answers_anew(
    settings: dict[str, Any], named: str, tmp_path: Path, tiny_model_dir: Path, data: Path,
    theirs: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    engine, out = FakeEngine(), tmp_path / "out"
    made = ask(out, tiny_model_dir, data, tiny_model_dir, theirs, by=engine, **settings)
    assert engine.answered == 2 * len(HUMANS)
    assert "opponent_evaluation" not in made.inputs
    assert f"was made with other settings ({named}): the opponent answers anew" in caplog.text
    # One model, one seed: what both drew is the same.
    assert samples(out, "opponent_sample") == samples(out, "sampled")


def test_an_opponents_samples_by_another_engine_are_taken_and_told(
    tmp_path: Path, tiny_model_dir: Path, data: Path, theirs: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    engine = {"engine": {"dtype": "bfloat16"}, "max_new_tokens": 8, "precision": "fp32"}
    made = ask(tmp_path / "out", tiny_model_dir, data, tiny_model_dir, theirs, evaluate=engine)
    assert "opponent_evaluation" in made.inputs
    assert "was drawn by another engine (dtype)" in caplog.text


def test_prompts_that_an_opponents_evaluation_lacks_are_told_before_an_engine_starts(
    tmp_path: Path, tiny_model_dir: Path, data: Path, theirs: Path
) -> None:
    more = make_data(tmp_path / "more", HUMANS | {4: "four", 5: "five"})
    engine = FakeEngine()
    with pytest.raises(InputError, match="lacks 2 of 5 held-out prompts"):
        ask(tmp_path / "out", tiny_model_dir, more, tiny_model_dir, theirs, by=engine)
    assert engine.answered == 0
