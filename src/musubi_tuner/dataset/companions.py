"""The files that accompany an item: references, the sound it refers to, and masks.

They are found by the stem of the item's source, or named in its line of a list. Each directory is read once.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from musubi_tuner.common.errors import ConfigErrors
from musubi_tuner.config.model import Mode

from .buckets import TEMPORAL_STRIDE
from .entries import DatasetConfig, DatasetEntry
from .files import EXTENSIONS, media_kind
from .sources import SourceItem, caption_path, list_items

Role = Literal["reference", "reference audio", "mask", "audio mask"]

INTERVAL_EXTENSIONS = frozenset([".json", ".txt"])
_PICTURES = EXTENSIONS["image"] | EXTENSIONS["video"]
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Companions:
    """What accompanies one item."""

    references: tuple[Path, ...] = ()  # one image, video or folder of images; or several images in their order
    reference_audio: Path | None = None
    mask: Path | None = None
    audio_mask: Path | None = None


@dataclass(frozen=True)
class CompanionListing:
    """What accompanies the items of a dataset, and what should but is not there."""

    found: Mapping[Path, Companions] = field(default_factory=dict)  # by the path of the item
    missing: Mapping[Role, tuple[str, ...]] = field(default_factory=dict)  # names of items

    def of(self, item: SourceItem) -> Companions:
        return self.found.get(item.path, Companions())


def wanted_roles(entry: DatasetEntry, mode: Mode) -> tuple[Role, ...]:
    """What the configuration asks for, as far as ``mode`` can use it.

    Audio masks are wanted in mode video, too: they share a file with the masks of the picture.
    """
    wanted: Mapping[Role, object] = {
        "reference": mode != "audio" and entry.reference_cache_directory,
        "reference audio": mode != "video" and entry.reference_audio_cache_directory,
        "mask": mode != "audio" and entry.mask_directory,
        "audio mask": entry.audio_mask_directory,
    }
    return tuple(role for role, where in wanted.items() if where)


def reference_frames(entry: DatasetEntry, references: Sequence[Path]) -> int:
    """Pixel frames of a reference: one latent frame for each of several images, else the dataset's number."""
    return 1 + TEMPORAL_STRIDE * (len(references) - 1) if len(references) > 1 else entry.reference_frames


def check_companions(config: DatasetConfig, mode: Mode, *, strict: bool) -> None:
    """Find the companions of all datasets once, before anything is encoded.

    Raises:
        ConfigErrors: control images or files that cannot be told apart; with ``strict`` also what is missing.
    """
    problems: list[str] = []
    for entry in config.entries():
        if entry.source is None or not wanted_roles(entry, mode):
            continue
        try:
            listing = find_companions(entry, list_items(entry).items, mode)
        except ConfigErrors as error:
            problems += error.problems
            continue
        if strict:
            problems += missing_lines(entry, listing)
    if problems:
        raise ConfigErrors(problems, f"{config.path}: references and masks that cannot be used")


def missing_lines(entry: DatasetEntry, listing: CompanionListing) -> Iterator[str]:
    """One line for each role that is missing for some items."""
    for role, names in listing.missing.items():
        yield f"{entry.label}: no {role} for {_shown(names)}"


def find_companions(entry: DatasetEntry, items: Sequence[SourceItem], mode: Mode) -> CompanionListing:
    """The files that accompany ``items``.

    Raises:
        ConfigErrors: an item without its control image, or files that cannot be told apart.
    """
    roles = wanted_roles(entry, mode)
    if not roles:
        return CompanionListing()
    problems: list[str] = []
    finders = _Finders(entry, items, roles, problems)
    found = {item.path: finders.companions(item) for item in items}
    problems += _frame_problems(entry, found)
    if problems:
        raise ConfigErrors(problems, f"{entry.label}: references and masks that cannot be used")
    missing: dict[Role, list[str]] = defaultdict(list)
    for item in items:
        for role in lacking(entry, mode, found[item.path]):
            missing[role].append(item.path.name)
    return CompanionListing(found, {role: tuple(missing[role]) for role in roles if role in missing})


