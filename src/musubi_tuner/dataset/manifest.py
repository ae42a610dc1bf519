"""Dataset manifests: what was cached, so that training needs neither the sources nor their configuration.

A manifest is JSON::

    {"format": "musubi_tuner_dataset_manifest", "version": 1, "architecture": "ltx2",
     "generated_at": "2026-01-31T12:00:00+00:00",
     "source_dataset_config": "dataset.toml", "saved_in": "/data", "failures": 0,
     "datasets": [{"dataset_type": "video", "params": {...}, "left_out": [],
                   "files": [{"base": "clip_00000-049", "bucket": [768, 512], "frames": 49, "audio_t": 50,
                              "latents": "clip_00000-049_0768x0512_ltx2.safetensors",
                              "audio": "clip_00000-049_0768x0512_ltx2_audio.safetensors", "mask": null,
                              "text": "clip_ltx2_te.safetensors"}]}],
     "validation_datasets": [...]}

``params`` holds every key of a dataset's configuration with its resolved value; directories of sources are null.
Directories of caches below the manifest's folder, or beside it, are relative to it, so that all can be moved
together; others are absolute. Manifests without ``files``, ``saved_in``, ``failures`` and ``left_out``, as other
programs write them, stand for whatever lies in their directories.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from musubi_tuner.common.atomic import write_text
from musubi_tuner.common.errors import ConfigErrors, UserError
from musubi_tuner.common.tables import count_text
from musubi_tuner.common.text_files import read_text

from .buckets import pixel_frames, pixel_size
from .cache import AudioHeader, CacheKind, CacheName, LatentHeader, read_text_header
from .companion_rules import CACHE_DIRECTORIES, SOURCE_DIRECTORIES, cache_directory_problems
from .discovery import CacheSearch
from .entries import DatasetConfig, DatasetEntry
from .files import ItemFiles
from .fingerprint import short_list
from .keys import COMMAND_LINE_DEFAULTS, KEYS, KINDS, SOURCES, show
from .mismatch import text_mismatch
from .schema import MANIFEST_FORMAT, Report, command_line_values, parse_entry

logger = logging.getLogger(__name__)

VERSION = 1
ARCHITECTURE = "ltx2"

_SOURCE_PATHS = frozenset({*SOURCES, *SOURCE_DIRECTORIES})  # null in a manifest
_CACHE_PATHS = ("cache_directory", *CACHE_DIRECTORIES)

# --- writing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cached:
    """What a manifest says of one dataset's caches, and what is told of them."""

    files: tuple[ItemFiles, ...]
    left_out: tuple[str, ...]  # what could have been an item, but is not
    text_due: int  # listed text caches that are missing or of another caption


def save_dataset_manifest(path: Path, config: DatasetConfig, *, text_is_cached: bool, failures: int = 0) -> None:
    """Write the manifest of what is cached now of a configuration's datasets.

    Called at the end of a caching run, also of one with failures; an interrupted run leaves an older manifest as it
    was. Listed are the caches that training would use. What failed is not among them, so a manifest never promises
    more than there is.

    Args:
        path: of the manifest.
        config: the configuration that was cached.
        text_is_cached: text was encoded as well: items without are left out. Otherwise the names that their text
            caches will have are listed.
        failures: of the caching run, noted for those who train with the manifest.
    """
    folder = path.parent.resolve()
    found = {entry.label: _find_cached(entry, text_is_cached=text_is_cached) for entry in config.entries()}
    values = {
        "format": MANIFEST_FORMAT,
        "version": VERSION,
        "architecture": ARCHITECTURE,
        "generated_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "source_dataset_config": _portable(config.path.resolve(), folder),
        "saved_in": folder.as_posix(),
        "failures": failures,
        "datasets": [_section(entry, found[entry.label], folder) for entry in config.datasets],
        "validation_datasets": [_section(entry, found[entry.label], folder) for entry in config.validation],
    }
    write_text(path, json.dumps(values, ensure_ascii=False, indent=1) + "\n")
    _report_saved(path, config, found, failures)


