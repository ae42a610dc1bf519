"""Low-rank adaptation of one Linear layer, attached from outside (Hu et al. 2021, arXiv:2106.09685).

``y = base(x) + multiplier * alpha / r * up(down(x))``. The base layer stays where it is in the model; only
its ``forward`` is replaced, so it may be any Linear subclass. The factors live in the network, which keeps
them out of the model's parameters, of block swapping and of quantisation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Switch:
    """Shared by all modules of a network: whether their deltas are added at all, and whether with a strength of one.

    Bools cost nothing when off and give a compiled block few variants.
    """

    def __init__(self) -> None:
        self.on = True
        self.as_trained = True


class LoRALinear(nn.Module):
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
        super().__init__()
        self.rank = rank
        self.dropout, self.rank_dropout, self.module_dropout = dropout, rank_dropout, module_dropout
        self.switch = switch or Switch()
        self.lora_down = nn.Linear(base.in_features, rank, bias=False, dtype=torch.float32)
        self.lora_up = nn.Linear(rank, base.out_features, bias=False, dtype=torch.float32)
        nn.init.zeros_(self.lora_up.weight)
        self.alpha_value, self.multiplier = float(alpha or rank), 1.0
        self.register_buffer("alpha", torch.tensor(self.alpha_value))
        # A tensor, so that changing the multiplier does not recompile a compiled block.
        self.register_buffer("scale", torch.tensor(self.alpha_value / rank), persistent=False)
        # Where training starts, if that counts as part of the base: see start_from.
        self.register_buffer("start_down", None)
        self.register_buffer("start_up", None)
        self.register_buffer("start_scale", torch.zeros(()), persistent=False)
        self._base: nn.Module | None = None
        self._base_forward: Callable[[Tensor], Tensor] | None = None

    # --- attaching ---

    def attach(self, base: nn.Module) -> None:
        """Take over ``base.forward``."""
        # Not through setattr: the base must not become a submodule of the network.
        self.__dict__["_base"] = base
        self._base_forward = base.forward
        base.forward = self.forward

    def detach(self) -> None:
        """Give ``base.forward`` back. Of several networks on a model the last attached leaves first."""
        if self._base is not None:
            if self._base.forward != self.forward:
                raise RuntimeError("another network was attached later and has to be detached first")
            # The class's own forward shows again unless the base had been patched before.
            self._base.forward = self._base_forward
            if getattr(self._base_forward, "__func__", None) is type(self._base).forward:
                del self._base.forward
            self.__dict__["_base"] = self._base_forward = None

    # --- start ---

    @torch.no_grad()
    def start_from(self, down: Tensor, up: Tensor) -> None:
        """Start at ``up @ down``, which corrects the base and so counts as part of it.

        The multiplier then scales only what is trained beyond: ``base + s * (start + multiplier * (delta - start))``.
        """
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
        return downs, ups, 2 * self.alpha_value

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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}alpha" in state_dict:
            self.set_alpha(float(state_dict[f"{prefix}alpha"]))

    def set_alpha(self, value: float) -> None:
        self.alpha_value = value
        self.alpha.fill_(value)
        self.set_multiplier(self.multiplier)

    # --- computing ---

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]: the base layer's output plus the delta."""
        adds_start = self.start_down is not None and not self.switch.as_trained
        if not (self.switch.on or adds_start):
            return self._base_forward(x)
        # In two dimensions a Linear's output is no view, so adding to it in place costs autograd nothing.
        rows = x.reshape(-1, x.shape[-1])  # [M, K]
        y = self._base_forward(rows)  # [M, N]
        if self.switch.on:
            y = self._add_delta(rows, y, x.shape[0] if x.dim() > 1 else 1)
        if adds_start:
            hidden = F.linear(rows, self.start_down.to(x.dtype)) * self.start_scale
            y = _add_product(y, hidden.to(y.dtype), self.start_up.to(y.dtype))
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])

    def _add_delta(self, rows: Tensor, y: Tensor, num_samples: int) -> Tensor:
        hidden = F.linear(rows, self.lora_down.weight.to(rows.dtype)) * self.scale  # [M, r]
        if self.training:
            hidden = self._drop(hidden, num_samples)
        return _add_product(y, hidden.to(y.dtype), self.lora_up.weight.to(y.dtype))

    def _drop(self, hidden: Tensor, num_samples: int) -> Tensor:
        """Training-time dropout of the r-wide activation [M, r]."""
        if self.dropout:
            hidden = F.dropout(hidden, self.dropout)
        if self.rank_dropout:
            keep = torch.rand(num_samples, 1, self.rank, device=hidden.device) >= self.rank_dropout
            keep = keep.to(hidden.dtype) / (1 - self.rank_dropout)
            hidden = (hidden.view(num_samples, -1, self.rank) * keep).view_as(hidden)
        if self.module_dropout:
            # Multiplied rather than skipped: a branch on a random number would break a compiled block.
            hidden = hidden * (torch.rand((), device=hidden.device) >= self.module_dropout)
        return hidden

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha_value:g}"


def _add_product(y: Tensor, hidden: Tensor, up: Tensor) -> Tensor:
    """``y + hidden @ up.T``, in place where that is safe: one pass over y and one rounding of the sum."""
    # A view made inside an autograd Function (of a quantised layer) may not be changed in place; a compiler
    # fuses the sum by itself.
    if torch.compiler.is_compiling() or y._is_view():
        return y + F.linear(hidden, up)
    return y.addmm_(hidden, up.t())
