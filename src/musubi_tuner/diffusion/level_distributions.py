"""Distributions of noise levels on [0, 1], each as a function of uniform numbers.

All arithmetic is in float64 on the CPU, a few numbers a batch. Every distribution rises with its first uniform, so an
evenly spread one gives evenly spread quantiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

# The stretched variant maps these normal quantiles to 0 and 1: 0.5 % and 99.9 %.
_Z_LOW = -2.5758
_Z_HIGH = 3.0902

_TAIL = 1e-9  # keeps the inverse normal distribution finite
_BISECTIONS = 50


class Distribution(Protocol):
    """One distribution a sample; B samples."""

    def level(self, uniforms: Tensor) -> Tensor:
        """Levels [B] of uniforms [B, 3]; the first places the level, the others make choices."""

    def cdf(self, sigma: Tensor) -> Tensor:
        """Share [B] of draws at or below sigma [B] in [0, 1]."""

    def quantile(self, share: Tensor) -> Tensor:
        """Level [B] at or below which a share [B] in (0, 1) of the draws lies."""


@dataclass(frozen=True)
class Uniform:
    """Every level alike."""

    def level(self, uniforms: Tensor) -> Tensor:
        return uniforms[:, 0]

    def cdf(self, sigma: Tensor) -> Tensor:
        return sigma

    def quantile(self, share: Tensor) -> Tensor:
        return share


@dataclass(frozen=True)
class LogitNormal:
    """``sigmoid(location + scale * z)`` with a standard normal ``z``.

    A flow shift ``t * a / (1 + (a - 1) * t)`` adds ``ln a`` to the location.
    """

    location: Tensor  # [B] or [1]
    scale: float

    def level(self, uniforms: Tensor) -> Tensor:
        return self.quantile(uniforms[:, 0])

    def cdf(self, sigma: Tensor) -> Tensor:
        return torch.special.ndtr((torch.logit(sigma) - self.location) / self.scale)

    def quantile(self, share: Tensor) -> Tensor:
        return torch.sigmoid(self.location + self.scale * torch.special.ndtri(share.clamp(_TAIL, 1 - _TAIL)))


@dataclass(frozen=True)
class Stretched:
    """A logit-normal distribution whose span between two quantiles is mapped to [0, 1].

    What then lies below ``eps`` is reflected, and a share ``uniform_prob`` of the draws is uniform on [eps, 1].
    """

    base: LogitNormal
    eps: float
    uniform_prob: float

    def level(self, uniforms: Tensor) -> Tensor:
        _, choice, uniform = uniforms.unbind(-1)
        low, span = self._span
        q = (self.base.level(uniforms) - low) / span
        q = torch.where(q < self.eps, 2 * self.eps - q, q).clamp(0, 1)
        return torch.where(choice < self.uniform_prob, self.eps + (1 - self.eps) * uniform, q)

    def cdf(self, sigma: Tensor) -> Tensor:
        low, span = self._span

        def below(q: Tensor) -> Tensor:
            return self.base.cdf((low + q * span).clamp(0, 1))

        folded = below(sigma) - below(2 * self.eps - sigma)  # the reflection folds the lower tail onto the rest
        uniform = (sigma - self.eps) / (1 - self.eps)
        share = (1 - self.uniform_prob) * folded + self.uniform_prob * uniform
        # What is stretched beyond 1 is drawn as exactly 1.
        return torch.where(sigma >= 1, torch.ones_like(share), torch.where(sigma < self.eps, 0.0, share))

    def quantile(self, share: Tensor) -> Tensor:
        return _bisect(self.cdf, share + 0 * self.base.location, self.eps)

    @cached_property
    def _span(self) -> tuple[Tensor, Tensor]:
        mu, std = self.base.location, self.base.scale
        low = torch.sigmoid(mu + _Z_LOW * std)
        high = torch.sigmoid(mu + _Z_HIGH * std)
        return low, (high - low).clamp(min=1e-6)


@dataclass(frozen=True)
class Mixture:
    """Each draw comes from one of several distributions."""

    parts: tuple[tuple[float, LogitNormal], ...]  # (probability, distribution); the probabilities sum to 1

    def level(self, uniforms: Tensor) -> Tensor:
        (_, first), *others = self.parts
        levels, below = first.level(uniforms), 0.0
        for (probability, _), (_, part) in zip(self.parts, others):  # noqa: B905 - each with the one after it
            below += probability
            levels = torch.where(uniforms[:, 1] < below, levels, part.level(uniforms))
        return levels

    def cdf(self, sigma: Tensor) -> Tensor:
        return torch.stack([probability * part.cdf(sigma) for probability, part in self.parts]).sum(dim=0)

    def quantile(self, share: Tensor) -> Tensor:
        return _bisect(self.cdf, share + 0 * self.parts[0][1].location, 0.0)


def _bisect(cdf: Callable[[Tensor], Tensor], share: Tensor, start: float) -> Tensor:
    """Where ``cdf``, which rises over [start, 1], reaches ``share``."""
    low, high = torch.full_like(share, start), torch.ones_like(share)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_below = cdf(middle) < share
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return (low + high) / 2
