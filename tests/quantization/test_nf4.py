"""NF4 against bitsandbytes and against its definition."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from musubi_tuner.quantization import rows
from musubi_tuner.quantization.nf4 import (
    LEVELS,
    dequantize_nf4,
    dequantize_with_bitsandbytes,
    quantize_nf4,
)

bnb = pytest.importorskip("bitsandbytes.functional")


@pytest.fixture
def weight() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 512, generator=generator) * torch.rand(96, 1, generator=generator)
    weight[3, :128] = 0
    weight[5] *= 1e-6
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [32, 64, 128, 512])
def test_codes_and_scales_are_those_of_bitsandbytes(weight, block_size, dtype):
    weight = weight.to(dtype)
    packed, absmax = quantize_nf4(weight, block_size)
    theirs, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
    assert torch.equal(packed.flatten(), theirs.flatten())
    assert torch.equal(absmax.flatten(), state.absmax)
    assert_close(dequantize_nf4(packed, absmax, dtype), bnb.dequantize_4bit(theirs, state), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_kernels_agree(weight, dtype):
    packed, absmax = quantize_nf4(weight, 64)
    ours = dequantize_nf4(packed, absmax, dtype)
    assert torch.equal(dequantize_with_bitsandbytes(packed, absmax, dtype), ours)


def test_chunks_of_rows_change_nothing(weight, monkeypatch):
    whole = quantize_nf4(weight, 32)
    monkeypatch.setattr(rows, "_ELEMENTS", 5 * 512)
    parts = quantize_nf4(weight, 32)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert torch.equal(dequantize_nf4(*parts, torch.float32), dequantize_nf4(*whole, torch.float32))


def test_levels_are_fixed_points():
    weight = torch.tensor(LEVELS).repeat(2, 2) * torch.tensor([[1.0], [0.5]])
    packed, absmax = quantize_nf4(weight, 32)
    assert packed[0, :3].tolist() == [0x01, 0x23, 0x45], "the first of a pair in the high bits"
    assert absmax.tolist() == [[1.0], [0.5]]
    assert torch.equal(dequantize_nf4(packed, absmax, torch.float32), weight)


def test_every_value_goes_to_its_nearest_level():
    weight = torch.linspace(-1, 1, 4096).view(1, -1)
    restored = dequantize_nf4(*quantize_nf4(weight, 4096), torch.float32)
    levels = torch.tensor(LEVELS)
    nearest = (weight.T - levels).abs().amin(dim=-1)
    assert_close((weight - restored).abs().flatten(), nearest, rtol=0, atol=1e-6)


def test_zeros_stay_zeros():
    weight = torch.zeros(2, 64)
    assert not dequantize_nf4(*quantize_nf4(weight, 32), torch.bfloat16).any()
