"""LoftQ: low-rank factors that take up what quantising a weight loses (Li et al. 2023, arXiv:2310.08659).

Alternates between quantising what the factors leave and fitting the factors to what quantising loses, so that
``W`` is near ``Q + up @ down``. Each weight is for itself, so a model is treated while it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.seeding import generator

from .packed import Packed

_OVERSAMPLING = 2  # directions looked at for each one kept
_POWER_STEPS = 4


@dataclass(frozen=True)
class Factors:
    """What is added to a quantised weight [N, K]: ``up @ down``."""

    down: Tensor  # [r, K] fp32
    up: Tensor  # [N, r] fp32


@torch.no_grad()
def quantize_with_factors(
    weight: Tensor, quantize: Callable[[Tensor], Packed], *, rank: int, iterations: int, name: str
) -> tuple[Packed, Factors]:
    """Alternate ``iterations`` times. The packed weight is the one that the factors were fitted to.

    With one iteration it is the plain ``quantize(weight)``. Beside ``weight`` there is one dense temporary.

    Args:
        weight: [N, K], any floating dtype.
        quantize: makes a packed weight of a dense one.
        rank: r of the factors, at most min(N, K).
        iterations: at least 1.
        name: of the weight; the draws of the decomposition are keyed by it.

    Raises:
        UserError: the weight holds NaN or infinity.
    """
    packed = quantize(weight)
    factors = _fit(weight, packed, rank, name)
    for _ in range(iterations - 1):
        packed = quantize(torch.addmm(weight.float(), factors.up, factors.down, alpha=-1))
        factors = _fit(weight, packed, rank, name)
    return packed, factors


def _fit(weight: Tensor, packed: Packed, rank: int, name: str) -> Factors:
    """The factors nearest to what the packed weight lacks."""
    missing = packed.dense(torch.float32).to(weight.device).neg_().add_(weight)
    if not missing.isfinite().all():
        raise UserError(f"{name} holds NaN or infinity, so the checkpoint is broken; make or download it again")
    left, values, right = truncated_svd(missing, rank, generator("loftq", name))
    roots = values.sqrt()
    return Factors(roots.unsqueeze(1) * right, left * roots)


def truncated_svd(matrix: Tensor, rank: int, draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` largest singular values [r] with their vectors, U [N, r] and V^T [r, K], in fp32.

    Subspace iteration from a random start (Halko et al. 2011, arXiv:0909.4061), with twice as many directions as are
    kept; exact where these are all there are.
    """
    width = min(_OVERSAMPLING * rank, *matrix.shape)
    if width == min(matrix.shape):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    start = torch.randn(matrix.shape[1], width, generator=draws).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q  # [N, width]
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left[:, :rank], values[:rank], right[:rank]
