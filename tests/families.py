"""Tiny models of many families, with weights large enough that every path matters."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY, PAD = 97, 0


def tiny_config(family: str, **changes: Any) -> Any:
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
        dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        sizes["vocab_size"] = VOCABULARY
        return AutoConfig.for_model(family, **sizes | dropout | changes)
    if family in ("bloom", "mpt"):
        sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "d_model": 32, "n_layers": 2}
        return AutoConfig.for_model(family, vocab_size=VOCABULARY, n_heads=4, **sizes, **changes)
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if family == "gpt_neox" else 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_dropout": 0.0,
    }
    if family in ("mistral", "phi3"):
        options["sliding_window"] = None
    return AutoConfig.for_model(family, **options | changes)


def tiny_model(
    family: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **changes: Any
) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(
        tiny_config(family, **changes), attn_implementation=attention
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise + (1 if parameter.ndim == 1 else 0))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.to(dtype).train()
