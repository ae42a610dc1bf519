"""What is remarkable about an item, measured on its pixels, sound and caption."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from musubi_tuner.dataset.buckets import Size

Severity = Literal["error", "warning", "note"]

_CHECKED_AREA = 128 * 128  # pixels of a frame that are looked at
_STATIC = 1.5  # mean difference of 8-bit levels; compression alone stays below
_BLACK = 12.0  # mean 8-bit level
_PLAIN = 2.0  # standard deviation of 8-bit levels
_SILENCE = 1e-3  # peak, -60 dB of full scale
_QUIET_DB = -45.0
_CLIPPED_SHARE = 1e-3
_ENLARGED = 1.25
_CROPPED = 0.25
_LONG_CAPTION = 600  # words; about where 1024 tokens of Gemma end


@dataclass(frozen=True)
class Finding:
    """One remark. ``kind`` collects equal ones in the summary."""

    kind: str
    text: str
    severity: Severity = "warning"


def picture_findings(pixels: np.ndarray) -> Iterator[Finding]:
    """Static, black and single-coloured clips; uint8 ``[F, H, W, 3]``."""
    step = max(int(np.sqrt(pixels.shape[1] * pixels.shape[2] / _CHECKED_AREA)), 1)
    small = pixels[:, ::step, ::step].astype(np.int16)  # a frame at 128x128 x 121 frames: 12 MB
    levels = small.mean(axis=(1, 2, 3))
    black = int((levels < _BLACK).sum())
    if black == len(small):
        yield Finding("black", "black" if len(small) == 1 else "every frame is black")
        return
    if black:
        yield Finding("black frames", f"{black} of {len(small)} frames are black")
    plain = int((small.std(axis=(1, 2)).max(axis=1) < _PLAIN).sum()) - black
    if plain == len(small):
        yield Finding("one colour", "one plain colour")
    if len(small) > 1 and max(float(np.abs(frame - small[0]).mean()) for frame in small[1:]) < _STATIC:
        yield Finding("static", "nothing moves: every frame shows the same picture")


def sound_findings(waveform: np.ndarray) -> Iterator[Finding]:
    """Silence and overdriven sound; float32 ``[C, S]``."""
    peak = float(np.abs(waveform).max(initial=0.0))
    if peak < _SILENCE:
        yield Finding("silent", "the sound is silence")
        return
    if level_db(waveform) < _QUIET_DB:
        yield Finding("quiet", f"very quiet sound ({level_db(waveform):.0f} dB)", "note")
    share = float((np.abs(waveform) >= 0.999).mean())
    if share > _CLIPPED_SHARE:
        yield Finding("clipped", f"{share:.1%} of the sound is overdriven", "note")


def level_db(waveform: np.ndarray) -> float:
    """Mean level in dB of full scale."""
    power = float(np.square(waveform, dtype=np.float64).mean()) if waveform.size else 0.0
    return 10 * float(np.log10(max(power, 1e-12)))


def caption_findings(caption: str) -> Iterator[Finding]:
    if not caption:
        yield Finding("empty caption", "the caption is empty")
    elif (words := len(caption.split())) > _LONG_CAPTION:
        yield Finding("long caption", f"the caption has {words} words; what exceeds 1024 tokens is not read")


def size_findings(size: Size, bucket: Size) -> Iterator[Finding]:
    """Pictures that are enlarged or lose much to fit their bucket."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    if scale > _ENLARGED:
        yield Finding("enlarged", f"enlarged {scale:.1f} times from {size[0]}x{size[1]}")
    lost = 1 - bucket[0] * bucket[1] / (size[0] * size[1] * scale**2)
    if lost > _CROPPED:
        yield Finding("cropped", f"{lost:.0%} of the picture is cut off to fit the bucket")
