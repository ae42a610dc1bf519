"""Sound: decoding on the clock of the video, cutting by time, stretching, conversion to 16 kHz stereo."""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import av
import numpy as np

from .buckets import AUDIO_RATE
from .media import MediaError, audio_stream, media_errors, open_container

logger = logging.getLogger(__name__)

STRETCH_TOLERANCE = 0.01  # of the duration; smaller differences are cut or filled
STRETCH_LIMITS = (0.5, 2.0)
STRETCH_RATE = 44_100  # Hz; the tempo filter's window is shorter, so its timing better, at high rates

_GAP = 0.02  # seconds; below it, timestamps are taken as rounded
_CLOCK_RESET = 300.0  # seconds; a jump above it is a new clock, not a pause
_WAVE_OF_UNKNOWN_LENGTH = 0x7FFF_0000  # bytes; streamed files state the largest number instead
_PACKED = "flt"  # planar frames of eight or more channels cannot be read


@dataclass(frozen=True)
class NoAudio:
    """A file without sound: not a failure."""

    reason: str


@dataclass(frozen=True)
class AudioInfo:
    """What a container says about its first audio stream."""

    rate: int
    channels: int
    duration: float | None  # seconds


def probe_audio(path: Path) -> AudioInfo | NoAudio:
    """Rate, channels and duration from the header."""
    with open_container(path) as container:
        stream = audio_stream(path, container)
        if stream is None:
            return NoAudio("no audio stream")
        duration = container.duration / av.time_base if container.duration else None
        if stream.duration is not None:
            duration = float(stream.duration * stream.time_base)
        return AudioInfo(stream.rate, stream.codec_context.channels, _wave_duration(path) or duration)


def _wave_duration(path: Path) -> float | None:
    """Seconds that the header of a WAVE file states; FFmpeg tells those that the file has.

    ``None`` for other files, and for headers that were written before the length was known.
    """
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return None
        bytes_per_second = 0
        while len(chunk := file.read(8)) == 8:
            size = int.from_bytes(chunk[4:], "little")
            if chunk[:4] == b"fmt ":
                bytes_per_second = int.from_bytes(file.read(16)[8:12], "little")
                file.seek(size - 16 + size % 2, os.SEEK_CUR)
            elif chunk[:4] == b"data":
                known = bytes_per_second > 0 and 0 < size < _WAVE_OF_UNKNOWN_LENGTH
                return size / bytes_per_second if known else None
            else:
                file.seek(size + size % 2, os.SEEK_CUR)
    return None


# --- decoding -----------------------------------------------------------------------------------------------


