"""Noise levels that a sampler steps through."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TERMINAL = 0.1  # the last level before 0


def ltx2_sigmas(num_steps: int, *, num_tokens: int = 4096) -> Tensor:
    """The LTX-2 schedule: [num_steps + 1] fp32, from 1 down to 0.

    Evenly spaced levels, shifted towards noise as for ``num_tokens`` latent tokens, then stretched so that the
    last level before 0 is 0.1. The published sampler uses 4096 tokens whatever the size of the sample.
    """
    if num_steps < 1:
        raise ValueError(f"expected at least 1 step, got {num_steps}")
    if num_steps == 1:
        return torch.tensor([1.0, 0.0])  # the stretch would divide by the distance from the first level to itself
    mu = 0.95 + (num_tokens - 1024) * (2.05 - 0.95) / (4096 - 1024)
    linear = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[:-1]
    shifted = math.exp(mu) / (math.exp(mu) + 1 / linear - 1)
    stretched = 1 - (1 - shifted) * (1 - _TERMINAL) / (1 - shifted[-1])
    return torch.cat([stretched, torch.zeros(1, dtype=torch.float64)]).float()
