"""The chunked head against its plain twin: values and gradients."""

import pytest
import torch
from torch import Tensor

from stages.objective.logprobs import chunked_logprobs, logprobs_from_logits

N, D, V = 37, 16, 101


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden_ND = torch.randn(N, D, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VD = torch.randn(V, D, dtype=torch.float64).to(dtype).requires_grad_()
    bias_V = torch.randn(V, dtype=torch.float64).to(dtype).requires_grad_()
    labels_N = torch.randint(V, (N,))
    grad_N = torch.randn(N, dtype=torch.float64)
    return hidden_ND, weight_VD, bias_V, labels_N, grad_N


def test_twin_sums_only_masked_tokens_and_ignores_other_labels() -> None:
    logits_BTV = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]]]))
    labels_BT = torch.tensor([[0, 2, -100]])
    mask_BT = torch.tensor([[1, 1, 0]])
    sums_B = logprobs_from_logits(logits_BTV, labels_BT, mask_BT)
    torch.testing.assert_close(sums_B, torch.log(torch.tensor([0.5 * 0.8])))


def test_twin_adds_long_responses_in_fp32() -> None:
    logits_BTV = torch.zeros(1, 4096, 8, dtype=torch.bfloat16)
    labels_BT = torch.zeros(1, 4096, dtype=torch.long)
    sums_B = logprobs_from_logits(logits_BTV, labels_BT, torch.ones(1, 4096))
    torch.testing.assert_close(sums_B, torch.tensor([-4096 * 2.0794415]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("chunk_size", [1, 8, 37, 64, None])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)],
)
def test_chunked_equals_twin(
    chunk_size: int | None, with_bias: bool, dtype: torch.dtype, tolerance: float
) -> None:
    hidden_ND, weight_VD, bias_V, labels_N, grad_N = inputs(dtype)
    bias = bias_V if with_bias else None
    ours_N = chunked_logprobs(hidden_ND, weight_VD, labels_N, bias_V=bias, chunk_size=chunk_size)
    assert ours_N.dtype == torch.promote_types(dtype, torch.float32)
    (ours_N * grad_N).sum().backward()

    # The twin starts from the same, rounded, numbers, in fp64.
    twins = [x.detach().double().requires_grad_() for x in (hidden_ND, weight_VD, bias_V)]
    logits_NV = twins[0] @ twins[1].t() + (twins[2] if with_bias else 0)
    twin_N = logprobs_from_logits(logits_NV[:, None], labels_N[:, None], torch.ones(N, 1))
    (twin_N * grad_N).sum().backward()

    torch.testing.assert_close(ours_N.double(), twin_N, rtol=tolerance, atol=tolerance)
    for leaf, twin in zip((hidden_ND, weight_VD, bias_V), twins, strict=True):
        if leaf is bias_V and not with_bias:
            continue
        assert leaf.grad is not None and twin.grad is not None
        assert leaf.grad.dtype == dtype
        scale = twin.grad.abs().max().item()
        torch.testing.assert_close(
            leaf.grad.double(), twin.grad, rtol=tolerance, atol=tolerance * scale
        )


def test_gradcheck() -> None:
    hidden_ND, weight_VD, bias_V, labels_N, _ = inputs(torch.float64)
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: chunked_logprobs(
            hidden, weight, labels_N[:5], bias_V=bias, chunk_size=2
        ),
        (hidden_ND[:5].detach().requires_grad_(), weight_VD, bias_V),
    )


def test_tied_embedding_gets_both_gradients() -> None:
    _, weight_VD, _, labels_N, grad_N = inputs(torch.float64)
    input_ids_N = labels_N.flip(0)
    ours = chunked_logprobs(weight_VD[input_ids_N].tanh(), weight_VD, labels_N, chunk_size=8)
    (ours_VD,) = torch.autograd.grad((ours * grad_N).sum(), weight_VD)
    logits_NV = weight_VD[input_ids_N].tanh() @ weight_VD.t()
    twin_N = logprobs_from_logits(logits_NV[:, None], labels_N[:, None], torch.ones(N, 1))
    (twin_VD,) = torch.autograd.grad((twin_N * grad_N).sum(), weight_VD)
    torch.testing.assert_close(ours_VD, twin_VD)


def test_frozen_weight_gets_no_gradient() -> None:
    hidden_ND, weight_VD, _, labels_N, _ = inputs(torch.float32)
    chunked_logprobs(hidden_ND, weight_VD.detach(), labels_N, chunk_size=8).sum().backward()
    assert hidden_ND.grad is not None and weight_VD.grad is None


def test_autocast_multiplies_in_bf16_and_keeps_an_fp32_gradient() -> None:
    hidden_ND, weight_VD, _, labels_N, grad_N = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours_N = chunked_logprobs(hidden_ND, weight_VD, labels_N, chunk_size=8)
    rounded_N = chunked_logprobs(hidden_ND.bfloat16(), weight_VD.bfloat16(), labels_N)
    torch.testing.assert_close(ours_N, rounded_N)
    (ours_N * grad_N).sum().backward()
    assert weight_VD.grad is not None and weight_VD.grad.dtype == torch.float32


def test_extreme_logits_stay_finite() -> None:
    hidden_ND = torch.full((2, D), 1e4, requires_grad=True)
    weight_VD = torch.linspace(-1, 1, V)[:, None].expand(V, D).contiguous()
    logprobs_N = chunked_logprobs(hidden_ND, weight_VD, torch.tensor([V - 1, 0]))
    logprobs_N.sum().backward()
    assert logprobs_N.isfinite().all() and logprobs_N[0] == 0
    assert hidden_ND.grad is not None and hidden_ND.grad.isfinite().all()


def test_no_tokens_give_an_empty_result() -> None:
    hidden_ND, weight_VD, _, labels_N, _ = inputs(torch.float32)
    assert chunked_logprobs(hidden_ND[:0], weight_VD, labels_N[:0]).shape == (0,)


def test_whole_logits_are_never_held() -> None:
    tokens, vocabulary, chunk_size = 256, 1 << 14, 4
    hidden_ND = torch.randn(tokens, 1, requires_grad=True)
    weight_VD = torch.zeros(vocabulary, 1, requires_grad=True)
    labels_N = torch.zeros(tokens, dtype=torch.long)
    with torch.profiler.profile(profile_memory=True) as profile:
        chunked_logprobs(hidden_ND, weight_VD, labels_N, chunk_size=chunk_size).sum().backward()
    largest_bytes = max(event.cpu_memory_usage for event in profile.events())
    assert largest_bytes <= chunk_size * vocabulary * 4


def test_chunk_size_zero_is_refused() -> None:
    hidden_ND, weight_VD, _, labels_N, _ = inputs(torch.float32)
    with pytest.raises(ValueError, match="chunk_size is 0"):
        chunked_logprobs(hidden_ND, weight_VD, labels_N, chunk_size=0)
