"""Low-rank adaptation of direction and length apart (DoRA, Liu et al. 2024, arXiv:2402.09353).

With W [N, K] the base weight, ``V = W + alpha / r * up @ down`` and ``|.|`` the norm of each row, the layer acts with
``W' = m * V / |V|``; m [N, 1] starts at |W|. As in the paper, |V| counts as a constant in the backward pass. A
multiplier s gives ``W + s * (W' - W)``.

V is never formed: ``|V|^2 = |W|^2 + 2 c <W, up down> + c^2 |up down|^2`` with c = alpha / r, where the base layer
itself, asked for ``down`` as an input, tells ``W down^T``. So the base may be quantised or come and go block by block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .lora import LoRALinear, add_product


class DoRALinear(LoRALinear):
    """A :class:`LoRALinear` with a trained length ``dora_scale`` [N, 1] for each row of the weight."""

    additive = False

    def __init__(self, base: nn.Linear, rank: int, alpha: float, **options: Any) -> None:
        super().__init__(base, rank, alpha, **options)
        self.dora_scale = nn.Parameter(torch.ones(base.out_features, 1))
        self.register_buffer("base_square", torch.ones(base.out_features), persistent=False)  # |W|^2
        # A tensor for the same reason as ``scale``.
        self.register_buffer("strength", torch.ones(()), persistent=False)
        self._has_lengths = self._over_base = False

    def attach(self, base: nn.Module) -> None:
        super().attach(base)
        self._stacked = not self._is_own(base)
        self._norm_base()

    @torch.no_grad()
    def _norm_base(self) -> None:
        """Take the norms of the base weight, once; the lengths start there unless a file gave them."""
        square = _dense(self._base, self.dora_scale.device).square().sum(dim=1)  # [N]
        self.base_square = square.to(self.base_square.dtype)
        if not self._has_lengths:
            self.set_lengths(square.sqrt()[:, None])
        elif self._over_base:
            self._resolve_lengths()

    @torch.no_grad()
    def set_lengths(self, lengths: Tensor, *, over_base: bool = False) -> None:
        """``m`` [N, 1], or with ``over_base`` what :meth:`lengths` makes of it, after the factors were set."""
        self.dora_scale.copy_(lengths)
        self._has_lengths = True
        self._over_base = over_base
        if over_base and self._base is not None:
            self._resolve_lengths()

    def _resolve_lengths(self) -> None:
        self.dora_scale.div_(self.norm_ratio().to(self.dora_scale.dtype))
        self._over_base = False

    @torch.no_grad()
    def lengths(self, *, over_base: bool = False) -> Tensor:
        """``m`` [N, 1]; with ``over_base`` as ComfyUI wants it, which divides by |W| instead of |V|."""
        lengths = self.dora_scale.detach().float()
        return lengths * self.norm_ratio().float() if over_base else lengths

    def set_multiplier(self, value: float) -> None:
        self.multiplier = value
        self.strength.fill_(value)

    def set_alpha(self, value: float) -> None:
        self.alpha_value = value
        self.alpha.fill_(value)
        self.scale.fill_(value / self.rank)

    def _apply(self, fn: Any, recurse: bool = True) -> DoRALinear:
        square = self.base_square
        super()._apply(fn, recurse)
        device = self.alpha.device
        # Norms keep their dtype, unless the network becomes double.
        wide = self.dora_scale.dtype if self.dora_scale.dtype == torch.float64 else square.dtype
        self.base_square = square.to(device, wide)
        self.scale = torch.tensor(self.alpha_value / self.rank, device=device, dtype=wide)
        self.strength = torch.tensor(self.multiplier, device=device, dtype=wide)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._has_lengths = self._has_lengths or f"{prefix}dora_scale" in state_dict

    def add_delta(self, rows: Tensor, hidden: Tensor, num_samples: int) -> Tensor:
        below = self._base_forward(rows)  # [M, N]
        own = self._own_product(rows) if self._stacked else below
        bias = self._base.bias
        product = own if bias is None else own - bias
        # Gains near 1 would be rounded away in half precision; what differs from 1 is not.
        gain = self.strength * (self.dora_scale[:, 0] / self._norms(rows.dtype))  # [N]
        y = torch.addcmul(below, product, (gain - self.strength).to(below.dtype))
        up = (self.lora_up.weight * gain[:, None]).to(y.dtype)
        return add_product(y, self._scaled(hidden, num_samples).to(y.dtype), up)

    def _own_product(self, rows: Tensor) -> Tensor:
        return type(self._base).forward(self._base, rows)

    @torch.no_grad()
    def _norms(self, dtype: torch.dtype) -> Tensor:
        """|V|, [N]."""
        down, up = self.lora_down.weight, self.lora_up.weight
        products = self._own_product(down.to(dtype))  # [r, N]
        bias = self._base.bias
        products = (products if bias is None else products - bias).to(up.dtype)
        mixed = (products.t() * up).sum(dim=1)
        squared = ((up @ (down @ down.t())) * up).sum(dim=1)
        return (self.base_square + 2 * self.scale * mixed + self.scale**2 * squared).clamp(min=_TINY).sqrt()

    @torch.no_grad()
    def norm_ratio(self) -> Tensor:
        """|W| / |V|, [N, 1], computed from the weight itself."""
        weight = _dense(self._base, self.dora_scale.device)
        norms = weight.norm(dim=1, keepdim=True)
        weight += self.scale * (self.lora_up.weight.to(weight.dtype) @ self.lora_down.weight.to(weight.dtype))
        return norms / weight.norm(dim=1, keepdim=True).clamp(min=_TINY)


_TINY = 1e-30


def _dense(base: nn.Module, device: torch.device) -> Tensor:
    """A copy of the weight of a layer, quantised or not, [N, K] in float32 (float64 stays)."""
    weight = base.dense_weight(torch.float32) if hasattr(base, "dense_weight") else base.weight
    return weight.detach().to(device, torch.promote_types(weight.dtype, torch.float32), copy=True)
