"""Which noise levels training sees.

Levels are ``sigma`` in [0, 1], 0 = clean. All arithmetic is in float64 on the CPU, a few numbers a batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Generator, Tensor

from musubi_tuner.common.log import warn_once
from musubi_tuner.common.registry import Registry
from musubi_tuner.common.seeding import generator

from .level_distributions import Distribution, LogitNormal, Mixture, Stretched, Uniform

logger = logging.getLogger(__name__)

# Shifts are lines through two points (tokens, shift).
_Line = tuple[tuple[int, float], tuple[int, float]]
_TOKEN_LINE: _Line = ((1024, 0.95), (4096, 2.05))  # over all tokens
_FLUX_LINE: _Line = ((256, 0.5), (4096, 1.15))  # these two over the tokens of one frame
_QWEN_LINE: _Line = ((256, 0.5), (8192, 0.9))

_REDRAWS = 1000
_SHARE_TAIL = 1e-7  # a given share is kept this far from 0 and 1

# One number of tokens for all samples, one for each, or latent grids (F, H, W) as an int tensor [B, 3] or [1, 3].
Size = int | Sequence[int] | Tensor


@dataclass(frozen=True)
class NoiseLevelSampler:
    """Draws one noise level a sample.

    ``shifted_logit_normal`` (``sigma`` is an alias): with the shift ``mu`` of the sequence length and a standard
    normal ``z``, *legacy* (LTX-2.0) is ``sigmoid(mu + std * z)``. *stretched* (LTX-2.3) maps the span between two
    quantiles of that to [0, 1], reflects what lies below ``eps``, and is replaced by a uniform level with
    probability ``uniform_prob``. :data:`SAMPLINGS` holds these and the others.

    Attributes:
        mean: added to ``mu``; ``logsnr``: mean of the log signal-to-noise ratio.
        std: of the normal distribution; not of the samplings that have ``sigmoid_scale``.
        shift: replaces ``mu``.
        clamp_shift: keep shifts that follow from a size within the range they were fitted to; for sound.
        flow_shift: of ``shift``.
        sigmoid_scale: standard deviation of the logits of ``sigmoid`` and the flow shifts.
        min_sigma, max_sigma: the levels are squeezed into this range.
        preserve_shape: draw again until a level lies in the range instead.
    """

    sampling: str = "shifted_logit_normal"
    shifted_logit_mode: Literal["legacy", "stretched"] = "legacy"
    mean: float = 0.0
    std: float = 1.0
    eps: float = 1e-3
    uniform_prob: float = 0.1
    shift: float | None = None
    clamp_shift: bool = False
    flow_shift: float = 1.0
    sigmoid_scale: float = 1.0
    min_sigma: float = 0.0
    max_sigma: float = 1.0
    preserve_shape: bool = False

    def draw(self, size: Size, generators: Sequence[Generator], *, shares: Tensor | None = None) -> Tensor:
        """:meth:`level` of random numbers; sample i draws from ``generators[i]`` only, three numbers."""
        uniforms = torch.stack([torch.rand(3, generator=g, dtype=torch.float64) for g in generators])
        return self.level(uniforms, size, shares=shares)

    def level(self, uniforms: Tensor, size: Size, *, shares: Tensor | None = None) -> Tensor:
        """Levels [B], fp32, on the CPU.

        Args:
            uniforms: [B, 3], float64 random numbers in [0, 1).
            size: of what is denoised, without reference tokens.
            shares: [B] in [0, 1), places the levels instead of random numbers, see :mod:`.level_pool`; which part
                of a mixture a level comes from stays random.
        """
        if shares is not None:
            shares = shares.to(torch.float64).clamp(_SHARE_TAIL, 1 - _SHARE_TAIL)
            uniforms = torch.stack([shares, uniforms[:, 1], shares], dim=1)
        grids = _grids(size)
        sigma = self._distribution(grids).level(uniforms)
        if not self.preserve_shape:
            return self._squeezed(sigma).to(torch.float32)
        pairs = zip(sigma, uniforms, grids.expand(len(uniforms), -1), strict=True)
        return torch.stack([self._drawn_again(*pair) for pair in pairs]).to(torch.float32)

    def quantile(self, u: float | Sequence[float] | Tensor, size: Size) -> Tensor:
        """Levels [B], fp32, below which a share ``u`` in (0, 1) of the draws lies."""
        u = torch.as_tensor(u, dtype=torch.float64).reshape(-1)
        distribution = self._distribution(_grids(size))
        if not self.preserve_shape:
            return self._squeezed(distribution.quantile(u)).to(torch.float32)
        low, high = (distribution.cdf(torch.tensor([x], dtype=torch.float64)) for x in (self.min_sigma, self.max_sigma))
        return distribution.quantile(low + u * (high - low)).clamp(self.min_sigma, self.max_sigma).to(torch.float32)

    def _distribution(self, grids: Tensor) -> Distribution:
        return _made_distribution(self, tuple(tuple(grid) for grid in grids.tolist()))

    def _squeezed(self, sigma: Tensor) -> Tensor:
        return self.min_sigma + sigma * (self.max_sigma - self.min_sigma)

    def _drawn_again(self, sigma: Tensor, uniforms: Tensor, grid: Tensor) -> Tensor:
        """``sigma`` if it is in the range, else the first of further draws that is; scalars."""
        if self.min_sigma <= float(sigma) <= self.max_sigma:
            return sigma
        # A generator of its own, so that the noise that is drawn next does not depend on the number of draws.
        random = generator("noise level again", *uniforms.tolist())
        further = torch.rand(_REDRAWS, 3, generator=random, dtype=torch.float64)
        levels = self._distribution(grid[None]).level(further)
        inside = levels[(levels >= self.min_sigma) & (levels <= self.max_sigma)]
        if len(inside):
            return inside[0]
        warn_once(
            logger,
            "never in range",
            "--preserve_distribution_shape: %d draws gave no noise level between %g and %g; squeezing instead",
            _REDRAWS,
            self.min_sigma,
            self.max_sigma,
        )
        return self._squeezed(sigma)


@lru_cache(maxsize=256)
def _made_distribution(sampler: NoiseLevelSampler, grids: tuple[tuple[int, ...], ...]) -> Distribution:
    # Clips of a bucket have one size, batch after batch, and the shift is a dozen operations on single numbers.
    return SAMPLINGS[sampler.sampling](sampler, torch.tensor(grids))


def default_shifted_logit_mode(version: str) -> Literal["legacy", "stretched"]:
    """The variant that a release was trained with."""
    return "legacy" if version == "2.0" else "stretched"


def token_shift(num_tokens: Tensor, *, clamp: bool = False) -> Tensor:
    """Shift of the logit-normal distribution, float64: 0.95 at 1024 tokens, 2.05 at 4096, linear beyond."""
    return _on_line(_TOKEN_LINE, num_tokens, clamp=clamp)


def _on_line(line: _Line, count: Tensor, *, clamp: bool) -> Tensor:
    (low_count, low), (high_count, high) = line
    share = (count.to(torch.float64) - low_count) / (high_count - low_count)
    value = low + share * (high - low)
    return value.clamp(low, high) if clamp else value


def _grids(size: Size) -> Tensor:
    """[B, 3] or [1, 3]; a number of tokens becomes a grid without an area."""
    size = torch.as_tensor(size)
    if size.ndim == 2:
        return size
    counts = size.reshape(-1, 1)
    return torch.cat([counts, torch.ones_like(counts), torch.ones_like(counts)], dim=1)


# --- the choices of --timestep_sampling ------------------------------------------------------------------------

SAMPLINGS: Registry[Callable[[NoiseLevelSampler, Tensor], Distribution]] = Registry("timestep sampling")


@SAMPLINGS.register("shifted_logit_normal", "sigma")
def _shifted_logit_normal(sampler: NoiseLevelSampler, grids: Tensor) -> Distribution:
    if sampler.shift is not None:
        mu = torch.tensor([sampler.shift], dtype=torch.float64)
    else:
        mu = token_shift(grids.prod(dim=1), clamp=sampler.clamp_shift)
    base = LogitNormal(mu + sampler.mean, sampler.std)
    if sampler.shifted_logit_mode == "legacy":
        return base
    return Stretched(base, sampler.eps, sampler.uniform_prob)


@SAMPLINGS.register("uniform")
def _uniform(sampler: NoiseLevelSampler, grids: Tensor) -> Distribution:
    return Uniform()


@SAMPLINGS.register("sigmoid")
def _sigmoid(sampler: NoiseLevelSampler, grids: Tensor) -> LogitNormal:
    return LogitNormal(_constant(0.0), sampler.sigmoid_scale)


@SAMPLINGS.register("shift")
def _shift(sampler: NoiseLevelSampler, grids: Tensor) -> LogitNormal:
    return LogitNormal(_constant(math.log(sampler.flow_shift)), sampler.sigmoid_scale)


@SAMPLINGS.register("flux_shift")
def _flux_shift(sampler: NoiseLevelSampler, grids: Tensor) -> LogitNormal:
    return _image_shift(_FLUX_LINE, sampler, _patches(grids))


@SAMPLINGS.register("flux2_shift")
def _flux2_shift(sampler: NoiseLevelSampler, grids: Tensor) -> LogitNormal:
    return _image_shift(_FLUX_LINE, sampler, grids[:, 1] * grids[:, 2])


@SAMPLINGS.register("qwen_shift")
def _qwen_shift(sampler: NoiseLevelSampler, grids: Tensor) -> LogitNormal:
    return _image_shift(_QWEN_LINE, sampler, _patches(grids))


@SAMPLINGS.register("logsnr")
def _logsnr(sampler: NoiseLevelSampler, grids: Tensor) -> LogitNormal:
    # The log signal-to-noise ratio of sigma is -2 logit(sigma).
    return LogitNormal(_constant(-sampler.mean / 2), sampler.std / 2)


@SAMPLINGS.register("qinglong_flux")
def _qinglong_flux(sampler: NoiseLevelSampler, grids: Tensor) -> Mixture:
    return _qinglong(sampler, _flux_shift(sampler, grids))


@SAMPLINGS.register("qinglong_qwen")
def _qinglong_qwen(sampler: NoiseLevelSampler, grids: Tensor) -> Mixture:
    return _qinglong(sampler, _qwen_shift(sampler, grids))


def _qinglong(sampler: NoiseLevelSampler, shifted: LogitNormal) -> Mixture:
    nearly_clean = LogitNormal(_constant(-5.36 / 2), 0.5)  # log signal-to-noise ratio N(5.36, 1)
    return Mixture(((0.8, shifted), (0.075, _logsnr(sampler, _grids(1))), (0.125, nearly_clean)))


def _image_shift(line: _Line, sampler: NoiseLevelSampler, count: Tensor) -> LogitNormal:
    return LogitNormal(_on_line(line, count, clamp=sampler.clamp_shift), sampler.sigmoid_scale)


def _patches(grids: Tensor) -> Tensor:
    """Patches of 2 x 2 latent cells in one frame."""
    return (grids[:, 1] // 2) * (grids[:, 2] // 2)


def _constant(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)
