"""Rotary position embedding over continuous positions (RoFormer, arXiv 2104.09864).

Positions are real numbers (seconds, pixels), any sign. They stay fp32 until cos and sin: the fastest of the
frequencies turns 15708 rad per unit, where bf16 positions are off by most of a radian.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.common.devices import upload


@dataclass(frozen=True)
class RopeTable:
    """Rotation of every pair of channels of every token, made once a step and read by all blocks."""

    cos: Tensor  # [B, N, H, head_dim / 2] fp32
    sin: Tensor  # [B, N, H, head_dim / 2] fp32
    interleaved: bool = False  # pairs are channels (2i, 2i + 1); otherwise (i, i + head_dim / 2) of a head


def rope_table(
    coords: Tensor,
    *,
    max_pos: tuple[float, ...],
    width: int,
    heads: int,
    theta: float = 10000.0,
    float64: bool = True,
    interleaved: bool = False,
) -> RopeTable:
    """Rotations for token bounds ``coords`` [B, A, N, 2]; the position is the middle of the bounds.

    Positions are scaled so that [0, max_pos] becomes [-1, 1]. The ``width / 2`` angles of a token run through
    the frequencies, and within one frequency through the axes; the pairs left over are not rotated and come
    first. Heads take consecutive angles, so their frequencies differ.

    Args:
        max_pos: extent of each of the A axes.
        width: inner width of the attention, all heads together.
        float64: compute the ladder of frequencies in float64 (angles are fp32 in either case).
    """
    position = coords.to(torch.float32).mean(dim=-1)  # [B, A, N]
    axes = position.shape[1]
    extent = upload(torch.tensor(max_pos, dtype=torch.float32), position.device)
    scaled = 2 * (position.transpose(1, 2) / extent) - 1  # [B, N, A]
    count = width // (2 * axes)
    ladder = _frequencies(count, theta, float64=float64, device=position.device)
    angles = (scaled.unsqueeze(2) * ladder.unsqueeze(-1)).flatten(2)  # [B, N, count * A]
    unrotated = width // 2 - count * axes
    if unrotated:
        angles = torch.nn.functional.pad(angles, (unrotated, 0))
    angles = angles.unflatten(2, (heads, -1))
    return RopeTable(cos=angles.cos(), sin=angles.sin(), interleaved=interleaved)


def _frequencies(count: int, theta: float, *, float64: bool, device: torch.device) -> Tensor:
    """``pi / 2 * theta ** (k / (count - 1))``, [count] fp32."""
    dtype = torch.float64 if float64 else torch.float32
    exponents = torch.linspace(0.0, 1.0, count, dtype=dtype, device=device)
    return (theta**exponents * (math.pi / 2)).to(torch.float32)


def apply_rope(x: Tensor, table: RopeTable) -> Tensor:
    """Rotate ``x`` [B, N, H, head_dim] in fp32 and return it in its own dtype."""
    if torch.compiler.is_compiling():
        return _rotate_plain(x, table.cos, table.sin, table.interleaved)
    return _Rotate.apply(x, table.cos, table.sin, table.interleaved)


class _Rotate(torch.autograd.Function):
    """The rotation, whose backward is the rotation back: nothing is saved but the shared table."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate(x, cos, sin, interleaved, sign=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, ctx.interleaved, sign=-1), None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, *, sign: int) -> Tensor:
    """Three kernels; the second and third round to the dtype of ``x`` as they write."""
    pair = -1 if interleaved else -2
    first, second = _pairs(x, pair).unbind(pair)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out_first, out_second = _pairs(out, pair).unbind(pair)
    scaled = _pairs(x, pair) * cos.unsqueeze(pair)
    torch.addcmul(scaled.select(pair, 0), second, sin, value=-sign, out=out_first)
    torch.addcmul(scaled.select(pair, 1), first, sin, value=sign, out=out_second)
    return out


def _rotate_plain(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The same for the compiler, which makes one kernel of it and of its backward."""
    pair = -1 if interleaved else -2
    first, second = _pairs(x, pair).unbind(pair)
    rotated = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=pair)
    return rotated.flatten(-2).to(x.dtype)


def _pairs(x: Tensor, pair: int) -> Tensor:
    """View the last dimension as pairs: [..., head_dim / 2, 2] (pair = -1) or [..., 2, head_dim / 2] (-2)."""
    return x.unflatten(-1, (-1, 2) if pair == -1 else (2, -1))
