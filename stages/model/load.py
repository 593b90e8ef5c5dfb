"""Loading models: safetensors only, and no code from them."""

import copy
from pathlib import Path
from typing import Any

import torch

from stages.errors import InputError
from stages.model.adapters import merge
from stages.model.source import model_chain


def load_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a causal language model for inference or training, on the CPU, in evaluation mode.

    An adapter is merged into its base in fp32, whatever the type that is asked for.

    Raises:
        InputError: the folder holds no loadable model.
        CorruptError: it holds an adapter, and the record of its base was tampered with.
    """
    whole, *adapters = model_chain(path)
    model = _load_whole(whole, torch.float32 if adapters else dtype)
    for folder in adapters:
        merge(model, folder)
    if adapters:
        for parameter in model.parameters():  # buffers stay: rotary frequencies are fp32 in any
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def _load_whole(path: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as library_logging

    library_logging.disable_progress_bar()  # ours is the one bar
    try:
        return AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation=_attention(_config(path)),
        )
    except (OSError, ValueError, KeyError) as error:
        raise _refusal(path, error) from error


def load_skeleton(path: Path) -> Any:
    """Return the model of a folder in fp32, its weights without memory and its buffers filled.

    Raises:
        InputError: the folder holds no loadable model.
    """
    from transformers import GenerationConfig

    try:
        model = _empty(_config(path))
        if (path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise _refusal(path, error) from error
    return model.eval()


def empty_copy(model: Any) -> Any:
    """Return a plain model of the same configuration, its weights without memory."""
    empty = _empty(model.config)
    empty.generation_config = model.generation_config
    return empty


def best_device() -> torch.device:
    """Return the current CUDA device where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _empty(config: Any) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config),
            dtype=torch.float32,
            trust_remote_code=False,
            attn_implementation=_attention(config),
        )
    model.tie_weights()
    return model


def _config(path: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)


def _attention(config: Any) -> str:
    """Return torch's own attention, or the plain one for a family that the former cannot serve."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "eager"  # torch's kernel leaves the soft cap out
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "sdpa" if getattr(model_class, "_supports_sdpa", True) else "eager"


def _refusal(path: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:300]
    return InputError(f"model {path} cannot be loaded: {reason}")
