"""A small Llama with random weights, for tests that look at log-probabilities."""

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM


def save_random_llama(
    folder: Path, seed: int, scale: float, generation: dict[str, Any], **shape: Any
) -> Path:
    """Write a model of this shape, of width 64 and two layers where nothing else is said.

    Args:
        scale: of all matrices: far enough from uniform that the prompt matters.
        generation: its generation config.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(sizes | shape)))
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.mul_(scale)
    model.generation_config = GenerationConfig(**generation)
    model.save_pretrained(folder)
    return folder
