"""Tiny diffusers components, written to a file under their official names (bf16, true metadata)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE
from torch import nn

from musubi_tuner.common.safetensors_io import save_safetensors
from musubi_tuner.demo.checkpoint import _connector_shapes, _fill_mel_bases, randomise
from musubi_tuner.demo.sections import official_config
from musubi_tuner.models.audio_vae import (
    audio_vae_config,
    audio_vae_official_name,
    vocoder_config,
    vocoder_official_name,
)
from musubi_tuner.models.connectors import connectors_config, connectors_official_name
from musubi_tuner.models.video_vae_layout import diffusers_config, to_official_name


@dataclass(frozen=True)
class Components:
    """The reference modules (fp32 with bf16-rounded weights) and the file they were written to."""

    path: Path
    version: str
    video_vae: AutoencoderKLLTX2Video
    audio_vae: AutoencoderKLLTX2Audio
    vocoder: nn.Module
    connectors: LTX2TextConnectors


def small_config(version: str) -> dict[str, dict[str, Any]]:
    """The demo's metadata with 16 video and 2 x 16 audio latent channels."""
    config = official_config(version)
    config["vae"]["latent_channels"] = 16
    for block, multiplier in zip(config["vae"]["encoder_blocks"][1::2], (2, 2, 1, 1), strict=True):
        block[1]["multiplier"] = multiplier
    config["audio_vae"]["model"]["params"]["ddconfig"] |= {"ch": 32, "z_channels": 2}
    return config


def write_components(path: Path, version: str) -> Components:
    config = small_config(version)
    vae_config = diffusers_config(config["vae"])
    video_vae = AutoencoderKLLTX2Video(**vae_config)
    audio_vae = AutoencoderKLLTX2Audio(**audio_vae_config(config["audio_vae"]))
    vocoder_arguments = vocoder_config(config["vocoder"])
    bwe = "bwe" in config["vocoder"]
    vocoder = (LTX2VocoderWithBWE if bwe else LTX2Vocoder)(**vocoder_arguments)
    section = config["transformer"]
    connectors = LTX2TextConnectors(**connectors_config(section, _connector_shapes(section), hidden_size=32))
    for name, module in (("video", video_vae), ("audio", audio_vae), ("voc", vocoder), ("text", connectors)):
        randomise(module, name)
        module.eval()
    with torch.no_grad():
        for vae in (video_vae, audio_vae):
            count = len(vae.latents_mean)
            vae.latents_mean.copy_(torch.linspace(-1, 1, count).bfloat16())
            vae.latents_std.copy_(torch.linspace(0.5, 2, count).bfloat16())
        if bwe:
            _fill_mel_bases(vocoder.mel_stft, config["vocoder"]["bwe"])
            for name, buffer in vocoder.named_buffers():
                if not name.startswith("resampler"):  # not in the file: computed when the module is built
                    buffer.copy_(buffer.bfloat16())
    tensors = {f"vae.{to_official_name(n, vae_config)}": t for n, t in video_vae.state_dict().items()}
    tensors["vae.per_channel_statistics.mean-of-stds"] = torch.ones(16)
    tensors |= {f"audio_vae.{audio_vae_official_name(n)}": t for n, t in audio_vae.state_dict().items()}
    tensors |= {f"vocoder.{vocoder_official_name(n)}": t for n, t in vocoder.state_dict().items()}
    for name, tensor in connectors.state_dict().items():
        official = connectors_official_name(name)
        prefix = "" if official.startswith("text_embedding_projection.") else "model.diffusion_model."
        tensors[prefix + official] = tensor
    metadata = {"config": json.dumps(config), "model_version": f"{version}.0"}
    save_safetensors({n: t.bfloat16() for n, t in tensors.items()}, path, metadata)
    return Components(path, version, video_vae, audio_vae, vocoder, connectors)
