"""Log-probabilities of given tokens, without ever holding the logits of a whole batch.

Shape legend: B = sequences, T = positions, N = tokens that are scored, D = hidden width,
V = vocabulary, C = tokens in one chunk (<= chunk_size).
"""

from typing import Any

import torch
from torch import Tensor

CPU_CHUNK_LOGITS = 1 << 21
"""Logits held at a time on a CPU, if the caller does not say: 8 MiB of fp32 stay in the cache,
while a chunk of at least 64 rows keeps the matrix product at its full speed."""
CUDA_CHUNK_LOGITS = 1 << 27
"""Likewise on a GPU: 0.25 GiB in bf16 and 0.5 GiB in fp32; 883 rows at a vocabulary of 152,000."""


def logprobs_from_logits(logits_BTV: Tensor, labels_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Summed log-probability of the masked-in labels: the slow, plain twin of `chunked_logprobs`.

    `labels_BT[b, t]` is the token that `logits_BTV[b, t]` predicts: the caller has shifted already.
    Labels where the mask is false may hold anything. Returns sums_B, accumulated in fp32 (fp64 for
    fp64 logits), differentiable in the logits.
    """
    return token_logprobs_from_logits(logits_BTV, labels_BT, mask_BT).sum(-1)


def token_logprobs_from_logits(logits_BTV: Tensor, labels_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Log-probability of each masked-in label, 0 elsewhere; see `logprobs_from_logits`."""
    mask_BT = mask_BT.bool()
    dtype = torch.promote_types(logits_BTV.dtype, torch.float32)
    logprobs_BTV = torch.log_softmax(logits_BTV, dim=-1, dtype=dtype)
    labels_BT = labels_BT.masked_fill(~mask_BT, 0)
    logprobs_BT = logprobs_BTV.gather(-1, labels_BT.unsqueeze(-1)).squeeze(-1)
    return logprobs_BT.masked_fill(~mask_BT, 0)


def chunked_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probability of each label under softmax(hidden @ weight^T + bias), in chunks of rows.

    Logits exist for `chunk_size` rows at a time and are computed again in the backward pass, so
    the cost is 4 matrix products (1 forward, 3 backward) instead of 3, and memory does not grow
    with N * V. Gradients reach hidden, weight (a tied embedding adds its own part as usual) and
    bias; whatever needs none is not computed. Softmax runs in fp32 whatever the inputs are (in
    fp64 for fp64). Under autocast the matrix products run in autocast's type, and a gradient of
    an fp32 weight is still accumulated in fp32.

    `chunk_size` None picks a size for the device. Returns logprobs_N in fp32 (fp64 for fp64).
    Leaves out on purpose: logit scaling and soft-capping.
    """
    if chunk_size is None:
        budget = CPU_CHUNK_LOGITS if hidden_ND.device.type == "cpu" else CUDA_CHUNK_LOGITS
        chunk_size = max(64, budget // weight_VD.shape[0])
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
    chunk_size = max(1, min(chunk_size, hidden_ND.shape[0]))  # buffers are of this size
    device_type = hidden_ND.device.type
    if torch.is_autocast_enabled(device_type):
        matmul_dtype = torch.get_autocast_dtype(device_type)
    else:
        matmul_dtype = torch.promote_types(hidden_ND.dtype, weight_VD.dtype)
    logprobs_N: Tensor = _ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, bias_V, labels_N, chunk_size, matmul_dtype
    )
    return logprobs_N


class _ChunkedLogprobs(torch.autograd.Function):
    """Nothing of size V is saved: the backward pass computes each chunk's softmax again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        chunk_size: int,
        matmul_dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, labels_N)
        ctx.chunk_size, ctx.matmul_dtype = chunk_size, matmul_dtype
        with torch.autocast(hidden_ND.device.type, enabled=False):
            chunks = _LogitChunks(weight_VD, bias_V, chunk_size, matmul_dtype)
            logprobs_N = torch.empty(
                hidden_ND.shape[0], dtype=chunks.softmax_dtype, device=hidden_ND.device
            )
            for start in range(0, hidden_ND.shape[0], chunk_size):
                rows = slice(start, start + chunk_size)
                logits_CV = chunks.logits(hidden_ND[rows].to(matmul_dtype))
                torch.log_softmax(logits_CV, -1, out=logits_CV)
                logprobs_N[rows] = logits_CV.gather(1, labels_N[rows, None]).squeeze(1)
        return logprobs_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_N,) = grads
        hidden_ND, weight_VD, bias_V, labels_N = ctx.saved_tensors
        chunk_size, matmul_dtype = ctx.chunk_size, ctx.matmul_dtype
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD) if needs_weight else None
        grad_bias_V = torch.zeros_like(bias_V) if needs_bias else None
        with torch.autocast(hidden_ND.device.type, enabled=False):
            chunks = _LogitChunks(weight_VD, bias_V, chunk_size, matmul_dtype)
            for start in range(0, hidden_ND.shape[0], chunk_size):
                rows = slice(start, start + chunk_size)
                hidden_CD = hidden_ND[rows].to(matmul_dtype)
                probs_CV = chunks.logits(hidden_CD)
                torch.softmax(probs_CV, -1, out=probs_CV)
                # d logprob / d logits = onehot - probs; its negative is built in place. Scaling by
                # the incoming gradient happens on the narrow side, D wide and not V.
                index_C1 = labels_N[rows, None]
                minus_one_C1 = torch.full_like(index_C1, -1, dtype=probs_CV.dtype)
                probs_CV.scatter_add_(1, index_C1, minus_one_C1)
                scale_C1 = -grad_N[rows, None]
                residual_CV = probs_CV.to(matmul_dtype)
                if grad_hidden_ND is not None:
                    grad_hidden_ND[rows] = (residual_CV @ chunks.weight_VD) * scale_C1
                if grad_weight_VD is not None:
                    scaled_CD = (hidden_CD * scale_C1).to(matmul_dtype)
                    if matmul_dtype == grad_weight_VD.dtype:
                        grad_weight_VD.addmm_(residual_CV.t(), scaled_CD)
                    else:
                        grad_weight_VD += residual_CV.t() @ scaled_CD
                if grad_bias_V is not None:
                    grad_bias_V += (scale_C1.t() @ probs_CV).squeeze(0)
                del residual_CV  # else it lives on while the next chunk's is made
        return grad_hidden_ND, grad_weight_VD, grad_bias_V, None, None, None


