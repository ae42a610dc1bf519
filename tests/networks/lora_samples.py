"""Tiny transformers, random networks and LoRA files for the tests of this folder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from musubi_tuner.common.av import AV
from musubi_tuner.models.ltx2.config import TransformerConfig
from musubi_tuner.models.ltx2.inputs import ModalityInput
from musubi_tuner.models.ltx2.transformer import LTX2Transformer
from musubi_tuner.networks.files.lora_file import LoraFile, LoraModule
from musubi_tuner.networks.lora_ltx2 import create_network
from musubi_tuner.networks.lora_network import LoRANetwork

_VERSION_FLAGS = {
    "2.0": {},
    "2.3": {
        "apply_gated_attention": True,
        "cross_attention_adaln": True,
        "caption_proj_before_connector": True,
    },
}
_TINY = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "audio_in_channels": 6,
    "audio_out_channels": 6,
    "cross_attention_dim": 32,
    "audio_cross_attention_dim": 24,
    "caption_channels": 20,
}


def full_skeleton(version: str, mode: str) -> LTX2Transformer:
    """The 48-block transformer of a release without storage."""
    with torch.device("meta"):
        return LTX2Transformer(TransformerConfig(**_VERSION_FLAGS[version]), mode)


def tiny_transformer(version: str = "2.3", mode: str = "av", seed: int = 0) -> LTX2Transformer:
    """2 blocks of widths 32 (video) and 24 (audio), random weights, frozen."""
    torch.manual_seed(seed)
    model = LTX2Transformer(TransformerConfig(**_TINY, **_VERSION_FLAGS[version]), mode)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def tiny_inputs(version: str = "2.3", seed: int = 1) -> AV[ModalityInput]:
    g = torch.Generator().manual_seed(seed)

    def stream(tokens: int, channels: int, axes: int, width: int) -> ModalityInput:
        sigma = torch.rand(2, generator=g)
        start = torch.rand(2, axes, tokens, generator=g)
        return ModalityInput(
            tokens=torch.randn(2, tokens, channels, generator=g),
            timesteps=sigma[:, None],
            sigma=sigma,
            coords=torch.stack([start, start + 0.3], dim=-1),
            context=torch.randn(2, 7, width, generator=g),
        )

    widths = (20, 20) if version == "2.0" else (32, 24)
    return AV(stream(6, 4, 3, widths[0]), stream(5, 6, 1, widths[1]))


def run(model: nn.Module, version: str = "2.3") -> dict[str, Tensor]:
    return dict(model(tiny_inputs(version)).items())


def random_network(
    transformer: nn.Module, dim: int = 4, alpha: float = 2.0, seed: int = 2, **args: object
) -> LoRANetwork:
    """A network whose up factors are random too, so that it changes the output."""
    torch.manual_seed(seed)
    network = create_network(1.0, dim, alpha, transformer, **args)
    for module in network.modules_by_name.values():
        nn.init.normal_(module.lora_up.weight, std=0.2)
    return network


def random_lora(
    names: dict[str, tuple[int, int, int, float | None]], dtype: torch.dtype = torch.float32, seed: int = 0
) -> LoraFile:
    """``{canonical name: (rank, in, out, alpha)}`` to random factors."""
    g = torch.Generator().manual_seed(seed)
    modules = {
        name: LoraModule(torch.randn(r, k, generator=g).to(dtype), torch.randn(n, r, generator=g).to(dtype), alpha)
        for name, (r, k, n, alpha) in names.items()
    }
    return LoraFile(modules, {})
