"""Files with the same content and items with the same caption, over all datasets of a configuration."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from musubi_tuner.common.progress import progress
from musubi_tuner.dataset.sources import SourceItem

from .findings import Finding

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
Place = tuple[str, SourceItem]  # label of the dataset

_BLOCK = 1 << 20


def find_duplicates(items: Mapping[str, Sequence[SourceItem]]) -> dict[tuple[str, Path], list[Finding]]:
    """Findings by dataset label and path.

    Args:
        items: by dataset label.
    """
    places = [(label, item) for label, found in items.items() for item in found]
    findings: dict[tuple[str, Path], list[Finding]] = defaultdict(list)
    for group in _same_content(places):
        for label, item in group:
            findings[label, item.path].append(Finding("same file", _same_file(group, label, item)))
    captions = _grouped((" ".join(item.caption.split()), (label, item)) for label, item in places if item.caption)
    for group in captions:
        for label, item in group:
            others = [place for place in group if place[1].path != item.path]
            if others:
                text = f"same caption as {_names(others, label)}"
                findings[label, item.path].append(Finding("same caption", text, "note"))
    return findings


def _same_content(places: Iterable[Place]) -> list[list[Place]]:
    """Only files of equal size are read."""
    sized = _grouped((size, place) for place in places if (size := _size(place[1].path)))
    candidates = [place for group in sized for place in group]
    digests: dict[Path, str] = {}
    for _, item in progress(candidates, desc="comparing files of equal size", unit="file") if candidates else ():
        if item.path not in digests and (digest := _digest(item.path)):
            digests[item.path] = digest
    return _grouped((digests[place[1].path], place) for place in candidates if place[1].path in digests)


def _grouped(pairs: Iterable[tuple[K, Place]]) -> list[list[Place]]:
    """Groups of two or more with an equal key."""
    groups: dict[K, list[Place]] = defaultdict(list)
    for key, place in pairs:
        groups[key].append(place)
    return [group for group in groups.values() if len(group) > 1]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def _digest(path: Path) -> str | None:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError:
        return None  # examining it says why
    return digest.hexdigest()


def _same_file(group: Sequence[Place], label: str, item: SourceItem) -> str:
    copies = [place for place in group if place[1].path != item.path]
    users = [other for other, same in group if same.path == item.path and other != label]
    parts = [f"also in {', '.join(users)}"] if users else []
    parts += [f"same content as {_names(copies, label)}"] if copies else []
    return "; ".join(parts)


def _names(places: Sequence[Place], label: str, limit: int = 3) -> str:
    """File names; with their dataset where that is another than ``label``."""
    names = dict.fromkeys(
        item.path.name if other == label else f"{item.path.name} in {other}" for other, item in places[: 2 * limit]
    )
    more = f" and {len(places) - limit} more" if len(places) > limit else ""
    return ", ".join(list(names)[:limit]) + more
