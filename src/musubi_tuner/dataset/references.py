"""Decoding of references: always from their beginning, whatever part of its source a target shows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from .buckets import AUDIO_RATE, TEMPORAL_STRIDE, Size
from .clip_sound import read_sound
from .companions import reference_frames
from .entries import DatasetEntry
from .files import media_kind
from .frames import sample_frames
from .media import MediaError, read_image
from .rates import frame_rate, open_frames
from .resize import resize_to_bucket


def reference_shape(entry: DatasetEntry, references: Sequence[Path], bucket: Size) -> tuple[int, Size]:
    """Pixel frames and (width, height) of the reference of targets in ``bucket``."""
    width, height = (side // entry.reference_downscale for side in bucket)
    return reference_frames(entry, references), (width, height)


def read_reference(paths: Sequence[Path], entry: DatasetEntry, *, frames: int, size: Size) -> np.ndarray:
    """uint8 ``[frames, H, W, 3]`` of ``size`` (width, height).

    An image fills all frames. Of a video (or folder of images) the first frames are taken by the frame-rate rule
    of the dataset; the last one is held where it is shorter. Several images get one latent frame each: the first
    one frame, every other eight.

    Raises:
        MediaError: a file is damaged, or is no picture.
    """
    if len(paths) > 1:
        images = [resize_to_bucket(read_image(path), size) for path in paths]
        shown = [images[0], *(image for image in images[1:] for _ in range(TEMPORAL_STRIDE))]
    elif media_kind(paths[0]) == "image" and not paths[0].is_dir():
        shown = [resize_to_bucket(read_image(paths[0]), size)]
    else:
        shown = _first_frames(paths[0], entry, frames, size)
    return np.stack([*shown, *[shown[-1]] * (frames - len(shown))])


def _first_frames(path: Path, entry: DatasetEntry, frames: int, size: Size) -> list[np.ndarray]:
    with open_frames(path, entry) as video:
        rate, _, _ = frame_rate(video, entry, limit=frames)
        shown: list[np.ndarray] = []
        last = -1
        for sample in islice(sample_frames(video.frames(), rate), frames):
            if sample.frame is None:
                break
            if sample.index != last:
                pixels = np.empty((size[1], size[0], 3), np.uint8)
                video.fit(sample.frame, pixels)
            shown.append(pixels)
            last = sample.index
    if not shown:
        raise MediaError(f"{path}: holds no frame; repair or remove it")
    return shown


def read_reference_sound(path: Path, max_seconds: float | None) -> np.ndarray:
    """float32 ``[2, S]`` at 16 kHz: the whole sound, or its first ``max_seconds``; never stretched.

    Raises:
        MediaError: the file is damaged or has no sound.
    """
    waveform = read_sound(path)
    return waveform if max_seconds is None else waveform[:, : round(max_seconds * AUDIO_RATE)]
