"""Which noise levels training sees.

Levels are ``sigma`` in [0, 1], 0 = clean. All arithmetic is in float64 on the CPU, a few numbers a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from musubi_tuner.common.registry import Registry

# The shift is a line through these points (tokens, shift).
_SHIFT_LOW = (1024, 0.95)
_SHIFT_HIGH = (4096, 2.05)

# The stretched variant maps these normal quantiles to 0 and 1: 0.5 % and 99.9 %.
_Z_LOW = -2.5758
_Z_HIGH = 3.0902

_TAIL = 1e-9  # keeps the inverse normal distribution finite
_BISECTIONS = 50


@dataclass(frozen=True)
class NoiseLevelSampler:
    """Draws one noise level a sample.

    ``shifted_logit_normal`` (``sigma`` is an alias): with the shift ``mu`` of the sequence length and a standard
    normal ``z``, *legacy* (LTX-2.0) is ``sigmoid(mu + std * z)``. *stretched* (LTX-2.3) maps the span between two
    quantiles of that to [0, 1], reflects what lies below ``eps``, and is replaced by a uniform level with
    probability ``uniform_prob``. ``uniform`` ignores the sequence length.

    Attributes:
        mean: added to ``mu``.
        shift: replaces ``mu``.
        clamp_shift: keep ``mu`` within [0.95, 2.05]; for sequences of audio.
        min_sigma, max_sigma: the levels are squeezed into this range.
    """

    sampling: Literal["shifted_logit_normal", "sigma", "uniform"] = "shifted_logit_normal"
    shifted_logit_mode: Literal["legacy", "stretched"] = "legacy"
    mean: float = 0.0
    std: float = 1.0
    eps: float = 1e-3
    uniform_prob: float = 0.1
    shift: float | None = None
    clamp_shift: bool = False
    min_sigma: float = 0.0
    max_sigma: float = 1.0

    def draw(self, num_tokens: int | Sequence[int], generators: Sequence[Generator]) -> Tensor:
        """Levels [B], fp32, on the CPU; sample i draws from ``generators[i]`` only.

        ``num_tokens`` is the sequence length without reference tokens, one for all or one for each sample.
        """
        uniforms = torch.stack([torch.rand(3, generator=g, dtype=torch.float64) for g in generators])  # [B, 3]
        distribution = self._distribution()
        return self._in_range(distribution.level(self, self._mu(num_tokens), uniforms))

    def quantile(self, u: float | Sequence[float] | Tensor, num_tokens: int | Sequence[int]) -> Tensor:
        """Levels [B], fp32, below which a share ``u`` in (0, 1) of the draws lies."""
        u = torch.as_tensor(u, dtype=torch.float64).reshape(-1)
        distribution = self._distribution()
        return self._in_range(distribution.quantile(self, self._mu(num_tokens), u))

    def _distribution(self) -> Distribution:
        is_shifted = self.sampling in ("shifted_logit_normal", "sigma")
        return DISTRIBUTIONS[self.shifted_logit_mode if is_shifted else self.sampling]

    def _mu(self, num_tokens: int | Sequence[int]) -> Tensor:
        """Centre of the logit-normal distribution, [B] or [1]."""
        if self.shift is not None:
            mu = torch.tensor([self.shift], dtype=torch.float64)
        else:
            mu = token_shift(torch.as_tensor(num_tokens).reshape(-1), clamp=self.clamp_shift)
        return mu + self.mean

    def _in_range(self, sigma: Tensor) -> Tensor:
        return (self.min_sigma + sigma * (self.max_sigma - self.min_sigma)).to(torch.float32)


def token_shift(num_tokens: Tensor, *, clamp: bool = False) -> Tensor:
    """Shift of the logit-normal distribution, float64: 0.95 at 1024 tokens, 2.05 at 4096, linear beyond."""
    (low_tokens, low), (high_tokens, high) = _SHIFT_LOW, _SHIFT_HIGH
    share = (num_tokens.to(torch.float64) - low_tokens) / (high_tokens - low_tokens)
    mu = low + share * (high - low)
    return mu.clamp(low, high) if clamp else mu


def default_shifted_logit_mode(version: str) -> Literal["legacy", "stretched"]:
    """The variant that a release was trained with."""
    return "legacy" if version == "2.0" else "stretched"


@dataclass(frozen=True)
class Distribution:
    """One way to draw levels in [0, 1].

    ``level`` gets mu [B] and three uniforms a sample [B, 3]; ``quantile`` gets mu [B] and shares [B].
    """

    level: Callable[[NoiseLevelSampler, Tensor, Tensor], Tensor]
    quantile: Callable[[NoiseLevelSampler, Tensor, Tensor], Tensor]


DISTRIBUTIONS: Registry[Distribution] = Registry("timestep sampling")


def _legacy(sampler: NoiseLevelSampler, mu: Tensor, u: Tensor) -> Tensor:
    return torch.sigmoid(mu + sampler.std * torch.special.ndtri(u.clamp(_TAIL, 1 - _TAIL)))


def _stretched(sampler: NoiseLevelSampler, mu: Tensor, u: Tensor) -> Tensor:
    base, choice, uniform = u.unbind(-1)
    low, span = _stretch(sampler, mu)
    q = (_legacy(sampler, mu, base) - low) / span
    q = torch.where(q < sampler.eps, 2 * sampler.eps - q, q).clamp(0, 1)
    return torch.where(choice < sampler.uniform_prob, sampler.eps + (1 - sampler.eps) * uniform, q)


def _stretch(sampler: NoiseLevelSampler, mu: Tensor) -> tuple[Tensor, Tensor]:
    low = torch.sigmoid(mu + _Z_LOW * sampler.std)
    high = torch.sigmoid(mu + _Z_HIGH * sampler.std)
    return low, (high - low).clamp(min=1e-6)


def _stretched_cdf(sampler: NoiseLevelSampler, mu: Tensor, sigma: Tensor) -> Tensor:
    """Share of draws <= sigma, for sigma in [eps, 1); the reflection folds the lower tail onto the rest."""
    low, span = _stretch(sampler, mu)

    def below(q: Tensor) -> Tensor:
        y = (low + q * span).clamp(0, 1)
        return torch.special.ndtr((torch.logit(y) - mu) / sampler.std)

    folded = below(sigma) - below(2 * sampler.eps - sigma)
    uniform = (sigma - sampler.eps) / (1 - sampler.eps)
    return (1 - sampler.uniform_prob) * folded + sampler.uniform_prob * uniform


def _stretched_quantile(sampler: NoiseLevelSampler, mu: Tensor, u: Tensor) -> Tensor:
    low = torch.full_like(mu + u, sampler.eps)
    high = torch.ones_like(low)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_below = _stretched_cdf(sampler, mu, middle) < u
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return (low + high) / 2


DISTRIBUTIONS.register("legacy")(Distribution(lambda s, mu, u: _legacy(s, mu, u[:, 0]), _legacy))
DISTRIBUTIONS.register("stretched")(Distribution(_stretched, _stretched_quantile))
DISTRIBUTIONS.register("uniform")(Distribution(lambda s, mu, u: u[:, 0], lambda s, mu, u: u))
