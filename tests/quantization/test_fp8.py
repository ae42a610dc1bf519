"""FP8 with scales against its definition."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from musubi_tuner.quantization import rows
from musubi_tuner.quantization.fp8 import dequantize_fp8, quantize_fp8
from musubi_tuner.quantization.packed import Fp8

SHAPES = [(1, 1), (24, 1), (24, 4)]


@pytest.fixture
def weight() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 256, generator=generator) * 10 ** torch.linspace(-3, 2, 24).unsqueeze(1)


@pytest.mark.parametrize("shape", SHAPES)
def test_largest_value_is_448_and_exact(weight, shape):
    quantized, scale = quantize_fp8(weight, shape)
    groups = weight.view(shape[0], shape[1], -1) if shape[0] > 1 else weight.view(1, 1, -1)
    largest = groups.abs().amax(-1)
    assert_close(scale * 448, largest, rtol=1e-6, atol=0)
    restored = dequantize_fp8(quantized, scale, torch.float32).view_as(groups).abs().amax(-1)
    assert_close(restored, largest, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_half_a_step(weight, shape):
    """e4m3 has 3 bits after the leading one: a relative error of 1/16, or half of 2^-9 of the scale below 2^-6."""
    quantized, scale = quantize_fp8(weight, shape)
    restored = dequantize_fp8(quantized, scale, torch.float32)
    steps = scale.repeat_interleave(256 // shape[1], dim=1).expand_as(weight)
    bound = torch.maximum(weight.abs() / 16, steps * 2**-10)
    assert ((weight - restored).abs() <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_rounded_once(weight, shape, dtype, monkeypatch):
    monkeypatch.setattr(rows, "_ELEMENTS", 5 * 256)
    quantized, scale = quantize_fp8(weight, shape)
    exact = quantized.float().view(24, shape[1], -1) * scale.unsqueeze(-1)
    assert torch.equal(dequantize_fp8(quantized, scale, dtype), exact.view(24, 256).to(dtype))


def test_zeros_stay_zeros():
    assert not dequantize_fp8(*quantize_fp8(torch.zeros(3, 64), (3, 1)), torch.bfloat16).any()


def test_rows_without_whole_blocks_have_one_scale():
    assert Fp8().quantize(torch.randn(4, 128)).scale.shape == (4, 2)
    assert Fp8().quantize(torch.randn(4, 96)).scale.shape == (4, 1)
    assert Fp8(block_size=None).quantize(torch.randn(4, 128)).scale.shape == (4, 1)
