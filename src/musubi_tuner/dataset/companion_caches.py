"""References and masks of cached targets: which files they are, and what they must agree with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from musubi_tuner.common.av import AV, Modality
from musubi_tuner.common.errors import UserError
from musubi_tuner.config.model import Mode

from . import companions
from .buckets import latent_frames, reference_scale
from .cache import (
    AudioHeader,
    CacheName,
    Grid,
    LatentHeader,
    MaskHeader,
    list_caches,
    read_audio_header,
    read_latent_header,
    read_mask_header,
)
from .companion_rules import SOURCE_DIRECTORIES
from .entries import DatasetEntry
from .items import MODALITIES, CacheProblem
from .source_changes import SourceChanges
from .sources import SourceItem

Header = TypeVar("Header")

# What may be missing, as messages name it.
REFERENCE, REFERENCE_SOUND, MASK = "cached reference", "cached reference sound", "cached mask"
SOUND = "cached sound (which a reference needs)"


# What is made of the files of which directories; caches of a directory that is not there are taken as they are.
_DIRECTORIES: Mapping[str, tuple[str, ...]] = {
    "reference": ("reference_directory", "control_directory"),
    "reference sound": ("reference_audio_directory",),
    "mask": ("mask_directory", "audio_mask_directory"),
}


@dataclass(frozen=True)
class Companions:
    """The references and masks of one item; the fields are those of a ``CachedItem``, with the files' headers."""

    reference: Path | None = None
    reference_header: LatentHeader | None = None
    reference_audio: Path | None = None
    reference_audio_header: AudioHeader | None = None
    mask: Path | None = None
    mask_header: MaskHeader | None = None
    mask_parts: AV[bool] = field(default_factory=AV)

    @property
    def reference_grid(self) -> Grid | None:
        return self.reference_header.grid if self.reference_header else None

    @property
    def reference_audio_steps(self) -> int:
        return self.reference_audio_header.steps if self.reference_audio_header else 0


class CompanionSearch:
    """Finds what the items of one dataset need beside latents and text.

    Args:
        entry: the dataset.
        mode: of the run.
        references: modalities whose references are trained with; others are not looked for.
        cached: the caches of the targets, among which the masks lie.
        items: the sources of the targets by stem, whose references and masks must still be there; ``None`` = they are
            not known, so the caches are taken as they are.
        changes: holds files against the metadata of caches.
    """

    def __init__(
        self,
        entry: DatasetEntry,
        mode: Mode,
        references: Collection[Modality],
        cached: Mapping[CacheName, Path],
        items: Mapping[str, SourceItem] | None,
        changes: SourceChanges,
    ) -> None:
        self.entry = entry
        self.items = items
        self.changes = changes
        absent = [name for name in SOURCE_DIRECTORIES if (d := getattr(entry, name)) is not None and not d.is_dir()]
        self.unknown = {what for what, names in _DIRECTORIES.items() if set(names) & set(absent)}
        self.files = _files(replace(entry, **dict.fromkeys(absent)), mode, references, items)
        self.cached = cached
        self.references = _names(entry.reference_cache_directory if "video" in references else None)
        self.sounds = _names(entry.reference_audio_cache_directory if "audio" in references else None)
        masked = {
            "video": entry.mask_directory is not None or entry.cache_only,
            "audio": entry.audio_mask_directory is not None or entry.cache_only,
        }
        self.masked: frozenset[Modality] = frozenset(modality for modality in MODALITIES[mode] if masked[modality])
        self.missing: dict[str, list[str]] = defaultdict(list)  # what, to the names of items
        self.problems: list[CacheProblem] = []

    def find(self, stem: str, name: CacheName, latents: LatentHeader, audio: AudioHeader | None) -> Companions | None:
        """What belongs to one target, of the source ``stem``; ``None`` if something is missing or damaged, which is
        noted."""
        found: Companions | None = Companions()
        if self.references is not None:
            found = self._with_reference(found, name, latents)
        if found is not None and self.sounds is not None:
            found = self._with_reference_sound(found, name, audio)
        if found is not None and self.masked:
            found = self._with_mask(found, name, latents, audio)
        if found is not None and self.items is not None and stem in self.items and not self.entry.cache_only:
            return found if self._check_files(self.files.of(self.items[stem]), found, name) else None
        return found

    def found_wrong(self, name: CacheName) -> bool:
        """Whether a problem of this target was noted."""
        return any(problem.name == name.base for problem in self.problems)

    def _check_files(self, files: companions.Companions, found: Companions, name: CacheName) -> bool:
        """Whether the files that ``found`` was made of are all there; those that changed are noted as problems."""
        for made in _made_of(files, found):
            if "source_size" not in made.metadata or made.what in self.unknown:  # of other programs, or not here
                continue
            if any(path is None for path in made.paths):
                self._lacks(f"{made.what} any more", name)
                return False
            if made.paths and self.changes.differs(made.metadata, *made.paths):  # type: ignore[arg-type]
                self._problem(f"the {made.what} is another file than when it was cached", name)
        return True

    def _with_reference(self, found: Companions, name: CacheName, latents: LatentHeader) -> Companions | None:
        path = _first(self.references, name, CacheName(name.base, "latents"))
        if path is None:
            return self._lacks(REFERENCE, name)
        header = self._header(read_latent_header, path, name)
        if header is None:
            return None
        if cause := reference_mismatch(self.entry, latents, header):
            self._problem(cause, name)
        return replace(found, reference=path, reference_header=header)

    def _with_reference_sound(self, found: Companions, name: CacheName, audio: AudioHeader | None) -> Companions | None:
        if audio is None:  # nothing that the reference could be for
            return self._lacks(SOUND, name)
        path = _first(self.sounds, name.sibling("audio"), CacheName(name.base, "audio"))
        if path is None:
            return self._lacks(REFERENCE_SOUND, name)
        header = self._header(read_audio_header, path, name)
        return None if header is None else replace(found, reference_audio=path, reference_audio_header=header)

    def _with_mask(
        self, found: Companions, name: CacheName, latents: LatentHeader, audio: AudioHeader | None
    ) -> Companions | None:
        needed = self.masked if audio is not None else self.masked - {"audio"}
        path = _first(self.cached, name.sibling("mask"), CacheName(name.base, "mask")) if needed else None
        header = self._header(read_mask_header, path, name) if path is not None else None
        if path is not None and header is None:
            return None
        shapes = AV(header.grid, header.audio_steps) if header is not None else AV()
        if not self.entry.cache_only and any(shapes[modality] is None for modality in needed):
            return self._lacks(MASK, name)
        targets = AV(latents.grid, audio.steps if audio is not None else None)
        parts = [modality for modality, _ in shapes.items() if modality in needed]
        for modality in parts:
            if shapes[modality] != targets[modality]:
                cause = f"the {modality} mask has the shape {shapes[modality]}, the target {targets[modality]}"
                self._problem(cause, name)
        if not parts:
            return found
        return replace(found, mask=path, mask_header=header, mask_parts=AV(**dict.fromkeys(parts, True)))

    def _header(self, read: Callable[[Path], Header], path: Path, name: CacheName) -> Header | None:
        try:
            return read(path)
        except UserError as error:
            self._problem(f"unreadable cache: {error}", name)
            return None

    def _problem(self, cause: str, name: CacheName) -> None:
        self.problems.append(CacheProblem(cause, name.base, "latents"))

    def _lacks(self, what: str, name: CacheName) -> None:
        self.missing[what].append(name.base)


