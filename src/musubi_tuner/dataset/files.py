"""Which files of a directory a dataset uses."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["video", "image", "audio"]

EXTENSIONS: dict[Kind, frozenset[str]] = {
    "video": frozenset([".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg"]),
    "image": frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl"]),
    "audio": frozenset([".wav", ".flac", ".mp3", ".ogg", ".m4a", ".aac", ".opus", ".wma"]),
}
_KINDS = {suffix: kind for kind, suffixes in EXTENSIONS.items() for suffix in suffixes}


@dataclass(frozen=True)
class ItemFiles:
    """The cache files of one item by name, as a manifest lists them, and what was in them."""

    latents: str
    text: str
    audio: str | None = None
    mask: str | None = None
    bucket: tuple[int, int] | None = None  # (width, height) in pixels; None in mode audio
    frames: int | None = None  # in pixel time; None in mode audio
    audio_steps: int | None = None  # latent steps; None without sound


def media_kind(path: Path) -> Kind | None:
    """The kind of a file by its extension (in any case), ``None`` for anything else."""
    return _KINDS.get(path.suffix.lower())


def scan_directory(directory: Path, kind: Kind) -> list[Path]:
    """The files of one kind directly in ``directory``, sorted by path; hidden files are left out.

    A link that leads nowhere counts: who uses it says so, rather than to leave out what the user sees in the directory.
    """
    with os.scandir(directory) as entries:
        files = (e for e in entries if e.is_file() or (e.is_symlink() and not e.is_dir()))
        names = [e.name for e in files if not e.name.startswith(".")]
    paths = (directory / name for name in sorted(names))
    return [path for path in paths if media_kind(path) == kind]


def duplicate_stems(paths: Iterable[Path]) -> list[tuple[Path, Path]]:
    """Pairs of files whose names differ only in extension or case, so that their caches would collide."""
    first: dict[str, Path] = {}
    return [(first[key], p) for p in paths if first.setdefault(key := p.stem.casefold(), p) is not p]
