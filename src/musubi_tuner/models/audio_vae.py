"""Audio: waveform to log-mel to normalised latents, and back through the vocoder.

The networks are diffusers' ``AutoencoderKLLTX2Audio``, ``LTX2Vocoder`` and ``LTX2VocoderWithBWE`` (with
bandwidth extension to 48 kHz); the weights come from the official single file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from musubi_tuner.common.errors import UserError

from .checkpoint import Checkpoint
from .component_loading import Component, build_empty, fill, read_renamed

if TYPE_CHECKING:  # diffusers takes seconds to import, and few runs come to a VAE
    from diffusers import AutoencoderKLLTX2Audio
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE

SAMPLE_RATE = 16000
N_FFT = 1024
HOP_LENGTH = 160
MEL_BINS = 64
MEL_MAX_HZ = 8000
MEL_FLOOR = 1e-5
MEL_FRAMES_PER_LATENT = 4


def log_mel(waveform: Tensor) -> Tensor:
    """Log-mel spectrogram of the audio VAE: [B, C, S] fp32 at 16 kHz to [B, C, 1 + S // 160, 64].

    Hann window of 1024, centred with reflection, magnitude (not power), 64 Slaney filters from 0 to 8 kHz
    with Slaney normalisation, natural logarithm floored at 1e-5.

    Raises:
        UserError: fewer than 513 samples, which reflection cannot pad.
    """
    if waveform.shape[-1] <= N_FFT // 2:
        raise UserError(
            f"the audio has {waveform.shape[-1]} samples at {SAMPLE_RATE} Hz; at least {N_FFT // 2 + 1} are needed"
        )
    waveform = waveform.float()
    window = torch.hann_window(N_FFT, device=waveform.device)
    spectrum = torch.stft(
        waveform.flatten(0, 1),
        N_FFT,
        hop_length=HOP_LENGTH,
        window=window,
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )  # [B*C, 513, T]
    mel = spectrum.abs().transpose(1, 2) @ _mel_filters().to(waveform.device)  # [B*C, T, 64]
    return mel.clamp(min=MEL_FLOOR).log().unflatten(0, waveform.shape[:2])


@lru_cache(maxsize=1)
def _mel_filters() -> Tensor:
    """[513, 64]"""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        num_frequency_bins=N_FFT // 2 + 1,
        num_mel_filters=MEL_BINS,
        min_frequency=0.0,
        max_frequency=float(MEL_MAX_HZ),
        sampling_rate=SAMPLE_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters).float()


def latent_length(samples: int) -> int:
    """Latent steps that :meth:`AudioVAE.encode` gives for ``samples`` at 16 kHz (16000 give 26)."""
    return samples // HOP_LENGTH // MEL_FRAMES_PER_LATENT + 1


class AudioVAE(Component):
    """Waveforms to normalised latents, and latents to log-mels.

    Attributes:
        sample_rate: 16000.
        latent_channels: 8.
    """

    def __init__(self, vae: AutoencoderKLLTX2Audio) -> None:
        super().__init__(vae)
        self.sample_rate: int = vae.config.sample_rate
        self.latent_channels: int = vae.config.latent_channels

    @torch.no_grad()
    def encode(self, waveform: Tensor) -> Tensor:
        """Stereo [B, 2, S] in [-1, 1] at 16 kHz to normalised latents [B, 8, T, 16], fp32.

        T is :func:`latent_length` of S. The mel is computed in fp32 whatever the dtype of the weights.
        """
        channels = self._module.config.in_channels
        if waveform.ndim != 3 or waveform.shape[1] != channels:
            raise ValueError(f"expected a waveform [B, {channels}, S], got {list(waveform.shape)}")
        mel = log_mel(waveform.to(self.device))
        latents = self._module.encode(mel.to(self.dtype)).latent_dist.mode().float()
        mean, std = self._statistics()
        return (latents - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, 8, T, 16] to a log-mel [B, 2, 4T - 3, 64], fp32."""
        mean, std = self._statistics()
        latents = latents.to(self.device, torch.float32) * std + mean
        return self._module.decode(latents.to(self.dtype)).sample.float()

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation [1, 8, 1, 16]; they are stored channel-major for (channel, mel bin)."""
        shape = (1, self.latent_channels, 1, -1)
        return self._module.latents_mean.view(shape), self._module.latents_std.view(shape)


class Vocoder(Component):
    """Log-mels to stereo sound, always in fp32 (bf16 degrades the spectrum by tens of percent).

    Attributes:
        sample_rate: of the sound: 24000 (LTX-2.0) or 48000.
    """

    def __init__(self, vocoder: LTX2Vocoder | LTX2VocoderWithBWE) -> None:
        super().__init__(vocoder)
        self.sample_rate: int = vocoder.config.output_sampling_rate

    @torch.no_grad()
    def to_waveform(self, mel: Tensor) -> Tensor:
        """Log-mel [B, 2, T, 64] to sound [B, 2, N] in [-1, 1], fp32; N = T * sample_rate / 100."""
        parameter = next(self._module.parameters())
        with torch.autocast(parameter.device.type, enabled=False):
            return self._module(mel.to(parameter.device, torch.float32))


def audio_vae_config(section: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``AutoencoderKLLTX2Audio`` from the metadata section ``audio_vae`` (``{}``: as released)."""
    params = section.get("model", {}).get("params", {})
    network = params.get("ddconfig", {})
    preprocessing = section.get("preprocessing", {})
    stft = preprocessing.get("stft", {})
    _check_front_end(params, preprocessing)
    return {
        "base_channels": network.get("ch", 128),
        "output_channels": network.get("out_ch", 2),
        "latent_channels": network.get("z_channels", 8),
        "ch_mult": tuple(network.get("ch_mult", (1, 2, 4))),
        "num_res_blocks": network.get("num_res_blocks", 2),
        # Empty means none to diffusers only as None. The released VAEs have no attention.
        "attn_resolutions": tuple(network.get("attn_resolutions") or ()) or None,
        "in_channels": network.get("in_channels", 2),
        "resolution": network.get("resolution", 256),
        "norm_type": network.get("norm_type", "pixel"),
        "causality_axis": network.get("causality_axis", "height"),
        "dropout": network.get("dropout", 0.0),
        "mid_block_add_attention": network.get("mid_block_add_attention", bool(network)),
        "double_z": network.get("double_z", True),
        "sample_rate": params.get("sampling_rate", SAMPLE_RATE),
        "mel_hop_length": stft.get("hop_length", HOP_LENGTH),
        "is_causal": stft.get("causal", True),
        "mel_bins": network.get("mel_bins")
        or preprocessing.get("mel", {}).get("n_mel_channels")
        or section.get("variables", {}).get("mel_bins")
        or MEL_BINS,
    }


def _check_front_end(params: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> None:
    """Refuse a VAE that was trained on other spectrograms than :func:`log_mel` makes."""
    stft, mel = preprocessing.get("stft", {}), preprocessing.get("mel", {})
    found = {
        "sampling_rate": (params.get("sampling_rate"), SAMPLE_RATE),
        "stft.filter_length": (stft.get("filter_length"), N_FFT),
        "stft.hop_length": (stft.get("hop_length"), HOP_LENGTH),
        "mel.n_mel_channels": (mel.get("n_mel_channels"), MEL_BINS),
        "mel.mel_fmax": (mel.get("mel_fmax"), MEL_MAX_HZ),
    }
    for name, (value, known) in found.items():
        if value is not None and value != known:
            raise UserError(f"audio VAE: {name} is {value} in the checkpoint's metadata; only {known} is known")


_STATISTICS = {
    "per_channel_statistics.mean-of-means": "latents_mean",
    "per_channel_statistics.std-of-means": "latents_std",
}


def audio_vae_name(name: str) -> str | None:
    """diffusers' name of an official parameter (``audio_vae.`` removed); ``None`` for one that is not used."""
    if name.startswith("per_channel_statistics."):
        return _STATISTICS.get(name)
    return name


def audio_vae_official_name(name: str) -> str:
    """Inverse of :func:`audio_vae_name`."""
    return {new: old for old, new in _STATISTICS.items()}.get(name, name)


def load_audio_vae(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> AudioVAE:
    """Read the audio VAE.

    Raises:
        UserError: the file has none, or one that is not supported.
    """
    from diffusers import AutoencoderKLLTX2Audio

    checkpoint.require("audio_vae", "audio")
    config = audio_vae_config(checkpoint.config.get("audio_vae", {}))
    vae = build_empty(lambda: AutoencoderKLLTX2Audio(**config))
    renamed = {
        new: key
        for name, key in checkpoint.component_keys("audio_vae").items()
        if (new := audio_vae_name(name)) is not None
    }
    statistics = {name: renamed.pop(name) for name in _STATISTICS.values() if name in renamed}
    tensors = dict(read_renamed(checkpoint, renamed, dtype=dtype, device=device, desc="audio VAE"))
    tensors |= read_renamed(checkpoint, statistics, dtype=torch.float32, device=device, desc="audio VAE")
    return AudioVAE(fill(vae, tensors.items(), source=f"{checkpoint.path}: audio VAE", device=device))


# What the released LTX-2.3 file says, for files that have lost their metadata.
_KNOWN_BWE: dict[str, Any] = {
    "vocoder": {
        "upsample_initial_channel": 1536,
        "resblock": "AMP1",
        "activation": "snakebeta",
        "upsample_rates": [5, 2, 2, 2, 2, 2],
        "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
        "use_tanh_at_final": False,
        "use_bias_at_final": False,
    },
    "bwe": {
        "upsample_initial_channel": 512,
        "resblock": "AMP1",
        "activation": "snakebeta",
        "upsample_rates": [6, 5, 2, 2, 2],
        "upsample_kernel_sizes": [12, 11, 4, 4, 4],
        "use_tanh_at_final": False,
        "use_bias_at_final": False,
        "n_fft": 512,
        "hop_length": 80,
        "num_mels": 64,
        "input_sampling_rate": 16000,
        "output_sampling_rate": 48000,
    },
}


def vocoder_config(section: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``LTX2Vocoder`` or, where the section has ``bwe``, of ``LTX2VocoderWithBWE``."""
    if "bwe" not in section:
        rate = section.get("output_sampling_rate") or section.get("output_sample_rate") or 24000
        return _generator_config(section, final="clamp") | {"output_sampling_rate": rate}
    bwe = section["bwe"]
    # diffusers' own converter leaves the inner output unbounded; the official network clamps it.
    inner = _generator_config(section.get("vocoder", {}), final="clamp")
    outer = {f"bwe_{key}": value for key, value in _generator_config(bwe, final=None).items()}
    return {
        **inner,
        **outer,
        "filter_length": bwe["n_fft"],
        "window_length": bwe.get("win_size", bwe["n_fft"]),
        "hop_length": bwe["hop_length"],
        "num_mel_channels": bwe.get("num_mels", MEL_BINS),
        "input_sampling_rate": bwe.get("input_sampling_rate", SAMPLE_RATE),
        "output_sampling_rate": bwe.get("output_sampling_rate", 48000),
    }


def _generator_config(section: Mapping[str, Any], *, final: str | None) -> dict[str, Any]:
    """One generator. ``final`` bounds the output where the section does not ask for tanh."""
    block = str(section.get("resblock", "1"))
    if block not in ("1", "AMP1"):
        raise UserError(f"vocoder: resblock is {block!r} in the checkpoint's metadata; known: '1', 'AMP1'")
    use_tanh = section.get("use_tanh_at_final", True) and (final is not None)
    return {
        "in_channels": 2 * MEL_BINS,
        "out_channels": 2,
        "hidden_channels": section.get("upsample_initial_channel", 1024),
        "upsample_factors": list(section.get("upsample_rates", (6, 5, 2, 2, 2))),
        "upsample_kernel_sizes": list(section.get("upsample_kernel_sizes", (16, 15, 8, 4, 4))),
        "resnet_kernel_sizes": list(section.get("resblock_kernel_sizes", (3, 7, 11))),
        "resnet_dilations": [list(d) for d in section.get("resblock_dilation_sizes", ((1, 3, 5),) * 3)],
        "act_fn": "leaky_relu" if block == "1" else section.get("activation", "snakebeta"),
        "antialias": block == "AMP1",
        "antialias_ratio": 2,
        "antialias_kernel_size": 12,
        "final_act_fn": "tanh" if use_tanh else final,
        "final_bias": bool(section.get("use_bias_at_final", True)),
    }


# Official to diffusers, anchored on dots: "ups." is also the head of "upsample.".
_VOCODER_PARTS = (
    ("ups.", "upsamplers."),
    ("resblocks.", "resnets."),
    ("conv_pre.", "conv_in."),
    ("conv_post.", "conv_out."),
    ("act_post.", "act_out."),
)


def vocoder_name(name: str) -> str:
    """diffusers' name of an official vocoder parameter (the first ``vocoder.`` removed)."""
    for official, ours in _VOCODER_PARTS:
        name = re.sub(rf"(^|\.){re.escape(official)}", rf"\1{ours}", name)
    return name.replace(".downsample.lowpass.", ".downsample.")


def vocoder_official_name(name: str) -> str:
    """Inverse of :func:`vocoder_name`."""
    for official, ours in _VOCODER_PARTS:
        name = re.sub(rf"(^|\.){re.escape(ours)}", rf"\1{official}", name)
    return name.replace(".downsample.", ".downsample.lowpass.")


def load_vocoder(checkpoint: Checkpoint, *, device: torch.device | str = "cpu") -> Vocoder:
    """Read the vocoder, with bandwidth extension where the file has it.

    Raises:
        UserError: the file has none, or one that is not supported.
    """
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE

    checkpoint.require("vocoder", "decoding audio")
    keys = checkpoint.component_keys("vocoder")
    has_bwe = any(name.startswith("bwe_generator.") for name in keys)
    section = checkpoint.config.get("vocoder") or (_KNOWN_BWE if has_bwe else {})
    config = vocoder_config(section)
    cls = LTX2VocoderWithBWE if "bwe" in section else LTX2Vocoder
    vocoder = build_empty(lambda: cls(**config))
    renamed = {vocoder_name(name): key for name, key in keys.items()}
    tensors = read_renamed(checkpoint, renamed, dtype=torch.float32, device=device, desc="vocoder")
    return Vocoder(fill(vocoder, tensors, source=f"{checkpoint.path}: vocoder", device=device))
