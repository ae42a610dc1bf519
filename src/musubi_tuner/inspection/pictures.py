"""Small pictures of clips and sounds."""

from __future__ import annotations

import io
import math

import cv2
import numpy as np
from PIL import Image

from musubi_tuner.dataset.buckets import Size

FRAMES_SHOWN = 8
_FRAME_AREA = 13_000  # pixels of one frame of a strip
_IMAGE_AREA = 40_000  # of a single picture
_GAP = 3
_GAP_COLOUR = 128  # seen on light and dark pages
_QUALITY = 72
_BARS = 160


def frame_strip(pixels: np.ndarray) -> bytes:
    """JPEG of up to 8 frames side by side, the first and the last included.

    Args:
        pixels: uint8 ``[F, H, W, 3]``.
    """
    height, width = pixels.shape[1:3]
    area = _FRAME_AREA if len(pixels) > 1 else _IMAGE_AREA
    scale = min(math.sqrt(area / (height * width)), 1.0)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    buffer = io.BytesIO()
    Image.fromarray(side_by_side(pixels, size)).save(buffer, format="JPEG", quality=_QUALITY)
    return buffer.getvalue()


def side_by_side(pixels: np.ndarray, size: Size) -> np.ndarray:
    """Up to 8 frames of uint8 ``[F, H, W, 3]`` at ``size`` (width, height), the first and the last included."""
    chosen = np.linspace(0, len(pixels) - 1, min(len(pixels), FRAMES_SHOWN)).round().astype(int)
    gap = np.full((size[1], _GAP, 3), _GAP_COLOUR, dtype=np.uint8)
    parts = [part for i in chosen for part in (cv2.resize(pixels[i], size, interpolation=cv2.INTER_AREA), gap)]
    return np.hstack(parts[:-1])


def wave_bars(waveform: np.ndarray) -> tuple[int, ...]:
    """Peaks of ``[C, S]`` in equal parts of time, 0 to 100; square roots, so that quiet sound is seen."""
    peaks = np.abs(waveform).max(axis=0)
    parts = np.array_split(peaks, min(_BARS, max(len(peaks), 1)))
    return tuple(min(round(100 * math.sqrt(part.max(initial=0.0))), 100) for part in parts)


def picture_width(jpeg: bytes) -> int:
    """Pixels."""
    with Image.open(io.BytesIO(jpeg)) as image:
        return image.width
