"""Tiny checkpoints on disk, dense and FP8, and what is in them."""

from __future__ import annotations

import json
from pathlib import Path

import ltx2_tiny
import torch
from torch import Tensor

from musubi_tuner.common.safetensors_io import SafetensorsFile, save_safetensors
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.ltx2.load import load_transformer
from musubi_tuner.models.ltx2.quantize import is_target
from musubi_tuner.quantization.fp8 import quantize_fp8

PREFIX = "model.diffusion_model."


def tiny_weights(version: str = "2.3", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The transformer's tensors by official name."""
    return dict(ltx2_tiny.tiny_model(ltx2_tiny.tiny_config(version), dtype=dtype).state_dict())


def save_checkpoint(
    path: Path, weights: dict[str, Tensor], version: str = "2.3", extra: dict[str, Tensor] | None = None
) -> Path:
    """A file in the official layout: the transformer, a tensor of the VAE and ``extra`` by key."""
    config = {"transformer": ltx2_tiny.tiny_section(version)}
    tensors = {PREFIX + name: t for name, t in weights.items()}
    tensors["vae.decoder.conv_in.conv.weight"] = torch.arange(8.0).view(2, 4)
    save_safetensors(tensors | (extra or {}), path, {"config": json.dumps(config), "model_version": version})
    return path


def save_fp8_checkpoint(path: Path, weights: dict[str, Tensor], *, suffix: str = ".weight_scale") -> Path:
    """Block 0 in FP8 with a scale for each weight and for its inputs, block 1 as it is."""
    packed, extra = {}, {}
    for name, tensor in weights.items():
        packed[name] = tensor
        if is_target(name) and name.startswith("transformer_blocks.0."):
            packed[name], scale = quantize_fp8(tensor, (1, 1))
            layer = PREFIX + name.removesuffix(".weight")
            extra[layer + suffix] = scale.reshape(())
            extra[layer + ".input_scale"] = torch.tensor(0.5)
    return save_checkpoint(path, packed, extra=extra)


def contents(path: Path) -> dict[str, Tensor]:
    return dict(SafetensorsFile(path).read())


def load(path: Path):
    """The transformer of a checkpoint, dense in float32."""
    return load_transformer(Checkpoint.open(path), mode="av", dtype=torch.float32, device="cpu").eval()
