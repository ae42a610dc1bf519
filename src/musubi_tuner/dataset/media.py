"""Decoding of videos and images."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, ImageOps

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.log import warn_once

from .buckets import Size
from .resize import BT601, BT709, YuvShrinker, resize_to_bucket

logger = logging.getLogger(__name__)

_UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED
_EXIF_ORIENTATION = 0x0112
_HIDDEN_FRAMES = frozenset({"vp8"})  # codecs with packets that show no frame
_REORDER = 32  # more than any codec's distance between decoding and presentation order


class MediaError(UserError):
    """A file cannot be decoded, or not to its end. The message names the file."""


@contextmanager
def media_errors(path: Path) -> Iterator[None]:
    """Turn what the decoding libraries raise into a :class:`MediaError` that names ``path``."""
    try:
        yield
    except (av.FFmpegError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        size = path.stat().st_size if path.is_file() else None
        if size == 0:
            reason = "the file is empty"
        raise MediaError(f"{path}: cannot be decoded ({reason}); repair or remove it") from error


@contextmanager
def open_container(path: Path) -> Iterator[InputContainer]:
    """An open container; foreign text encodings in its metadata do not matter."""
    with media_errors(path):
        container = av.open(str(path), metadata_errors="replace")
    with container:
        yield container


def audio_stream(path: Path, container: InputContainer) -> AudioStream | None:
    """The first audio stream that can be decoded; phones add others in formats of their own.

    Raises:
        MediaError: there are audio streams, but none in a known format.
    """
    streams = container.streams.audio
    known = next((stream for stream in streams if stream.codec_context is not None), None)
    if streams and known is None:
        raise MediaError(f"{path}: its sound is in an unknown format; convert it, for example to AAC")
    return known


# --- video --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VideoInfo:
    """What a container says about its first video stream, with the first frame decoded."""

    size: Size  # (width, height) as shown, after rotation
    fps: float | None
    duration: float | None  # seconds
    frames: int | None  # as stored in the container; absent in some formats
    has_audio: bool


class Video:
    """One open video file, read once from its beginning; made by :func:`open_video`."""

    def __init__(self, path: Path, container: InputContainer, *, threads: int) -> None:
        self.path = path
        self._container = container
        self._stream = _video_stream(path, container)
        self._stream.codec_context.thread_count = threads
        self._stream.codec_context.thread_type = "AUTO" if threads != 1 else "NONE"
        self._converter = VideoReformatter()
        self._shrinker = YuvShrinker()
        self._decoded = container.decode(self._stream)
        with media_errors(path):
            first = next(self._decoded, None)
        if first is None:
            raise MediaError(f"{path}: has no decodable video frame; repair or remove it")
        self._first = first
        self.origin: float = _seconds(first) or 0.0  # of the first frame on the container's clock
        turned = _quarter_turns(first) % 2
        self.info = VideoInfo(
            size=(first.height, first.width) if turned else (first.width, first.height),
            fps=_frame_rate(self._stream),
            duration=_duration(self._stream),
            frames=self._stream.frames or None,
            has_audio=any(s.codec_context for s in container.streams.audio),
        )

    def frames(self) -> Iterator[tuple[float, av.VideoFrame]]:
        """Pairs of seconds since the first frame and the frame.

        Raises:
            MediaError: a frame is damaged, or the stream ends before the container says.
        """
        step = 1.0 / (self.info.fps or 25.0)
        time = shown = 0.0
        with media_errors(self.path):
            for index, frame in enumerate(chain((self._first,), self._decoded)):
                if frame.is_corrupt:
                    raise MediaError(f"{self.path}: the frame at {time:.2f} s is damaged; repair or remove it")
                seconds = _seconds(frame)
                time = index * step if seconds is None else seconds - self.origin
                shown = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0
                yield time, frame
        self._check_complete(time + max(step, shown))  # screen recordings hold their last frame

    def to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """uint8 ``[H, W, 3]`` as shown. High-definition material without a tag is BT.709."""
        untagged_hd = _is_untagged_hd(frame)
        with media_errors(self.path):
            rgb = self._converter.reformat(
                frame, format="rgb24", src_colorspace="ITU709" if untagged_hd else None, threads=1
            )
        turns = _quarter_turns(frame)
        pixels = rgb.to_ndarray()
        return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels

    def fit(self, frame: av.VideoFrame, out: np.ndarray) -> None:
        """Fill ``out``, uint8 ``[H, W, 3]``, with the frame as shown, resized to cover it and cut.

        The same picture as :meth:`to_rgb` and :func:`.resize.resize_to_bucket` give, up to rounding: the plain
        conversion of FFmpeg rounds down and is one level darker on average.
        """
        colorspace = int(frame.colorspace)
        if colorspace == _UNSPECIFIED:
            colorspace = BT709 if _is_untagged_hd(frame) else BT601
        with media_errors(self.path):
            done = self._shrinker.shrink(frame, out, colorspace=colorspace, turns=_quarter_turns(frame))
        if not done:
            out[...] = resize_to_bucket(self.to_rgb(frame), (out.shape[1], out.shape[0]))

    def _check_complete(self, end: float) -> None:
        _check_extent(self.path, self._stream)
        stated = self.info.duration
        # Some containers count from their own zero, which may lie before the first frame.
        reached = end + max(self.origin, 0.0)
        if stated is not None and reached < stated - max(0.5, 0.02 * stated):
            raise MediaError(
                f"{self.path}: ends at {reached:.2f} s of {stated:.2f} s, the file is truncated or damaged; "
                "repair or remove it"
            )


@contextmanager
def open_video(path: Path, *, threads: int = 1) -> Iterator[Video]:
    """Open a video and decode its first frame.

    Args:
        threads: decoder threads; 0 = one for each core. One is best when several files are read at once.

    Raises:
        MediaError: not a video, or damaged.
    """
    with open_container(path) as container:
        yield Video(path, container, threads=threads)


def probe_video(path: Path) -> VideoInfo:
    """What the container and the first frame tell, without decoding more."""
    with open_video(path) as video:
        return video.info


def frame_times(path: Path, limit: int | None = None) -> list[float]:
    """Presentation times of the (first ``limit``) frames in seconds since the first, without decoding where
    the packets tell them."""
    with open_container(path) as container:
        stream = _video_stream(path, container)
        packets = (p for p in container.demux(stream) if p.size and not p.is_discard)
        if stream.codec_context.name in _HIDDEN_FRAMES:
            packets = iter(())
        with media_errors(path):  # packets come in decoding order
            marks = [p.pts for p in islice(packets, None if limit is None else limit + _REORDER)]
        if marks and None not in marks and len(set(marks)) == len(marks):
            ordered = sorted(cast("list[int]", marks))[:limit]
            return [float((mark - ordered[0]) * stream.time_base) for mark in ordered]
    with open_video(path, threads=0) as video:
        return [time for time, _ in islice(video.frames(), limit)]


def _video_stream(path: Path, container: InputContainer) -> VideoStream:
    # Cover art of sound files is stored as a video stream of one picture.
    pictures = av.stream.Disposition.attached_pic
    stream = next((s for s in container.streams.video if not s.disposition & pictures), None)
    if stream is None or stream.codec_context is None:
        raise MediaError(f"{path}: holds no video stream that can be decoded; remove it from the dataset")
    return stream


def _check_extent(path: Path, stream: VideoStream) -> None:
    """Refuse a file that ends before the last frame of its index (MP4 and MOV with the index in front)."""
    index = stream.index_entries
    if not index:
        return
    last, size = index[len(index) - 1], path.stat().st_size
    if last.pos + last.size > size:
        raise MediaError(
            f"{path}: its last frame ends at byte {last.pos + last.size} of a file of {size}, so the file is "
            "truncated; repair or remove it"
        )


def _frame_rate(stream: VideoStream) -> float | None:
    rate = stream.average_rate or stream.base_rate
    return float(rate) if rate else None


def _duration(stream: VideoStream) -> float | None:
    """Seconds of this stream; Matroska keeps it in a tag."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    tag = stream.metadata.get("DURATION", "")
    try:
        hours, minutes, seconds = (float(part) for part in tag.split(":"))
    except ValueError:
        return None
    return hours * 3600 + minutes * 60 + seconds


