"""The items of a dataset: media files with their captions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from musubi_tuner.common.errors import ConfigErrors, UserError

from .entries import DatasetConfig, DatasetEntry
from .files import Kind, duplicate_stems, media_kind, scan_directory
from .jsonl import read_media_list

_MOST_NAMED = 20


@dataclass(frozen=True)
class SourceItem:
    """One media file and what is said about it."""

    path: Path  # of videos also a directory of images
    stem: str  # file name without its last extension; names the caches
    caption: str
    kind: Kind
    audio: Path | None = None  # the sound of a video, where a list names a file of its own
    references: tuple[Path, ...] = ()  # where a list names them; several images are one reference together
    reference_audio: Path | None = None
    place: str | None = None  # "clips.jsonl:3" of items that are listed


@dataclass(frozen=True)
class Problem:
    """Why one file is left out."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class ItemListing:
    """What a dataset holds and what had to be left out."""

    items: tuple[SourceItem, ...]
    problems: tuple[Problem, ...]


def list_items(entry: DatasetEntry) -> ItemListing:
    """Items of a dataset: of a directory sorted by path, of a JSONL file in its order.

    In a directory an item without a readable caption or name becomes a problem. Listed media need not exist. A dataset
    that is read from its caches only has no items.

    Raises:
        ConfigErrors: files whose caches would collide, lines that cannot be used.
        UserError: the directory or the JSONL file cannot be read.
    """
    if entry.source is None:
        return ItemListing((), ())
    if entry.listed:
        return ItemListing(tuple(_listed_items(entry.source, entry)), ())
    try:
        paths = scan_directory(entry.source, entry.kind)
    except OSError as error:
        raise UserError(f"{entry.label}: {entry.source} cannot be read ({error.strerror})") from None
    if clashes := duplicate_stems(paths):
        raise ConfigErrors(
            [f"{first} and {second} would share a cache file; rename one" for first, second in clashes],
            f"{entry.label}: equal names",
        )
    items: list[SourceItem] = []
    problems: list[Problem] = []
    for path in paths:
        caption = _name_problem(path) or read_caption(path, entry.caption_extension)
        if isinstance(caption, Problem):
            problems.append(caption)
        else:
            items.append(SourceItem(path, path.stem, caption, entry.kind))
    return ItemListing(tuple(items), tuple(problems))


def require_captions(config: DatasetConfig) -> None:
    """Check that every item of a directory has a readable caption.

    Raises:
        ConfigErrors: those that have none, at most 20 of them by name.
    """
    problems = [
        f"{entry.label}: {problem.path.name}: {problem.reason}"
        for entry in config.entries()
        for problem in list_items(entry).problems
    ]
    if problems:
        more = len(problems) - _MOST_NAMED
        shown = [*problems[:_MOST_NAMED], *([f"and {more} more"] if more > 0 else [])]
        raise ConfigErrors(
            shown, f"{config.path}: {len(problems)} items lack a caption; write them, or leave out --strict_captions"
        )


def stray_captions(entry: DatasetEntry) -> list[str]:
    """Caption files of a directory whose media file is of no known extension, or is not there."""
    if entry.source is None or entry.listed:
        return []
    with os.scandir(entry.source) as entries:
        names = sorted(e.name for e in entries if not e.is_dir() and not e.name.startswith("."))
    media = {Path(name).stem for name in names if media_kind(Path(name)) is not None}
    ending = entry.caption_extension
    return [name for name in names if name.endswith(ending) and name.removesuffix(ending) not in media]


def _listed_items(file: Path, entry: DatasetEntry) -> Iterator[SourceItem]:
    for media in read_media_list(file, entry.kind, entry.caption_field).media:
        yield SourceItem(
            media.path,
            media.path.stem,
            media.caption,
            entry.kind,
            audio=media.audio,
            references=media.references,
            reference_audio=media.reference_audio,
            place=media.place,
        )


def _name_problem(path: Path) -> Problem | None:
    """Metadata of caches, lists and manifests are UTF-8, names of files need not be. And each line of a log is one."""
    try:
        path.name.encode("utf-8")
    except UnicodeEncodeError:
        return Problem(path, "the name of the file is not UTF-8; rename it")
    lines = path.name.splitlines()
    if len(lines) > 1:
        return Problem(path.with_name(" ".join(lines)), "the name of the file has several lines; rename it")
    return None


def caption_path(media: Path, extension: str) -> Path:
    """``<stem><extension>`` beside the media file."""
    return media.with_name(media.stem + extension)


def read_caption(media: Path, extension: str) -> str | Problem:
    """The caption of a media file, stripped; it may be empty."""
    # Strings: over tens of thousands of files a Path for each takes longer than to read it.
    name = media.stem + extension
    try:
        with open(os.path.join(media.parent, name), "rb", buffering=0) as file:  # noqa: PTH118, PTH123
            return file.read().decode("utf-8-sig").strip()
    except FileNotFoundError:
        return Problem(media, f"no caption file {name}")
    except UnicodeDecodeError as error:
        return Problem(media, f"caption file {name} is not UTF-8 (byte {error.start}); save it as UTF-8")
    except OSError as error:
        return Problem(media, f"caption file {name} cannot be read ({error.strerror})")


def summarize_problems(problems: Sequence[Problem], limit: int = 5) -> str:
    """One line: the number of files left out and the first few with their reasons."""
    shown = "; ".join(f"{p.path.name}: {p.reason}" for p in problems[:limit])
    more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
    return f"{len(problems)} left out: {shown}{more}"