def _find_cached(entry: DatasetEntry, *, text_is_cached: bool) -> _Cached:
    # Sound is listed whatever the mode of this run: mode video does not read it.
    search = CacheSearch(entry, "audio" if entry.kind == "audio" else "av")
    files, lacking, due = [], [], set()
    for stem, name, latents in search.current_clips():
        audio_path, audio = search.find_audio(name)
        companions = search.companions.find(stem, name, latents, audio)
        text = search.find_text(stem, name.base)
        current = text is not None and _is_current(search, text, stem)
        without_sound = audio is None and entry.kind == "audio"
        outdated = search.is_of_another_source(stem, latents) or search.companions.found_wrong(name)
        if (text_is_cached and not current) or without_sound or companions is None or outdated:
            lacking.append(name.base)
            continue
        text = text or CacheName(stem, "text")
        if not current:
            due.add(text)
        item = _item_files(name, latents, text=text, audio_path=audio_path, audio=audio)
        files.append(replace(item, mask=companions.mask.name if companions.mask else None))
    problems = [problem.name for problem in search.found.problems]
    return _Cached(tuple(files), tuple(dict.fromkeys([*search.found.uncached, *problems, *lacking])), len(due))


def _is_current(search: CacheSearch, text: CacheName, stem: str) -> bool:
    """Whether a text cache can be read and is of the item's caption, where that is known."""
    try:
        header = read_text_header(search.names[text])
    except UserError:
        return False
    mode = "audio" if search.entry.kind == "audio" else "video"  # the least that any run reads
    return text_mismatch(mode, header, (search.captions or {}).get(stem)) is None


def _item_files(
    name: CacheName, latents: LatentHeader, *, text: CacheName, audio_path: Path | None, audio: AudioHeader | None
) -> ItemFiles:
    placeholder = latents.has_virtual_grid
    return ItemFiles(
        latents=str(name),
        text=str(text),
        audio=audio_path.name if audio_path else None,
        bucket=None if placeholder else pixel_size(latents.grid),
        frames=None if placeholder else pixel_frames(latents.grid),
        audio_steps=audio.steps if audio else None,
    )


def _section(entry: DatasetEntry, cached: _Cached, folder: Path) -> dict[str, Any]:
    return {
        "dataset_type": entry.kind,
        "params": _params(entry, folder),
        "left_out": list(cached.left_out),
        "files": [_file_values(item) for item in cached.files],
    }


def _params(entry: DatasetEntry, folder: Path) -> dict[str, Any]:
    values = {field.name: getattr(entry, field.name) for field in fields(entry)} | {"cache_only": True}
    params: dict[str, Any] = {}
    for name, key in KEYS.items():
        if entry.kind not in key.kinds:
            continue
        value = None if name in _SOURCE_PATHS else values[name]
        params[name] = _portable(value, folder) if isinstance(value, Path) else value
    return params


def _file_values(item: ItemFiles) -> dict[str, Any]:
    name = CacheName.parse(item.latents)
    return {
        "base": name.base if name else item.latents,
        "bucket": item.bucket,
        "frames": item.frames,
        "audio_t": item.audio_steps,
        "latents": item.latents,
        "audio": item.audio,
        "mask": item.mask,
        "text": item.text,
    }


def _portable(path: Path, folder: Path) -> str:
    """Relative to ``folder`` for what lies below it or beside it, else absolute; with / on every system."""
    if path.is_relative_to(folder):
        return path.relative_to(folder).as_posix()
    above = folder.parent
    if above != above.parent and path.is_relative_to(above):  # not from the root: that is no place of its own
        return f"../{path.relative_to(above).as_posix()}"
    return path.as_posix()


def _report_saved(path: Path, config: DatasetConfig, found: Mapping[str, _Cached], failures: int) -> None:
    items = sum(len(cached.files) for cached in found.values())
    datasets = len(found)
    logger.info("%s: lists %s of %s", path, count_text(items, "item"), count_text(datasets, "dataset"))
    for entry in config.entries():
        cached = found[entry.label]
        if not cached.files:
            logger.warning("%s: nothing of %s is cached yet; save the manifest again once it is", path, entry.label)
        elif cached.left_out:
            logger.warning("%s: not cached and so not listed: %s", entry.label, short_list([*cached.left_out]))
        if cached.text_due:
            logger.info("%s: %d listed text caches are still to be made", entry.label, cached.text_due)
    if failures:
        logger.warning("%s: failures of this run: %d; what failed is not listed", path, failures)