class _LogitChunks:
    """Logits of one chunk after another, in buffers that are allocated once."""

    def __init__(
        self, weight_VD: Tensor, bias_V: Tensor | None, chunk_size: int, dtype: torch.dtype
    ) -> None:
        self.weight_VD = weight_VD.to(dtype)
        self.bias_V = None if bias_V is None else bias_V.to(dtype)
        self.softmax_dtype = torch.promote_types(dtype, torch.float32)
        shape = (chunk_size, weight_VD.shape[0])
        self._product_CV = torch.empty(shape, dtype=dtype, device=weight_VD.device)
        self._softmax_CV = self._product_CV
        if dtype != self.softmax_dtype:
            self._softmax_CV = torch.empty(shape, dtype=self.softmax_dtype, device=weight_VD.device)

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Returns logits in the softmax's type; the next call overwrites them."""
        rows = hidden_CD.shape[0]
        product_CV, softmax_CV = self._product_CV[:rows], self._softmax_CV[:rows]
        if self.bias_V is None:
            torch.mm(hidden_CD, self.weight_VD.t(), out=product_CV)
        else:
            torch.addmm(self.bias_V, hidden_CD, self.weight_VD.t(), out=product_CV)
        if softmax_CV is not product_CV:
            softmax_CV.copy_(product_CV)
        return softmax_CV
