"""A stage works with the text of the stage before it, or says what differs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stages import generate, pair
from stages.artifacts import read_manifest
from stages.config import RunConfig
from stages.data.chat import chat_fingerprints
from stages.errors import ConfigError, InputError
from stages.generate import GenerateInputs
from stages.pair import PairInputs
from tests.fakes import FakeEngine
from tests.pipeline.test_generate import make_data, questions


def config(**chat: Any) -> RunConfig:
    settings = {"max_new_tokens": 12, "parity": {"rows": 0}}
    return RunConfig.model_validate({"generate": settings, "chat": chat})


def generated(model: Path, folder: Path, **chat: Any) -> Path:
    data = make_data(folder / "data", questions(8))
    inputs = GenerateInputs(str(model), data)
    generate.run(config(**chat), inputs, folder / "generate", open_engine=FakeEngine().open)
    return folder / "generate"


def test_generate_and_pair_record_the_hashes_of_template_and_tokenizer(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    made = generated(tiny_model_dir, tmp_path)
    inputs = PairInputs(tmp_path / "data", (made,), str(tiny_model_dir))
    paired = pair.run(config(), inputs, tmp_path / "pair")
    expected = chat_fingerprints(tiny_model_dir, config().chat)
    assert expected.keys() == {"template", "tokenizer"}
    assert read_manifest(made).fingerprints == paired.fingerprints == expected


def test_another_template_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    made = generated(tiny_model_dir, tmp_path)
    inputs = PairInputs(tmp_path / "data", (made,), str(tiny_model_dir))
    with pytest.raises(InputError, match="with another chat template or settings than") as caught:
        pair.run(config(system="Be brief."), inputs, tmp_path / "pair")
    assert "tokenizer" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"template"):
        generated(tiny_model_dir, tmp_path, prompt_suffix=" Think.")


def test_another_tokenizer_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    made = generated(tiny_model_dir, tmp_path)
    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    eos = {"eos_token_id": [1, 2]}
    (other / "generation_config.json").write_text(json.dumps(eos))
    inputs = PairInputs(tmp_path / "data", (made,), str(other))
    with pytest.raises(InputError, match="with another tokenizer or stop tokens than") as caught:
        pair.run(config(), inputs, tmp_path / "pair")
    assert "template" not in str(caught.value)


def test_the_models_own_template_given_by_the_recipe_is_the_same_text(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    made = generated(tiny_model_dir, tmp_path)
    own = str(tiny_model_dir / "chat_template.jinja")
    inputs = PairInputs(tmp_path / "data", (made,), str(tiny_model_dir))
    assert pair.run(config(template=own), inputs, tmp_path / "pair").counts["candidates"] == 8
