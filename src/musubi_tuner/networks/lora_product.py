"""Adapted Linear layers that read the same input, as one step of autograd.

Left to itself, autograd makes of each layer two gradients of the input, that of the base and that of the down factor,
and adds them all up. Here one matrix product after the other adds to the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Member(NamedTuple):
    """One of the layers, K wide in and N wide out; tensors in the dtype of the input."""

    weight: Tensor  # [N, K], frozen
    bias: Tensor | None  # [N], frozen
    up: Tensor  # [N, r]
    scale: float
    mask: Tensor | None  # [M, r] factors on the r-wide activation: dropout


def dense_products(rows: Tensor, down: Tensor, members: Sequence[Member]) -> tuple[Tensor, ...]:
    """For each member ``rows W^T + b + scale * (rows down^T * mask) up^T``, [M, N].

    Args:
        rows: [M, K].
        down: the down factors one below the other, [sum of r, K].
    """
    weights, biases, ups, scales, masks = zip(*members, strict=True)
    return _Products.apply(rows, down, scales, masks, weights, biases, *ups)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        down: Tensor,
        scales: Sequence[float],
        masks: Sequence[Tensor | None],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        *ups: Tensor,
    ) -> tuple[Tensor, ...]:
        hidden = F.linear(rows, down)  # [M, sum of r]
        outputs, first = [], 0
        for scale, mask, weight, bias, up in zip(scales, masks, weights, biases, ups, strict=True):
            part = hidden[:, first : first + up.shape[1]]
            if mask is not None:
                part.mul_(mask)
            outputs.append(F.linear(rows, weight, bias).addmm_(part, up.t(), alpha=scale))
            first += up.shape[1]
        # Through save_for_backward alone: what swaps or offloads weights watches what it keeps.
        ctx.save_for_backward(rows, down, hidden, *weights, *ups, *(m for m in masks if m is not None))
        ctx.scales, ctx.masked = scales, [m is not None for m in masks]
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, down, hidden, *rest = ctx.saved_tensors
        count = len(grads)
        weights, ups, masks = rest[:count], rest[count : 2 * count], iter(rest[2 * count :])
        d_hidden = torch.empty_like(hidden)
        d_ups: list[Tensor | None] = []
        d_rows, first = None, 0
        for i, (grad, weight, up) in enumerate(zip(grads, weights, ups, strict=True)):
            part = slice(first, first + up.shape[1])
            first += up.shape[1]
            d_part = torch.addmm(d_hidden[:, part], grad, up, beta=0, alpha=ctx.scales[i], out=d_hidden[:, part])
            if ctx.masked[i]:
                d_part.mul_(next(masks))
            wanted = ctx.needs_input_grad[6 + i]
            d_ups.append((grad.t() @ hidden[:, part]).mul_(ctx.scales[i]) if wanted else None)
            if ctx.needs_input_grad[0]:
                d_rows = grad @ weight if d_rows is None else d_rows.addmm_(grad, weight)
        if d_rows is not None:
            d_rows.addmm_(d_hidden, down)
        d_down = d_hidden.t() @ rows if ctx.needs_input_grad[1] else None
        return d_rows, d_down, None, None, None, None, *d_ups
