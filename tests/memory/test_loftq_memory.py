"""Quantising for LoRAs of LoftQ goes weight by weight: what it allocates does not grow with the file."""

from __future__ import annotations

from pathlib import Path

import torch
from allocations import allocated_peak

from musubi_tuner.common.safetensors_io import save_safetensors
from musubi_tuner.networks.file_tools.write_loftq import write_own_base

SIDE = 256


def peak_of(folder: Path, blocks: int) -> int:
    source = folder / f"{blocks}.safetensors"
    draws = torch.Generator().manual_seed(blocks)
    layers = [f"model.diffusion_model.transformer_blocks.{i}.attn1.to_q" for i in range(blocks)]
    save_safetensors({f"{layer}.weight": torch.randn(SIDE, SIDE, generator=draws) for layer in layers}, source)
    target = folder / f"{blocks}-nf4.safetensors"
    return allocated_peak(
        lambda: write_own_base(source, target, rank=8, iterations=2, block_size=32, preset="t2v", device="cpu")
    )


def test_peak_is_that_of_one_weight(tmp_path: Path):
    weight = 4 * SIDE * SIDE
    few, many = peak_of(tmp_path, 2), peak_of(tmp_path, 12)
    assert few > weight
    assert many < few + weight / 2
