"""The VAEs as caching uses them: decoded media in, latents on the CPU out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .latent_outputs import LatentRecipe


class VideoEncoder(Protocol):
    """What is used of :class:`musubi_tuner.models.video_vae.VideoVAE`."""

    @property
    def device(self) -> torch.device: ...
    def encode(self, pixels: Tensor) -> Tensor: ...


class AudioEncoder(Protocol):
    """What is used of :class:`musubi_tuner.models.audio_vae.AudioVAE`."""

    @property
    def device(self) -> torch.device: ...
    def encode(self, waveform: Tensor) -> Tensor: ...


class Encoders:
    """The VAEs with the dtypes of what they are to give."""

    def __init__(self, recipe: LatentRecipe, video_vae: VideoEncoder | None, audio_vae: AudioEncoder | None) -> None:
        self.recipe = recipe
        self._video_vae = video_vae
        self._audio_vae = audio_vae

    def pictures(self, clips: Sequence[np.ndarray]) -> Tensor:
        """Clips of one shape, uint8 ``[F, H, W, 3]`` each, to latents ``[B, C, F, H, W]``."""
        assert self._video_vae is not None
        pixels = torch.stack([torch.from_numpy(clip) for clip in clips])
        # Bytes travel to the device, floats are made there.
        video = pixels.to(self._video_vae.device).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)
        return self._video_vae.encode(video).to(self.recipe.video_dtype).cpu()

    def sound(self, waveform: np.ndarray) -> Tensor:
        """float32 ``[2, S]`` at 16 kHz to latents ``[8, T, 16]``."""
        assert self._audio_vae is not None
        batch = torch.from_numpy(waveform)[None].to(self._audio_vae.device)  # [1, 2, S]
        return self._audio_vae.encode(batch)[0].to(self.recipe.audio_dtype).cpu()


def explained(error: Exception) -> Exception:
    """``error``, or where memory ran out what to do about it."""
    if not isinstance(error, torch.OutOfMemoryError):
        return error
    torch.cuda.empty_cache()
    return MemoryError("out of memory; add --vae_chunk_size 16 or --vae_spatial_tile_size 512, or use --batch_size 1")
