"""Low-rank adaptation of one Linear layer, attached from outside (Hu et al. 2021, arXiv:2106.09685).

``y = base(x) + multiplier * alpha / r * up(down(x))``. The base layer stays where it is in the model; only
its ``forward`` is replaced, so it may be any Linear subclass. The factors live in the network, which keeps
them out of the model's parameters, of block swapping and of quantisation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attached import START_BUFFERS, AttachedLinear, Switch
from .lora_product import Member, dense_products


class LoRALinear(AttachedLinear):
    """The low-rank delta of one Linear layer with in_features K and out_features N.

    The factors may be float32 while the activations are half precision: the factors (small) are cast, never
    the activations, and their gradients arrive in their own dtype.

    Args:
        base: the layer to adapt; only its sizes are read.
        rank: r; ``lora_down`` is [r, K] (uniform), ``lora_up`` [N, r] (zero, so the start is the base).
        alpha: the delta is scaled by alpha / r; 0 means r.
        dropout: probability of zeroing an element of the r-wide activation.
        rank_dropout: probability of zeroing one of the r components for a whole sample.
        module_dropout: probability of leaving out the delta in a call.
    """

    # Whether the output is the base's plus a product, which a dense base computes in one step.
    additive = True

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        switch: Switch | None = None,
    ) -> None:
        super().__init__(switch)
        self.rank = rank
        self.dropout, self.rank_dropout, self.module_dropout = dropout, rank_dropout, module_dropout
        self.lora_down = nn.Linear(base.in_features, rank, bias=False, dtype=torch.float32)
        self.lora_up = nn.Linear(rank, base.out_features, bias=False, dtype=torch.float32)
        nn.init.zeros_(self.lora_up.weight)
        self.alpha_value, self.multiplier = float(alpha or rank), 1.0
        self.register_buffer("alpha", torch.tensor(self.alpha_value))
        # A tensor, so that changing the multiplier does not recompile a compiled block.
        self.register_buffer("scale", torch.tensor(self.alpha_value / rank), persistent=False)
        for name in START_BUFFERS:  # see start_from
            self.register_buffer(name, None)
        self.register_buffer("start_scale", torch.zeros(()), persistent=False)

    # --- attaching ---

    def attach(self, base: nn.Module) -> None:
        """Take over ``base.forward``."""
        self._is_dense = type(base) is nn.Linear and "forward" not in vars(base)
        super().attach(base)

    # --- start ---

    @torch.no_grad()
    def start_from(self, down: Tensor, up: Tensor) -> None:
        """Start at ``up @ down``, which corrects the base and so counts as part of it.

        The multiplier then scales only what is trained beyond: ``base + s * (start + multiplier * (delta - start))``.
        Rows of ``down`` that are all zero keep the values that the layer was made with, for ``up`` to have a gradient:
        nothing was lost there.
        """
        made = self.lora_down.weight.to(down)
        down = torch.where(down.any(dim=1, keepdim=True), down, made)
        # In bfloat16: half the memory, and the factors start at exactly these values.
        self.start_down = down.to(self.alpha.device, torch.bfloat16)
        self.start_up = (up * (self.rank / self.alpha_value)).to(self.alpha.device, torch.bfloat16)
        self.lora_down.weight.copy_(self.start_down)
        self.lora_up.weight.copy_(self.start_up)
        self.set_multiplier(self.multiplier)

    @torch.no_grad()
    def trained_factors(self) -> tuple[Tensor, Tensor, float]:
        """Down, up and alpha of what training has changed: of rank 2r where it began at a start.

        ``B A - B0 A0 = (B - B0) A + B0 (A - A0)``, of which each term is small where little has changed, so that a
        narrow dtype rounds the change and not its parts.
        """
        down, up = self.lora_down.weight.detach(), self.lora_up.weight.detach()
        if self.start_down is None:
            return down, up, self.alpha_value
        start_down, start_up = self.start_down.to(down.dtype), self.start_up.to(up.dtype)
        downs, ups = torch.cat([down, down - start_down]), torch.cat([up - start_up, start_up], dim=1)
        return downs, ups, self.stored_size[1]

    @property
    def stored_size(self) -> tuple[int, float]:
        """Rank and alpha of :meth:`trained_factors`."""
        factor = 1 if self.start_down is None else 2
        return factor * self.rank, factor * self.alpha_value

    # --- scale ---

    def set_multiplier(self, value: float) -> None:
        """Scale the delta by ``value`` on top of alpha / r, in place."""
        self.multiplier = value
        self.scale.fill_(value * self.alpha_value / self.rank)
        self.start_scale.fill_((1 - value) * self.alpha_value / self.rank)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALinear:
        super()._apply(fn, recurse)
        # Casting the network to half precision must not round alpha and the scale.
        device = self.alpha.device
        self.alpha = torch.tensor(self.alpha_value, device=device)
        self.scale = torch.tensor(self.multiplier * self.alpha_value / self.rank, device=device)
        self.start_scale = torch.tensor((1 - self.multiplier) * self.alpha_value / self.rank, device=device)
        return self

    def set_alpha(self, value: float) -> None:
        self.alpha_value = value
        self.alpha.fill_(value)
        self.set_multiplier(self.multiplier)

    # --- computing ---

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]: the base layer's output plus the delta."""
        if self.switch.on:
            return adapt_together([self], x)[0]
        if not self._adds_start:
            return self._base_forward(x)
        rows = x.reshape(-1, x.shape[-1])
        return _in_shape_of(self._add_start(rows, self._base_forward(rows)), x)

    @property
    def _adds_start(self) -> bool:
        return self.start_down is not None and not self.switch.as_trained

    def takes_product(self, rows: Tensor) -> bool:
        """Whether :func:`dense_products` computes this layer: the base is dense, of the activations' dtype."""
        return self.additive and self._is_dense and not self._adds_start and self._base.weight.dtype == rows.dtype

    def as_member(self, rows: Tensor, num_samples: int) -> Member:
        """What :func:`dense_products` needs to know of this layer."""
        base, scale = self._base, self.multiplier * self.alpha_value / self.rank
        mask = self._mask(rows, num_samples) if self.training else None
        return Member(base.weight, base.bias, self.lora_up.weight.to(rows.dtype), scale, mask)

    def add_delta(self, rows: Tensor, hidden: Tensor, num_samples: int) -> Tensor:
        """The layer's output [M, N] from its input [M, K] and ``down(x)`` [M, r]."""
        y = self._base_forward(rows)
        y = add_product(y, self._scaled(hidden, num_samples).to(y.dtype), self.lora_up.weight.to(y.dtype))
        return self._add_start(rows, y) if self._adds_start else y

    def _add_start(self, rows: Tensor, y: Tensor) -> Tensor:
        hidden = F.linear(rows, self.start_down.to(rows.dtype)) * self.start_scale
        return add_product(y, hidden.to(y.dtype), self.start_up.to(y.dtype))

    def _scaled(self, hidden: Tensor, num_samples: int) -> Tensor:
        hidden = hidden * self.scale
        mask = self._mask(hidden, num_samples) if self.training else None
        return hidden if mask is None else hidden * mask

    def _mask(self, like: Tensor, num_samples: int) -> Tensor | None:
        """Training-time dropout of the r-wide activation [M, r]: factors of its dtype, None for none."""
        options, mask = {"dtype": like.dtype, "device": like.device}, None
        if self.dropout:
            mask = F.dropout(torch.ones(like.shape[0], self.rank, **options), self.dropout)
        if self.rank_dropout:
            keep = torch.rand(num_samples, 1, self.rank, device=like.device) >= self.rank_dropout
            keep = keep.to(like.dtype) / (1 - self.rank_dropout)
            keep = keep.expand(-1, like.shape[0] // max(num_samples, 1), -1).reshape(-1, self.rank)
            mask = keep if mask is None else mask * keep
        if self.module_dropout:
            # Multiplied rather than skipped: a branch on a random number would break a compiled block.
            keep = (torch.rand((), device=like.device) >= self.module_dropout).to(like.dtype)
            mask = keep.expand(like.shape[0], self.rank) if mask is None else mask * keep
        return mask

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha_value:g}"


