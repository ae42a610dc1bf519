"""Clipping against PyTorch's own, which takes the norm of each gradient for every group anew."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from musubi_tuner.training.gradients import clip_gradients


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    """Four, the third without a gradient."""
    g = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((3, 4), (64, 32), (100, 7), (5,))]
    for parameter in (made[0], made[1], made[3]):
        parameter.grad = torch.randn(parameter.shape, generator=g).to(dtype)
    return made


def gradients(made: list[nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad for p in made if p.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [1.0, 1e6])
def test_norms_and_gradients_are_those_of_pytorch(dtype: torch.dtype, max_norm: float):
    ours, theirs = parameters(dtype), parameters(dtype)
    group = torch.nn.utils.get_total_norm([theirs[0].grad, theirs[3].grad])
    norms = clip_gradients(ours, {"ends": [ours[0], ours[3]], "none": [ours[2]]}, max_norm)
    total = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert norms.keys() == {"grad_norm", "grad_norm/ends"}
    assert torch.equal(norms["grad_norm"], total)
    assert torch.equal(norms["grad_norm/ends"], group)
    assert all(torch.equal(a, b) for a, b in zip(gradients(ours), gradients(theirs), strict=True))


def test_without_a_limit_gradients_stay_as_they_are():
    made = parameters(torch.float32)
    before = [g.clone() for g in gradients(made)]
    clip_gradients(made, {}, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(gradients(made), before, strict=True))


def test_no_gradient_at_all_has_norm_zero():
    norms = clip_gradients([nn.Parameter(torch.ones(2))], {}, 1.0)
    assert {name: norm.item() for name, norm in norms.items()} == {"grad_norm": 0.0}
