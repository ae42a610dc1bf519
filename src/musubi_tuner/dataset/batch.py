"""What one training batch holds: cached latents and text embeddings, no noise yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TypeVar

from torch import Tensor

from musubi_tuner.common.av import AV

T = TypeVar("T")


@dataclass(frozen=True)
class VideoLatents:
    """Normalised video VAE latents."""

    latents: Tensor  # [B, C, F, H, W]
    fps: Tensor  # [B] float32, frames per second of the pixel video


@dataclass(frozen=True)
class AudioLatents:
    """Normalised audio VAE latents, zero-padded at the end to the longest of the batch."""

    latents: Tensor  # [B, 8, T, 16]
    lengths: Tensor  # [B] int64, valid latent steps; 0 = this sample has no audio
    virtual_grid: Tensor | None = None  # [B, 3] int64 (F, H, W), audio mode only, for the timestep shift


@dataclass(frozen=True)
class TextEmbeds:
    """Text embeddings after the connectors."""

    video: Tensor | None  # [B, S, Dv]
    audio: Tensor | None  # [B, S, Da]
    mask: Tensor | None  # [B, S] bool, True = attend; None = all


@dataclass(frozen=True)
class SampleKey:
    """Names one sample of one epoch; every random draw for the sample is keyed by it."""

    name: str  # cache base name, e.g. "clip_00000-049"
    dataset: int = 0
    repeat: int = 0


@dataclass(frozen=True)
class Batch:
    """Some items of one bucket, stacked. ``video`` is ``None`` in audio mode, ``audio`` in video mode."""

    video: VideoLatents | None
    audio: AudioLatents | None
    text: TextEmbeds
    keys: tuple[SampleKey, ...]
    references: AV = field(default_factory=AV)  # VideoLatents and AudioLatents, every sample's or none
    masks: AV[Tensor] = field(default_factory=AV)  # [B, F, H, W] / [B, T] in [0, 1], 1 = stays clean
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    loss_weights: AV[float] = field(default_factory=AV)  # overrides of the dataset

    @property
    def size(self) -> int:
        return len(self.keys)


def pin_memory(value: T) -> T:
    """A batch, or a part of one, with every tensor that is in it in page-locked memory."""
    if isinstance(value, Tensor):
        return value.pin_memory()
    if is_dataclass(value):
        return replace(value, **{f.name: pin_memory(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, Mapping):
        return {key: pin_memory(part) for key, part in value.items()}
    return value
