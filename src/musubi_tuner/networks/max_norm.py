"""Max-norm regularisation of low-rank deltas: a delta that has grown too large is scaled back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .lora import LoRALinear


def delta_norm(module: LoRALinear) -> Tensor:
    """Frobenius norm of ``alpha / r * up @ down`` without forming the product, scalar, float32."""
    down, up = module.lora_down.weight.float(), module.lora_up.weight.float()  # [r, K], [N, r]
    squared = ((up.T @ up) * (down @ down.T)).sum()
    return squared.clamp(min=0).sqrt() * (module.alpha_value / module.rank)


@torch.no_grad()
def limit_norms(modules: Sequence[LoRALinear], limit: float) -> tuple[int, float, float]:
    """Scale both factors of each delta whose norm exceeds ``limit`` by the root of what is too much.

    Returns:
        How many deltas were scaled, the mean and the largest norm afterwards.
    """
    norms = torch.stack([delta_norm(module) for module in modules])
    bounded = norms.clamp(min=limit / 2)
    ratios = bounded.clamp(max=limit) / bounded
    for module, root in zip(modules, ratios.sqrt(), strict=True):
        module.lora_down.weight.mul_(root)
        module.lora_up.weight.mul_(root)
    after = norms * ratios
    scaled, mean, largest = torch.stack([(ratios != 1).sum().float(), after.mean(), after.max()]).tolist()
    return int(scaled), mean, largest