class AudioTrack:
    """The sound of one file as stereo at its own rate, read forward, holding only what is asked for.

    Sample ``k`` belongs to ``k / rate`` seconds on the clock that starts at ``origin``. Pauses in the stream
    are silence of their true length. Use as a context manager.
    """

    def __init__(self, path: Path, *, origin: float | None = None) -> None:
        """
        Args:
            origin: seconds on the container's clock that become 0, e.g. the first video frame's time; None:
                the first sample.
        """
        self.path = path
        self.origin = origin
        self.gaps = 0.0  # seconds filled with silence so far
        self.damaged = 0  # packets that could not be decoded so far
        self.empty = True  # no sample yet
        self.ended = False  # the last sample has been read
        self._blocks: deque[tuple[int, np.ndarray]] = deque()  # (first sample, float32 [2, S])
        self._end = 0  # next sample
        with ExitStack() as stack:
            container = stack.enter_context(open_container(path))
            self._stream = audio_stream(path, container)
            self._stack = stack.pop_all()
        self.rate: int = self._stream.rate if self._stream else 0
        self._frames = iter(()) if self._stream is None else self._decode(container)

    def __enter__(self) -> AudioTrack:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def read(self, start: float, end: float) -> np.ndarray | NoAudio:
        """float32 ``[2, S]`` of the seconds ``[start, end)``; silence where the track has nothing.

        Raises:
            MediaError: the stream cannot be decoded at all.
        """
        if self._stream is None:
            return NoAudio("no audio stream")
        first, last = round(start * self.rate), round(end * self.rate)
        self._fill(last)
        if self.empty:
            if self.damaged:
                raise MediaError(f"{self.path}: its sound cannot be decoded; repair or remove it")
            return NoAudio("the audio stream is empty")
        out = np.zeros((2, last - first), dtype=np.float32)
        heard = False
        for position, block in self._blocks:
            low, high = max(position, first), min(position + block.shape[1], last)
            if low < high:
                out[:, low - first : high - first] = block[:, low - position : high - position]
                heard = True
        return out if heard else NoAudio(f"no sound between {start:.2f} s and {end:.2f} s")

    def read_all(self) -> np.ndarray | NoAudio:
        """The whole track."""
        self._fill(None)
        return self.read(0.0, max(self._end, 1) / self.rate) if self.rate else NoAudio("no audio stream")

    def forget(self, before: float) -> None:
        """Free the sound earlier than ``before`` seconds."""
        limit = round(before * self.rate)
        while self._blocks and self._blocks[0][0] + self._blocks[0][1].shape[1] <= limit:
            self._blocks.popleft()

    def _fill(self, until: int | None) -> None:
        """Decode up to sample ``until`` (the end if None)."""
        while until is None or self._end < until:
            frame = next(self._frames, None)
            if frame is None:
                self.ended = True
                return
            self._append(frame)

    @property
    def seconds(self) -> float:
        """Where the track ends, as far as it has been read."""
        return self._end / self.rate if self.rate else 0.0

    def _append(self, frame: av.AudioFrame) -> None:
        samples = to_stereo(_samples(frame), frame.layout.name)
        seconds = None if frame.pts is None else float(frame.pts * frame.time_base)
        if self.empty:
            if self.origin is None:
                self.origin = seconds or 0.0
            self._end = 0 if seconds is None else round((seconds - self.origin) * self.rate)
        position = self._end
        if seconds is not None:
            stated = round((seconds - self.origin) * self.rate)
            if abs(stated - position) > _CLOCK_RESET * self.rate:
                self.origin += (stated - position) / self.rate
            elif abs(stated - position) > _GAP * self.rate:
                self.gaps += max(stated - position, 0) / self.rate
                samples = samples[:, max(position - stated, 0) :]  # an overlap: what came first stays
                position = max(position, stated)
        if samples.shape[1]:
            self._blocks.append((position, samples))
            self._end = position + samples.shape[1]
            self.empty = False

    def _decode(self, container: av.container.InputContainer) -> Iterator[av.AudioFrame]:
        """Packed float frames at the track's rate. Damaged packets are left out."""
        resampler, described = None, None
        with media_errors(self.path):
            for packet in container.demux(self._stream):
                try:
                    frames = packet.decode()
                except av.error.InvalidDataError:
                    self.damaged += 1
                    continue
                for frame in frames:
                    # Some streams change their layout or rate on the way.
                    description = frame.format.name, frame.layout.name, frame.sample_rate
                    if description != described:
                        described = description
                        resampler = av.AudioResampler(_PACKED, frame.layout.name, self.rate)
                    yield from resampler.resample(frame)


def _samples(frame: av.AudioFrame) -> np.ndarray:
    """float32 ``[C, S]`` of a packed frame."""
    # A copy: the array of a frame keeps the frame alive, which is many times larger.
    return frame.to_ndarray().reshape(-1, frame.layout.nb_channels).T.copy()


def _packed_frame(samples: np.ndarray, layout: str, rate: int) -> av.AudioFrame:
    packed = np.ascontiguousarray(samples.T, dtype=np.float32).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(packed, format=_PACKED, layout=layout)
    frame.sample_rate = rate
    return frame


# --- channels -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def down_mix_matrix(layout: str) -> np.ndarray | None:
    """``[2, C]`` weights from ``layout`` to stereo, ``None`` if the layout has no such rule.

    libswresample's weights (centre and surround at 0.7071, no LFE), which it leaves unnormalised for float,
    over their largest row sum: 1 / 2.414 for 5.1, 1 / 3.121 for 7.1. Found by converting unit impulses.
    """
    channels = av.AudioLayout(layout).nb_channels
    resampler = av.AudioResampler(_PACKED, "stereo", 48_000)
    try:
        out = resampler.resample(_packed_frame(np.eye(channels), layout, 48_000))
    except (av.FFmpegError, ValueError):
        return None
    matrix = np.concatenate([_samples(frame) for frame in out], axis=1)[:, :channels]
    return matrix / np.abs(matrix).sum(axis=1).max()


def to_stereo(samples: np.ndarray, layout: str) -> np.ndarray:
    """float32 ``[C, S]`` to ``[2, S]``: mono is doubled, more channels are mixed down."""
    channels = samples.shape[0]
    if channels == 1:
        return np.repeat(samples, 2, axis=0)
    if channels == 2:
        return samples
    matrix = down_mix_matrix(layout)
    if matrix is None or layout.endswith("channels"):  # no known positions
        matrix = np.full((2, channels), 1.0 / channels)
    return (matrix @ samples).astype(np.float32)


