"""Max-norm: each delta's Frobenius norm against the product formed in full."""

from __future__ import annotations

import pytest
import torch
from lora_samples import tiny_transformer

from musubi_tuner.networks.lora_ltx2 import create_network


@pytest.fixture
def network():
    network = create_network(1.0, 3, 6.0, tiny_transformer("2.0"), lora_target_preset="t2v")
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for i, module in enumerate(network.modules_by_name.values()):
            for factor in (module.lora_down.weight, module.lora_up.weight):
                factor.copy_(torch.randn(factor.shape, generator=g) * 0.1 * (i % 5))
    return network


def deltas(network) -> list[torch.Tensor]:
    """alpha / r * up @ down, formed."""
    return [2.0 * (m.lora_up.weight @ m.lora_down.weight).detach() for m in network.modules_by_name.values()]


def test_max_norm_bounds_each_delta_and_keeps_its_direction(network):
    before, limit = deltas(network), 3.0
    norms = torch.tensor([d.norm() for d in before])
    assert (norms > limit).any()
    assert (norms < limit).any()
    scaled, mean, largest = network.apply_max_norm_regularization(limit, torch.device("cpu"))
    for old, new in zip(before, deltas(network), strict=True):
        scale = 1.0 if old.norm() <= limit else float(limit / old.norm())
        assert torch.allclose(new, old * scale, rtol=1e-5, atol=1e-7)
    after = norms.clamp(max=limit)
    assert scaled == int((norms > limit).sum())
    assert mean == pytest.approx(float(after.mean()), rel=1e-5)
    assert largest == pytest.approx(limit, rel=1e-5)


def test_max_norm_scales_both_factors_alike_and_leaves_small_ones_bit_for_bit(network):
    modules = list(network.modules_by_name.values())
    before = [(m.lora_down.weight.clone(), m.lora_up.weight.clone()) for m in modules]
    norms = [d.norm() for d in deltas(network)]
    network.apply_max_norm_regularization(3.0, torch.device("cpu"))
    for module, (down, up), norm in zip(modules, before, norms, strict=True):
        if norm <= 2.99:
            assert torch.equal(module.lora_down.weight, down)
            assert torch.equal(module.lora_up.weight, up)
        elif norm > 3.01:
            root = (3.0 / norm).sqrt()
            assert torch.allclose(module.lora_down.weight, down * root)
            assert torch.allclose(module.lora_up.weight, up * root)
