"""The four ranges of noise levels by which losses are told apart."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from musubi_tuner.diffusion.losses import LossTerm

LEVEL_RANGES = ("0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00")


def level_range(sigma: Tensor) -> Tensor:
    """Position in :data:`LEVEL_RANGES` of levels in [0, 1]; int64, on their device."""
    count = len(LEVEL_RANGES)
    return (sigma * count).long().clamp(0, count - 1)


def sample_losses(terms: Mapping[str, LossTerm]) -> Tensor:
    """[B]: the weighted sum of each sample's terms, detached."""
    parts = []
    for term in terms.values():
        value = term.value.detach().float()
        parts.append(term.weight * (value if term.valid is None else value * term.valid))
    return torch.stack(parts).sum(dim=0)


def losses_by_range(terms: Mapping[str, LossTerm], sigma: Tensor) -> Tensor:
    """[2, 4] fp32: in each range the sum of the losses of its samples, and the number of those that have any."""
    members = one_hot(level_range(sigma), len(LEVEL_RANGES)).float()  # [B, 4]
    learning = [torch.ones_like(sigma, dtype=torch.bool) if t.valid is None else t.valid for t in terms.values()]
    members = members * torch.stack(learning).any(dim=0)[:, None]
    return torch.stack([sample_losses(terms) @ members, members.sum(dim=0)])
