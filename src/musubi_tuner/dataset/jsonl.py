"""JSONL lists of media: one JSON object a line, blank lines skipped."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musubi_tuner.common.errors import ConfigErrors, did_you_mean
from musubi_tuner.common.text_files import read_text

from .files import Kind, duplicate_stems, media_kind

_PROBLEMS_SHOWN = 20
_SEVERAL_TARGETS = re.compile(r"image_path_\d+")
_SEVERAL_CONTROLS = re.compile(r"control_path_(\d+)")


@dataclass(frozen=True)
class ListedMedia:
    """One line. Its files need not exist: that shows when they are opened."""

    path: Path  # absolute
    caption: str
    place: str  # "clips.jsonl:3"
    audio: Path | None = None  # sound of a video that lies in a file of its own
    references: tuple[Path, ...] = ()  # images, videos or folders of images; several images are one reference
    reference_audio: Path | None = None


@dataclass(frozen=True)
class MediaList:
    """What a list holds."""

    media: tuple[ListedMedia, ...]
    ignored: tuple[str, ...] = ()  # keys that mean nothing here


def read_media_list(file: Path, kind: Kind, caption_field: str = "caption") -> MediaList:
    """The media of a JSONL file, in its order.

    Each line has ``<kind>_path`` and a caption; lines of videos may have ``audio_path``. References are named by
    ``reference_path`` or ``control_path`` (of images also ``control_path_0``, ``control_path_1``, ...) and
    ``reference_audio_path``. Relative paths lie beside the JSONL file or else in the working directory.

    Raises:
        UserError: the file is missing or not UTF-8.
        ConfigErrors: lines that cannot be used, each with file and line, and names whose caches would collide.
    """
    media: list[ListedMedia] = []
    problems: list[str] = []
    ignored: dict[str, None] = {}
    # Not splitlines(): a caption may hold separators such as U+2028.
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        parsed = _Line(file, number, kind, caption_field)
        try:
            media.append(parsed.media(line))
        except ValueError as problem:
            problems.append(f"{file}:{number}: {problem}")
        ignored.update(dict.fromkeys(parsed.ignored))
    problems += _collisions(media)
    if problems:
        raise ConfigErrors(_shortened(problems), f"{file}: lines that cannot be used")
    return MediaList(tuple(media), tuple(ignored))


def _collisions(media: list[ListedMedia]) -> Iterator[str]:
    places: dict[Path, list[str]] = {}
    for listed in media:
        places.setdefault(listed.path, []).append(listed.place)
    for path, where in places.items():
        if len(where) > 1:
            yield f"{path} is listed {len(where)} times ({', '.join(where)}); use num_repeats to repeat a dataset"
    for first, second in duplicate_stems(places):
        pair = f"{first} ({places[first][0]}) and {second} ({places[second][0]})"
        yield f"{pair} would share a cache file; rename one"


def _shortened(problems: list[str]) -> list[str]:
    more = len(problems) - _PROBLEMS_SHOWN
    return [*problems[:_PROBLEMS_SHOWN], f"and {more} more"] if more > 0 else problems


class _Line:
    """Reads one line; every :class:`ValueError` says what is wrong with it."""

    def __init__(self, file: Path, number: int, kind: Kind, caption_field: str) -> None:
        self.file = file
        self.place = f"{file.name}:{number}"
        self.kind = kind
        self.caption_field = caption_field
        self.ignored: list[str] = []

    def media(self, line: str) -> ListedMedia:
        values = _json_object(line)
        path_key = f"{self.kind}_path"
        controls = _control_keys(values)
        if controls and self.kind != "image":
            raise ValueError(f"{controls[0]}: only images have several control images; give control_path")
        known = [path_key, self.caption_field, *_OPTIONAL[self.kind], *controls]
        if several := [name for name in values if _SEVERAL_TARGETS.fullmatch(name)]:
            raise ValueError(f"{several[0]}: LTX-2 is trained on one target per item; list it as image_path")
        self.ignored = [name for name in values if name not in known]
        for name in (path_key, self.caption_field):
            if name not in values:
                raise ValueError(f"{name} is missing{self._hint(name, values)}")
        path = self._path(path_key, values[path_key])
        self._check_kind(path_key, path)
        return ListedMedia(
            path,
            _text(self.caption_field, values[self.caption_field]).strip(),
            self.place,
            audio=self._optional("audio_path", values) if self.kind == "video" else None,
            references=self._references(values, controls) if self.kind != "audio" else (),
            reference_audio=self._optional("reference_audio_path", values) if self.kind != "image" else None,
        )

    def _optional(self, name: str, values: Mapping[str, Any]) -> Path | None:
        return None if values.get(name) is None else self._path(name, values[name])

    def _references(self, values: Mapping[str, Any], controls: list[str]) -> tuple[Path, ...]:
        names = [name for name in ("reference_path", "control_path") if values.get(name) is not None]
        groups = [[name] for name in names] + ([controls] if controls else [])
        if len(groups) > 1:
            raise ValueError(f"{', '.join(name for group in groups for name in group)}: give the reference once")
        paths = [(name, self._path(name, values[name])) for group in groups for name in group]
        for name, path in paths:
            if media_kind(path) == "audio" or (controls and media_kind(path) != "image"):
                raise ValueError(f"{name}: {path.name} is not {'an image' if controls else 'a picture or video'}")
        return tuple(path for _, path in paths)

    def _hint(self, name: str, values: Mapping[str, Any]) -> str:
        other = next((k for k in ("video", "image", "audio") if f"{k}_path" in values), None)
        if name == f"{self.kind}_path" and other is not None:
            return f" (the line has {other}_path: list it in {other}_jsonl_file)"
        near = next((n for n in self.ignored if did_you_mean(n, [name])), None)
        return f" (is {near!r} meant?)" if near else f"; the line has {', '.join(values) or 'nothing'}"

    def _path(self, name: str, value: object) -> Path:
        text = _text(name, value)
        if not text.strip() or "\0" in text:
            raise ValueError(f"{name}: expected a path, got {json.dumps(text)}")
        beside = self.file.parent / text  # an absolute path wins by itself
        # os.path: no error for names that no file can have, and links keep their name.
        in_working_directory = not os.path.exists(beside) and os.path.exists(text)  # noqa: PTH110
        return Path(os.path.abspath(text if in_working_directory else beside))  # noqa: PTH100

    def _check_kind(self, name: str, path: Path) -> None:
        found = media_kind(path)
        # Sound may be read from videos; what an unknown extension holds shows when it is decoded.
        usable = {self.kind, None} | ({"video"} if self.kind == "audio" else set())
        if found not in usable:
            raise ValueError(f"{name}: {path.name} is of kind {found}; list it in {found}_jsonl_file")


def _json_object(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        hint = "; write \\ in paths as / or \\\\" if "escape" in error.msg else ""
        raise ValueError(f"not JSON: {error.msg} (column {error.colno}){hint}") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: too deeply nested") from None
    if not isinstance(values, dict):
        raise ValueError('expected one object {"...": "..."} a line')
    return values


# Optional keys of a line, beside numbered control images.
_OPTIONAL: Mapping[Kind, tuple[str, ...]] = {
    "video": ("audio_path", "reference_path", "control_path", "reference_audio_path"),
    "image": ("reference_path", "control_path"),
    "audio": ("reference_audio_path",),
}


def _control_keys(values: Mapping[str, Any]) -> list[str]:
    """``control_path_0``, ``control_path_1``, ... by number."""
    numbers = sorted(int(match[1]) for name in values if (match := _SEVERAL_CONTROLS.fullmatch(name)))
    names = [f"control_path_{number}" for number in range(len(numbers))]
    if gaps := [name for name in names if name not in values]:
        raise ValueError(f"{gaps[0]} is missing: control images are numbered from 0 without gaps")
    return names


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a text, got {json.dumps(value, ensure_ascii=False)[:80]}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: half a character at position {error.start} (an unpaired \\u escape)") from None
    return value
