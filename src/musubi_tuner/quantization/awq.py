"""Activation-aware quantisation: columns that large inputs meet get finer steps (Lin et al. 2023, arXiv:2306.00978).

``W x = (W diag(c)) (x / c)``: the scaled weight is quantised, the inputs are divided. Columns of a large ``c`` take a
larger part of the range of their block, so their rounding errors count less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .linear import QuantizedLinear
from .packed import Method, Packed

_LEAST = 1e-5


@dataclass(frozen=True)
class ActivationAware:
    """A method applied to a weight whose columns are scaled by what their inputs are like.

    Attributes:
        method: how the scaled weight is quantised.
        magnitudes: [K] mean of abs(x) of each input.
        alpha: strength; 0 scales nothing.
    """

    method: Method
    magnitudes: Tensor
    alpha: float

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.method.fits(shape)

    def quantize(self, weight: Tensor) -> Packed:
        scale = channel_scales(weight, self.magnitudes.to(weight.device), self.alpha)
        return replace(self.method.quantize(weight.float() * scale), input_scale=scale)


def channel_scales(weight: Tensor, magnitudes: Tensor, alpha: float) -> Tensor:
    """c [K] fp32: the share of a column's importance in the mean one, to the power of ``alpha``.

    Importance is the inputs' mean magnitude times the column's largest weight. Rounded to bfloat16, so that inputs of
    every dtype are divided by exactly what the weight was multiplied by.
    """
    importance = magnitudes.float() * weight.abs().amax(dim=0).float()
    mean = importance.mean()
    if mean == 0:
        return torch.ones_like(importance)
    return (importance / mean).pow(alpha).clamp_(min=_LEAST).to(torch.bfloat16).float()


@dataclass
class InputMagnitudes:
    """Mean abs(input) of each quantised layer of a model, over what runs through it while it is watched."""

    _sums: dict[str, Tensor] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Count all inputs [..., K] that layers of ``model`` get in a block."""
        layers = [(name, m) for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]
        hooks = [m.register_forward_pre_hook(self._counter(f"{name}.weight")) for name, m in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def means(self) -> dict[str, Tensor]:
        """[K] fp32 on the CPU by the names of the weights; each call of a layer counts alike."""
        return {name: total.cpu() / self._counts[name] for name, total in self._sums.items()}

    def _counter(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            mean = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).abs().mean(dim=0, dtype=torch.float32)
            self._sums[name] = self._sums[name] + mean if name in self._sums else mean
            self._counts[name] = self._counts.get(name, 0) + 1

        return count
