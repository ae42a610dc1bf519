"""Which frames of a video a dataset uses: the frame-rate rule and the extraction of clips.

Pure functions over times and indices; no decoding here.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice, takewhile
from typing import Generic, Literal, TypeVar

import numpy as np

from .buckets import floor_frames

T = TypeVar("T")
U = TypeVar("U")

Extraction = Literal["head", "chunk", "slide", "uniform", "full"]

_EPS = 1e-6  # seconds; times come from fractions and meet multiples of 1 / fps


@dataclass(frozen=True)
class ClipWindow:
    """``count`` consecutive frames from ``start``, counted at the target rate."""

    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(frozen=True)
class FrameRate:
    """How the frames of one source become frames at the target rate."""

    source: float  # frames per second, detected or given
    target: float
    given: bool = False  # the user gave ``source``: container times are not trusted for the choice of frames
    resample: bool = False  # choose frames by time; else every frame is kept and only re-timed
    variable: bool = False  # resampled because the frames do not keep their rate


def needs_resampling(source_fps: float, target_fps: float) -> bool:
    """Whether the rates differ by more than one frame per second after rounding the source up.

    Rounding up keeps NTSC material (23.976, 59.94) as it is beside 24, 25 and 60.
    """
    return abs(math.ceil(round(source_fps, 3)) - target_fps) > 1


def is_regular(times: Sequence[float], source_fps: float) -> bool:
    """Whether frames (at ``times`` in seconds since the first) keep within 1.5 frames of a constant rate."""
    if len(times) == 0:
        return True
    ideal = np.arange(len(times)) / source_fps
    return bool(np.abs(np.asarray(times) - ideal).max() <= 1.5 / source_fps)


def settle_rate(rate: FrameRate, times: Sequence[float], limit: int | None) -> FrameRate:
    """``rate``, made to choose frames by time if frames at ``times`` do not keep it.

    Args:
        times: seconds since the first frame.
        limit: output frames that can be used at all; what lies behind them does not decide. ``None`` = any.
    """
    checked = times if limit is None else times[: limit + 1]
    if rate.resample or rate.given or is_regular(checked, rate.source):
        return rate
    return replace(rate, resample=True, variable=True)


@dataclass(frozen=True)
class Sample(Generic[T]):
    """One output frame."""

    frame: T | None  # None marks the end of the stream
    index: int  # of the source frame
    time: float  # seconds since the first frame on the source's own clock; where sound is cut


def sample_frames(frames: Iterable[tuple[float, T]], rate: FrameRate) -> Iterator[Sample[T]]:
    """Frames at the target rate, then one end mark.

    Re-timed: every frame. Resampled: output ``j`` is the last frame that is not later than ``j / target``, so
    frames are dropped or repeated and real time is kept. Works on a stream: it holds two frames.

    Args:
        frames: pairs of seconds since the first frame and the frame, in order of presentation.
    """
    return _resampled(frames, rate) if rate.resample else _retimed(frames, rate)


def _retimed(frames: Iterable[tuple[float, T]], rate: FrameRate) -> Iterator[Sample[T]]:
    index, time = -1, 0.0
    for index, (time, frame) in enumerate(frames):
        yield Sample(frame, index, time)
    if index >= 0:
        yield Sample(None, index + 1, time + _last_duration(index, time, rate))


def _resampled(frames: Iterable[tuple[float, T]], rate: FrameRate) -> Iterator[Sample[T]]:
    stream = iter(frames)
    current = next(stream, None)
    if current is None:
        return
    index, output = 0, 0
    while current is not None:
        time, frame = current
        current = next(stream, None)
        next_time = current[0] if current else time + _last_duration(index, time, rate)
        # Where this frame begins and ends on the clock that chooses frames.
        begin = index / rate.source if rate.given else time
        end = (index + 1) / rate.source if rate.given else next_time
        pace = (next_time - time) / (end - begin) if end > begin else 1.0
        # An instant that meets a boundary belongs to what comes after it.
        while output / rate.target < end - _EPS:
            yield Sample(frame, index, time + (output / rate.target - begin) * pace)
            output += 1
        index += 1
    # Where the next output would lie, so that the last clip lasts as long as the others.
    yield Sample(None, index, time + (output / rate.target - begin) * pace)


def _last_duration(index: int, time: float, rate: FrameRate) -> float:
    """Seconds the last frame is shown. With a given rate the container's own pace is the mean one."""
    return time / index if rate.given and index > 0 and time > 0 else 1.0 / rate.source


def resample_indices(times: Sequence[float], rate: FrameRate) -> list[int]:
    """The source frame of every output frame, for frames at ``times`` seconds since the first."""
    return [s.index for s in sample_frames(((t, i) for i, t in enumerate(times)), rate) if s.frame is not None]


