"""Our training loop against TRL's DPOTrainer: same weights, pairs, optimizer; same numbers."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from stages.config import TrainConfig
from stages.data.chat import TOKENIZER_FILES
from stages.model.fit import Step, fit
from stages.model.group import open_group
from stages.model.load import load_model
from stages.model.objectives import PairObjective
from stages.model.pairs import PairForward
from stages.objective.losses import PairLossOptions
from tests.families import tiny_model
from tests.scored_pairs import NO_TEXT, scored_store

trl = pytest.importorskip("trl", reason="needs the dev extra (trl)")

BETA = 0.1
STEPS = 3
PAIRS = [
    ("What is two and two?\n", "It is four.", "Five, I think."),
    ("Name a colour.\n", "Red.", "A colour is a thing that one sees, such as green or blue."),
    ("Say hello.\n", "Hello there, how are you today?", "No."),
    ("Count.\n", "1 2 3 4 5 6 7 8", "1 2 4 8"),
]


@pytest.mark.parametrize(
    ("family", "mode"),
    [("llama", mode) for mode in ("shared", "packed", "padded", "single")]
    + [(family, "auto") for family in ("qwen2", "qwen3", "mistral", "gemma", "gpt2", "gemma2")],
)
def test_losses_rewards_and_gradient_norms_equal_trl(
    tiny_model_dir: Path, tmp_path: Path, family: str, mode: Any
) -> None:
    folder = tiny_model_dir if family == "llama" else _of_family(family, tiny_model_dir, tmp_path)
    theirs, rows = _trl_steps(folder, tmp_path / "trl")
    ours = _our_steps(folder, tmp_path, rows, mode)
    assert len(theirs) == len(ours) == STEPS
    for their, our in zip(theirs, ours, strict=True):
        assert our.loss == pytest.approx(their["loss"], rel=1e-4)
        assert our.grad_norm == pytest.approx(their["grad_norm"], rel=1e-3)
        assert our.metrics["margin"] == pytest.approx(their["rewards/margins"], abs=1e-4)
        assert our.metrics["accuracy"] == pytest.approx(their["rewards/accuracies"])
    assert ours[0].loss == pytest.approx(0.693147, abs=1e-5)
    assert ours[-1].loss < ours[0].loss


def _of_family(family: str, tokenizer_dir: Path, tmp_path: Path) -> Path:
    """A tiny model of another family with the same tokenizer."""
    folder = tmp_path / family
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    tiny_model(family, vocab_size=300, **special).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tokenizer_dir / name).is_file():
            shutil.copyfile(tokenizer_dir / name, folder / name)
    return folder


def _trl_steps(model_dir: Path, out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    from datasets import Dataset
    from transformers import AutoTokenizer

    columns = dict(zip(("prompt", "chosen", "rejected"), zip(*PAIRS, strict=True), strict=True))
    trainer = trl.DPOTrainer(
        model=load_model(model_dir),
        ref_model=load_model(model_dir),
        args=trl.DPOConfig(
            output_dir=str(out),
            beta=BETA,
            per_device_train_batch_size=len(PAIRS),
            num_train_epochs=STEPS,
            learning_rate=1e-3,
            lr_scheduler_type="linear",
            warmup_steps=0,
            weight_decay=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_dropout=True,
            max_length=None,
        ),
        train_dataset=Dataset.from_dict(columns),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
    )
    tokenized = [
        {
            "prompt_token_ids": row["prompt_ids"],
            "chosen_token_ids": row["chosen_ids"],
            "rejected_token_ids": row["rejected_ids"],
        }
        for row in trainer.train_dataset
    ]
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry], tokenized


def _our_steps(model_dir: Path, tmp_path: Path, rows: list[Any], mode: Any) -> list[Step]:
    config = TrainConfig(
        learning_rate=1e-3,
        warmup_steps=0,
        batch_size=len(rows),
        micro_batch_size=3,
        token_budget=128,
        epochs=STEPS,
        precision="fp32",
        beta=BETA,
    )
    forward = PairForward(load_model(model_dir), mode, 0)
    full = [{"prompt_id": f"{i:032x}", **NO_TEXT, **row} for i, row in enumerate(rows)]
    store = scored_store(full, forward, tmp_path)
    objective = PairObjective(
        store=store,
        forward=forward,
        options=PairLossOptions("sigmoid", BETA, 0.0, False, False, 0.0),
        config=config,
    )
    steps: list[Step] = []
    fit(forward, objective, config, 0, open_group(config), steps.append)
    return steps
