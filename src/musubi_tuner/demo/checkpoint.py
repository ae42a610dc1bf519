"""A tiny random checkpoint in the official single-file layout, with true metadata.

Latents have the real channel counts (128 video, 8 x 16 audio), so that caches, samplers and the LoRA path run
as they do on the real model. The transformer is random, but arranged so that it learns: gates are open and the
output head undoes the input projection. The video VAE is a working autoencoder of coarse mosaics, so that
previews show what was learned; audio VAE, vocoder and connectors are random.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from musubi_tuner.common.safetensors_io import TensorInfo, save_safetensors
from musubi_tuner.common.seeding import generator
from musubi_tuner.models.audio_vae import (
    audio_vae_config,
    audio_vae_official_name,
    vocoder_config,
    vocoder_official_name,
)
from musubi_tuner.models.connectors import connectors_config, connectors_official_name
from musubi_tuner.models.ltx2.config import TransformerConfig, Version
from musubi_tuner.models.ltx2.transformer import LTX2Transformer
from musubi_tuner.models.video_vae_layout import diffusers_config, to_official_name

from .fit import fit_audio_statistics, fit_video_vae
from .gemma import HIDDEN_SIZE, NUM_LAYERS
from .mosaic import make_mosaic
from .sections import official_config

TRANSFORMER_PREFIX = "model.diffusion_model."
_BRANCH = 0.2


def write_checkpoint(path: Path, version: Version, clips: Sequence[Path] = ()) -> None:
    """Write the file (bf16, about 40 MB); the same bytes each time on one machine.

    Args:
        path: the safetensors file.
        version: "2.0" or "2.3".
        clips: videos whose latents get zero mean and unit deviation, and to which the decoder is fitted;
            without them the statistics are zeros and ones.
    """
    config = official_config(version)
    tensors = {
        **build_transformer(config["transformer"]),
        **build_connectors(config["transformer"]),
        **build_video_vae(config["vae"], clips),
        **build_audio_vae(config["audio_vae"], clips),
        **build_vocoder(config["vocoder"]),
    }
    metadata = {"config": json.dumps(config), "model_version": f"{version}.0"}
    save_safetensors({name: t.to(torch.bfloat16) for name, t in tensors.items()}, path, metadata)


def build_transformer(section: Mapping[str, Any]) -> dict[str, Tensor]:
    """Official keys of a random transformer that can learn."""
    model = LTX2Transformer(TransformerConfig.from_metadata(section, {"transformer_blocks.": ()}), "av")
    randomise(model, "transformer")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "scale_shift_table" in name:
                _open_gates(name, parameter)
            elif name.endswith(("to_out.0.weight", "ff.net.2.weight")):
                parameter *= _BRANCH  # what a random block says should not drown its input
        for stream in ("", "audio_"):
            _invert_head(getattr(model, f"{stream}patchify_proj"), getattr(model, f"{stream}proj_out"))
    return {TRANSFORMER_PREFIX + name: tensor for name, tensor in model.state_dict().items()}


def _open_gates(name: str, table: Tensor) -> None:
    """Small offsets everywhere, gates near one: a closed gate would hide every LoRA behind it."""
    table.copy_(0.1 * _normal(table.shape, "transformer", name))
    if "a2v_ca" in name:
        table[4] += 1.0  # scale, shift, scale, shift, gate
    elif "prompt" not in name and table.shape[0] in (6, 9):
        table[2::3] += 1.0  # (shift, scale, gate) of each sub-layer


def _invert_head(project: nn.Linear, head: nn.Linear) -> None:
    """Orthonormal columns in, their transpose out: what a token holds can be told at the end."""
    q, _ = torch.linalg.qr(
        _normal((max(project.weight.shape), min(project.weight.shape)), "head", project.weight.shape)
    )
    weight = q if project.weight.shape[0] >= project.weight.shape[1] else q.T
    project.weight.copy_(weight * math.sqrt(project.weight.shape[0] / project.weight.shape[1]))
    head.weight.copy_(weight.T * math.sqrt(project.weight.shape[1] / project.weight.shape[0]))
    project.bias.zero_()
    head.bias.zero_()


def build_connectors(section: Mapping[str, Any]) -> dict[str, Tensor]:
    """Official keys of random text connectors that fit the demo's Gemma."""
    module = LTX2TextConnectors(**connectors_config(section, _connector_shapes(section), hidden_size=HIDDEN_SIZE))
    randomise(module, "connectors")
    tensors = {}
    for name, tensor in module.state_dict().items():
        official = connectors_official_name(name)
        prefix = "" if official.startswith("text_embedding_projection.") else TRANSFORMER_PREFIX
        tensors[prefix + official] = tensor
    return tensors


