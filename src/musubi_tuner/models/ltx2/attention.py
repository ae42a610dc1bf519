"""Multi-head attention of the LTX-2 transformer, and its masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from musubi_tuner.models.attention_backends import AttentionFunction, attention

from .norm import RMSNorm
from .rope import RopeTable, apply_rope


class Attention(nn.Module):
    """Attention with norms on the whole query and key, rotary positions and (from 2.3 on) a gate per head.

    ``attention_function`` may be replaced from outside: another kernel, or one wrapped to work in chunks.
    """

    def __init__(
        self,
        query_width: int,
        context_width: int,
        *,
        heads: int,
        head_dim: int,
        eps: float,
        gated: bool,
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.attention_function: AttentionFunction = attention
        self.to_q = nn.Linear(query_width, inner)
        self.to_k = nn.Linear(context_width, inner)
        self.to_v = nn.Linear(context_width, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, query_width)])
        self.q_norm = RMSNorm(inner, eps)
        self.k_norm = RMSNorm(inner, eps)
        self.to_gate_logits = nn.Linear(query_width, heads) if gated else None

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        rope: RopeTable | None = None,
        context_rope: RopeTable | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Queries from ``x`` [B, Nq, D], keys and values from ``context`` [B, Nk, Dc] (None: from ``x``).

        Args:
            mask: additive, broadcastable to [B, 1, Nq, Nk].
            rope: positions of the queries, and of the keys unless ``context_rope`` is given.
            keep: [B, 1, 1]; where 0, every token gets its own value instead of the attention over all
                (spatio-temporal guidance, arXiv 2411.18664). Only for self-attention.
        """
        context = x if context is None else context
        q, k, v = self.project(x, context)
        q = self.q_norm(q).unflatten(-1, (self.heads, -1))  # [B, Nq, H, head_dim]
        k = self.k_norm(k).unflatten(-1, (self.heads, -1))
        v = v.unflatten(-1, (self.heads, -1))
        if rope is not None:
            q = apply_rope(q, rope)
            k = apply_rope(k, rope if context_rope is None else context_rope)
        out = self.attention_function(q, k, v, mask)  # [B, Nq, H, head_dim]
        if keep is not None:
            out = torch.lerp(v, out, keep.unsqueeze(-1).to(out.dtype))
        if self.to_gate_logits is not None:
            out = out * (2 * torch.sigmoid(self.to_gate_logits(x))).unsqueeze(-1)
        return self.to_out[0](out.flatten(2))

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of ``x``, keys and values of ``context``; may be replaced from outside, as the layers may."""
        return self.to_q(x), self.to_k(context), self.to_v(context)


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """PyTorch's attention in all of a model while it is open, whatever was attached."""
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    attached = [layer.attention_function for layer in layers]
    try:
        for layer in layers:
            layer.attention_function = attention
        yield
    finally:
        for layer, function in zip(layers, attached, strict=True):
            layer.attention_function = function


def text_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[B, L] bool or int (1 = attend) to an additive [B, 1, 1, L]; float masks are additive already."""
    if mask is None:
        return None
    if not mask.is_floating_point():
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask == 0, _hidden(dtype))
    return mask.to(dtype)[:, None, None, :]


def weight_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Attention weights [B or 1, Nq or 1, Nk] in [0, 1] to an additive [B or 1, 1, Nq or 1, Nk].

    A weight w multiplies the token's share before normalisation (additive log w), so 0 removes it.
    """
    if mask is None:
        return None
    logits = mask.to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny).log()
    return logits.masked_fill(mask <= 0, _hidden(dtype)).to(dtype).unsqueeze(1)


def _hidden(dtype: torch.dtype) -> float:
    """Additive value of a key that nothing may read.

    Half of the lowest number: scores added to the lowest one overflow in fp16, and a kernel that multiplies it
    by log2(e) gets -inf, which makes NaN of a row, or of a tile of keys, that is hidden as a whole
    (pytorch/pytorch issues 109517 and 110213).
    """
    return torch.finfo(dtype).min / 2
