"""Latents to pictures and sound."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.models.audio_vae import AudioVAE, Vocoder, load_audio_vae, load_vocoder
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.video_vae import Tiling, VideoVAE, load_video_vae


@dataclass(frozen=True)
class Sound:
    """A stereo waveform."""

    waveform: Tensor  # [2, N] in [-1, 1], fp32
    sample_rate: int

    @property
    def seconds(self) -> float:
        return self.waveform.shape[1] / self.sample_rate


class Decoders:
    """The decoders of a checkpoint: loaded when first needed, on the CPU between uses.

    Args:
        checkpoint: file with the VAEs and the vocoder.
        video_vae: another file for the video VAE.
        dtype: of the VAEs; the vocoder always computes in fp32.
        device: where they run.
        tiling: of the video decoder; needs less memory.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        video_vae: Checkpoint | None = None,
        dtype: torch.dtype,
        device: torch.device | str,
        tiling: Tiling | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._video_checkpoint = video_vae or checkpoint
        self._dtype = dtype
        self._device = torch.device(device)
        self._tiling = tiling or Tiling()
        self._video: VideoVAE | None = None
        self._audio: AudioVAE | None = None
        self._vocoder: Vocoder | None = None

    def require(self, *, video: bool, audio: bool) -> None:
        """Raise UserError unless the files hold what is asked for; reads nothing."""
        if video:
            self._video_checkpoint.require("video_vae_decoder", "decoding videos")
        if audio:
            self._checkpoint.require("audio_vae", "decoding sound")
            self._checkpoint.require("vocoder", "decoding sound")

    def frames(self, latents: Tensor) -> Tensor:
        """Normalised latents [1, 128, f, h, w] to uint8 frames [F, H, W, 3] on the CPU."""
        if self._video is None:
            self._video = load_video_vae(self._video_checkpoint, dtype=self._dtype, encoder=False)
            self._video.enable_decode_tiling(
                spatial_tile=self._tiling.spatial_tile,
                spatial_overlap=self._tiling.spatial_overlap,
                temporal_tile=self._tiling.temporal_tile,
                temporal_overlap=self._tiling.temporal_overlap,
            )
        pixels = self._video.to(self._device).decode(latents)[0]  # [3, F, H, W]
        return torch.stack([to_uint8(frame) for frame in pixels.unbind(1)])

    def sound(self, latents: Tensor) -> Sound:
        """Normalised latents [1, 8, T, 16] to sound."""
        if self._audio is None:
            self._audio = load_audio_vae(self._checkpoint, dtype=self._dtype)
            self._vocoder = load_vocoder(self._checkpoint)
        mel = self._audio.to(self._device).decode(latents)
        waveform = self._vocoder.to(self._device).to_waveform(mel)[0]
        return Sound(waveform.float().clamp(-1, 1).cpu(), self._vocoder.sample_rate)

    def to_cpu(self) -> None:
        """Free the device; what is loaded stays in host memory for the next use."""
        for model in (self._video, self._audio, self._vocoder):
            if model is not None:
                model.to("cpu")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def to_uint8(frame: Tensor) -> Tensor:
    """Pixels [3, H, W] in [-1, 1] to [H, W, 3] in 0..255 on the CPU."""
    scaled = (frame.float() / 2 + 0.5).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(1, 2, 0).cpu()
