"""Latents as token sequences: patchify, positions, and the state between clean and noise.

The noise level is per token, so conditioning edits levels, weights and length, never latents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from musubi_tuner.models.ltx2.inputs import ModalityInput

VIDEO_TIME_STRIDE = 8  # pixel frames a latent frame (causal: the first latent frame is one pixel frame)
VIDEO_SPACE_STRIDE = 32  # pixels a latent cell
AUDIO_STEP_SECONDS = 0.04  # 4 mel frames of hop 160 at 16 kHz
AUDIO_LATENTS_PER_SECOND = 25


@dataclass(frozen=True)
class NoisedTokens:
    """One modality between clean and noise.

    ``noisy = clean + t * (noise - clean)``; the flow-matching velocity target is ``noise - clean`` for every
    token whatever its level (rectified flow, arXiv 2209.03003).

    Keep ``t`` at [B, 1] as long as all tokens of a sample share their level: the transformer then computes and
    saves its modulation once a sample instead of once a token (12 of 33 units of activation memory in an
    LTX-2.3 video block). So call :meth:`freeze` only for conditions that were drawn.
    """

    clean: Tensor  # [B, N, C]
    noise: Tensor  # [B, N, C]
    t: Tensor  # [B, N] noise level of each token, fp32, 0 = clean, 1 = noise; [B, 1] = one level for all tokens
    sigma: Tensor  # [B] level drawn for the sample, fp32
    coords: Tensor  # [B, A, N, 2] token bounds, fp32
    weight: Tensor  # [B, N] loss weight, 0 = not supervised
    grid: tuple[int, int, int]  # (F, H, W) of the target; audio: (T, 1, 1)
    target: slice  # where the target lies in N
    valid: Tensor | None = None  # [B, N] bool, False = padding; None = no padding
    reads_text: Tensor | None = None  # [B, N] bool
    seen_by_other: Tensor | None = None  # [B, N] bool

    @property
    def noisy(self) -> Tensor:
        """[B, N, C]"""
        return torch.lerp(self.clean, self.noise, self.t.unsqueeze(-1).to(self.clean.dtype))

    @property
    def velocity(self) -> Tensor:
        """[B, N, C]"""
        return self.noise - self.clean

    def freeze(self, keep: Tensor) -> NoisedTokens:
        """Keep tokens (partly) clean: ``t *= 1 - keep`` and no loss where ``keep > 0``; keep is [B, N] in [0, 1]."""
        return replace(
            self,
            t=self.t * (1 - keep),
            weight=self.weight.masked_fill(keep > 0, 0.0),
        )

    def prepend(
        self,
        clean: Tensor,
        coords: Tensor,
        *,
        valid: Tensor | None = None,
        reads_text: bool = True,
        seen_by_other: bool = True,
    ) -> NoisedTokens:
        """Put clean tokens in front (a reference): level 0, no loss; ``sigma`` and the target stay as they are.

        Args:
            clean: [B, M, C].
            coords: [B, A, M, 2] token bounds.
            valid: [B, M] bool, False = padding; ``None`` = no padding.
            reads_text: whether these tokens attend to the text.
            seen_by_other: whether the other modality attends to these tokens.
        """
        shape = clean.shape[:2]
        before = self.weight.new_zeros(shape)
        none = None if reads_text else torch.zeros(shape, dtype=torch.bool, device=clean.device)
        unseen = None if seen_by_other else torch.zeros(shape, dtype=torch.bool, device=clean.device)
        moved = shape[1]
        return replace(
            self,
            clean=torch.cat([clean, self.clean], dim=1),
            noise=torch.cat([clean, self.noise], dim=1),  # velocity 0
            t=torch.cat([before.to(self.t.dtype), self.t.expand_as(self.weight)], dim=1),
            coords=torch.cat([coords, self.coords], dim=2),
            weight=torch.cat([before, self.weight], dim=1),
            target=slice(self.target.start + moved, self.target.stop + moved),
            valid=_joined(valid, self.valid, shape, self.weight.shape, clean.device),
            reads_text=_joined(none, self.reads_text, shape, self.weight.shape, clean.device),
            seen_by_other=_joined(unseen, self.seen_by_other, shape, self.weight.shape, clean.device),
        )

    def as_input(
        self,
        context: Tensor,
        context_mask: Tensor | None,
        *,
        other: NoisedTokens | None = None,
        dtype: torch.dtype,
    ) -> ModalityInput:
        """The model input of this modality.

        ``other`` is the other modality of the pass, if any: its padding and reference rules become this
        one's ``cross_mask``. Levels and positions stay fp32; tokens and context are cast to ``dtype``.
        """
        return ModalityInput(
            tokens=self.noisy.to(dtype),
            timesteps=self.t,
            sigma=self.sigma,
            coords=self.coords,
            context=context.to(dtype),
            context_mask=context_mask,
            attention_mask=None if self.valid is None else self.valid[:, None, :].to(torch.float32),
            cross_mask=None if other is None else other._visible_to_other(),
            reads_text=None if self.reads_text is None else self.reads_text.to(torch.float32),
        )

    def _visible_to_other(self) -> Tensor | None:
        """[B, 1, N] in {0, 1}, or None when everything is visible."""
        masks = [m for m in (self.valid, self.seen_by_other) if m is not None]
        if not masks:
            return None
        visible = masks[0]
        for mask in masks[1:]:
            visible = visible & mask
        return visible[:, None, :].to(torch.float32)


def _joined(
    first: Tensor | None, second: Tensor | None, shape: torch.Size, other_shape: torch.Size, device: torch.device
) -> Tensor | None:
    """Two masks of the given shapes one after the other; ``None`` stands for all True."""
    if first is None and second is None:
        return None
    parts = zip((first, second), (shape, other_shape), strict=True)
    masks = [torch.ones(s, dtype=torch.bool, device=device) if mask is None else mask for mask, s in parts]
    return torch.cat(masks, dim=1)


def patchify_video(latents: Tensor) -> Tensor:
    """[B, C, F, H, W] to [B, F*H*W, C]: frame-major, then row, then column."""
    return latents.flatten(2).transpose(1, 2)


def unpatchify_video(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """[B, F*H*W, C] to [B, C, F, H, W]."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def patchify_audio(latents: Tensor) -> Tensor:
    """[B, 8, T, 16] to [B, T, 128]: channel-major, then mel bin."""
    return latents.transpose(1, 2).flatten(2)