def _seconds(frame: av.VideoFrame) -> float | None:
    return None if frame.pts is None or frame.time_base is None else float(frame.pts * frame.time_base)


def _is_untagged_hd(frame: av.VideoFrame) -> bool:
    return frame.colorspace == _UNSPECIFIED and frame.height >= 720 and not frame.format.is_rgb


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Counter-clockwise quarter turns by which the frame is shown; other angles are left as stored."""
    return round(frame.rotation / 90) % 4 if frame.rotation % 90 == 0 else 0


# --- images -------------------------------------------------------------------------------------------------


def image_size(path: Path) -> Size:
    """``(width, height)`` as shown, from the header."""
    with media_errors(path), Image.open(path) as image:
        width, height = image.size
        turned = image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


def read_image(path: Path) -> np.ndarray:
    """uint8 ``[H, W, 3]``, turned as its EXIF data says, transparency dropped.

    Raises:
        MediaError: not an image, or damaged.
    """
    with media_errors(path), Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if "A" in image.getbands() or "transparency" in image.info:
            warn_once(logger, "alpha", "%s: transparency is dropped (reported once)", path.name)
        if image.mode.startswith("I"):  # 16-bit grey; PIL would clip it to white
            grey = (np.asarray(image, dtype=np.uint32) >> 8).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        return np.array(image.convert("RGB"))
