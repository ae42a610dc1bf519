"""What an item will give, from its header alone."""

from __future__ import annotations

from dataclasses import dataclass

from .audio import NoAudio, probe_audio
from .buckets import Size
from .clip_sound import AudioSource
from .clips import item_bucket
from .entries import DatasetEntry
from .frames import ClipWindow, clip_windows, output_length
from .media import MediaError, image_size, probe_video
from .rates import image_sequence, nominal_rate
from .sources import SourceItem


@dataclass(frozen=True)
class ItemPlan:
    """What an item will give, from its header alone; counts are estimates until it is decoded."""

    item: SourceItem
    bucket: Size
    size: Size | None  # (width, height) as shown
    fps: float | None  # of the source
    duration: float | None  # seconds
    frames: int  # at the target rate
    windows: tuple[ClipWindow, ...]
    too_short: tuple[int, ...]  # target_frames that are longer than the video
    resampled: bool
    has_audio: bool


def plan_item(item: SourceItem, entry: DatasetEntry, audio_source: AudioSource | None = None) -> ItemPlan:
    """Which clips and bucket an item will give, from headers (and the first frame of a video).

    Raises:
        MediaError: as :func:`iter_clips`, as far as the header shows it.
    """
    if item.kind == "image":
        size = image_size(item.path)
        return ItemPlan(
            item,
            item_bucket(item, entry, size),
            size=size,
            fps=None,
            duration=None,
            frames=1,
            windows=(ClipWindow(0, 1),),
            too_short=(),
            resampled=False,
            has_audio=False,
        )
    if item.kind == "audio":
        info = probe_audio(item.path)
        if isinstance(info, NoAudio):
            raise MediaError(f"{item.path}: {info.reason}; remove it from the dataset")
        return ItemPlan(
            item,
            entry.resolution,
            size=None,
            fps=None,
            duration=info.duration,
            frames=0,
            windows=(),
            too_short=(),
            resampled=False,
            has_audio=True,
        )
    return _plan_video(item, entry, audio_source or AudioSource())


def _plan_video(item: SourceItem, entry: DatasetEntry, sound: AudioSource) -> ItemPlan:
    info = image_sequence(item.path, entry).info if item.path.is_dir() else probe_video(item.path)
    rate = nominal_rate(item.path, info.fps, entry)
    pace = info.fps or rate.source
    stored = info.frames or round((info.duration or 0.0) * pace)
    frames = output_length(stored, stored / pace, rate)
    windows = clip_windows(entry.extraction, frames)
    lengths = {window.count for window in windows}
    external = sound.locate(item)
    return ItemPlan(
        item,
        item_bucket(item, entry, info.size),
        size=info.size,
        fps=info.fps,
        duration=stored / pace,
        frames=frames,
        windows=tuple(windows),
        too_short=() if entry.frame_extraction == "full" else tuple(t for t in entry.target_frames if t not in lengths),
        resampled=rate.resample,
        has_audio=info.has_audio if external == item.path else external.is_file(),
    )
