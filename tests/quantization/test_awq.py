"""Columns scaled by their inputs: the formula, exact folding, and the error that it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from musubi_tuner.quantization.awq import ActivationAware, InputMagnitudes, channel_scales
from musubi_tuner.quantization.fp8_products import Fp8Products
from musubi_tuner.quantization.linear import QuantizedLinear, use_products
from musubi_tuner.quantization.loftq import quantize_with_factors
from musubi_tuner.quantization.packed import Fp8, Nf4, Packed


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(64, 128, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def magnitudes() -> torch.Tensor:
    """A few channels are far larger than the others."""
    values = torch.rand(128, generator=torch.Generator().manual_seed(1)) + 0.5
    values[::16] *= 30
    return values


def inputs(magnitudes: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, 128, generator=torch.Generator().manual_seed(2)) * magnitudes


def test_formula(weight, magnitudes):
    importance = magnitudes.numpy() * np.abs(weight.numpy()).max(axis=0)
    expected = (importance / importance.mean()) ** 0.25
    np.testing.assert_allclose(channel_scales(weight, magnitudes, 0.25).numpy(), expected, rtol=2**-8)


def test_scales_are_exact_in_bfloat16(weight, magnitudes):
    scale = channel_scales(weight, magnitudes, 0.5)
    assert torch.equal(scale.to(torch.bfloat16).float(), scale)


def test_inputs_of_nothing(weight, magnitudes):
    magnitudes[3] = 0
    assert channel_scales(weight, magnitudes, 0.5)[3] == pytest.approx(1e-5, rel=0.01)
    assert torch.equal(channel_scales(weight, torch.zeros(128), 0.5), torch.ones(128))


@pytest.mark.parametrize("method", [Nf4(), Fp8()], ids=["nf4", "fp8"])
def test_no_strength_changes_nothing(weight, magnitudes, method):
    packed, plain = ActivationAware(method, magnitudes, 0.0).quantize(weight), method.quantize(weight)
    assert torch.equal(packed.weight.view(torch.uint8), plain.weight.view(torch.uint8))
    assert torch.equal(packed.scale, plain.scale)
    assert torch.equal(packed.input_scale, torch.ones(128))


def test_folding_is_exact(weight, magnitudes):
    """Without the rounding between them the two scales cancel."""
    scale = channel_scales(weight, magnitudes, 0.25)
    x = inputs(magnitudes, 7).double()
    torch.testing.assert_close((x / scale) @ (weight.double() * scale).T, x @ weight.double().T)


def test_layer_and_its_gradient_are_those_of_the_dense_weight(weight, magnitudes):
    packed = QuantizedLinear(ActivationAware(Nf4(), magnitudes, 0.25).quantize(weight), torch.randn(64))
    plain = nn.Linear(128, 64).requires_grad_(False)
    plain.weight.copy_(packed.dense_weight(torch.float32))
    plain.bias.copy_(packed.bias)
    results = []
    for layer in (packed, plain):
        x = inputs(magnitudes, 2, 5).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append((y, x.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-3)


def test_columns_of_nothing_are_no_nan_in_float16(weight, magnitudes):
    weight[:, 5] = 0  # its scale is the least one, by which an input of 1 becomes 1e5
    layer = QuantizedLinear(ActivationAware(Nf4(), magnitudes, 0.5).quantize(weight))
    x = inputs(magnitudes, 7)
    x[:, 5] = 1
    half = x.half().requires_grad_()
    y = layer(half)
    y.sum().backward()
    assert half.grad.isfinite().all()
    assert (y - layer(x)).norm() < 0.01 * layer(x).norm()


def test_products_in_fp8_get_the_divided_inputs(weight, magnitudes):
    scaled = ActivationAware(Fp8(block_size=None), magnitudes, 0.5).quantize(weight)
    layer, plain = QuantizedLinear(scaled), QuantizedLinear(Packed(scaled.weight, scaled.scale))
    for each in (layer, plain):
        use_products(each, Fp8Products("reference"))
    results = []
    for divide in (lambda x: layer(x), lambda x: plain(x / scaled.input_scale)):
        x = inputs(magnitudes, 2, 5).requires_grad_()
        y = divide(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    exact = inputs(magnitudes, 2, 5) @ weight.T
    assert (results[0][0] - exact).norm() < 0.06 * exact.norm()


def test_error_of_the_outputs_falls(weight, magnitudes):
    x = inputs(magnitudes, 4096)
    errors = {}
    for alpha in (0.0, 0.25):
        dense = ActivationAware(Nf4(), magnitudes, alpha).quantize(weight).dense(torch.float32)
        errors[alpha] = float((x @ (weight - dense).T).norm())
    assert errors[0.25] < 0.9 * errors[0.0]


def test_casts_and_moves_pass_the_scale_by(weight, magnitudes):
    layer = QuantizedLinear(ActivationAware(Nf4(), magnitudes, 0.25).quantize(weight))
    before = layer.input_scale.clone()
    nn.Sequential(layer).to(torch.bfloat16)
    assert torch.equal(layer.input_scale, before)
    assert layer(inputs(magnitudes, 3).bfloat16()).dtype == torch.bfloat16
    layer.to("meta")
    assert layer.input_scale.is_meta


def test_loftq_corrects_the_weight_behind_the_scale(weight, magnitudes):
    """Its factors see the inputs as they are, not divided."""
    method = ActivationAware(Nf4(), magnitudes, 0.25)
    packed, factors = quantize_with_factors(weight, method.quantize, rank=64, iterations=1, name="w")
    torch.testing.assert_close(packed.dense(torch.float32) + factors.up @ factors.down, weight, atol=1e-4, rtol=0)


def test_measured_magnitudes():
    model = nn.Sequential(QuantizedLinear(Nf4().quantize(torch.randn(8, 32))), nn.Identity())
    first, second = torch.randn(2, 5, 32), torch.randn(1, 3, 32)
    magnitudes = InputMagnitudes()
    with magnitudes.watching(model):
        model(first)
        model(second)
    model(torch.full((1, 1, 32), 1e6))
    expected = (first.abs().mean(dim=(0, 1)) + second.abs().mean(dim=(0, 1))) / 2
    assert magnitudes.means().keys() == {"0.weight"}
    torch.testing.assert_close(magnitudes.means()["0.weight"], expected)
