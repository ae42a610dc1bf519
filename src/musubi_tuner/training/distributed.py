"""Gradients of several processes.

The LoRA runs inside the base model's forward, so a DDP wrapper would never see a forward of its own module;
gradients are averaged here instead, once per optimizer step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter


def average_gradients(parameters: Sequence[Parameter]) -> None:
    """Average gradients over all processes, in place.

    Ranks may differ in which parameters got a gradient (a batch without audio leaves audio modules out): a
    parameter with a gradient on any rank counts as zero on the others, one without any stays ``None``.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    device = parameters[0].device
    has_gradient = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=device)
    dist.all_reduce(has_gradient, op=dist.ReduceOp.MAX)
    used = [p for p, flag in zip(parameters, has_gradient.tolist(), strict=True) if flag]
    if not used:
        return
    for p in used:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.reshape(-1).float() for p in used])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, mean in zip(used, flat.split([p.numel() for p in used]), strict=True):
        p.grad.copy_(mean.view_as(p))


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum of a small tensor, of the same shape on every process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values
