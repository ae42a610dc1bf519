"""Geometry that follows from configuration alone: resolution buckets, frame counts, latent sizes.

Sizes are ``(width, height)`` in pixels, as in dataset configurations and cache file names; tensors are
``[..., H, W]``.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

Size = tuple[int, int]

SPATIAL_STRIDE = 32  # pixels per latent row and column
TEMPORAL_STRIDE = 8  # frames per latent frame after the first (causal)
IMAGE_FPS = 25.0  # of an image as a clip of one frame

AUDIO_RATE = 16_000  # Hz, what the audio VAE reads
AUDIO_HOP = 160  # samples per mel frame
AUDIO_STRIDE = 4  # mel frames per latent step
SHORTEST_SOUND = 513  # samples; the spectrogram reflects half a window of 1024 at each end
AUDIO_LATENTS_PER_SECOND = AUDIO_RATE / AUDIO_HOP / AUDIO_STRIDE


def floor_to(value: float, step: int) -> int:
    """The largest multiple of ``step`` not above ``value``."""
    return int(value // step) * step


# --- resolution ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def bucket_sizes(resolution: Size, step: int = SPATIAL_STRIDE) -> tuple[Size, ...]:
    """All buckets of about the area of ``resolution``, sorted.

    Widths run from half the side of the equal-area square up to that side, heights follow from the area, and
    each pair is taken both ways. Sides are multiples of ``step``; an area below ``step`` squared has none.
    """
    area = resolution[0] * resolution[1]
    side = math.isqrt(area)
    sizes: set[Size] = set()
    for width in range(max(floor_to(side // 2, step), step), side + step, step):
        height = floor_to(area // width, step)
        if height:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def choose_bucket(
    size: Size,
    resolution: Size,
    *,
    enable_bucket: bool,
    no_upscale: bool = False,
    step: int = SPATIAL_STRIDE,
) -> Size | None:
    """The bucket of an item of ``size``; ``None`` if it is smaller than one step and may not be enlarged.

    Without ``enable_bucket`` that is ``resolution`` itself. Otherwise it is the bucket of the nearest aspect
    ratio (linear distance in width / height), or, with ``no_upscale``, the item's own size rounded down when
    its area is not above that of ``resolution``.
    """
    if not enable_bucket:
        return resolution
    width, height = size
    if no_upscale and width * height <= resolution[0] * resolution[1]:
        own = floor_to(width, step), floor_to(height, step)
        return own if min(own) > 0 else None
    aspect = width / height
    return min(bucket_sizes(resolution, step), key=lambda bucket: abs(bucket[0] / bucket[1] - aspect))


# --- frames -------------------------------------------------------------------------------------------------


def is_legal_frame_count(frames: int) -> bool:
    """Whether the video VAE encodes ``frames`` without padding: 8k + 1."""
    return frames >= 1 and frames % TEMPORAL_STRIDE == 1


def floor_frames(frames: int) -> int:
    """The largest 8k + 1 not above ``frames``; 0 if there is none."""
    return (frames - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1 if frames >= 1 else 0


def latent_frames(frames: int) -> int:
    """Latent frames of ``frames`` pixel frames, 8k + 1 of them."""
    return (frames - 1) // TEMPORAL_STRIDE + 1


def latent_grid(frames: int, size: Size) -> tuple[int, int, int]:
    """Latent ``(F, H, W)`` of a clip of ``frames`` frames of ``size``."""
    width, height = size
    return latent_frames(frames), height // SPATIAL_STRIDE, width // SPATIAL_STRIDE


def reference_scale(target: tuple[int, int, int], reference: tuple[int, int, int]) -> int | None:
    """How many times the sides of a target's latent grid are those of its reference.

    ``None`` if that is no whole number, or not the same for both sides.
    """
    scale = target[1] // reference[1]
    fits = target[1:] == (reference[1] * scale, reference[2] * scale)
    return scale if fits and scale >= 1 else None


def pixel_frames(grid: tuple[int, int, int]) -> int:
    """Frames of a latent ``(F, H, W)``."""
    return (grid[0] - 1) * TEMPORAL_STRIDE + 1


def pixel_size(grid: tuple[int, int, int]) -> Size:
    """Size of a latent ``(F, H, W)``."""
    return grid[2] * SPATIAL_STRIDE, grid[1] * SPATIAL_STRIDE


# --- sound --------------------------------------------------------------------------------------------------


def audio_latent_length(samples: int) -> int:
    """Latent steps of ``samples`` samples at 16 kHz (centred STFT, then a causal stride of 4)."""
    mel = samples // AUDIO_HOP + 1
    return -(-mel // AUDIO_STRIDE)


def audio_bucket_step(interval: float) -> int:
    """Latent steps of an audio bucket interval in seconds, at least 1."""
    return max(round(interval * AUDIO_LATENTS_PER_SECOND), 1)


def quantize_audio_length(length: int, step: int, strategy: Literal["pad", "truncate"]) -> int:
    """The audio bucket of ``length`` latent steps: the nearest (pad) or next lower (truncate) multiple of
    ``step``, at least one step."""
    offset = step // 2 if strategy == "pad" else 0
    return max((length + offset) // step * step, step)