def lacking(entry: DatasetEntry, mode: Mode, companions: Companions) -> tuple[Role, ...]:
    """What an item should have and has not. Audio masks are not missed in mode video."""
    needed = [role for role in wanted_roles(entry, mode) if role != "audio mask" or mode != "video"]
    return tuple(role for role in needed if not part(companions, role))


def part(companions: Companions, role: Role) -> tuple[Path, ...] | Path | None:
    """The file or files of one role."""
    return getattr(companions, "references" if role == "reference" else role.replace(" ", "_"))


def _frame_problems(entry: DatasetEntry, found: Mapping[Path, Companions]) -> Iterator[str]:
    wrong: dict[int, list[str]] = defaultdict(list)
    for path, companions in found.items():
        count = len(companions.references)
        if count > 1 and entry.reference_frames not in (1, reference_frames(entry, companions.references)):
            wrong[count].append(path.name)
    for count, names in wrong.items():
        yield (
            f"{entry.label}.reference_frames: {count} control images (of {_shown(names)}) make "
            f"{1 + TEMPORAL_STRIDE * (count - 1)} frames, got {entry.reference_frames}; leave it out"
        )


# --- by name ------------------------------------------------------------------------------------------------


class _Finders:
    """Looks the companions of one item up; what goes wrong is appended to ``problems``."""

    def __init__(
        self, entry: DatasetEntry, items: Sequence[SourceItem], roles: Collection[Role], problems: list[str]
    ) -> None:
        self._entry = entry
        self._roles = roles
        self._problems = problems
        # A directory may hold the targets themselves and their captions.
        own = {path for item in items for path in (item.path, caption_path(item.path, entry.caption_extension))}
        self._reference = _Directory.scan(entry.reference_directory, _PICTURES, own, folders=True)
        self._sound = _Directory.scan(entry.reference_audio_directory, EXTENSIONS["audio"], own)
        self._mask = _Directory.scan(entry.mask_directory, _PICTURES, own, folders=True)
        self._audio_mask = _Directory.scan(entry.audio_mask_directory, INTERVAL_EXTENSIONS, own)
        self._controls: Mapping[str, tuple[Path, ...]] = {}
        if entry.control_directory is not None and "reference" in roles:
            find = _video_controls if entry.kind == "video" else _image_controls
            self._controls = find(entry, [item for item in items if not item.references], own, problems)

    def companions(self, item: SourceItem) -> Companions:
        roles = self._roles
        return Companions(
            references=self._references(item) if "reference" in roles else (),
            reference_audio=self._reference_audio(item) if "reference audio" in roles else None,
            mask=self._look(self._mask, item) if "mask" in roles else None,
            audio_mask=self._look(self._audio_mask, item) if "audio mask" in roles else None,
        )

    def _references(self, item: SourceItem) -> tuple[Path, ...]:
        if item.references:  # all or none: several are one reference together
            return item.references if all(map(_existing, item.references)) else ()
        path = self._look(self._reference, item)
        return self._controls.get(item.stem, ()) if path is None else (path,)

    def _reference_audio(self, item: SourceItem) -> Path | None:
        return _existing(item.reference_audio) if item.reference_audio else self._look(self._sound, item)

    def _look(self, directory: _Directory, item: SourceItem) -> Path | None:
        paths = directory.find(item.stem)
        if len(paths) > 1:
            self._problems.append(f"{self._entry.label}: {_ambiguous(item.stem, paths)}")
        return paths[0] if paths else None


def _existing(path: Path | None) -> Path | None:
    return path if path is not None and path.exists() else None


def _ambiguous(stem: str, paths: Sequence[Path]) -> str:
    return f"{paths[0].parent}: {' and '.join(p.name for p in paths)} are all meant for {stem}; keep one"


@dataclass(frozen=True)
class _Directory:
    """The usable files of a directory by stem."""

    exact: Mapping[str, list[Path]] = field(default_factory=dict)
    folded: Mapping[str, list[Path]] = field(default_factory=dict)  # without regard to case

    @classmethod
    def scan(
        cls, directory: Path | None, extensions: Collection[str], own: Collection[Path], *, folders: bool = False
    ) -> _Directory:
        exact: dict[str, list[Path]] = defaultdict(list)
        folded: dict[str, list[Path]] = defaultdict(list)
        for path, is_folder in _entries(directory):
            if path in own or not (folders if is_folder else path.suffix.lower() in extensions):
                continue
            stem = path.name if is_folder else path.stem
            exact[stem].append(path)
            folded[stem.casefold()].append(path)
        return cls(dict(exact), dict(folded))

    def find(self, stem: str) -> list[Path]:
        return self.exact.get(stem) or self.folded.get(stem.casefold(), [])


