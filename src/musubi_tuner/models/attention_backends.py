"""Kernels for scaled dot-product attention, by name.

A backend is one function ``attention(q, k, v, mask) -> out``. All tensors are [B, N, H, head_dim] (the layout
in which projections come and flash kernels read), the scale is ``head_dim ** -0.5``, nothing is causal and
``mask`` is an additive [B or 1, 1, Nq or 1, Nk], None for none. None stays None down to the kernel: a mask
of zeros would rule the flash kernels out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor

from musubi_tuner.common.registry import Registry

AttentionFunction: TypeAlias = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]

ATTENTION_BACKENDS: Registry[AttentionFunction] = Registry("attention backend")


@ATTENTION_BACKENDS.register("sdpa")
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's own choice among flash, memory-efficient and plain attention."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2)  # [B, Nq, H, head_dim]