def output_length(frames: int, duration: float, rate: FrameRate) -> int:
    """Output frames of ``frames`` source frames that span ``duration`` seconds (the last one included)."""
    if not rate.resample:
        return frames
    seconds = frames / rate.source if rate.given else duration
    return max(math.ceil((seconds - _EPS) * rate.target), 0)


# --- extraction ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExtractionRule:
    """How clips are taken from the output frames of one video."""

    mode: Extraction = "head"
    target_frames: tuple[int, ...] = (1,)  # ascending
    stride: int = 1  # slide
    sample: int = 1  # uniform
    max_frames: int = 129  # full

    @property
    def record(self) -> str:
        """The rule but for the clip lengths, as caches keep it: "slide 4"."""
        parameter = {"slide": self.stride, "uniform": self.sample, "full": self.max_frames}.get(self.mode)
        return self.mode if parameter is None else f"{self.mode} {parameter}"

    @property
    def limit(self) -> int | None:
        """Output frames that can be used at all; ``None`` = any."""
        if self.mode == "head":
            return self.target_frames[-1]
        return floor_frames(self.max_frames) if self.mode == "full" else None

    @property
    def longest(self) -> int:
        """Frames of the longest clip there can be."""
        return floor_frames(self.max_frames) if self.mode == "full" else self.target_frames[-1]


def clip_starts(rule: ExtractionRule, frames: int, length: int | None) -> Iterable[int]:
    """Start positions, ascending, of clips of ``frames`` frames in ``length`` output frames.

    With ``length`` ``None`` (a stream whose end is not known yet) they go on as far as the mode allows;
    "uniform" needs the length.
    """
    if rule.mode in ("head", "full"):
        starts: Iterable[int] = (0,)
    elif rule.mode == "chunk":
        starts = count(0, frames)
    elif rule.mode == "slide":
        starts = count(0, rule.stride)
    elif length is None:
        raise ValueError("uniform extraction needs the number of frames")
    elif length < frames:
        starts = ()
    else:
        starts = sorted(set(np.linspace(0, length - frames, rule.sample, dtype=int).tolist()))
    if length is None:
        return starts
    return takewhile(lambda start: start + frames <= length, starts)


def can_start_at(rule: ExtractionRule, start: int, frames: int) -> bool:
    """Whether a video of some length gives a clip of ``frames`` frames from ``start``."""
    if rule.mode == "uniform":
        return True
    step = {"chunk": frames, "slide": rule.stride}.get(rule.mode)
    return start % step == 0 if step else start == 0


def clip_windows(rule: ExtractionRule, length: int) -> list[ClipWindow]:
    """All clips of ``length`` output frames: by clip length, then by start."""
    if rule.mode == "full":
        frames = floor_frames(min(length, rule.max_frames))
        return [ClipWindow(0, frames)] if frames else []
    return [ClipWindow(s, t) for t in rule.target_frames for s in clip_starts(rule, t, length)]


@dataclass(frozen=True)
class Cut(Generic[T]):
    """The frames of one clip and the seconds of its sound."""

    window: ClipWindow
    frames: list[T]
    start: float  # seconds since the first frame of the source
    end: float
    earliest: float  # no later clip starts before this


def cut_clips(
    samples: Iterable[Sample[T]],
    rule: ExtractionRule,
    *,
    convert: Callable[[T], U],
    length: int | None = None,
) -> Iterator[Cut[U]]:
    """Clips from a stream of output frames, each as soon as it is complete.

    Holds only the frames that a later clip still needs, and stops reading when no clip can follow.

    Args:
        convert: applied once to every source frame that is used.
        length: number of output frames; "uniform" needs it.
    """
    if rule.mode == "full":
        targets = [floor_frames(rule.max_frames)]
    else:
        targets = list(rule.target_frames)
    starts = {frames: iter(clip_starts(rule, frames, length)) for frames in targets}
    waiting = {frames: next(it, None) for frames, it in starts.items()}
    held: deque[tuple[float, U]] = deque()  # outputs from `base` on
    base, last_index, converted = 0, -1, None

    def cut(window: ClipWindow, end: float) -> Cut[U]:
        part = list(islice(held, window.start - base, window.end - base))
        return Cut(window, [frame for _, frame in part], part[0][0], end, earliest=held[0][0])

    for position, sample in enumerate(samples):
        for frames, start in waiting.items():
            if start is not None and start + frames == position:
                yield cut(ClipWindow(start, frames), sample.time)
                waiting[frames] = next(starts[frames], None)
        if sample.frame is None and rule.mode == "full" and waiting[targets[0]] is not None:
            frames = floor_frames(position)
            yield cut(ClipWindow(0, frames), held[frames][0] if frames < position else sample.time)
        first_needed = min((start for start in waiting.values() if start is not None), default=None)
        if sample.frame is None or first_needed is None:
            return
        while held and base < first_needed:
            held.popleft()
            base += 1
        if position < first_needed:
            base = position + 1
            continue
        if sample.index != last_index:
            last_index, converted = sample.index, convert(sample.frame)
        held.append((sample.time, converted))