def _connector_shapes(section: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """The shapes from which :func:`connectors_config` reads what the metadata does not say."""
    features = HIDDEN_SIZE * (NUM_LAYERS + 1)
    shapes: dict[str, tuple[int, ...]] = {
        f"{modality}_embeddings_connector.learnable_registers": (128, 1) for modality in ("video", "audio")
    }
    if section.get("caption_proj_before_connector"):
        shapes["text_embedding_projection.video_aggregate_embed.weight"] = (section["cross_attention_dim"], features)
        audio_width = section["audio_cross_attention_dim"]
        shapes["text_embedding_projection.audio_aggregate_embed.weight"] = (audio_width, features)
    else:
        shapes["text_embedding_projection.aggregate_embed.weight"] = (HIDDEN_SIZE, features)
    return {name: TensorInfo(torch.bfloat16, shape, 0, 0) for name, shape in shapes.items()}


def build_video_vae(section: Mapping[str, Any], clips: Sequence[Path] = ()) -> dict[str, Tensor]:
    """Official keys of the mosaic video VAE, with its statistics and last layer fitted to ``clips``."""
    config = diffusers_config(section)
    vae = AutoencoderKLLTX2Video(**config)
    randomise(vae, "video vae")
    make_mosaic(vae)
    if clips:
        fit_video_vae(vae, clips)
    tensors = {f"vae.{to_official_name(name, config)}": t for name, t in vae.state_dict().items()}
    # Real files carry statistics that nothing reads.
    tensors["vae.per_channel_statistics.mean-of-stds"] = torch.ones(config["latent_channels"])
    return tensors


def build_audio_vae(section: Mapping[str, Any], clips: Sequence[Path] = ()) -> dict[str, Tensor]:
    """Official keys of a random audio VAE, with its statistics fitted to the sound of ``clips``."""
    vae = AutoencoderKLLTX2Audio(**audio_vae_config(section))
    randomise(vae, "audio vae")
    if clips:
        fit_audio_statistics(vae, clips)
    return {f"audio_vae.{audio_vae_official_name(name)}": t for name, t in vae.state_dict().items()}


def build_vocoder(section: Mapping[str, Any]) -> dict[str, Tensor]:
    """Official keys of a random, quiet vocoder."""
    config = vocoder_config(section)
    module: nn.Module = LTX2VocoderWithBWE(**config) if "bwe" in section else LTX2Vocoder(**config)
    randomise(module, "vocoder")
    with torch.no_grad():
        if "bwe" in section:
            _fill_mel_bases(module.mel_stft, section["bwe"])
            _quieten(module, module.vocoder.conv_out)
            _quieten(module, module.bwe_generator.conv_out)
        else:
            _quieten(module, module.conv_out)
    return {f"vocoder.{vocoder_official_name(name)}": tensor for name, tensor in module.state_dict().items()}


def _quieten(module: nn.Module, convolution: nn.Conv1d, deviation: float = 0.03) -> None:
    """Scale the last convolution of a generator, so that a noisy mel gives quiet noise."""
    seen: list[Tensor] = []
    hook = convolution.register_forward_hook(lambda *call: seen.append(call[2]))
    module(2 * _normal((1, 2, 40, 64), "mel") - 6)
    hook.remove()
    convolution.weight.mul_(deviation / seen[0].std())


def _fill_mel_bases(mel_stft: nn.Module, section: Mapping[str, Any]) -> None:
    """The bases that real files store: Hann-windowed DFT rows (cosines, then negative sines) and Slaney mels."""
    n_fft = section["n_fft"]
    bins = n_fft // 2 + 1
    angle = 2 * math.pi / n_fft * torch.outer(torch.arange(bins), torch.arange(n_fft))
    basis = torch.cat([angle.cos(), -angle.sin()]) * torch.hann_window(n_fft)
    mel_stft.stft_fn.forward_basis.copy_(basis[:, None])
    mel_stft.stft_fn.inverse_basis.copy_(basis[:, None])
    filters = mel_filter_bank(
        num_frequency_bins=bins,
        num_mel_filters=section["num_mels"],
        min_frequency=0.0,
        max_frequency=section["input_sampling_rate"] / 2,
        sampling_rate=section["input_sampling_rate"],
        norm="slaney",
        mel_scale="slaney",
    )
    mel_stft.mel_basis.copy_(torch.from_numpy(filters).T)


@torch.no_grad()
def randomise(module: nn.Module, purpose: str) -> None:
    """Initialise every parameter from its name, whatever the order of construction.

    Matrices and kernels keep the scale of their input; norms are one, biases and log-scales zero. Values are
    rounded to bf16, since that is what will be stored.
    """
    for name, parameter in module.named_parameters():
        leaf = name.rpartition(".")[2]
        if parameter.ndim == 1:
            parameter.fill_(1.0 if leaf == "weight" else 0.0)
            continue
        value = _normal(parameter.shape, purpose, name)
        if leaf == "weight":
            value /= math.sqrt(_fan_in(module.get_submodule(name.rpartition(".")[0]), parameter))
        parameter.copy_(value.to(torch.bfloat16))


def _fan_in(owner: nn.Module, weight: Tensor) -> float:
    if isinstance(owner, nn.ConvTranspose1d):  # [in, out, k]; each output sample sees k / stride taps
        return weight.shape[0] * weight.shape[2] / owner.stride[0]
    return math.prod(weight.shape[1:])


def _normal(shape: Sequence[int], *keys: object) -> Tensor:
    return torch.randn(tuple(shape), generator=generator("demo", *keys))