# --- reading ------------------------------------------------------------------------------------------------


def load_dataset_manifest(
    path: str | os.PathLike[str], *, command_line: Mapping[str, object] | None = None
) -> DatasetConfig:
    """The datasets of a manifest, as those of a configuration with ``cache_only``.

    Relative directories lie beside the manifest, else where it was saved, else in the working directory.

    Args:
        command_line: options by name, for the same keys as in a configuration; they apply where the manifest has
            the default.

    Raises:
        UserError: the file is missing, no manifest, or of another version or architecture.
        ConfigErrors: everything that is wrong in its datasets.
    """
    file = Path(path)
    raw = _read(file)
    reader = _Reader(file, raw, command_line_values(command_line))
    config = DatasetConfig(
        reader.entries("datasets"),
        reader.entries("validation_datasets"),
        file,
        made_from=reader.locate_config(raw.get("source_dataset_config")),
    )
    report = reader.report
    report.problems += cache_directory_problems(config)
    if report.problems:
        raise ConfigErrors(report.problems, f"{file}: invalid dataset manifest")
    if reader.unknown:
        logger.info("%s: unknown parameters are ignored: %s", file.name, ", ".join(sorted(reader.unknown)))
    for warning in report.warnings:
        logger.warning("%s: %s", file.name, warning)
    if isinstance(failures := raw.get("failures"), int) and failures > 0:
        logger.warning("%s: failures of the run that saved it: %d; what failed is not in it", file.name, failures)
    return config


def _read(file: Path) -> dict[str, Any]:
    content = read_text(file)
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        hint = "; a dataset configuration is given as --dataset_config" if file.suffix.lower() == ".toml" else ""
        raise UserError(f"{file}: not a dataset manifest: {error}{hint}") from None
    if not isinstance(raw, dict) or raw.get("format") != MANIFEST_FORMAT:
        found = show(raw.get("format")) if isinstance(raw, dict) else "no object"
        raise UserError(
            f'{file}: format: expected "{MANIFEST_FORMAT}", got {found}; save one with --save_dataset_manifest of the '
            "caching scripts (a dataset configuration is given as --dataset_config)"
        )
    if type(raw.get("version")) is not int or raw["version"] != VERSION:
        found = show(raw.get("version"))
        raise UserError(f"{file}: version: expected {VERSION}, got {found}; save the manifest again with this version")
    if raw.get("architecture") != ARCHITECTURE:
        found = show(raw.get("architecture"))
        raise UserError(
            f'{file}: architecture: expected "{ARCHITECTURE}", got {found}; its caches are of another model'
        )
    for name in ("datasets", "validation_datasets"):
        sections = raw.get(name) or []
        if not isinstance(sections, list) or (name == "datasets" and not sections):
            raise UserError(f"{file}: {name}: expected a list of datasets, got {show(raw.get(name))}")
    return raw


