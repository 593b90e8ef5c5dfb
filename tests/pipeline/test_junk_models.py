"""Models that collapsed: what they answer is bounded, counted by reason, and decided by policy."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stages import generate, pair, score, train
from stages.artifacts import Manifest, Outcome, Plan, TableWriter, Workspace, produce, read_rows
from stages.config import RunConfig
from stages.data.rows import DROPPED, GENERATIONS, PROMPTS
from stages.errors import InputError
from stages.generate import GenerateInputs
from stages.model.tokenizer import train_tokenizer
from stages.pair import PairInputs
from stages.score import ScoreInputs
from stages.train import TrainInputs
from tests.conftest import CHAT_TEMPLATE, SENTENCES

NUM_PROMPTS = 12
MOST_TOKENS = 10
HUMAN = "xyz"


@dataclass(frozen=True)
class Junk:
    """A model that follows a table from the last token to the next one."""

    always: str | None
    """What follows any token that is not in the table; None: any of the others, drawn."""
    never_stops: bool = False
    table: Mapping[str, str] = field(default_factory=dict)
    """From token to token; "" stands for any token of the prompt's end."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Of generate: empty, finish_stop, finish_length; the others are none."""
    dropped: str = ""
    """Why pair makes no pair of any answer."""


ALL = NUM_PROMPTS
JUNK = {
    "only stops": Junk("</s>", counts={"empty": ALL, "finish_stop": ALL}, dropped="empty"),
    "never stops": Junk(
        None, never_stops=True, counts={"finish_length": ALL}, dropped="cut_off"
    ),
    "only white space": Junk(
        "Ġ", counts={"empty": ALL, "finish_length": ALL}, dropped="empty"
    ),
    "white space and a stop": Junk(
        "Ċ", table={"Ċ": "</s>"}, counts={"empty": ALL, "finish_stop": ALL}, dropped="empty"
    ),
    "one token": Junk("Q", counts={"finish_length": ALL}, dropped="cut_off"),
    "the human response": Junk(
        "x", table={"x": "y", "y": "z", "z": "</s>"}, counts={"finish_stop": ALL},
        dropped="identical",
    ),
}  # fmt: skip


def make_model(folder: Path, junk: Junk) -> Path:
    """A Llama whose layers do nothing: its embeddings are one-hot, its head is the table."""
    tokenizer: PreTrainedTokenizerFast = train_tokenizer(SENTENCES, 300)
    tokenizer.chat_template = CHAT_TEMPLATE
    size = len(tokenizer) + len(tokenizer) % 2
    ids = tokenizer.get_vocab()
    config = LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        head = model.lm_head.weight  # the norm makes a one-hot row sqrt(size)
        if junk.always is not None:
            head[ids[junk.always]] = 2.0
        for before, after in junk.table.items():
            head[:, ids[before]] = 0.0
            head[ids[after], ids[before]] = 2.0
        if junk.never_stops:
            head[ids["</s>"]] = -10.0
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_data(place: Path) -> Path:
    def fill(space: Workspace) -> Outcome:
        with TableWriter(space.file("train-00000.parquet"), PROMPTS) as table:
            for number in range(NUM_PROMPTS):
                table.append(
                    {
                        "prompt_id": f"{number:032x}",
                        "messages": [{"role": "user", "content": f"Ann has {number} cups."}],
                        "response": HUMAN,
                        "source": "test",
                        "source_row": number,
                    }
                )
        return Outcome(counts={"train": NUM_PROMPTS})

    produce(place, Plan("prepare", 1, {"for": "junk"}, {}), fill)
    return place


@dataclass(frozen=True)
class Played:
    """What was made of a junk model's answers."""

    place: Path
    generated: Manifest
    paired: Manifest


def play(place: Path, junk: Junk, **pair_settings: Any) -> Played:
    model, data = make_model(place / "model", junk), make_data(place / "data")
    config = RunConfig.model_validate(
        {"generate": {"max_new_tokens": MOST_TOKENS}, "pair": pair_settings}
    )
    generated = generate.run(config, GenerateInputs(str(model), data), place / "generate")
    inputs = PairInputs(data, (place / "generate",), str(model))
    return Played(place, generated, pair.run(config, inputs, place / "pair"))


@pytest.mark.parametrize("name", JUNK)
def test_junk_is_bounded_and_counted_by_reason(tmp_path: Path, name: str) -> None:
    junk = JUNK[name]
    played = play(tmp_path, junk)
    expected = {"prompts": ALL, "rows": ALL, "empty": 0, "finish_stop": 0, "finish_length": 0}
    counts = played.generated.counts
    assert {n: counts[n] for n in expected} == expected | dict(junk.counts)
    assert played.paired.counts == {
        "candidates": ALL, "pairs": 0, f"dropped_{junk.dropped}": ALL,
    }  # fmt: skip
    rows = list(read_rows(sorted((tmp_path / "generate").glob("part-*.parquet")), GENERATIONS))
    assert max(len(row["response_token_ids"]) for row in rows) <= MOST_TOKENS
    dropped = list(read_rows([tmp_path / "pair" / "dropped.parquet"], DROPPED))
    assert [row["reason"] for row in dropped] == [junk.dropped] * ALL
    assert all(row["detail"] for row in dropped)


@pytest.mark.parametrize("name", ["only stops", "the human response"])
def test_nothing_to_train_on_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    play(tmp_path, JUNK[name])
    model = str(tmp_path / "model")
    scored = score.run(RunConfig(), ScoreInputs(tmp_path / "pair", model), tmp_path / "score")
    assert scored.counts["pairs"] == 0
    with pytest.raises(InputError, match="has no pair to train on .* answers as the") as caught:
        train.run(RunConfig(), TrainInputs(tmp_path / "score", model), tmp_path / "train")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "train").exists()


@pytest.mark.parametrize("name", ["never stops", "one token"])
def test_policy_decides_on_answers_that_were_cut_off(tmp_path: Path, name: str) -> None:
    played = play(tmp_path, JUNK[name], drop_cut_off=False)
    assert played.paired.counts == {"candidates": ALL, "pairs": ALL}
