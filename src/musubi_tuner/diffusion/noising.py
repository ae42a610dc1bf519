"""A batch of clean latents to tokens between clean and noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Generator, Tensor

from musubi_tuner.common.av import AV, Modality
from musubi_tuner.common.devices import staging, upload
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.seeding import generator
from musubi_tuner.dataset.batch import AudioLatents, Batch, SampleKey, VideoLatents

from .timesteps import NoiseLevelSampler, Size
from .tokens import NoisedTokens, audio_coords, patchify_audio, patchify_video, video_coords


def sample_generators(seed: int, purpose: str, epoch: int, keys: Sequence[SampleKey]) -> list[Generator]:
    """One private generator for each sample.

    A sample's draws for one purpose depend on the run's seed, the epoch and the sample alone: not on the batch
    it is in, the process that handles it, or what else was drawn.
    """
    return [generator(seed, purpose, epoch, key.dataset, key.name, key.repeat) for key in keys]


def noise_batch(
    batch: Batch,
    *,
    sampler: NoiseLevelSampler,
    generators: Sequence[Generator],
    independent_audio: bool = False,
    shares: AV[Tensor] | None = None,
    quantiles: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> AV[NoisedTokens]:
    """Draw noise and one noise level a sample, all in fp32.

    Audio shares the video's level unless ``independent_audio``; then it has its own from the same distribution,
    with the shift of its own length kept within the calibrated range. Without video the shift follows the
    batch's virtual grid, likewise clamped. Everything is drawn on the CPU, so devices agree.

    Args:
        sampler: distribution of the levels.
        generators: one for each sample, see :func:`sample_generators`; they are advanced.
        shares: [B], which quantiles of the distribution the levels are, see :mod:`.level_pool`.
        quantiles: [B] in (0, 1), takes these quantiles of the distribution instead of drawing (validation). Noise is
            the same either way.
        device: where the tokens go.

    Returns:
        The modalities of the batch. Audio is absent when no sample has any. A sample without audio beside others
        with audio has weight 0 and tokens of 0, which count as valid: attention over nothing but padding is
        undefined. Its video must not be let read them (``Perturbations.a2v``).

    Raises:
        UserError: an audio batch has no usable virtual grid.
    """
    audio = batch.audio if batch.audio is not None and bool((batch.audio.lengths > 0).any()) else None
    # For both levels numbers are drawn whether they are used or not, so that no flag changes the noise that follows.
    drawn = torch.stack([torch.rand(2, 3, generator=g, dtype=torch.float64) for g in generators])  # [B, 2, 3]
    uniforms, given = AV(video=drawn[:, 0], audio=drawn[:, 1]), shares or AV()

    def level(name: Modality, own: NoiseLevelSampler, size: Size) -> Tensor:
        if quantiles is not None:
            return own.quantile(quantiles, size)
        return own.level(uniforms[name], size, shares=given[name])

    levels = _levels(batch, audio, sampler, level, independent_audio=independent_audio)
    return AV(
        video=None if batch.video is None else _noised_video(batch.video, levels.video, generators, device),
        audio=None if audio is None else _noised_audio(audio, levels.audio, generators, device),
    )


def _levels(
    batch: Batch,
    audio: AudioLatents | None,
    sampler: NoiseLevelSampler,
    level: Callable[[Modality, NoiseLevelSampler, Size], Tensor],
    *,
    independent_audio: bool,
) -> AV[Tensor]:
    """The levels [B] of each modality: ``level`` of its name, its sampler and its size."""
    for_audio = replace(sampler, clamp_shift=True)
    if batch.video is None:
        if audio is None:
            raise ValueError(f"batch {batch.keys} has neither video nor audio")
        return AV(audio=level("audio", for_audio, _virtual_grids(audio, batch.keys)))
    video = level("video", sampler, torch.tensor([batch.video.latents.shape[2:]]))
    if audio is None or not independent_audio:
        return AV(video=video, audio=video)
    return AV(video=video, audio=level("audio", for_audio, audio.lengths.tolist()))


def _virtual_grids(audio: AudioLatents, keys: Sequence[SampleKey]) -> Tensor:
    if audio.virtual_grid is None:
        raise UserError(
            f"{keys[0].name}: the latent cache has no virtual video geometry, which the timestep shift of mode audio "
            "needs; re-run ltx2_cache_latents.py with --ltx2_mode audio"
        )
    for key, grid in zip(keys, audio.virtual_grid, strict=True):
        if (count := int(grid.prod())) <= 1:
            raise UserError(
                f"{key.name}: the virtual video geometry {grid.tolist()} in the latent cache has {count} token(s), "
                "expected more; re-run ltx2_cache_latents.py with --ltx2_mode audio, or leave out a clip this short"
            )
    return audio.virtual_grid


def _noised_video(
    video: VideoLatents, sigma: Tensor, generators: Sequence[Generator], device: torch.device | str
) -> NoisedTokens:
    channels, *grid = video.latents.shape[1:]
    frames, height, width = grid
    num_tokens = frames * height * width
    noise = staging((len(generators), num_tokens, channels), device)  # [B, N, C]
    for row, g in zip(noise, generators, strict=True):
        row.normal_(generator=g)
    clean = patchify_video(upload(video.latents, device).to(torch.float32))
    sigma = upload(sigma, device)
    return NoisedTokens(
        clean=clean,
        noise=upload(noise, device),
        t=sigma[:, None],
        sigma=sigma,
        coords=_video_coords((frames, height, width), tuple(video.fps.tolist()), device),
        weight=torch.ones(clean.shape[:2], device=device),
        grid=(frames, height, width),
        target=slice(0, num_tokens),
    )


def _noised_audio(
    audio: AudioLatents, sigma: Tensor, generators: Sequence[Generator], device: torch.device | str
) -> NoisedTokens:
    clean = patchify_audio(upload(audio.latents, device).to(torch.float32))
    batch, steps, _ = clean.shape
    noise = staging(clean.shape, device).zero_()
    # Only the sample's own length is drawn: what follows must not depend on how far the batch is padded.
    for row, length, g in zip(noise, audio.lengths.tolist(), generators, strict=True):
        row[:length].normal_(generator=g)
    supervised = torch.arange(steps) < audio.lengths[:, None]  # [B, T]
    valid = supervised | (audio.lengths == 0)[:, None]
    sigma = upload(sigma, device)
    return NoisedTokens(
        clean=clean,
        noise=upload(noise, device),
        t=sigma[:, None],
        sigma=sigma,
        coords=_audio_coords(steps, batch, device),
        weight=upload(supervised, device).to(torch.float32),
        grid=(steps, 1, 1),
        target=slice(0, steps),
        valid=None if bool(valid.all()) else upload(valid, device),
    )


# Clips of a bucket lie on one grid, batch after batch, and their positions are two dozen operations, on a GPU launches.
@lru_cache(maxsize=16)
def _video_coords(grid: tuple[int, int, int], fps: tuple[float, ...], device: torch.device | str) -> Tensor:
    return upload(video_coords(grid, torch.tensor(fps)), device)


@lru_cache(maxsize=16)
def _audio_coords(steps: int, batch: int, device: torch.device | str) -> Tensor:
    return upload(audio_coords(steps, batch), device)
