"""From one source item to clips ready for the VAEs: decoded, at the target rate, resized, cut, with sound.

Everything here runs without a model and without a GPU. The functions are plain and their arguments and
results can be pickled, so threads or processes can call them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from .audio import AudioTrack, NoAudio, cut_clip, probe_audio, to_16k
from .buckets import AUDIO_RATE, IMAGE_FPS, SHORTEST_SOUND, Size
from .cache import clip_base
from .entries import DatasetEntry
from .frame_store import BlockPool, FrameStore, join
from .frames import (
    ClipWindow,
    Cut,
    FrameRate,
    clip_windows,
    cut_clips,
    needs_resampling,
    output_length,
    sample_frames,
    settle_rate,
)
from .image_sequence import ImageSequence
from .media import (
    MediaError,
    Video,
    frame_times,
    image_size,
    open_video,
    probe_video,
    read_image,
)
from .resize import resize_to_bucket
from .sources import SourceItem

logger = logging.getLogger(__name__)

AudioStatus = Literal["present", "absent", "not requested"]

_SILENT_END = 0.1  # seconds; sound that ends a little early is usual

# Beyond these a container's rate is a damaged or meaningless value.
_LOWEST_FPS, _HIGHEST_FPS = 1.0, 1000.0


@dataclass(frozen=True)
class AudioSource:
    """Where the sound of a video item comes from."""

    kind: Literal["video", "audio_files"] = "video"
    directory: Path | None = None  # of the files; None: beside the video
    extension: str = ".wav"

    def kind_for(self, item: SourceItem) -> Literal["video", "audio_files"]:
        """``kind``, unless the item names a file of its own."""
        return self.kind if item.audio is None else "audio_files"

    def locate(self, item: SourceItem) -> Path:
        """The file that should hold the item's sound: the listed one, the video itself or ``<stem><extension>``."""
        if item.audio is not None:
            return item.audio
        if self.kind == "video":
            return item.path
        suffix = "." + self.extension.lstrip(".")
        return (self.directory or item.path.parent) / (item.stem + suffix)


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
    bucket = _bucket(item, entry, size)
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


def read_sound(path: Path) -> np.ndarray:
    """The whole sound of a file, float32 ``[2, S]`` at 16 kHz.

    Raises:
        MediaError: the file is missing or damaged, has no sound, or too little for one latent step.
    """
    with AudioTrack(path) as track:
        samples = track.read_all()
        _warn_of_damage(track)
    if isinstance(samples, NoAudio):
        raise MediaError(f"{path}: {samples.reason}; remove it from the dataset")
    waveform = to_16k(samples, track.rate)
    if waveform.shape[1] < SHORTEST_SOUND:
        raise MediaError(f"{path}: {_too_short(waveform)}; remove it from the dataset")
    _warn_if_cut_short(path, waveform.shape[1] / AUDIO_RATE)
    return waveform


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
        bucket = _bucket(item, entry, video.info.size)
        rule = entry.extraction
        rate, length, notes = frame_rate(video, entry, limit=rule.limit, count=rule.mode == "uniform")
        track = _open_track(stack, video, item, sound) if sound else None
        store = FrameStore(bucket, rule.longest, pool)

        def convert(frame) -> np.ndarray:
            pixels = store.take()
            video.fit(frame, pixels)
            return pixels

        cuts = cut_clips(sample_frames(video.frames(), rate), rule, convert=convert, length=length)
        for cut in cuts:
            waveform, status, reason = _clip_sound(track, cut, entry.target_fps)
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
                silent_end=_silent_end(track, cut) if status == "present" else 0.0,
            )
        if isinstance(track, AudioTrack):
            _warn_of_damage(track)
            if track.ended and track.path != item.path:
                _warn_if_cut_short(track.path, track.seconds)


def open_frames(path: Path, entry: DatasetEntry, threads: int = 1) -> AbstractContextManager[Video | ImageSequence]:
    """A video or a folder of images, to be read once from its beginning."""
    return nullcontext(_sequence(path, entry)) if path.is_dir() else open_video(path, threads=threads)


def _sequence(path: Path, entry: DatasetEntry) -> ImageSequence:
    """Without a rate of its own every image becomes one frame."""
    return ImageSequence(path, entry.source_fps or entry.target_fps)


