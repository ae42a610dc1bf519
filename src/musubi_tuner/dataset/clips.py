"""From one source item to clips ready for the VAEs: decoded, at the target rate, resized, cut, with sound.

Everything here runs without a model and without a GPU. The functions are plain and their arguments and
results can be pickled, so threads or processes can call them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from .audio import AudioTrack
from .buckets import AUDIO_RATE, IMAGE_FPS, Size
from .cache import clip_base
from .clip_sound import (
    AudioSource,
    AudioStatus,
    clip_sound,
    open_track,
    read_sound,
    silent_end,
    warn_if_cut_short,
    warn_of_damage,
)
from .entries import DatasetEntry
from .frame_store import BlockPool, FrameStore, join
from .frames import ClipWindow, cut_clips, sample_frames
from .media import MediaError, read_image
from .rates import frame_rate, open_frames
from .resize import resize_to_bucket
from .sources import SourceItem


@dataclass(frozen=True)
class PreparedClip:
    """One training sample before encoding."""

    base_name: str  # start of its cache file names
    item: SourceItem
    bucket: Size  # (width, height)
    window: ClipWindow | None  # frames at the target rate; None: a sound without picture
    pixels: np.ndarray | None  # uint8 [F, H, W, 3]
    fps: float
    waveform: np.ndarray | None  # float32 [2, S] at 16 kHz
    audio_status: AudioStatus
    original_size: Size | None  # (width, height) as shown
    notes: tuple[str, ...] = ()
    silent_end: float = 0.0  # seconds at the end for which the file has no more sound

    @property
    def duration(self) -> float:
        """Seconds: of the frames, or of the sound where there are none."""
        if self.pixels is not None:
            return len(self.pixels) / self.fps
        return self.waveform.shape[1] / AUDIO_RATE if self.waveform is not None else 0.0


def base_name(item: SourceItem, window: ClipWindow | None) -> str:
    """``<stem>``, for clips of a video ``<stem>_<start>-<count>``."""
    if item.kind != "video" or window is None:
        return item.stem
    return clip_base(item.stem, window.start, window.count)


# --- clips --------------------------------------------------------------------------------------------------


def prepare_clips(
    item: SourceItem,
    entry: DatasetEntry,
    *,
    with_audio: bool,
    audio_source: AudioSource | None = None,
    decode_threads: int = 1,
) -> list[PreparedClip]:
    """All clips of an item at once, by length, then by start; see :func:`iter_clips`."""
    clips = iter_clips(item, entry, with_audio=with_audio, audio_source=audio_source, decode_threads=decode_threads)
    return sorted(clips, key=lambda clip: (clip.window.count, clip.window.start) if clip.window else (0, 0))


def iter_clips(
    item: SourceItem,
    entry: DatasetEntry,
    *,
    with_audio: bool,
    audio_source: AudioSource | None = None,
    decode_threads: int = 1,
    pool: BlockPool | None = None,
) -> Iterator[PreparedClip]:
    """Decode an item and yield its clips, each as soon as it is complete.

    Memory stays near that of the longest clip, however long the video is. A video shorter than every target
    length yields nothing.

    Args:
        with_audio: cut the sound of videos too; sound without picture always has it.
        audio_source: where the sound of videos comes from; by default from the video itself.
        decode_threads: of one video decoder; 0 = one for each core.
        pool: shares the memory of clips that are done with between calls.

    Raises:
        MediaError: the file is missing, damaged, of unknown frame rate, or too small for a bucket.
    """
    require_files(item, with_audio=with_audio)
    if item.kind == "image":
        yield _image_clip(item, entry)
    elif item.kind == "audio":
        yield _audio_clip(item, entry)
    else:
        sound = audio_source or AudioSource() if with_audio else None
        yield from _video_clips(item, entry, sound, decode_threads, pool or BlockPool())


def require_files(item: SourceItem, *, with_audio: bool) -> None:
    """Check that what a list names is there.

    Raises:
        MediaError: it is not. The message names the line.
    """
    if item.place is None:  # found in a directory
        return
    files = [(f"{item.kind}_path", item.path), ("audio_path", item.audio if with_audio else None)]
    for name, path in files:
        if path is None or path.is_file() or (name == "video_path" and path.is_dir()):
            continue
        what = "is not a file" if path.exists() else "does not exist"
        raise MediaError(f"{path}: {what} ({name} of {item.place}); correct or remove the line")


def _image_clip(item: SourceItem, entry: DatasetEntry) -> PreparedClip:
    pixels = read_image(item.path)
    size = pixels.shape[1], pixels.shape[0]
    bucket = item_bucket(item, entry, size)
    return PreparedClip(
        base_name=base_name(item, None),
        item=item,
        bucket=bucket,
        window=ClipWindow(0, 1),
        pixels=np.ascontiguousarray(resize_to_bucket(pixels, bucket))[None],
        fps=IMAGE_FPS,
        waveform=None,
        audio_status="not requested",
        original_size=size,
    )


def _audio_clip(item: SourceItem, entry: DatasetEntry) -> PreparedClip:
    waveform = read_sound(item.path)
    return PreparedClip(
        base_name=base_name(item, None),
        item=item,
        bucket=entry.resolution,
        window=None,
        pixels=None,
        fps=entry.target_fps,
        waveform=waveform,
        audio_status="present",
        original_size=None,
    )


def _video_clips(
    item: SourceItem,
    entry: DatasetEntry,
    sound: AudioSource | None,
    decode_threads: int,
    pool: BlockPool,
) -> Iterator[PreparedClip]:
    with ExitStack() as stack:
        video = stack.enter_context(open_frames(item.path, entry, decode_threads))
        bucket = item_bucket(item, entry, video.info.size)
        rule = entry.extraction
        rate, length, notes = frame_rate(video, entry, limit=rule.limit, count=rule.mode == "uniform")
        track = open_track(stack, video, item, sound) if sound else None
        store = FrameStore(bucket, rule.longest, pool)

        def convert(frame) -> np.ndarray:
            pixels = store.take()
            video.fit(frame, pixels)
            return pixels

        cuts = cut_clips(sample_frames(video.frames(), rate), rule, convert=convert, length=length)
        for cut in cuts:
            waveform, status, reason = clip_sound(track, cut, entry.target_fps)
            yield PreparedClip(
                base_name=base_name(item, cut.window),
                item=item,
                bucket=bucket,
                window=cut.window,
                pixels=join(cut.frames),
                fps=entry.target_fps,
                waveform=waveform,
                audio_status=status,
                original_size=video.info.size,
                notes=notes + reason,
                silent_end=silent_end(track, cut) if status == "present" else 0.0,
            )
        if isinstance(track, AudioTrack):
            warn_of_damage(track)
            if track.ended and track.path != item.path:
                warn_if_cut_short(track.path, track.seconds)


def item_bucket(item: SourceItem, entry: DatasetEntry, size: Size) -> Size:
    """(width, height) that an item of ``size`` gets.

    Raises:
        MediaError: it is too small for any.
    """
    bucket = entry.bucket(size)
    if bucket is None:
        raise MediaError(
            f"{item.path}: {size[0]}x{size[1]} is smaller than the smallest bucket (32 per side); "
            "remove it, or allow enlarging with bucket_no_upscale = false"
        )
    return bucket
