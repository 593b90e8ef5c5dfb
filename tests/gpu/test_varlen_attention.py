"""The CUDA routes of shared-prompt attention against the dense twin on the same device."""

import pytest
import torch
from torch import Tensor

from stages.data.tokens import PairTokens
from stages.model import attention
from stages.model.attention import build_layout, dense_attention, shared_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

LENGTHS = [(37, 90, 41), (1, 1, 1), (180, 20, 250), (300, 129, 64)]
PAIRS = [PairTokens([5] * p, [6] * c, [7] * r) for p, c, r in LENGTHS]


def heads(tokens: int, key_heads: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(1, n, tokens, 64, device="cuda", dtype=dtype, requires_grad=True)
        for n in (8, key_heads, key_heads)
    ]


@pytest.mark.parametrize("library", ["installed", "torch"])
@pytest.mark.parametrize("key_heads", [2, 8])
@pytest.mark.parametrize("share", [False, True])
def test_varlen_attention_equals_dense_attention(
    share: bool, key_heads: int, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above all: causal must be aligned to the bottom right where a prefix makes keys longer."""
    if library == "torch":
        monkeypatch.setattr(attention, "_flash_attn_varlen", lambda: None)
    layout = build_layout(PAIRS, share).to("cuda")
    leaves = heads(layout.num_tokens, key_heads, torch.bfloat16)
    ours, _ = shared_attention(torch.nn.Module(), *leaves, None, spin_segments=layout.segments)
    twins = [leaf.detach().float().requires_grad_() for leaf in leaves]
    twin = dense_attention(*twins, layout.segments, 64**-0.5)
    torch.testing.assert_close(ours.float(), twin, rtol=2e-2, atol=2e-2)
    grad = torch.randn_like(twin)
    for leaf, twin_leaf in zip(
        torch.autograd.grad(ours, leaves, grad.bfloat16()),
        torch.autograd.grad(twin, twins, grad),
        strict=True,
    ):
        assert (leaf - twin_leaf).norm() <= 2e-2 * twin_leaf.norm()


def test_fp32_takes_the_dense_route() -> None:
    layout = build_layout(PAIRS, share=True).to("cuda")
    leaves = heads(layout.num_tokens, 2, torch.float32)
    ours, _ = shared_attention(torch.nn.Module(), *leaves, None, spin_segments=layout.segments)
    assert torch.equal(ours, dense_attention(*leaves, layout.segments, 64**-0.5))