def reference_mismatch(entry: DatasetEntry, target: LatentHeader, reference: LatentHeader) -> str | None:
    """Why cached reference latents do not belong to a target as the dataset is configured now; ``None`` if they do."""
    metadata = reference.metadata
    # Several control images make a reference of a length of its own, unless the configuration gives one.
    own_length = entry.reference_frames == 1 and "source_frames" in metadata
    recorded = ("reference_downscale",) if own_length else ("reference_downscale", "reference_frames")
    for name in recorded:
        value, current = metadata.get(name), getattr(entry, name)
        if value is not None and value != str(current):
            return (
                f"references were made with {name} {value}, this run has {current}; give --{name} {value} here too, "
                "or cache again"
            )
    if entry.kind == "video" and float(metadata.get("target_fps", entry.target_fps)) != entry.target_fps:
        return f"references were made with target_fps {metadata['target_fps']}, this run has {entry.target_fps:g}"
    scale = reference_scale(target.grid, reference.grid)
    if scale != entry.reference_downscale:
        height, width = target.grid[1:]
        return (
            f"references have the latent size {reference.grid[2]}x{reference.grid[1]}, targets {width}x{height}, "
            f"which is not reference_downscale {entry.reference_downscale} on both sides"
        )
    frames = latent_frames(entry.reference_frames)
    if reference.grid[0] != frames and not own_length:
        wanted = f"reference_frames {entry.reference_frames} gives {frames}"
        return f"references have {reference.grid[0]} latent frames, {wanted}"
    return None


@dataclass(frozen=True)
class _Made:
    """A cache by the files that it was made of, in the order of their stamp; ``None`` = that file is gone."""

    what: str
    paths: tuple[Path | None, ...]
    metadata: Mapping[str, str]


def _made_of(files: companions.Companions, found: Companions) -> Iterator[_Made]:
    if found.reference_header is not None:
        yield _Made("reference", files.references or (None,), found.reference_header.metadata)
    if found.reference_audio_header is not None:
        yield _Made("reference sound", (files.reference_audio,), found.reference_audio_header.metadata)
    if found.mask_header is None:
        return
    both = AV(files.mask, files.audio_mask)
    header, used = found.mask_header, found.mask_parts
    shapes = {"video": header.grid, "audio": header.audio_steps}
    paths = {modality: both[modality] for modality, shape in shapes.items() if shape is not None}
    # The file of a part that this mode does not read may be gone: then the stamp of both cannot be compared.
    if any(path is None and not used[modality] for modality, path in paths.items()):
        paths = {modality: path for modality, path in paths.items() if used[modality] and path is None}
    yield _Made("mask", tuple(paths.values()), header.metadata)


def _files(
    entry: DatasetEntry, mode: Mode, references: Collection[Modality], items: Mapping[str, SourceItem] | None
) -> companions.CompanionListing:
    """The references that are trained with, and the masks."""
    if items is None or entry.cache_only:
        return companions.CompanionListing()
    used = replace(
        entry,
        reference_cache_directory=entry.reference_cache_directory if "video" in references else None,
        reference_audio_cache_directory=entry.reference_audio_cache_directory if "audio" in references else None,
    )
    return companions.find_companions(used, list(items.values()), mode)


def _names(directory: Path | None) -> dict[CacheName, Path] | None:
    return None if directory is None else list_caches(directory)


def _first(names: Mapping[CacheName, Path] | None, *options: CacheName) -> Path | None:
    return next((names[option] for option in options if option in names), None) if names else None