# --- time ---------------------------------------------------------------------------------------------------


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """float32 ``[2, S]`` at another sample rate; ``S * new_rate / rate`` samples."""
    if rate == new_rate or samples.shape[1] == 0:
        return samples
    resampler = av.AudioResampler(_PACKED, "stereo", new_rate)
    frames = resampler.resample(_packed_frame(samples, "stereo", rate)) + resampler.resample(None)
    return fit_length(
        np.concatenate([_samples(frame) for frame in frames], axis=1),
        math.floor(samples.shape[1] * new_rate / rate + 1e-6),
    )


def fit_length(samples: np.ndarray, length: int) -> np.ndarray:
    """Cut the end of ``[C, S]`` or append silence."""
    missing = length - samples.shape[1]
    return np.pad(samples, ((0, 0), (0, missing))) if missing > 0 else samples[:, :length]


def time_stretch(samples: np.ndarray, rate: int, length: int) -> np.ndarray:
    """float32 ``[2, S]`` to ``[2, length]`` at the same pitch, by FFmpeg's atempo (WSOLA).

    The filter's output leads its input by about half its window; that is compensated, which leaves a few
    milliseconds. The tempo ``S / length`` must lie in ``STRETCH_LIMITS``.
    """
    tempo = samples.shape[1] / length
    half = 2 ** math.ceil(math.log2(rate / 24)) // 2
    # Silence before and behind gives the filter whole windows at both ends.
    padded = np.pad(samples, ((0, 0), (half, 4 * half)))
    stretched = _atempo(padded, rate, tempo)
    skip = max(round(half / tempo) - round(0.9 * half), 0)
    return fit_length(stretched[:, skip:], length)


def _atempo(samples: np.ndarray, rate: int, tempo: float) -> np.ndarray:
    graph = av.filter.Graph()
    source = graph.add_abuffer(sample_rate=rate, format=_PACKED, layout="stereo")
    nodes = [
        source,
        graph.add("atempo", f"{tempo:.9f}"),
        graph.add("aformat", f"sample_fmts={_PACKED}"),
        graph.add("abuffersink"),
    ]
    graph.link_nodes(*nodes).configure()
    for begin in range(0, samples.shape[1], rate):
        frame = _packed_frame(samples[:, begin : begin + rate], "stereo", rate)
        frame.pts = begin
        graph.push(frame)
    graph.push(None)
    out: list[np.ndarray] = []
    while True:
        try:
            out.append(_samples(graph.pull()))
        except (av.error.EOFError, av.error.BlockingIOError):
            return np.concatenate(out, axis=1)


# --- clips --------------------------------------------------------------------------------------------------


def cut_clip(track: AudioTrack, start: float, end: float, duration: float) -> np.ndarray | NoAudio:
    """The sound of ``[start, end)`` seconds as float32 ``[2, S]`` at 16 kHz, made to last ``duration``.

    A difference above 1 % is stretched at constant pitch; a smaller one is cut, or filled with the sound that
    follows.

    Raises:
        MediaError: the durations differ by more than a factor of 2.
    """
    tempo = (end - start) / duration
    length = math.floor(duration * AUDIO_RATE + 1e-6)
    if abs(end - start - duration) <= STRETCH_TOLERANCE * (end - start):
        samples = track.read(start, start + duration)
        return samples if isinstance(samples, NoAudio) else to_16k(samples, track.rate, length)
    if not STRETCH_LIMITS[0] <= tempo <= STRETCH_LIMITS[1]:
        raise MediaError(
            f"{track.path}: {end - start:.2f} s of sound would be stretched to {duration:.2f} s of video; "
            "check source_fps of the dataset"
        )
    samples = track.read(start, end)
    if isinstance(samples, NoAudio):
        return samples
    rate = track.rate if track.rate >= STRETCH_RATE else 48_000
    samples = resample(samples, track.rate, rate)
    return to_16k(time_stretch(samples, rate, round(duration * rate)), rate, length)


def to_16k(samples: np.ndarray, rate: int, length: int | None = None) -> np.ndarray:
    """float32 ``[2, S]`` at 16 kHz, of exactly ``length`` samples if given."""
    converted = resample(samples, rate, AUDIO_RATE)
    return np.ascontiguousarray(converted if length is None else fit_length(converted, length))
