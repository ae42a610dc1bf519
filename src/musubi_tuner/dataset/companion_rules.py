"""Rules for the keys of references, control images and masks: what a target is trained with beside its caption."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .entries import DatasetConfig, DatasetEntry
from .jsonl import ListedMedia

SOURCE_DIRECTORIES = (
    "reference_directory",
    "control_directory",
    "reference_audio_directory",
    "mask_directory",
    "audio_mask_directory",
)
CACHE_DIRECTORIES = ("reference_cache_directory", "reference_audio_cache_directory")

# The directories of one kind of reference with the cache that holds it.
_REFERENCES: Mapping[str, tuple[str, ...]] = {
    "reference_cache_directory": ("reference_directory", "control_directory"),
    "reference_audio_cache_directory": ("reference_audio_directory",),
}


def companion_problems(values: Mapping[str, Any], *, listed: bool) -> Iterator[str]:
    """What is wrong among the keys of one entry; a JSONL file may name references line by line."""
    if values.get("reference_directory") and values.get("control_directory"):
        yield "control_directory: is a reference as well; give either it or reference_directory"
    for cache, names in _REFERENCES.items():
        given = [name for name in names if values.get(name)]
        if given and not values[cache]:
            yield f"{cache}: needed with {given[0]}"
        elif values[cache] and not given and not listed and not values["cache_only"]:
            yield f"{cache}: needs {' or '.join(name for name in names if name in values) or 'another kind of dataset'}"


def listed_reference_problems(entry: DatasetEntry, media: Sequence[ListedMedia]) -> Iterator[str]:
    """References that lines of a list name need a cache directory, and the other way round."""
    rules = (
        ("reference_path", "reference_cache_directory", [m.place for m in media if m.references]),
        ("reference_audio_path", "reference_audio_cache_directory", [m.place for m in media if m.reference_audio]),
    )
    for key, cache, places in rules:
        sources = [name for name in _REFERENCES[cache] if getattr(entry, name) is not None]
        if places and getattr(entry, cache) is None:
            yield f"{cache}: needed with the {key} of {places[0]}"
        elif getattr(entry, cache) is not None and media and not (places or sources):
            yield f"{cache}: no line of the list has a {key}; add it, or remove {cache}"


def directory_problems(entry: DatasetEntry) -> Iterator[str]:
    """Directories of references and masks that are not there."""
    if entry.source is None:
        return
    for name in SOURCE_DIRECTORIES:
        directory: Path | None = getattr(entry, name)
        if directory is not None and not directory.is_dir():
            what = "is not a directory" if directory.exists() else "does not exist"
            yield f"{name}: {directory} {what}"


def cache_directory_problems(config: DatasetConfig) -> Iterator[str]:
    """Each dataset has its own cache directories, and none is both for targets and for references."""
    first: dict[str, tuple[str, str]] = {}  # normalised path to (entry, key) that has it
    for name in ("cache_directory", *CACHE_DIRECTORIES):
        for entry in config.entries():
            directory: Path | None = getattr(entry, name)
            if directory is None:
                continue
            if directory.is_file():
                yield f"{entry.label}.{name}: {directory} is a file"
            label, other = first.setdefault(os.path.normcase(directory), (entry.label, name))
            # References of sound and of pictures differ in their names, so one dataset may keep both in one place.
            if (label, other) != (entry.label, name) and not (label == entry.label and other in CACHE_DIRECTORIES):
                whose = f"that of {label}" if other == name else f"the {other} of {label}"
                yield f"{entry.label}.{name}: is also {whose} ({directory}); give each dataset its own"
