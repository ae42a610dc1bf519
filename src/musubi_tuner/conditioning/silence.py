"""Silence in place of missing sound, so that the audio stream is not forgotten on clips that have none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from musubi_tuner.common.devices import upload
from musubi_tuner.dataset.batch import AudioLatents, Batch
from musubi_tuner.diffusion.losses import AUDIO_TERM, SILENCE_TERM, LossTerm
from musubi_tuner.diffusion.tokens import AUDIO_LATENTS_PER_SECOND, VIDEO_TIME_STRIDE

_CHANNELS, _MEL_BINS = 8, 16  # of the audio latents


def fill_silence(batch: Batch) -> tuple[Batch, Tensor | None]:
    """Give the clips without sound latents of 0 that last as long as the picture.

    Zeros are the mean of the normalised latents, not an encoded silence.

    Returns:
        The batch, and which samples were filled, [B] bool on the CPU; ``None`` if none was.
    """
    if batch.video is None:
        return batch, None
    lengths = torch.zeros(batch.size, dtype=torch.int64) if batch.audio is None else batch.audio.lengths
    silent = lengths == 0
    if not bool(silent.any()):
        return batch, None
    lengths = torch.where(silent, _silence_lengths(batch), lengths)
    if batch.audio is None:
        latents = torch.zeros(batch.size, _CHANNELS, int(lengths.max()), _MEL_BINS)
        return replace(batch, audio=AudioLatents(latents, lengths)), silent
    latents = batch.audio.latents
    longer = max(int(lengths.max()) - latents.shape[2], 0)
    return replace(batch, audio=replace(batch.audio, latents=pad(latents, (0, 0, 0, longer)), lengths=lengths)), silent


def _silence_lengths(batch: Batch) -> Tensor:
    """[B] latent steps in the time of the pixel frames, at least 1."""
    frames = (batch.video.latents.shape[2] - 1) * VIDEO_TIME_STRIDE + 1
    steps = (frames * AUDIO_LATENTS_PER_SECOND / batch.video.fps.to(torch.float64)).to(torch.int64)
    return steps.clamp(min=1)


def part_silence(terms: Mapping[str, LossTerm], silent: Tensor | None, factor: float) -> Mapping[str, LossTerm]:
    """Make of the audio term one of the real sounds and one of the silences, whose weight is ``factor`` times as high.

    Together they are the mean over all samples, each with its own weight.
    """
    audio = terms.get(AUDIO_TERM)
    if silent is None or audio is None:
        return terms
    share = float(silent.to(torch.float64).mean())
    on_device = upload(silent, audio.value.device)
    parts = dict(terms)
    parts[AUDIO_TERM] = replace(audio, valid=_both(audio.valid, ~on_device), share=1 - share)
    parts[SILENCE_TERM] = replace(audio, valid=_both(audio.valid, on_device), share=share, weight=audio.weight * factor)
    return {name: term for name, term in parts.items() if term.share > 0}


def _both(valid: Tensor | None, chosen: Tensor) -> Tensor:
    return chosen if valid is None else valid & chosen
