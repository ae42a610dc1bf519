"""The frame-rate rule of a dataset, applied to one video or folder of images."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from .entries import DatasetEntry
from .frames import FrameRate, needs_resampling, output_length, settle_rate
from .image_sequence import ImageSequence
from .media import MediaError, Video, frame_times, open_video

logger = logging.getLogger(__name__)

# Beyond these a container's rate is a damaged or meaningless value.
_LOWEST_FPS, _HIGHEST_FPS = 1.0, 1000.0


def open_frames(path: Path, entry: DatasetEntry, threads: int = 1) -> AbstractContextManager[Video | ImageSequence]:
    """A video or a folder of images, to be read once from its beginning."""
    return nullcontext(image_sequence(path, entry)) if path.is_dir() else open_video(path, threads=threads)


def image_sequence(path: Path, entry: DatasetEntry) -> ImageSequence:
    """Without a rate of its own every image becomes one frame."""
    return ImageSequence(path, entry.source_fps or entry.target_fps)


def frame_rate(
    video: Video | ImageSequence, entry: DatasetEntry, *, limit: int | None = None, count: bool = False
) -> tuple[FrameRate, int | None, tuple[str, ...]]:
    """The frame-rate rule for one video, the number of output frames (if ``count``), notes.

    Args:
        limit: output frames that are used at most; what lies behind them does not decide.
        count: whether the number of output frames is needed.

    Raises:
        MediaError: its frame rate is unknown.
    """
    name = video.path.name
    rate = nominal_rate(video.path, video.info.fps, entry)
    notes: list[str] = []
    if isinstance(video, ImageSequence):
        if video.misplaced:
            notes.append("frames are taken by name: {} comes before {}; pad the numbers".format(*video.misplaced))
    elif not rate.given:
        logger.info("Auto-detected source FPS: %.2f for %s", rate.source, name)
    length = None
    check = not (rate.resample or rate.given)
    if check or count:
        times = frame_times_of(video, None if limit is None else limit + 1)
        rate = settle_rate(rate, times, limit)
        if rate.variable:
            notes.append("variable frame rate: frames are chosen by their time")
        length = output_length(len(times), times[-1] + 1.0 / rate.source, rate)
    if rate.resample:
        logger.info("Resampling %s: %.2f FPS -> %.2f FPS", name, rate.source, rate.target)
    if rate.source < rate.target - 1 and rate.resample:
        notes.append(f"repeats frames ({rate.source:.2f} to {rate.target:.2f} FPS); set target_fps")
    for note in notes:
        logger.warning("%s: %s", name, note)
    return rate, length if count else None, tuple(notes)


def frame_times_of(video: Video | ImageSequence, limit: int | None = None) -> list[float]:
    """Seconds of the (first ``limit``) source frames since the first; the video is not advanced."""
    return video.times(limit) if isinstance(video, ImageSequence) else frame_times(video.path, limit)


def nominal_rate(path: Path, detected: float | None, entry: DatasetEntry) -> FrameRate:
    """The frame-rate rule for a file as far as its rate alone decides; see :func:`.frames.settle_rate`.

    Raises:
        MediaError: the rate is neither known nor given.
    """
    source = entry.source_fps or detected
    if source is None or not _LOWEST_FPS <= source <= _HIGHEST_FPS:
        found = "unknown" if source is None else f"{source:.6g}"
        raise MediaError(f"{path}: its frame rate is {found}; set source_fps of the dataset")
    return FrameRate(
        source,
        entry.target_fps,
        given=entry.source_fps is not None,
        resample=needs_resampling(source, entry.target_fps),
    )
