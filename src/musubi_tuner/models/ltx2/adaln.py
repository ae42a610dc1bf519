"""Adaptive layer norm (DiT, arXiv 2212.09748): noise levels to shifts, scales and gates, and their use.

A sample's tokens mostly share one or two noise levels, so modulation is computed once per distinct level and
looked up per token only where it is applied. That saves the big projection, and above all the memory: what
autograd keeps are a few rows instead of a dozen tensors of the size of the hidden state. All arithmetic on
rows is fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FREQUENCIES = 128
_MAX_PERIOD = 10000.0


@dataclass(frozen=True)
class Levels:
    """Noise levels: one a sample, or the distinct ones of all tokens and where each token finds its own."""

    values: Tensor  # [B, 1], or [U] with an index; fp32
    index: Tensor | None = None  # [B, N] int64 into U


def distinct_levels(timesteps: Tensor) -> Levels:
    """Levels of ``timesteps`` [B, 1] (as they are) or [B, N] (each distinct value once).

    Counting the values makes the host wait for the device, once a forward and only for per-token levels, at
    its start, where little is queued. The count is rounded up to a power of two, so that a compiled block
    meets few shapes.
    """
    if timesteps.shape[1] == 1:
        return Levels(timesteps)
    values, index = torch.unique(timesteps, return_inverse=True)
    padding = (1 << (values.numel() - 1).bit_length()) - values.numel()
    return Levels(F.pad(values, (0, padding)), index)


@dataclass(frozen=True)
class Modulation:
    """Rows of shift, scale and gate vectors; scales include their 1."""

    rows: Tensor  # [B, 1, R, D], or [U, R, D] with an index; fp32
    index: Tensor | None = None  # [B, N] into U

    def with_table(self, table: Tensor) -> tuple[Tensor, ...]:
        """Add a block's own ``table`` [R, D]; returns R tensors [B, 1, D] or [U, D], fp32."""
        return (self.rows + table).unbind(-2)


class TimestepEmbedder(nn.Module):
    """Sinusoid of a timestep, then two linears."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(2 * _FREQUENCIES, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoid(timestep).to(dtype))))


class _Embedding(nn.Module):
    # One level of nesting that only the parameter names need.
    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(width)


class AdaLayerNormSingle(nn.Module):
    """adaLN-single (PixArt-alpha, arXiv 2310.00426): modulation rows for all blocks from a timestep."""

    def __init__(self, width: int, num_rows: int) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.emb = _Embedding(width)
        self.linear = nn.Linear(width, num_rows * width)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Timesteps [...] (0 to 1000, fp32) to rows [..., R, D] and the embedding [..., D], both fp32.

        ``dtype`` is that of the linears' input; the sinusoid is fp32.
        """
        embedding = self.emb.timestep_embedder(timestep, dtype)
        rows = self.linear(F.silu(embedding)).unflatten(-1, (self.num_rows, -1))
        return rows.to(torch.float32), embedding.to(torch.float32)


def add_one(rows: Tensor, scale_rows: slice) -> Tensor:
    """``rows`` [..., R, D] with 1 added to some: a scale ``s`` is applied as ``x * (1 + s)``."""
    one = torch.zeros(rows.shape[-2], 1, dtype=rows.dtype, device=rows.device)
    one[scale_rows] = 1
    return rows + one


def sinusoid(timestep: Tensor) -> Tensor:
    """[...] to [..., 256] fp32: cosines, then sines, of 128 frequencies from 1 down to nearly 1 / 10000."""
    exponents = torch.arange(_FREQUENCIES, dtype=torch.float32, device=timestep.device) / _FREQUENCIES
    angles = timestep.to(torch.float32).unsqueeze(-1) * torch.exp(-math.log(_MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: Tensor, scale: Tensor, shift: Tensor, index: Tensor | None = None) -> Tensor:
    """``x * scale + shift`` in fp32, returned in the dtype of ``x`` [B, N, D].

    ``scale`` (its 1 included) and ``shift`` are [B, 1, D], or [U, D] with ``index`` [B, N].
    """
    if torch.compiler.is_compiling():
        return (x * _per_token(scale, index) + _per_token(shift, index)).to(x.dtype)
    return _Modulate.apply(x, scale, shift, index)


def gated_add(x: Tensor, y: Tensor, gate: Tensor, index: Tensor | None = None) -> Tensor:
    """``x + y * gate`` in fp32, returned in the dtype of ``x`` [B, N, D]; gate as in :func:`modulate`."""
    if torch.compiler.is_compiling():
        return (x + y * _per_token(gate, index)).to(x.dtype)
    return _GatedAdd.apply(x, y, gate, index)


# Written as autograd functions because an fp32 operand makes PyTorch's own ops return fp32: the result, and
# each gradient, would be written twice as wide and then copied. With ``out=`` the kernel rounds as it writes.


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, index: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, scale, index)
        ctx.shift_shape = shift.shape
        return torch.addcmul(_per_token(shift, index), x, _per_token(scale, index), out=torch.empty_like(x))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, index = ctx.saved_tensors
        needs_x, needs_scale, needs_shift, _ = ctx.needs_input_grad
        return (
            torch.mul(grad, _per_token(scale, index), out=torch.empty_like(grad)) if needs_x else None,
            _per_row(grad.to(scale.dtype) * x, scale.shape, index) if needs_scale else None,
            _per_row(grad.to(scale.dtype), ctx.shift_shape, index) if needs_shift else None,
            None,
        )


class _GatedAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor, index: Tensor | None) -> Tensor:
        ctx.save_for_backward(y if ctx.needs_input_grad[2] else None, gate, index)
        return torch.addcmul(x, y, _per_token(gate, index), out=torch.empty_like(x))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, gate, index = ctx.saved_tensors
        _, needs_y, needs_gate, _ = ctx.needs_input_grad
        return (
            grad,
            torch.mul(grad, _per_token(gate, index), out=torch.empty_like(grad)) if needs_y else None,
            _per_row(grad.to(gate.dtype) * y, gate.shape, index) if needs_gate else None,
            None,
        )


def _per_token(rows: Tensor, index: Tensor | None) -> Tensor:
    """[B, 1, D] as it is, [U, D] looked up to [B, N, D]."""
    return rows if index is None else F.embedding(index, rows)


def _per_row(grad: Tensor, shape: torch.Size, index: Tensor | None) -> Tensor:
    """Sum a per-token gradient [B, N, D] over the tokens that read each row."""
    if index is None:
        return grad.sum_to_size(shape)
    return grad.new_zeros(shape).index_add_(0, index.flatten(), grad.flatten(0, 1))
