"""References: clean tokens in front of the target, which attends to them (in-context LoRA, arXiv 2410.23775)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from musubi_tuner.common.av import AV
from musubi_tuner.common.devices import upload
from musubi_tuner.dataset.batch import AudioLatents, VideoLatents
from musubi_tuner.dataset.buckets import reference_scale
from musubi_tuner.diffusion.tokens import (
    AUDIO_STEP_SECONDS,
    NoisedTokens,
    audio_coords,
    patchify_audio,
    patchify_video,
    video_coords,
)


@dataclass(frozen=True)
class AudioReferenceRules:
    """How a reference sound takes part."""

    negative_positions: bool = False  # it ends one step before time 0 instead of starting there
    hidden_from_video: bool = False
    hidden_from_text: bool = False  # it does not read the text


def prepend_references(
    tokens: AV[NoisedTokens], references: AV, audio_rules: AudioReferenceRules = AudioReferenceRules()
) -> AV[NoisedTokens]:
    """Put the batch's references (``Batch.references``) before their targets, where there are any.

    Noise, levels and ``sigma`` of the targets stay what they are.
    """
    video, audio = tokens.video, tokens.audio
    if video is not None and references.video is not None:
        video = _prepend_video(video, references.video)
    if audio is not None and references.audio is not None:
        audio = _prepend_audio(audio, references.audio, audio_rules)
    return replace(tokens, video=video, audio=audio)


def _prepend_video(target: NoisedTokens, reference: VideoLatents) -> NoisedTokens:
    grid = tuple(reference.latents.shape[2:])
    device = target.clean.device
    clean = patchify_video(upload(reference.latents, device).to(torch.float32))
    coords = reference_video_coords(grid, target.grid, upload(reference.fps, device))  # type: ignore[arg-type]
    return target.prepend(clean, coords)


def reference_video_coords(grid: tuple[int, int, int], target: tuple[int, int, int], fps: Tensor) -> Tensor:
    """Token bounds [B, 3, N, 2] of a reference of ``grid`` beside a target: from time 0, over the target's extent.

    Raises:
        ValueError: the sides of the target are no multiple of the reference's.
    """
    scale = reference_scale(target, grid)
    if scale is None:
        raise ValueError(f"latent sizes {target[1:]} of the target and {grid[1:]} of the reference have no whole ratio")
    factors = upload(torch.tensor([1.0, scale, scale]), fps.device)  # seconds, rows, columns
    return video_coords(grid, fps) * factors[None, :, None, None]


def _prepend_audio(target: NoisedTokens, reference: AudioLatents, rules: AudioReferenceRules) -> NoisedTokens:
    device = target.clean.device
    clean = patchify_audio(upload(reference.latents, device).to(torch.float32))
    coords = reference_audio_coords(clean.shape[1], reference.lengths, negative=rules.negative_positions)
    valid = torch.arange(clean.shape[1]) < reference.lengths[:, None]  # [B, T]
    return target.prepend(
        clean,
        upload(coords, device),
        valid=None if bool(valid.all()) else upload(valid, device),
        reads_text=not rules.hidden_from_text,
        seen_by_other=not rules.hidden_from_video,
    )


def reference_audio_coords(steps: int, lengths: Tensor, *, negative: bool) -> Tensor:
    """Token bounds [B, 1, T, 2] of reference sounds that are padded to ``steps``, in seconds.

    They start at 0 as the target does, or, if ``negative``, the last valid token of each ends one step before 0.
    """
    coords = audio_coords(steps, len(lengths), lengths.device)
    if not negative:
        return coords
    ends = coords[:, :, :, 1].gather(2, (lengths - 1)[:, None, None])  # [B, 1, 1]
    return coords - ends[..., None] - AUDIO_STEP_SECONDS
