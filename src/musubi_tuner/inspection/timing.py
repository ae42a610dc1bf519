"""Which frames of a source video stand for which frames at the target rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.dataset.entries import DatasetEntry
from musubi_tuner.dataset.frames import ClipWindow, FrameRate, resample_indices, settle_rate
from musubi_tuner.dataset.image_sequence import ImageSequence
from musubi_tuner.dataset.media import frame_times
from musubi_tuner.dataset.rates import nominal_rate


@dataclass(frozen=True)
class FrameUse:
    """The part of a source that one clip shows."""

    first: int  # source frames, both included
    last: int
    used: int  # different source frames
    start: float  # seconds since the first frame
    end: float

    @property
    def dropped(self) -> int:
        """Source frames between the first and the last that are not shown."""
        return self.last - self.first + 1 - self.used


@dataclass(frozen=True)
class Timing:
    """How a whole video becomes frames at the target rate."""

    rate: FrameRate
    times: Sequence[float]  # seconds since the first frame, of every source frame
    indices: Sequence[int]  # source frame of every output frame

    @property
    def duration(self) -> float:
        return self.times[-1] + 1.0 / self.rate.source if self.times else 0.0

    def second(self, output: int) -> float:
        """Where output frame ``output`` begins in the source; its end behind the last one."""
        return self.times[self.indices[output]] if output < len(self.indices) else self.duration

    def use(self, window: ClipWindow) -> FrameUse:
        shown = self.indices[window.start : window.end] or [len(self.times) - 1]
        end = self.times[shown[-1] + 1] if shown[-1] + 1 < len(self.times) else self.duration
        return FrameUse(shown[0], shown[-1], len(set(shown)), self.times[shown[0]], end)

    def describe(self) -> str:
        """The rule that applies, in words."""
        source, target = f"{self.rate.source:.5g}", f"{self.rate.target:.5g}"
        frames, used = len(self.times), len(set(self.indices))
        if not self.rate.resample:
            if source == target:
                return f"{source} FPS, every frame"
            pace = self.rate.target / self.rate.source - 1
            return f"{source} FPS, every frame, played at {target} ({pace:+.1%} speed)"
        why = "variable frame rate" if self.rate.variable else f"{source} FPS"
        changes = [f"{frames - used} of {frames} frames dropped"] if used < frames else []
        changes += [f"{len(self.indices) - used} repeated"] if used < len(self.indices) else []
        return f"{why} resampled to {target}: {', '.join(changes) or 'every frame'}"


def read_timing(path: Path, entry: DatasetEntry, detected: float) -> Timing:
    """Apply the dataset's frame-rate rule to a video (or folder of images), without decoding.

    Raises:
        MediaError: the file is damaged.
    """
    times = ImageSequence(path, detected).times() if path.is_dir() else frame_times(path)
    rate = settle_rate(nominal_rate(path, detected, entry), times, entry.extraction.limit)
    return Timing(rate, times, resample_indices(times, rate))
