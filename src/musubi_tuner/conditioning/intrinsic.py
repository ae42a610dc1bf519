"""Conditions on the target itself: some of its tokens stay clean and the rest is generated around them.

Each condition is a keep map in [0, 1] over the tokens, 1 = stays clean; :meth:`NoisedTokens.freeze` turns it into
noise levels and loss weights. Several compose by being applied one after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

from musubi_tuner.common.av import AV, Modality
from musubi_tuner.common.devices import upload
from musubi_tuner.common.log import warn_once
from musubi_tuner.diffusion.tokens import VIDEO_SPACE_STRIDE, NoisedTokens

logger = logging.getLogger(__name__)

Grid = tuple[int, int, int]  # (F, H, W) of a video, (T, 1, 1) of a sound


def prefix_keep(grid: Grid, units: int) -> Tensor:
    """[N]: 1 on the first ``units`` latent frames (audio: latent steps)."""
    keep = torch.zeros(grid)
    keep[:units] = 1.0
    return keep.flatten()


def suffix_keep(grid: Grid, units: int) -> Tensor:
    """[N]: 1 on the last ``units`` latent frames (audio: latent steps)."""
    return prefix_keep(grid, units).reshape(grid).flip(0).flatten()


def first_frame_keep(grid: Grid) -> Tensor:
    """[N]: 1 on latent frame 0, which is pixel frame 0 alone (the VAE is causal)."""
    return prefix_keep(grid, 1)


def spatial_crop_keep(grid: Grid, region: tuple[int, int, int, int]) -> Tensor:
    """[N]: 1 inside the pixel rectangle (y1, x1, y2, x2) of every frame.

    Bounds are divided by the VAE's stride of 32, rounding down, and clamped to the grid.
    """
    _, height, width = grid
    y1, x1, y2, x2 = (bound // VIDEO_SPACE_STRIDE for bound in region)
    keep = torch.zeros(grid)
    keep[:, max(y1, 0) : min(y2, height), max(x1, 0) : min(x2, width)] = 1.0
    return keep.flatten()


def mask_keep(mask: Tensor, *, threshold: float | None = None) -> Tensor:
    """[B, N] from a mask [B, F, H, W] or [B, T] in [0, 1]; values above ``threshold`` become 1, others 0."""
    keep = mask.flatten(1).to(torch.float32)
    return keep if threshold is None else (keep > threshold).to(torch.float32)


def draw_gates(probability: float, generators: Sequence[Generator]) -> Tensor:
    """Which samples get a condition: [B] bool, each from its own generator."""
    return torch.tensor([float(torch.rand((), generator=g)) < probability for g in generators])


def apply_keep(tokens: NoisedTokens, keep: Tensor, gates: Tensor) -> NoisedTokens:
    """Freeze the target tokens by ``keep`` ([N] or [B, N] over the target) in the samples of ``gates`` [B].

    A map [N] that keeps something of every token is not applied: nothing would be left to learn.
    """
    if keep.ndim == 1 and bool((keep > 0).all()):
        warn_once(logger, "covered", "a condition that covers the whole clip is not applied to such clips")
        return tokens
    if not bool(gates.any()):
        return tokens  # one level a sample stays one level a sample, which the transformer makes use of
    gated = keep.expand(len(gates), -1) * gates[:, None]
    full = torch.zeros(tokens.weight.shape)
    full[:, tokens.target] = gated
    return tokens.freeze(upload(full, tokens.t.device))


def condition_first_frame(
    tokens: AV[NoisedTokens], probability: float, generators: Sequence[Generator]
) -> AV[NoisedTokens]:
    """Keep the first latent frame of some samples clean (image-to-video).

    A single image is left as it is.
    """
    video = tokens.video
    if video is None or probability == 0 or video.grid[0] <= 1:
        return tokens
    return replace(tokens, video=apply_keep(video, first_frame_keep(video.grid), draw_gates(probability, generators)))


def condition_masks(
    tokens: AV[NoisedTokens], masks: AV[Tensor], audio_lengths: Tensor | None = None
) -> AV[NoisedTokens]:
    """Keep clean what each sample's mask marks ([B, F, H, W] and [B, T], 1 = stays clean): inpainting.

    A sample whose mask covers it trains nothing, for it may stand beside others that have something to learn.

    Args:
        masks: on the CPU, as ``Batch.masks``.
        audio_lengths: [B] valid steps of the sounds, on the CPU; ``None`` = all.
    """

    def one(name: Modality, target: NoisedTokens) -> NoisedTokens:
        mask = masks[name]
        if mask is None or not bool((mask > 0).any()):
            return target
        keep = mask_keep(mask)
        # Silence in place of missing sound may be longer than the sounds that the masks were padded to.
        keep = pad(keep, (0, target.target.stop - target.target.start - keep.shape[1]))
        if _some_covered(keep, audio_lengths if name == "audio" else None):
            warn_once(logger, f"masked {name}", "the %s of some item is masked as a whole: it trains nothing", name)
        return apply_keep(target, keep, torch.ones(mask.shape[0], dtype=torch.bool))

    return tokens.map_named(one)


def _some_covered(keep: Tensor, lengths: Tensor | None) -> bool:
    """Whether a row of ``keep`` [B, N] leaves nothing of its first ``lengths`` tokens; asked of the CPU."""
    steps = keep.shape[1]
    ends = torch.full((len(keep),), steps) if lengths is None else lengths
    padding = torch.arange(steps) >= ends[:, None]
    return bool((((keep > 0) | padding).all(dim=1) & (ends > 0)).any())
