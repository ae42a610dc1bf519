"""References and masks of an item as training will see them, and what is missing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from musubi_tuner.common.errors import UserError
from musubi_tuner.config.model import Mode
from musubi_tuner.dataset.buckets import AUDIO_RATE, TEMPORAL_STRIDE
from musubi_tuner.dataset.clips import PreparedClip
from musubi_tuner.dataset.companions import (
    CompanionListing,
    Companions,
    Role,
    find_companions,
    lacking,
    missing_lines,
    part,
    wanted_roles,
)
from musubi_tuner.dataset.entries import DatasetEntry
from musubi_tuner.dataset.intervals import read_intervals
from musubi_tuner.dataset.masks import read_masks
from musubi_tuner.dataset.references import read_reference, read_reference_sound, reference_shape
from musubi_tuner.dataset.sources import SourceItem

from .findings import Finding
from .pictures import frame_strip, wave_bars

logger = logging.getLogger(__name__)

_KEPT = np.array([255, 80, 40])  # colour over what a mask keeps


@dataclass(frozen=True)
class CompanionView:
    """One reference or mask."""

    text: str
    strip: bytes | None = field(default=None, repr=False)  # JPEG
    wave: tuple[int, ...] = ()


@dataclass(frozen=True)
class Accompanied:
    """All of one item."""

    views: tuple[CompanionView, ...] = ()
    findings: tuple[Finding, ...] = ()


def look_at(
    companions: Companions, entry: DatasetEntry, mode: Mode, first: PreparedClip, seconds: float | None
) -> Accompanied:
    """Decode what accompanies ``first``, the first clip of its item. A damaged file becomes a finding.

    Args:
        seconds: of a reference sound that are used; ``None`` = the whole.
    """
    views: list[CompanionView] = []
    findings = [
        Finding(f"no {role}", f"no {role} is found", "error" if role.startswith("reference") else "warning")
        for role in lacking(entry, mode, companions)
    ]
    for role in wanted_roles(entry, mode):
        if not part(companions, role):
            continue
        try:
            views.append(_view(role, companions, entry, first, seconds))
        except (UserError, OSError) as error:
            findings.append(Finding(f"unreadable {role}", str(error), "error"))
    return Accompanied(tuple(views), tuple(findings))


def counts_text(entry: DatasetEntry, mode: Mode, items: Sequence[SourceItem], companions: CompanionListing) -> str:
    """``reference 3 of 4, mask 4 of 4``; empty if nothing is wanted."""
    found = [
        f"{role} {sum(bool(part(companions.of(item), role)) for item in items)} of {len(items)}"
        for role in wanted_roles(entry, mode)
    ]
    return ", ".join(found)


def log_companions(entry: DatasetEntry, mode: Mode, items: Sequence[SourceItem]) -> int:
    """Log how many items have what is wanted and which lack it; returns the number of those that are missing.

    Raises:
        ConfigErrors: control images, or files that cannot be told apart.
    """
    companions = find_companions(entry, items, mode)
    if counts := counts_text(entry, mode, items, companions):
        logger.info("%s: %s", entry.label, counts)
    for line in missing_lines(entry, companions):
        logger.error("missing: %s", line)
    return sum(map(len, companions.missing.values()))


def _view(
    role: Role, companions: Companions, entry: DatasetEntry, clip: PreparedClip, seconds: float | None
) -> CompanionView:
    if role == "reference":
        return _reference(companions.references, entry, clip)
    if role == "reference audio":
        assert companions.reference_audio is not None
        waveform = read_reference_sound(companions.reference_audio, seconds)
        used = waveform.shape[1] / AUDIO_RATE
        return CompanionView(
            f"reference audio {companions.reference_audio.name}: {used:.2f} s", wave=wave_bars(waveform)
        )
    if role == "mask":
        assert companions.mask is not None
        return _mask(companions.mask, entry, clip)
    assert companions.audio_mask is not None
    parts = ", ".join(f"{start:g} to {end:g} s" for start, end in read_intervals(companions.audio_mask))
    return CompanionView(f"audio mask {companions.audio_mask.name}: keeps {parts or 'nothing'}")


def _reference(references: Sequence[Path], entry: DatasetEntry, clip: PreparedClip) -> CompanionView:
    frames, size = reference_shape(entry, references, clip.bucket)
    pixels = read_reference(references, entry, frames=frames, size=size)
    names = ", ".join(path.name for path in references)
    shown = f"{frames} {'frame' if frames == 1 else 'frames'} of {size[0]}x{size[1]}"
    return CompanionView(f"reference {names}: {shown}", strip=frame_strip(pixels))


def _mask(path: Path, entry: DatasetEntry, clip: PreparedClip) -> CompanionView:
    """Over the frames of the clip, one for each latent frame."""
    assert clip.pixels is not None
    assert clip.window is not None
    (mask,) = read_masks(path, clip.item, entry, [clip.window], bucket=clip.bucket, size=clip.original_size)
    frames = clip.pixels[[0, *range(TEMPORAL_STRIDE, len(clip.pixels), TEMPORAL_STRIDE)]]
    rows, columns = (side // cells for side, cells in zip(frames.shape[1:3], mask.shape[1:], strict=True))
    keep = 0.6 * mask.repeat(rows, axis=1).repeat(columns, axis=2)[..., None]
    overlaid = (frames * (1 - keep) + _KEPT * keep).astype(np.uint8)
    return CompanionView(f"mask {path.name}: keeps {mask.mean():.0%}", strip=frame_strip(overlaid))
