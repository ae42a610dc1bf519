"""Conditioning masks on the latent grid: 1 keeps a cell of the target clean, 0 generates it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .buckets import SPATIAL_STRIDE, TEMPORAL_STRIDE, Size
from .entries import DatasetEntry
from .files import media_kind
from .frames import ClipWindow, sample_frames
from .intervals import interval_mask, read_intervals
from .media import MediaError, read_image
from .rates import frame_rate, frame_times_of, open_frames
from .resize import resize_to_bucket
from .sources import SourceItem

logger = logging.getLogger(__name__)

_SNAP = 16  # 8-bit levels; video compression does not keep black and white exactly
_ASPECT_TOLERANCE = 0.02


def pool_cells(pixels: np.ndarray) -> np.ndarray:
    """uint8 ``[H, W, 3]`` to float32 ``[H / 32, W / 32]``: the mean level of each cell, white = 1."""
    levels = pixels.astype(np.float32).mean(axis=-1)
    levels[levels < _SNAP] = 0
    levels[levels > 255 - _SNAP] = 255
    height, width = (side // SPATIAL_STRIDE for side in levels.shape)
    cells = levels.reshape(height, SPATIAL_STRIDE, width, SPATIAL_STRIDE).mean(axis=(1, 3))
    return cells / np.float32(255)


def pool_frames(cells: np.ndarray) -> np.ndarray:
    """``[8k + 1, h, w]`` to ``[k + 1, h, w]``: the maximum over the frames that each latent frame sees.

    The first latent frame sees the first frame, every other the next eight.
    """
    rest = cells[1:].reshape(-1, TEMPORAL_STRIDE, *cells.shape[1:])
    return np.concatenate([cells[:1], rest.max(axis=1)])


def read_masks(
    path: Path, item: SourceItem, entry: DatasetEntry, windows: Sequence[ClipWindow], *, bucket: Size, size: Size | None
) -> list[np.ndarray]:
    """float32 ``[F, H, W]`` for each clip of ``item``, from its mask: an image, a video or a folder of images.

    The mask is scaled and cut as the clip is; one of the bucket's size is taken as it is. An image holds for all
    frames. A video is read once, by the frame-rate rule of the dataset; its last frame is held where it is shorter
    than the clips.

    Args:
        bucket: of the clips, (width, height).
        size: of the item as shown; None = not checked.

    Raises:
        MediaError: the mask is damaged, or of another shape than the item.
    """
    if media_kind(path) == "image" and not path.is_dir():
        pixels = read_image(path)
        _check_shape(path, (pixels.shape[1], pixels.shape[0]), item, bucket, size)
        cells = pool_cells(resize_to_bucket(pixels, bucket))[None]
    else:
        cells = _video_cells(path, item, entry, max(window.end for window in windows), bucket, size)
    return [pool_frames(_part(cells, window)) for window in windows]


def _part(cells: np.ndarray, window: ClipWindow) -> np.ndarray:
    """``[count, h, w]`` from ``start``; the last frame is held."""
    return cells[np.minimum(np.arange(window.start, window.end), len(cells) - 1)]


def _video_cells(
    path: Path, item: SourceItem, entry: DatasetEntry, frames: int, bucket: Size, size: Size | None
) -> np.ndarray:
    cells: list[np.ndarray] = []
    last = -1
    with open_frames(path, entry) as video:
        _check_shape(path, video.info.size, item, bucket, size)
        rate, _, _ = frame_rate(video, entry, limit=frames)
        for sample in sample_frames(video.frames(), rate):
            if sample.frame is None or len(cells) == frames:
                break
            same = sample.index == last
            cells.append(cells[-1] if same else pool_cells(resize_to_bucket(video.to_rgb(sample.frame), bucket)))
            last = sample.index
    if not cells:
        raise MediaError(f"{path}: holds no frame; repair or remove it")
    if len(cells) < frames:
        logger.warning("%s: the mask ends after %d of %d frames; its last is held", path, len(cells), frames)
    return np.stack(cells)


def _check_shape(path: Path, found: Size, item: SourceItem, bucket: Size, size: Size | None) -> None:
    if size is None or found == bucket:
        return
    aspect, expected = found[0] / found[1], size[0] / size[1]
    if abs(aspect / expected - 1) > _ASPECT_TOLERANCE:
        raise MediaError(
            f"{path}: {found[0]}x{found[1]}, but {item.path.name} is {size[0]}x{size[1]}; a mask needs the same "
            f"aspect ratio, or the size of the bucket ({bucket[0]}x{bucket[1]})"
        )


# --- sound --------------------------------------------------------------------------------------------------


def read_audio_masks(
    path: Path, item: SourceItem, entry: DatasetEntry, clips: Sequence[tuple[ClipWindow | None, int]]
) -> list[np.ndarray]:
    """float32 ``[T]`` for each clip (its window and latent steps) of ``item``, from a file of intervals.

    Intervals are seconds of the source, counted from its first frame (of a sound: from its beginning).

    Raises:
        UserError: the file of intervals is not one, or the item is damaged.
    """
    intervals = read_intervals(path)
    spans = _spans(item, entry, [window for window, _ in clips if window is not None])
    masks = []
    for window, steps in clips:
        start, end = spans[window] if window else (0.0, 0.0)
        pace = (end - start) * entry.target_fps / window.count if window else 1.0
        masks.append(interval_mask(intervals, steps, start=start, pace=pace))
    return masks


def _spans(
    item: SourceItem, entry: DatasetEntry, windows: Sequence[ClipWindow]
) -> dict[ClipWindow, tuple[float, float]]:
    """Where in the source the sound of each clip begins and ends, in seconds; nothing is decoded."""
    if not windows:
        return {}
    rule = entry.extraction
    with open_frames(item.path, entry) as video:
        rate, _, _ = frame_rate(video, entry, limit=rule.limit)
        times = frame_times_of(video)
        samples = [sample.time for sample in sample_frames(((time, None) for time in times), rate)]
    last = len(samples) - 1  # headers may count frames wrongly
    return {window: (samples[min(window.start, last)], samples[min(window.end, last)]) for window in windows}