class _Reader:
    """Reads the datasets of one manifest and notes what is wrong."""

    def __init__(self, file: Path, raw: Mapping[str, Any], fallback: Mapping[str, object]) -> None:
        self.file = file
        self.raw = raw
        self.fallback = fallback
        self.report = Report()
        self.unknown: set[str] = set()
        saved_in = raw.get("saved_in")
        others = [Path(saved_in)] if isinstance(saved_in, str) else []
        self.places = [file.parent.resolve(), *others, Path.cwd()]

    def entries(self, section: str) -> tuple[DatasetEntry, ...]:
        tables = enumerate(self.raw.get(section) or [])
        found = [self._entry(f"{section}[{index}]", table) for index, table in tables]
        return tuple(entry for entry in found if entry is not None)

    def _entry(self, label: str, section: object) -> DatasetEntry | None:
        problems = self.report.problems
        if not isinstance(section, dict) or not isinstance(section.get("params"), dict):
            problems.append(f"{label}.params: expected an object, got {show(section)[:80]}")
            return None
        kind = section.get("dataset_type")
        if kind not in KINDS:
            problems.append(f"{label}.dataset_type: expected one of {', '.join(KINDS)}, got {show(kind)}")
            return None
        self.unknown |= section["params"].keys() - KEYS.keys()
        known = {name for name, key in KEYS.items() if kind in key.kinds}
        table = dict(self._settings(label, {k: v for k, v in section["params"].items() if k in known}))
        entry = parse_entry(label, kind, table, self.fallback, {}, self.file, self.report)
        if isinstance(left_out := section.get("left_out"), list) and left_out:
            self.report.warnings.append(f"{label}: was not cached and is left out: {short_list([*map(str, left_out)])}")
        files = section.get("files")
        return entry if files is None else replace(entry, files=self._files(label, files))

    def _settings(self, label: str, params: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """The keys of an entry; a default that the command line may replace counts as not given."""
        for name, value in params.items():
            if value is None or name in _SOURCE_PATHS:
                continue
            if name in _CACHE_PATHS and isinstance(value, str) and value.strip():
                yield name, self._locate_directory(f"{label}.params.{name}", value)
            elif not (name in COMMAND_LINE_DEFAULTS and value == KEYS[name].default):
                yield name, value
        yield "cache_only", True

    # --- paths

    def _locate_directory(self, key: str, value: str) -> str:
        found = next((path for path in self._candidates(value) if path.is_dir()), None)
        if found is None:
            looked = ", ".join(dict.fromkeys(str(place) for place in self.places))
            where = "" if Path(value).is_absolute() else f" (looked in {looked})"
            self.report.problems.append(
                f"{key}: {value} does not exist{where}; put the caches there or change the path in the manifest"
            )
        return str((found or self.places[0] / value).absolute())

    def locate_config(self, value: object) -> Path | None:
        if not isinstance(value, str):
            return None
        return next((path.resolve() for path in self._candidates(value) if path.is_file()), self.places[0] / value)

    def _candidates(self, value: str) -> Iterator[Path]:
        # As it is first: on this system a backslash may be a part of a name.
        for place in self.places:
            for spelling in dict.fromkeys((value, value.replace("\\", "/"))):
                yield place / os.path.expanduser(spelling)  # noqa: PTH111 (pathlib raises for ~name)

    # --- files

    def _files(self, label: str, files: object) -> tuple[ItemFiles, ...]:
        if not isinstance(files, list):
            self.report.problems.append(f"{label}.files: expected a list, got {show(files)[:80]}")
            return ()
        items = []
        for index, values in enumerate(files):
            try:
                items.append(_parse_files(values))
            except ValueError as problem:
                self.report.problems.append(f"{label}.files[{index}]{problem}")
                break  # the others are likely to be wrong in the same way
        return tuple(items)


def _parse_files(values: object) -> ItemFiles:
    if not isinstance(values, dict):
        raise ValueError(f": expected an object, got {show(values)[:80]}")
    bucket = values.get("bucket")
    if bucket is not None and (not isinstance(bucket, list) or [*map(type, bucket)] != [int, int]):
        raise ValueError(f".bucket: expected [width, height] or null, got {show(bucket)}")
    for name in ("frames", "audio_t"):
        if values.get(name) is not None and type(values[name]) is not int:
            raise ValueError(f".{name}: expected an integer or null, got {show(values[name])}")
    return ItemFiles(
        latents=_cache_name(values, "latents"),
        text=_cache_name(values, "text"),
        audio=_cache_name(values, "audio") if values.get("audio") is not None else None,
        mask=_cache_name(values, "mask") if values.get("mask") is not None else None,
        bucket=tuple(bucket) if bucket else None,  # type: ignore[arg-type]
        frames=values.get("frames"),
        audio_steps=values.get("audio_t"),
    )


def _cache_name(values: Mapping[str, Any], kind: CacheKind) -> str:
    value = values.get(kind)
    name = CacheName.parse(value) if isinstance(value, str) else None
    if name is None or name.kind != kind:
        raise ValueError(f".{kind}: expected the name of a cache file of this kind, got {show(value)}")
    return str(value)
