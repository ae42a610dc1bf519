"""From noise to clean tokens along the probability flow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

from torch import Tensor

from musubi_tuner.common.av import AV
from musubi_tuner.common.registry import Registry

# (tokens [B, N, C], sigma) -> the clean tokens that the model sees in them
Denoiser = Callable[[AV[Tensor], float], AV[Tensor]]
Sampler = Callable[[Denoiser, AV[Tensor], Iterable[tuple[float, float]]], AV[Tensor]]

SAMPLERS: Registry[Sampler] = Registry("sampler")


@SAMPLERS.register("euler")
def euler(denoise: Denoiser, tokens: AV[Tensor], steps: Iterable[tuple[float, float]]) -> AV[Tensor]:
    """First-order steps.

    A token whose level is ``t = (1 - keep) * sigma`` moves by ``(x - x0) / sigma`` as well, because
    ``x - x0 = t * velocity`` and its level falls ``1 - keep`` times as fast as sigma; a fixed token stays where
    it is.

    Args:
        denoise: predicts the clean tokens, each token's own level taken into account.
        tokens: at the first level, fp32.
        steps: pairs (sigma, next sigma), see :func:`sigma_steps`.
    """
    for sigma, next_sigma in steps:
        clean = denoise(tokens, sigma)
        share = (next_sigma - sigma) / sigma
        tokens = tokens.map_named(lambda name, x, c=clean, s=share: x + (x - c[name]) * s)
    return tokens


def sigma_steps(sigmas: Tensor) -> list[tuple[float, float]]:
    """[S + 1] levels to S pairs (level, next level)."""
    return list(pairwise(sigmas.tolist()))


def to_clean(tokens: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """Clean tokens ``x - t * v`` in fp32; ``t`` is [B, N] or [B, 1]."""
    return tokens.float() - t.unsqueeze(-1) * velocity.float()