def unpatchify_audio(tokens: Tensor, channels: int = 8) -> Tensor:
    """[B, T, 128] to [B, 8, T, 16]."""
    return tokens.unflatten(2, (channels, -1)).transpose(1, 2)


def video_coords(grid: tuple[int, int, int], fps: Tensor) -> Tensor:
    """Token bounds [B, 3, F*H*W, 2], fp32: seconds, pixel row, pixel column.

    Latent frame 0 covers pixel frame 0 and frame k covers ``8k-7 .. 8k`` (causal VAE).
    ``fps`` is [B]; its device is the device of the result.
    """
    frames, height, width = grid
    device = fps.device
    f = torch.arange(frames, device=device, dtype=torch.float32)
    first = VIDEO_TIME_STRIDE - 1
    start = (f * VIDEO_TIME_STRIDE - first).clamp(min=0)
    end = ((f + 1) * VIDEO_TIME_STRIDE - first).clamp(min=0)
    time = torch.stack([start, end], dim=-1)[None] / fps.to(torch.float32)[:, None, None]  # [B, F, 2]
    rows = _cell_bounds(height, device)
    columns = _cell_bounds(width, device)
    batch = fps.shape[0]
    shape = (batch, frames, height, width, 2)
    return torch.stack(
        [
            time[:, :, None, None, :].expand(shape),
            rows[None, None, :, None, :].expand(shape),
            columns[None, None, None, :, :].expand(shape),
        ],
        dim=1,
    ).flatten(2, 4)


def _cell_bounds(count: int, device: torch.device) -> Tensor:
    index = torch.arange(count, device=device, dtype=torch.float32)
    return torch.stack([index, index + 1], dim=-1) * VIDEO_SPACE_STRIDE  # [count, 2]


def audio_coords(steps: int, batch: int, device: torch.device | str = "cpu") -> Tensor:
    """Token bounds [B, 1, T, 2] in seconds, fp32: [0, .01), [.01, .05), [.05, .09), ..."""
    index = torch.arange(steps + 1, device=device, dtype=torch.float32)
    edge = (4 * index - 3).clamp(min=0) * 0.01
    bounds = torch.stack([edge[:-1], edge[1:]], dim=-1)
    return bounds[None, None].expand(batch, 1, steps, 2)
