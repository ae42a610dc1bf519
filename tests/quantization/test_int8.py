"""Int8 with scales against its definition."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from musubi_tuner.quantization import rows
from musubi_tuner.quantization.int8 import dequantize_int8, quantize_int8
from musubi_tuner.quantization.packed import Fp8, Int8, dequantize


@pytest.fixture
def weight() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 256, generator=generator) * 10 ** torch.linspace(-3, 2, 24).unsqueeze(1)


@pytest.mark.parametrize("blocks", [1, 4])
def test_error_is_half_a_step(weight, blocks):
    quantized, scale = quantize_int8(weight, blocks)
    assert_close(scale, weight.view(24, blocks, -1).abs().amax(-1) / 127)
    restored = dequantize_int8(quantized, scale, torch.float32)
    steps = scale.repeat_interleave(256 // blocks, dim=1)
    assert ((weight - restored).abs() <= 0.5 * steps * (1 + 1e-4)).all()
    assert quantized.int().abs().max() == 127, "-128 stays unused"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_product_is_rounded_once(weight, dtype, monkeypatch):
    monkeypatch.setattr(rows, "_ELEMENTS", 5 * 256)
    quantized, scale = quantize_int8(weight, 4)
    exact = quantized.float().view(24, 4, -1) * scale.unsqueeze(-1)
    assert torch.equal(dequantize_int8(quantized, scale, dtype), exact.view(24, 256).to(dtype))


def test_whole_numbers_are_fixed_points():
    weight = torch.arange(-127.0, 129).clamp(max=127).view(2, 128)
    weight[1, 5] = -127
    assert torch.equal(dequantize_int8(*quantize_int8(weight * 0.5, 1), torch.float32), weight * 0.5)


def test_zeros_stay_zeros():
    assert not dequantize_int8(*quantize_int8(torch.zeros(3, 64), 1), torch.bfloat16).any()


def test_chunks_of_rows_change_nothing(weight, monkeypatch):
    whole = quantize_int8(weight, 4)
    monkeypatch.setattr(rows, "_ELEMENTS", 5 * 256)
    for part, expected in zip(quantize_int8(weight, 4), whole, strict=True):
        assert torch.equal(part, expected)


def test_normal_weights_lose_far_less_than_in_fp8():
    """Steps of E|largest of 64| / 127, about 2.6 / 127: a mean error of a quarter of that."""
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    errors = []
    for method in (Int8(), Fp8()):
        packed = method.quantize(weight)
        assert packed.scale.shape == (512, 16)
        errors.append((dequantize(packed.weight, packed.scale, torch.float32) - weight).abs().mean().item())
    step = weight.view(512, 16, 64).abs().amax(-1).mean().item() / 127
    assert errors[0] == pytest.approx(step / 4, rel=0.03)
    assert errors[0] < errors[1] / 3
    assert Int8().quantize(weight[:, :96]).scale.shape == (512, 1)
