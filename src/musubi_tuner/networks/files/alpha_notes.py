"""What folding alpha into B takes away, noted in the metadata, so that a conversion back restores every bit.

A note is believed only where B is exactly what folding makes of the factor that it leads to: a file that was changed
since keeps its weights as they are.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from musubi_tuner.common.dtypes import dtype_name

NOTES = "musubi_folded_alpha"  # key in the metadata
_DTYPES = {dtype_name(d): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
_DTYPES |= {dtype_name(d): d for d in (torch.float8_e4m3fn, torch.float8_e5m2)}


@dataclass(frozen=True)
class AlphaNote:
    """One module before alpha / r was folded into B: its alpha (``None``: no tensor), and the dtypes of alpha and B."""

    alpha: float | None
    alpha_dtype: torch.dtype
    up_dtype: torch.dtype

    def scale(self, rank: int) -> float:
        return 1.0 if self.alpha is None else self.alpha / rank


def fold(up: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """B times alpha / r, computed in float32."""
    return up if scale == 1 and dtype == up.dtype else (up.float() * scale).to(dtype)


def unfold(folded: Tensor, note: AlphaNote, rank: int) -> Tensor | None:
    """The factor that was folded, or ``None`` where the note does not lead to it."""
    scale = note.scale(rank)
    up = (folded.float() / scale).to(note.up_dtype) if scale else None
    if up is None or not torch.equal(fold(up, scale, folded.dtype).float(), folded.float()):
        return None
    return up


def restoring_dtype(up: Tensor, note: AlphaNote, rank: int) -> torch.dtype | None:
    """The dtype in which folded B leads back to every bit of ``up``: its own, else float32; ``None``: neither does."""
    for dtype in dict.fromkeys((up.dtype, torch.float32)):
        folded = fold(up, note.scale(rank), dtype)
        back = unfold(folded, note, rank)
        if back is not None and torch.equal(back.float(), up.float()):
            return dtype
    return None


def write_notes(notes: Mapping[str, AlphaNote]) -> dict[str, str]:
    """The metadata entry: what most modules have, and the others by name; ``{}`` where there is nothing to note."""
    if not notes:
        return {}
    usual, _ = Counter(notes.values()).most_common(1)[0]
    others = {name: _packed(note) for name, note in notes.items() if note != usual}
    packed = {"modules": len(notes), "usual": _packed(usual), "others": others}
    return {NOTES: json.dumps(packed, separators=(",", ":"))}


def read_notes(metadata: Mapping[str, str]) -> tuple[AlphaNote | None, dict[str, AlphaNote]]:
    """(note of modules that are not named, notes by name); none where the entry is missing or not understood."""
    try:
        packed = json.loads(metadata[NOTES])
        others = {name: _unpacked(entry) for name, entry in packed["others"].items()}
        return _unpacked(packed["usual"]), others
    except (KeyError, ValueError, TypeError, AttributeError):
        return None, {}


def _packed(note: AlphaNote) -> list[object]:
    return [note.alpha, dtype_name(note.alpha_dtype), dtype_name(note.up_dtype)]


def _unpacked(entry: list[object]) -> AlphaNote:
    alpha, alpha_dtype, up_dtype = entry
    return AlphaNote(None if alpha is None else float(alpha), _DTYPES[str(alpha_dtype)], _DTYPES[str(up_dtype)])
