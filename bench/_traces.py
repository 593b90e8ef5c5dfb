"""What bench/train.py measures on: length traces, model shapes, and the work in them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.artifacts import Outcome, Plan, TableWriter, Workspace, produce
from stages.config import PairConfig
from stages.data.rows import PAIRS
from stages.data.tokens import TOKEN_COLUMNS, PairTokens

MAX_TOKENS = 1024
"""Longest prompt and response together."""
SIGMA = 0.6
"""Of the logarithm of every length."""
FIRST_TOKEN = 3
"""Lower ids are the tokenizer's special tokens."""
SHORTEST_PROMPT = 64
"""What a response at most leaves of MAX_TOKENS to its prompt."""

MEDIANS = {"chat": (150, 300, 300), "math": (60, 110, 110), "rag": (700, 120, 120)}
"""Median tokens of prompt, chosen and rejected response."""


@dataclass(frozen=True)
class Shape:
    """A Qwen2 with tied embeddings."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int

    @property
    def layer_weights(self) -> int:
        """Weights in the matrices of one layer."""
        head_size = self.hidden_size // self.num_heads
        queries_and_output = 2 * self.hidden_size * self.num_heads * head_size
        keys_and_values = 2 * self.hidden_size * self.num_kv_heads * head_size
        return queries_and_output + keys_and_values + 3 * self.hidden_size * self.intermediate_size

    @property
    def num_weights(self) -> int:
        """Weights in all matrices, the embeddings' too; biases and norms are left out."""
        return self.num_layers * self.layer_weights + self.vocab_size * self.hidden_size


SHAPES = {
    "tiny": Shape(6, 256, 4, 2, 1024, 8192),
    "0.5b": Shape(24, 896, 14, 2, 4864, 151_936),
    "1.5b": Shape(28, 1536, 12, 2, 8960, 151_936),
    "3b": Shape(36, 2048, 16, 2, 11_008, 151_936),
}
"""The last three are those of Qwen2.5."""


def draw_pairs(trace: str, num_pairs: int, vocab_size: int, seed: int = 0) -> list[PairTokens]:
    """Return pairs of random tokens with a trace's lengths; the arguments alone decide them.

    Lengths are lognormal. Where prompt and longer response exceed MAX_TOKENS together, it is the
    prompt that is cut, as a retrieval pipeline does: responses keep their lengths and medians.
    """
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(num_pairs):
        prompt, chosen, rejected = (
            max(1, round(median * math.exp(SIGMA * rng.standard_normal())))
            for median in MEDIANS[trace]
        )
        chosen, rejected = (min(n, MAX_TOKENS - SHORTEST_PROMPT) for n in (chosen, rejected))
        prompt = min(prompt, MAX_TOKENS - max(chosen, rejected))
        pairs.append(
            PairTokens(
                *(
                    rng.integers(FIRST_TOKEN, vocab_size, n).tolist()
                    for n in (prompt, chosen, rejected)
                )
            )
        )
    return pairs


def unique_tokens(pairs: Sequence[PairTokens]) -> int:
    """Return the tokens in pairs, each prompt counted once."""
    return sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)


def forward_flops(shape: Shape, pairs: Sequence[PairTokens]) -> int:
    """Return the floating-point operations that one forward pass over pairs cannot do without.

    Two for every weight and token it meets, a prompt's tokens once, the head on response tokens
    alone; and for attention, four times the width of all heads for every token that a token sees.
    Nothing for padding, norms, activations, softmax. A training step takes three times as many.
    """
    tokens = unique_tokens(pairs)
    responses = sum(len(p.chosen) + len(p.rejected) for p in pairs)
    seen = 0
    for pair in pairs:
        prompt, chosen, rejected = len(pair.prompt), len(pair.chosen), len(pair.rejected)
        seen += _triangle(prompt + chosen) + _triangle(rejected) + rejected * prompt
    linear = 2 * shape.num_layers * shape.layer_weights * tokens
    head = 2 * shape.vocab_size * shape.hidden_size * responses
    return linear + head + 4 * shape.num_layers * shape.hidden_size * seen


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


GPU_PEAKS = (
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("RTX 4090", 165e12),
)
"""Dense bf16 operations a second, as the makers state them; the first name that fits counts."""


def gpu_peak(name: str) -> float | None:
    """Return a GPU's stated peak in bf16 operations a second; None where it is not known."""
    return next((peak for part, peak in GPU_PEAKS if part.lower() in name.lower()), None)


NO_TEXT = {
    "pair_index": 0,
    "chosen": "",
    "rejected": "",
    "chosen_source": "human",
    "rejected_source": "sample 0",
    "chosen_reward": None,
    "rejected_reward": None,
    "win_probability": None,
    "iteration": 0,
    "weight": 1.0,
}
"""What a row of PAIRS holds beside its id and its tokens."""


def write_pairs(pairs: Sequence[PairTokens], out: Path) -> None:
    """Write pairs as an artifact of the pair stage."""

    def fill(space: Workspace) -> Outcome:
        with TableWriter(space.file("part-00000.parquet"), PAIRS) as table:
            for number, pair in enumerate(pairs):
                tokens = dict(zip(TOKEN_COLUMNS, pair, strict=True))
                table.append({"prompt_id": f"{number:032x}", **NO_TEXT, **tokens})
        return Outcome(counts={"pairs": len(pairs)})

    settings = {"pair": PairConfig(max_length=MAX_TOKENS).identity(), "pairs": len(pairs)}
    plan = Plan(stage="pair", format_version=1, config=settings, inputs={})
    produce(out, plan, fill)


def model_config(shape: Shape, **special_tokens: int | None) -> Any:
    """Return transformers' configuration of a shape."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=2 * MAX_TOKENS,
        tie_word_embeddings=True,
        **special_tokens,
    )


def write_model(shape: Shape, folder: Path, device: str, seed: int = 0) -> None:
    """Write a model with random weights, in fp32 (bf16 where it is made on a GPU), and a tokenizer.

    The tokenizer only serves to name the special tokens: no text is ever tokenized.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from stages.model.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["0 1 2"], vocab_size=300)
    special_tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(seed)
    with torch.device(device):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        config = model_config(shape, **special_tokens)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config = GenerationConfig(**special_tokens)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
