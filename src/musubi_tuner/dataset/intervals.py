"""Files that name parts of a sound by seconds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.text_files import read_text

from .buckets import AUDIO_HOP, AUDIO_RATE, AUDIO_STRIDE

Interval = tuple[float, float]  # seconds [start, end)

_MEL_SECONDS = AUDIO_HOP / AUDIO_RATE


def read_intervals(path: Path) -> tuple[Interval, ...]:
    """Seconds ``[start, end)``; of a file without intervals nothing.

    A ``.json`` file has a list of ``[start, end]`` or ``{"start": ..., "end": ...}``, or an object with such a list
    as ``intervals``. Any other file has ``start end`` on each line; empty lines and those with ``#`` are skipped.

    Raises:
        UserError: the file cannot be read, or says something else; names the line or the entry.
    """
    text = read_text(path)
    return tuple(_json_intervals(path, text) if path.suffix.lower() == ".json" else _line_intervals(path, text))


def _line_intervals(path: Path, text: str) -> Iterator[Interval]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield _interval(f"{path}:{number}", re.split(r"[\s,;]+", line.strip()), line.strip())


def _json_intervals(path: Path, text: str) -> Iterator[Interval]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    entries = value.get("intervals") if isinstance(value, dict) else value
    if not isinstance(entries, list):
        raise UserError(f'{path}: expected a list of [start, end], or {{"intervals": [...]}}')
    for number, entry in enumerate(entries):
        pair = [entry.get("start"), entry.get("end")] if isinstance(entry, dict) else entry
        yield _interval(f"{path}: interval {number}", pair, json.dumps(entry, ensure_ascii=False))


def _interval(place: str, pair: Any, found: str) -> Interval:
    try:
        start, end = (float(value) for value in pair)
    except (TypeError, ValueError):
        raise UserError(f"{place}: expected a start and an end in seconds, got {found[:80]}") from None
    if not (0 <= start < end and math.isfinite(start)):
        raise UserError(f"{place}: expected 0 <= start < end in seconds, got {found[:80]}")
    return start, end


def interval_mask(intervals: Sequence[Interval], steps: int, *, start: float = 0.0, pace: float = 1.0) -> np.ndarray:
    """float32 ``[steps]``: 1 for the latent steps of a clip's sound whose middle lies in an interval.

    Args:
        intervals: seconds of the source.
        steps: latent steps of the clip's sound.
        start: second of the source at which the clip begins.
        pace: seconds of the source in a second of the clip, where its sound was stretched.
    """
    ends = np.arange(steps) * AUDIO_STRIDE + 1  # in mel frames; the first step has one, by causality
    starts = np.maximum(ends - AUDIO_STRIDE, 0)
    middles = start + pace * (starts + ends) / 2 * _MEL_SECONDS
    mask = np.zeros(steps, dtype=np.float32)
    for begin, end in intervals:
        mask[(middles >= begin) & (middles < end)] = 1.0
    return mask
