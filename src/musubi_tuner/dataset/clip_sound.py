"""The sound of clips: which file it comes from, and the part of it that belongs to a clip."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from musubi_tuner.common.tables import count_text

from .audio import AudioTrack, NoAudio, cut_clip, probe_audio, to_16k
from .buckets import AUDIO_RATE, SHORTEST_SOUND
from .frames import Cut
from .image_sequence import ImageSequence
from .media import MediaError, Video
from .sources import SourceItem

logger = logging.getLogger(__name__)

AudioStatus = Literal["present", "absent", "not requested"]

_SILENT_END = 0.1  # seconds; sound that ends a little early is usual


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


def read_sound(path: Path, *, advice: str = "remove it from the dataset") -> np.ndarray:
    """The whole sound of a file, float32 ``[2, S]`` at 16 kHz.

    Args:
        advice: what to do with a file that has no usable sound.

    Raises:
        MediaError: the file is missing or damaged, has no sound, or too little for one latent step.
    """
    with AudioTrack(path) as track:
        samples = track.read_all()
        warn_of_damage(track)
    if isinstance(samples, NoAudio):
        raise MediaError(f"{path}: {samples.reason}; {advice}")
    waveform = to_16k(samples, track.rate)
    if waveform.shape[1] < SHORTEST_SOUND:
        raise MediaError(f"{path}: {_too_short(waveform)}; {advice}")
    warn_if_cut_short(path, waveform.shape[1] / AUDIO_RATE)
    return waveform


def open_track(
    stack: ExitStack, video: Video | ImageSequence, item: SourceItem, sound: AudioSource
) -> AudioTrack | NoAudio:
    """The sound of a video, on the clock of its picture; closed with ``stack``."""
    path = sound.locate(item)
    if path.is_dir():
        return NoAudio("a folder of images has no sound")
    if path != item.path and not path.is_file():
        return NoAudio(f"no file {path}")
    # A file of its own starts with the video.
    return stack.enter_context(AudioTrack(path, origin=video.origin if path == item.path else None))


def clip_sound(
    track: AudioTrack | NoAudio | None, cut: Cut[np.ndarray], fps: float
) -> tuple[np.ndarray | None, AudioStatus, tuple[str, ...]]:
    """The sound of one clip at 16 kHz, float32 ``[2, S]``, or why it has none; ``track`` None = none is wanted."""
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


def silent_end(track: AudioTrack | NoAudio | None, cut: Cut[np.ndarray]) -> float:
    """Seconds at the end of a clip for which its file has no more sound."""
    if not isinstance(track, AudioTrack) or not track.ended:
        return 0.0
    missing = cut.end - max(track.seconds, cut.start)
    return missing if missing > _SILENT_END else 0.0


def _too_short(waveform: np.ndarray) -> str:
    found, needed = (1000 * count / AUDIO_RATE for count in (waveform.shape[1], SHORTEST_SOUND))
    return f"{found:.0f} ms of sound, at least {needed:.0f} ms are needed"


def warn_of_damage(track: AudioTrack) -> None:
    """Tell what was filled or left out of a track that has been read."""
    if track.gaps:
        logger.warning("%s: %.2f s of pauses in the sound filled with silence", track.path.name, track.gaps)
    if track.damaged:
        logger.warning("%s: %s of sound left out", track.path.name, count_text(track.damaged, "damaged packet"))


def warn_if_cut_short(path: Path, seconds: float) -> None:
    """Only a warning: some formats know their duration by an estimate from the bit rate."""
    info = probe_audio(path)
    stated = None if isinstance(info, NoAudio) else info.duration
    if stated is not None and seconds < stated - max(0.5, 0.05 * stated):
        logger.warning("%s: ends at %.2f s of %.2f s; the file may be truncated", path.name, seconds, stated)
