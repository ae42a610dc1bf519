"""Root-mean-square norm (arXiv 1910.07467) that keeps little for backward on every device."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FUSED_ON_CUDA = hasattr(torch.ops.aten, "_fused_rms_norm")  # torch >= 2.9


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float) -> Tensor:
    """Norm over the last dimension, computed in fp32, returned in the dtype of ``x``."""
    if torch.compiler.is_compiling() or (x.is_cuda and _FUSED_ON_CUDA):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class RMSNorm(nn.Module):
    """:func:`rms_norm` with a weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)


class _RMSNorm(torch.autograd.Function):
    """Where PyTorch has no fused kernel its composite keeps two fp32 copies of ``x``; this keeps ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = torch.rsqrt(norm * norm / x.shape[-1] + eps)  # [..., 1]
        ctx.save_for_backward(x, weight, inverse)
        normed = wide * inverse
        return (normed if weight is None else normed.mul_(weight)).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        wide, grad = x.to(inverse.dtype), grad.to(inverse.dtype)
        grad_weight = (grad * wide * inverse).sum_to_size(weight.shape) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        scaled = (grad if weight is None else grad * weight) * inverse
        # d inverse / d x = -inverse^3 x / D
        along = (scaled * wide).mean(dim=-1, keepdim=True) * inverse * inverse
        return scaled.addcmul_(wide, along, value=-1).to(x.dtype), grad_weight, None
