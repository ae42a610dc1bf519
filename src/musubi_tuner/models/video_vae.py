"""The causal video VAE: pixels to normalised latents and back, whole or in tiles.

The network is diffusers' ``AutoencoderKLLTX2Video``; the weights come from the official single file.
Latents are normalised per channel, which is all that the transformer, the caches and the samplers ever see.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from musubi_tuner.common.errors import UserError

from .checkpoint import Checkpoint
from .component_loading import Component, build_empty, fill, read_renamed
from .vae_tiling import Tiling, tiled_decode, tiled_encode
from .video_vae_layout import KNOWN_CONFIGS, diffusers_config, infer_config, to_diffusers_name

if TYPE_CHECKING:  # diffusers takes seconds to import, and few runs come to a VAE
    from diffusers import AutoencoderKLLTX2Video
    from diffusers.models.autoencoders.autoencoder_kl_ltx2 import LTX2VideoCausalConv3d


class VideoVAE(Component):
    """Encoder and decoder, either of which may be absent.

    Attributes:
        spatial_stride: pixels a latent cell (32).
        temporal_stride: frames a latent frame (8); the first latent frame is one pixel frame.
        latent_channels: 128.
    """

    def __init__(self, vae: AutoencoderKLLTX2Video) -> None:
        super().__init__(vae)
        self.spatial_stride: int = vae.spatial_compression_ratio
        self.temporal_stride: int = vae.temporal_compression_ratio
        self.latent_channels: int = vae.config.latent_channels
        self._encode_tiling = Tiling()
        self._decode_tiling = Tiling()

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] in [-1, 1] to normalised latents [B, 128, (F-1)/8+1, H/32, W/32], fp32.

        Deterministic (the mode of the posterior). Latent frame 0 depends on pixel frame 0 only.

        Raises:
            UserError: F is not 8k+1, or H or W is not a multiple of 32.
        """
        self._check_pixels(pixels)
        mode = tiled_encode(
            lambda tile: self._module.encode(tile).latent_dist.mode(),
            pixels.to(self.device, self.dtype),
            self._encode_tiling,
        )
        mean, std = self._statistics()
        return (mode.float() - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, 128, f, h, w] to pixels [B, 3, 8(f-1)+1, 32h, 32w] in [-1, 1].

        Raises:
            UserError: a picture of a single latent row or column, which LTX-2.0's decoder cannot pad.
        """
        if self._module.decoder is None:
            raise ValueError("this VideoVAE was loaded without its decoder")
        reflects = self._module.config.decoder_spatial_padding_mode == "reflect"
        if reflects and min(latents.shape[3:]) < 2:
            height, width = (size * self.spatial_stride for size in latents.shape[3:])
            raise UserError(f"the LTX-2.0 video VAE decodes at least 64x64 pixels, got {width}x{height}")
        mean, std = self._statistics()
        latents = (latents.to(self.device, torch.float32) * std + mean).to(self.dtype)
        pixels = tiled_decode(lambda tile: self._module.decode(tile).sample, latents, self._decode_tiling)
        return pixels.clamp_(-1, 1)

    def enable_encode_tiling(
        self,
        *,
        spatial_tile: int = 0,
        spatial_overlap: int = 64,
        temporal_tile: int = 0,
        temporal_overlap: int = 24,
    ) -> None:
        """Encode in overlapping tiles; see :class:`Tiling`."""
        self._encode_tiling = Tiling(spatial_tile, spatial_overlap, temporal_tile, temporal_overlap)

    def enable_decode_tiling(
        self,
        *,
        spatial_tile: int = 0,
        spatial_overlap: int = 64,
        temporal_tile: int = 0,
        temporal_overlap: int = 8,
    ) -> None:
        """Decode in overlapping tiles, linearly cross-faded; see :class:`Tiling`."""
        self._decode_tiling = Tiling(spatial_tile, spatial_overlap, temporal_tile, temporal_overlap)

    def set_chunk_size(self, frames: int | None) -> None:
        """Run every encoder convolution over ``frames`` frames at a time, with the same result.

        Counted at each layer's own temporal resolution; only the workspace of the convolutions shrinks.
        ``None`` or 0 switches it off.
        """
        if frames is not None and frames < 0:
            raise UserError(f"VAE chunk size {frames}: expected a positive number of frames, or 0 for whole clips")
        for module in self._encoder_convolutions():
            module.__dict__.pop("forward", None)
            if frames:
                module.forward = types.MethodType(_chunked_forward(frames), module)

    def _encoder_convolutions(self) -> list[nn.Module]:
        from diffusers.models.autoencoders.autoencoder_kl_ltx2 import LTX2VideoCausalConv3d

        encoder = self._module.encoder
        return [] if encoder is None else [m for m in encoder.modules() if isinstance(m, LTX2VideoCausalConv3d)]

    def _statistics(self) -> tuple[Tensor, Tensor]:
        shape = (1, -1, 1, 1, 1)
        return self._module.latents_mean.view(shape), self._module.latents_std.view(shape)

    def _check_pixels(self, pixels: Tensor) -> None:
        if self._module.encoder is None:
            raise ValueError("this VideoVAE was loaded without its encoder")
        frames, height, width = pixels.shape[2:]
        if (frames - 1) % self.temporal_stride:
            raise UserError(
                f"the video VAE takes {self.temporal_stride}k+1 frames (1, {self.temporal_stride + 1}, "
                f"{2 * self.temporal_stride + 1}, ...), got {frames}"
            )
        if height % self.spatial_stride or width % self.spatial_stride:
            raise UserError(
                f"the video VAE takes widths and heights that are multiples of {self.spatial_stride}, "
                f"got {width}x{height}"
            )


def _chunked_forward(frames: int):
    """A forward of ``LTX2VideoCausalConv3d`` that carries the last k-1 input frames from chunk to chunk.

    Exact because no convolution of the encoder has a temporal stride.
    """

    def forward(self: LTX2VideoCausalConv3d, hidden_states: Tensor, causal: bool = True) -> Tensor:
        if not causal or hidden_states.shape[2] <= frames:
            return type(self).forward(self, hidden_states, causal=causal)
        history = self.kernel_size[0] - 1
        carried = hidden_states[:, :, :1].expand(-1, -1, history, -1, -1)
        outputs = []
        for chunk in hidden_states.split(frames, dim=2):
            padded = torch.cat([carried, chunk], dim=2)
            outputs.append(self.conv(padded))
            carried = padded[:, :, padded.shape[2] - history :]
        return torch.cat(outputs, dim=2)

    return forward


def load_video_vae(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    encoder: bool = True,
    decoder: bool = True,
) -> VideoVAE:
    """Read the wanted halves of the video VAE; the other one is neither read nor allocated.

    Raises:
        UserError: the file has no such half, or one that is not supported.
    """
    from diffusers import AutoencoderKLLTX2Video

    names: dict[str, str] = {}
    if encoder:
        checkpoint.require("video_vae_encoder", "encoding videos")
        names |= checkpoint.component_keys("video_vae_encoder")
    if decoder:
        checkpoint.require("video_vae_decoder", "decoding videos")
        names |= checkpoint.component_keys("video_vae_decoder")
    section = dict(checkpoint.config.get("vae") or infer_config(names))
    if not decoder:  # LTX-2.5 files may have a decoder of another kind, which need not be understood here
        section |= {"decoder": None, "decoder_blocks": KNOWN_CONFIGS["2.3"]["decoder_blocks"]}
    if any(name.startswith("decoder.last_time_embedder.") for name in names):
        raise UserError(f"{checkpoint.path}: timestep-conditioned video VAE decoders are not supported")
    config = diffusers_config(section)

    vae = build_empty(lambda: AutoencoderKLLTX2Video(**config))
    if not encoder:
        vae.encoder = None
    if not decoder:
        vae.decoder = None
    renamed = {new: key for name, key in names.items() if (new := to_diffusers_name(name, config)) is not None}
    # Statistics stay fp32: they are tiny, and fp16 would round them.
    statistics = {name: renamed.pop(name) for name in ("latents_mean", "latents_std") if name in renamed}
    tensors = dict(read_renamed(checkpoint, renamed, dtype=dtype, device=device, desc="video VAE"))
    tensors |= read_renamed(checkpoint, statistics, dtype=torch.float32, device=device, desc="video VAE")
    return VideoVAE(fill(vae, tensors.items(), source=f"{checkpoint.path}: video VAE", device=device))