def _entries(directory: Path | None) -> Iterator[tuple[Path, bool]]:
    """Entries by name and whether each is a folder; hidden ones are left out."""
    if directory is None:
        return
    with os.scandir(directory) as entries:
        found = sorted((e.name, e.is_dir()) for e in entries if not e.name.startswith("."))
    yield from ((directory / name, is_folder) for name, is_folder in found)


# --- control images -----------------------------------------------------------------------------------------


def _image_controls(
    entry: DatasetEntry, items: Sequence[SourceItem], own: Collection[Path], problems: list[str]
) -> dict[str, tuple[Path, ...]]:
    """``<stem>.png``, then ``<stem>_<digits>.png`` by number, for each image."""
    stems = {item.stem for item in items}
    folded = {stem.casefold(): stem for stem in stems}
    numbered: dict[str, list[tuple[int, Path]]] = defaultdict(list)
    for path, is_folder in _entries(entry.control_directory):
        if is_folder or path in own or media_kind(path) != "image":
            continue
        stem, suffix = _split_control(path.stem, stems, folded)
        if stem is None:
            continue
        if suffix is not None and not re.fullmatch("[0-9]+", suffix):
            expected = f"{stem}{path.suffix} or {stem}_<digits>{path.suffix}"
            problems.append(f"{entry.label}: {path}: expected {expected}; rename or remove it")
            continue
        numbered[stem].append((-1 if suffix is None else int(suffix), path))
    for stem, pairs in numbered.items():
        for number in {number for number, _ in pairs}:
            if len(same := [path for n, path in pairs if n == number]) > 1:
                problems.append(f"{entry.label}: {_ambiguous(stem, same)}")
    _require_all(entry, (item for item in items if item.stem not in numbered), problems)
    return {stem: tuple(path for _, path in sorted(pairs)) for stem, pairs in numbered.items()}


def _split_control(name: str, stems: Collection[str], folded: Mapping[str, str]) -> tuple[str | None, str | None]:
    """The image whose control ``name`` is and the suffix; the longest stem wins, so ``a`` does not take ``a_b``'s."""
    ends = [len(name), *(i for i in range(len(name) - 1, 0, -1) if name[i] == "_")]
    exact = ((end, name[:end]) for end in ends if name[:end] in stems)
    in_any_case = ((end, folded[name[:end].casefold()]) for end in ends if name[:end].casefold() in folded)
    end, stem = next(exact, None) or next(in_any_case, (0, None))
    return stem, name[end + 1 :] if end < len(name) else None


def _video_controls(
    entry: DatasetEntry, items: Sequence[SourceItem], own: Collection[Path], problems: list[str]
) -> dict[str, tuple[Path, ...]]:
    """The file of the same name, else the folder ``<stem>``, else ``<stem>`` with another video extension."""
    directory = _Directory.scan(entry.control_directory, EXTENSIONS["video"], own, folders=True)
    controls: dict[str, tuple[Path, ...]] = {}
    for item in items:
        paths = directory.find(item.stem)
        choices = [p for p in paths if p.name == item.path.name] or [p for p in paths if p.is_dir()] or paths
        if len(choices) > 1:
            problems.append(f"{entry.label}: {_ambiguous(item.stem, choices)}")
        if choices:
            controls[item.stem] = (choices[0],)
    _require_all(entry, (item for item in items if item.stem not in controls), problems)
    return controls


def _require_all(entry: DatasetEntry, without: Iterable[SourceItem], problems: list[str]) -> None:
    names = [item.path.name for item in without]
    if names:
        what = "control video (a video, or a folder of images)" if entry.kind == "video" else "control image"
        problems.append(
            f"{entry.label}: no {what} in {entry.control_directory} for {_shown(names)}; every {entry.kind} needs one"
        )


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more ({len(names)} in all)" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
