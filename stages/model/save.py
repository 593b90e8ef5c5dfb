"""Writing a model folder that transformers and vLLM open, or peft: weights, tokenizer, template."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import logging as library_logging

from stages.data.chat import TOKENIZER_FILES
from stages.model.adapters import Adapter, write_adapter
from stages.model.base import Base, write_base
from stages.model.load import empty_copy

WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def save_model(
    model: Any, state: dict[str, Tensor], folder: Path, tokenizer_from: Path, template: str
) -> None:
    """Save weights and configuration, with the tokenizer of another folder, byte for byte.

    Args:
        model: what the weights belong to; its own may be sharded, and are not looked at.
        state: all weights by name, on the CPU, in the type to save; tied ones once.
        template: the chat template that the model was trained with; it becomes the folder's own.
    """
    library_logging.disable_progress_bar()  # ours is the one bar
    plain = empty_copy(model)
    dtype = next(iter(state.values())).dtype
    plain.load_state_dict(state, strict=False, assign=True)
    plain.tie_weights()
    assert not any(p.is_meta for p in plain.parameters()), "every weight was gathered"
    plain.config.dtype = dtype
    plain.save_pretrained(folder)
    _save_chat(folder, tokenizer_from, template)


def save_adapter(
    model: Any,
    adapter: Adapter,
    base: Base,
    folder: Path,
    dtype: torch.dtype,
    tokenizer_from: Path,
    template: str,
) -> None:
    """Save an adapter alone, in fp32, with all else that a model folder has; see `save_model`.

    Args:
        dtype: what the whole model is saved in, should it be merged one day.
    """
    write_adapter(folder, model, adapter, base)
    write_base(folder, base)
    plain = empty_copy(model)
    plain.config.dtype = dtype
    plain.config.save_pretrained(folder)
    plain.generation_config.save_pretrained(folder)
    _save_chat(folder, tokenizer_from, template)


def _save_chat(folder: Path, tokenizer_from: Path, template: str) -> None:
    for name in TOKENIZER_FILES:
        if tokenizer_from != folder and (tokenizer_from / name).is_file():
            shutil.copyfile(tokenizer_from / name, folder / name)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def saved_dtype(wish: str, start_from: Path | None) -> torch.dtype:
    """Return the type to save in: the wish, or for `auto` that of the folder started from."""
    if wish != "auto":
        return WEIGHTS[wish]
    if start_from is None:
        return torch.float32
    config = AutoConfig.from_pretrained(start_from, trust_remote_code=False, local_files_only=True)
    return torch.bfloat16 if config.dtype in (torch.bfloat16, torch.float16) else torch.float32