def _bucket(item: SourceItem, entry: DatasetEntry, size: Size) -> Size:
    bucket = entry.bucket(size)
    if bucket is None:
        raise MediaError(
            f"{item.path}: {size[0]}x{size[1]} is smaller than the smallest bucket (32 per side); "
            "remove it, or allow enlarging with bucket_no_upscale = false"
        )
    return bucket


# --- frame rate ---------------------------------------------------------------------------------------------


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


# --- sound --------------------------------------------------------------------------------------------------


def _open_track(
    stack: ExitStack, video: Video | ImageSequence, item: SourceItem, sound: AudioSource
) -> AudioTrack | NoAudio:
    path = sound.locate(item)
    if path.is_dir():
        return NoAudio("a folder of images has no sound")
    if path != item.path and not path.is_file():
        return NoAudio(f"no file {path}")
    # A file of its own starts with the video.
    return stack.enter_context(AudioTrack(path, origin=video.origin if path == item.path else None))


def _clip_sound(
    track: AudioTrack | NoAudio | None, cut: Cut[np.ndarray], fps: float
) -> tuple[np.ndarray | None, AudioStatus, tuple[str, ...]]:
    if track is None:
        return None, "not requested", ()
    if isinstance(track, NoAudio):
        return None, "absent", (track.reason,)
    samples = cut_clip(track, cut.start, cut.end, cut.window.count / fps)
    track.forget(cut.earliest)
    if isinstance(samples, NoAudio):
        return None, "absent", (samples.reason,)
    if samples.shape[1] < SHORTEST_SOUND:
        return None, "absent", (_too_short(samples),)
    return samples, "present", ()


def _silent_end(track: AudioTrack | NoAudio | None, cut: Cut[np.ndarray]) -> float:
    if not isinstance(track, AudioTrack) or not track.ended:
        return 0.0
    missing = cut.end - max(track.seconds, cut.start)
    return missing if missing > _SILENT_END else 0.0


def _too_short(waveform: np.ndarray) -> str:
    found, needed = (1000 * count / AUDIO_RATE for count in (waveform.shape[1], SHORTEST_SOUND))
    return f"{found:.0f} ms of sound, at least {needed:.0f} ms are needed"


def _warn_of_damage(track: AudioTrack) -> None:
    if track.gaps:
        logger.warning("%s: %.2f s of pauses in the sound filled with silence", track.path.name, track.gaps)
    if track.damaged:
        logger.warning("%s: %d damaged packets of sound left out", track.path.name, track.damaged)


def _warn_if_cut_short(path: Path, seconds: float) -> None:
    """Only a warning: some formats know their duration by an estimate from the bit rate."""
    info = probe_audio(path)
    stated = None if isinstance(info, NoAudio) else info.duration
    if stated is not None and seconds < stated - max(0.5, 0.05 * stated):
        logger.warning("%s: ends at %.2f s of %.2f s; the file may be truncated", path.name, seconds, stated)


# --- planning -----------------------------------------------------------------------------------------------


def plan_item(item: SourceItem, entry: DatasetEntry, audio_source: AudioSource | None = None) -> ItemPlan:
    """Which clips and bucket an item will give, from headers (and the first frame of a video).

    Raises:
        MediaError: as :func:`iter_clips`, as far as the header shows it.
    """
    if item.kind == "image":
        size = image_size(item.path)
        return ItemPlan(
            item,
            _bucket(item, entry, size),
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
    info = _sequence(item.path, entry).info if item.path.is_dir() else probe_video(item.path)
    rate = nominal_rate(item.path, info.fps, entry)
    pace = info.fps or rate.source
    stored = info.frames or round((info.duration or 0.0) * pace)
    frames = output_length(stored, stored / pace, rate)
    windows = clip_windows(entry.extraction, frames)
    lengths = {window.count for window in windows}
    external = sound.locate(item)
    return ItemPlan(
        item,
        _bucket(item, entry, info.size),
        size=info.size,
        fps=info.fps,
        duration=stored / pace,
        frames=frames,
        windows=tuple(windows),
        too_short=() if entry.frame_extraction == "full" else tuple(t for t in entry.target_frames if t not in lengths),
        resampled=rate.resample,
        has_audio=info.has_audio if external == item.path else external.is_file(),
    )
