"""Fit in closed form what the demo's VAEs need: the statistics of their latents and the decoder's last layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
from torch import Tensor

from musubi_tuner.models.audio_vae import SAMPLE_RATE, log_mel

WIDTH, HEIGHT, FRAMES = 192, 128, 17
_RIDGE = 1e-3


@torch.no_grad()
def fit_video_vae(vae: AutoencoderKLLTX2Video, clips: Sequence[Path]) -> None:
    """Give the latents of ``clips`` zero mean and unit deviation, and fit the decoder's last convolution.

    The convolution sees the mosaic of colours (see :mod:`.mosaic`); ridge regression of the pixels on it finds
    their scale and smooths the edges.
    """
    vae.eval()
    pixels = torch.cat([_read_pixels(clip) for clip in clips])  # [B, 3, F, H, W]
    latents = torch.cat([vae.encode(clip[None]).latent_dist.mode() for clip in pixels])
    _set_statistics(vae, latents, dims=(0, 2, 3, 4))
    convolution = vae.decoder.conv_out
    inputs: list[Tensor] = []
    hook = convolution.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for clip in latents:
        vae.decode(clip[None])
    hook.remove()
    patch = vae.config.patch_size
    targets = pixels.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))  # [B, 3, F, h, p, w, q]
    targets = targets.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)  # [B, 3*q*p, F, h, w], as the decoder orders them
    _fit_convolution(convolution, torch.cat(inputs), targets)


@torch.no_grad()
def fit_audio_statistics(vae: AutoencoderKLLTX2Audio, clips: Sequence[Path]) -> None:
    """Give the latents of the clips' sound zero mean and unit deviation."""
    vae.eval()
    latents = torch.cat(
        [vae.encode(log_mel(read_sound(clip)[None])).latent_dist.mode() for clip in clips], dim=2
    )  # [1, 8, T, 16]
    _set_statistics(vae, latents, dims=(0, 2))


def _set_statistics(vae: AutoencoderKLLTX2Video | AutoencoderKLLTX2Audio, latents: Tensor, dims: tuple) -> None:
    """Statistics over ``dims``, rounded as they will be stored."""
    vae.latents_mean.copy_(latents.mean(dims).flatten().to(torch.bfloat16))
    vae.latents_std.copy_(latents.std(dims).clamp(min=1e-2).flatten().to(torch.bfloat16))


def _fit_convolution(convolution: torch.nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """Ridge regression of ``targets`` [B, O, F, h, w] on the 3x3x3 neighbourhoods of ``inputs`` [B, C, F, h, w]."""
    channels = inputs.shape[1]
    size = channels * 27 + 1
    gram = torch.zeros(size, size, dtype=torch.float64)
    cross = torch.zeros(size, targets.shape[1], dtype=torch.float64)
    for x, y in zip(inputs, targets, strict=True):
        x = torch.cat([x[:, :1], x, x[:, -1:]], dim=1)  # frames are repeated at both ends, space is padded below
        x = F.pad(x, (1, 1, 1, 1))
        rows = x.unfold(1, 3, 1).unfold(2, 3, 1).unfold(3, 3, 1)  # [C, F, h, w, 3, 3, 3]
        rows = rows.permute(1, 2, 3, 0, 4, 5, 6).flatten(3).flatten(0, 2).double()
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
        gram += rows.T @ rows
        cross += rows.T @ y.permute(1, 2, 3, 0).flatten(0, 2).double()
    gram += _RIDGE * gram.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    solution = torch.linalg.solve(gram, cross).float()
    convolution.conv.weight.copy_(solution[:-1].T.unflatten(1, (channels, 3, 3, 3)))
    convolution.conv.bias.copy_(solution[-1])


def _read_pixels(clip: Path) -> Tensor:
    """The first frames [1, 3, F, H, W] in [-1, 1]."""
    frames: list[np.ndarray] = []
    with av.open(str(clip)) as container:
        for frame in container.decode(video=0):
            frames.append(frame.reformat(WIDTH, HEIGHT, format="rgb24").to_ndarray())
            if len(frames) == FRAMES:
                break
    pixels = torch.from_numpy(np.stack(frames)).float() / 127.5 - 1
    return pixels.permute(3, 0, 1, 2)[None]


def read_sound(clip: Path) -> Tensor:
    """Stereo [2, S] at 16 kHz."""
    resampler = av.AudioResampler(format="fltp", layout="stereo", rate=SAMPLE_RATE)
    with av.open(str(clip)) as container:
        parts = [
            part.to_ndarray() for frame in [*container.decode(audio=0), None] for part in resampler.resample(frame)
        ]
    return torch.from_numpy(np.concatenate(parts, axis=1))
