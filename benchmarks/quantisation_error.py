"""What quantising costs in accuracy: the error of the weights that come back, on normal random weights.

Mean absolute error, signal-to-noise ratio and cosine similarity of W against dequantised W, W ~ N(0, 1) of the shape of
a linear layer of the big model, and bytes a weight with scales. With LoftQ the factors of the LoRA count as part of the
weight that comes back, but not among its bytes.

    python benchmarks/quantisation_error.py
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from musubi_tuner.common.tables import format_table
from musubi_tuner.quantization.fp8 import quantize_fp8
from musubi_tuner.quantization.loftq import quantize_with_factors
from musubi_tuner.quantization.packed import Fp8, Int8, Method, Nf4, Packed, dequantize


class _PerTensor:
    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2

    def quantize(self, weight: Tensor) -> Packed:
        return Packed(*quantize_fp8(weight, (1, 1)))


METHODS: dict[str, Method] = {
    "--fp8_base --fp8_scaled (64 values a scale)": Fp8(),
    "fp8, a scale for each row": Fp8(None),
    "fp8, one scale": _PerTensor(),
    "--int8_base (64 values a scale)": Int8(),
    "--nf4_base": Nf4(),
    "--nf4_base --nf4_block_size 64": Nf4(64),
    "--nf4_base --nf4_block_size 128": Nf4(128),
}
LOFTQ_RANK = 32


def error(weight: Tensor, restored: Tensor) -> tuple[float, float, float]:
    """MAE, SNR in dB, cosine similarity; in fp64."""
    weight, restored = weight.double().flatten(), restored.double().flatten()
    noise = weight - restored
    snr = 10 * torch.log10(weight.square().sum() / noise.square().sum())
    cosine = torch.dot(weight, restored) / (weight.norm() * restored.norm())
    return noise.abs().mean().item(), snr.item(), cosine.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns")
    size = parser.parse_args().size
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    rows = [_row("bf16", error(weight, weight.bfloat16()), 2.0)]
    for name, method in METHODS.items():
        packed = method.quantize(weight)
        restored = dequantize(packed.weight, packed.scale, torch.float32)
        num_bytes = (packed.weight.nbytes + packed.scale.nbytes) / weight.numel()
        rows.append(_row(name, error(weight, restored), num_bytes))
    for iterations in (1, 2, 5):
        packed, factors = quantize_with_factors(
            weight, Nf4().quantize, rank=LOFTQ_RANK, iterations=iterations, name="benchmark"
        )
        restored = packed.dense(torch.float32) + factors.up @ factors.down
        num_bytes = (packed.weight.nbytes + packed.scale.nbytes) / weight.numel()
        name = f"--nf4_base --loftq_init --loftq_iters {iterations}, rank {LOFTQ_RANK}"
        rows.append(_row(name, error(weight, restored), num_bytes))
    print(format_table(["method", "MAE", "SNR", "cosine", "bytes a weight"], rows, f"N(0, 1), {size} x {size}"))


def _row(name: str, measured: tuple[float, float, float], num_bytes: float) -> list[str]:
    mae, snr, cosine = measured
    return [name, f"{mae:.5f}", f"{snr:.1f} dB", f"{cosine:.6f}", f"{num_bytes:.4f}"]


if __name__ == "__main__":
    main()