def adapt_together(modules: Sequence[LoRALinear], x: Tensor) -> list[Tensor]:
    """Outputs [..., N] of layers that read the same ``x`` [..., K]: one product with all the down factors."""
    # In two dimensions a Linear's output is no view, so adding to it in place costs autograd nothing.
    rows = x.reshape(-1, x.shape[-1])  # [M, K]
    num_samples = x.shape[0] if x.dim() > 1 else 1
    downs = [m.lora_down.weight for m in modules]
    down = (downs[0] if len(downs) == 1 else torch.cat(downs)).to(rows.dtype)  # [sum of r, K]
    if _eager(rows.device.type) and all(m.takes_product(rows) for m in modules):
        outputs = dense_products(rows, down, [m.as_member(rows, num_samples) for m in modules])
    else:
        parts = F.linear(rows, down).split([m.rank for m in modules], dim=1)
        outputs = [m.add_delta(rows, part, num_samples) for m, part in zip(modules, parts, strict=True)]
    return [_in_shape_of(y, x) for y in outputs]


def _in_shape_of(y: Tensor, x: Tensor) -> Tensor:
    """[M, N] with the leading dimensions of ``x``."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _eager(device: str) -> bool:
    """Neither a compiler, which fuses by itself, nor autocast, whose casts the backward pass has to know of."""
    autocasts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return not autocasts and not torch.compiler.is_compiling()


def add_product(y: Tensor, hidden: Tensor, up: Tensor) -> Tensor:
    """``y + hidden @ up.T``, in place where that is safe: one pass over y and one rounding of the sum."""
    # A view made inside an autograd Function (of a quantised layer) may not be changed in place; a compiler
    # fuses the sum by itself.
    if torch.compiler.is_compiling() or y._is_view():
        return y + F.linear(hidden, up)
    return y.addmm_(hidden, up.t())
