"""Loading models: safetensors only, and no code from them."""

from pathlib import Path
from typing import Any

import torch

from stages.errors import InputError


def load_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a causal language model for inference or training, on the CPU, in evaluation mode.

    Raises:
        InputError: the folder holds no loadable model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as library_logging

    library_logging.disable_progress_bar()  # ours is the one bar
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="sdpa",
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"model {path} cannot be loaded: {reason}") from error
    return model.eval()


def best_device() -> torch.device:
    """Return the current CUDA device where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
