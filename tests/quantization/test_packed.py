"""The error of each format on normal weights, within 2% of the published figures."""

from __future__ import annotations

import pytest
import torch

from musubi_tuner.quantization.packed import Fp8, Int8, Nf4, dequantize, packed_bytes

PUBLISHED = {  # mean absolute error, SNR in dB, 1 - cosine
    "fp8": (Fp8(), 0.0171, 32.0, 1 - 0.999686),
    "nf4": (Nf4(32), 0.0678, 21.2, 1 - 0.996188),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_error_on_normal_weights(name):
    method, mae, snr, distance = PUBLISHED[name]
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    packed = method.quantize(weight)
    assert packed.shape == (1024, 1024)
    restored = dequantize(packed.weight, packed.scale, torch.float32)
    noise = weight - restored
    assert noise.abs().mean().item() == pytest.approx(mae, rel=0.02)
    assert 10 * torch.log10(weight.square().sum() / noise.square().sum()).item() == pytest.approx(snr, abs=0.1)
    cosine = torch.cosine_similarity(weight.double().flatten(), restored.double().flatten(), dim=0).item()
    assert 1 - cosine == pytest.approx(distance, rel=0.02)


def test_what_fits():
    assert Nf4(64).fits((3, 128))
    assert not Nf4(64).fits((3, 96))
    assert Fp8().fits((3, 96))
    assert not Fp8().fits((96,))


@pytest.mark.parametrize("method", [Nf4(), Nf4(64), Fp8(), Fp8(None), Int8()], ids=str)
@pytest.mark.parametrize("shape", [(48, 128), (16, 192)])
def test_bytes_are_known_from_the_shape(method, shape):
    packed = method.quantize(torch.ones(shape))
    assert packed_bytes(method, shape) == packed.weight.nbytes + packed.scale.nbytes


def test_bytes_of_rows_that_are_no_whole_number_of_blocks():
    for method in (Fp8(), Int8()):
        packed = method.quantize(torch.ones(16, 80))
        assert packed_bytes(method, (16, 80)) == packed.weight.nbytes + packed.scale.nbytes == 16 * 80 + 16 * 4
