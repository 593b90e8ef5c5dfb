"""Writing a model folder that transformers and vLLM open: safetensors, tokenizer, template."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as library_logging

from stages.data.chat import TOKENIZER_FILES

WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def save_model(model: Any, folder: Path, tokenizer_from: Path, template: str, dtype: str) -> None:
    """Save weights and configuration, with the tokenizer of another folder, byte for byte.

    Args:
        template: the chat template that the model was trained with; it becomes the folder's own.
        dtype: `float32` or `bfloat16`, of the saved weights.
    """
    library_logging.disable_progress_bar()  # ours is the one bar
    model.to(WEIGHTS[dtype])
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if tokenizer_from != folder and (tokenizer_from / name).is_file():
            shutil.copyfile(tokenizer_from / name, folder / name)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def source_dtype(model: Any, wish: str) -> str:
    """Return the dtype to save in: the wish, or for `auto` that of the model's configuration."""
    if wish != "auto":
        return wish
    return "bfloat16" if model.config.dtype in (torch.bfloat16, torch.float16) else "float32"
