"""Dataset configuration files: TOML (or the same structure as JSON) to frozen values.

All problems of a file are collected and reported together.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from musubi_tuner.common.errors import ConfigErrors, UserError, did_you_mean
from musubi_tuner.common.text_files import read_json, read_toml
from musubi_tuner.config.model import Mode

from .buckets import SPATIAL_STRIDE, floor_frames, floor_to
from .companion_rules import (
    CACHE_DIRECTORIES,
    SOURCE_DIRECTORIES,
    cache_directory_problems,
    companion_problems,
    directory_problems,
    listed_reference_problems,
)
from .entries import DatasetConfig, DatasetEntry
from .files import Kind, duplicate_stems, media_kind, scan_directory
from .jsonl import read_media_list
from .keys import COMMAND_LINE_DEFAULTS, IGNORED, KEYS, SOURCES, show, unknown_key

logger = logging.getLogger(__name__)

MANIFEST_FORMAT = "musubi_tuner_dataset_manifest"


@dataclass
class Report:
    """What is to be said of a file once it is read."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


# --- loading ------------------------------------------------------------------------------------------------


def load_dataset_config(
    path: str | os.PathLike[str],
    *,
    command_line: Mapping[str, object] | None = None,
    need_sources: bool = True,
) -> DatasetConfig:
    """Read and check a dataset configuration.

    A value is looked up in the entry, then in ``[general]``, then (for a few names) on the command line, then
    in the defaults. Relative directories lie beside the configuration file or else in the working directory; a
    cache directory that does not exist yet goes where its source was found, or beside the file.

    Args:
        command_line: options by name; None values do not count.
        need_sources: whether the media must be there; training reads caches only.

    Raises:
        UserError: the file is missing or cannot be parsed.
        ConfigErrors: everything that is wrong in it.
    """
    file = Path(path)
    raw = _parse_file(file)
    if raw.get("format") == MANIFEST_FORMAT:
        raise UserError(f"{file}: is a dataset manifest, expected a configuration; training takes --dataset_manifest")
    report = Report()
    fallback = command_line_values(command_line)
    general = _general(raw, report)
    sections = {
        section: tuple(
            parse_entry(f"{section}[{index}]", _kind(table), table, fallback, general, file, report)
            for index, table in enumerate(_tables(raw, section, report))
        )
        for section in ("datasets", "validation_datasets")
    }
    config = DatasetConfig(sections["datasets"], sections["validation_datasets"], file)
    report.problems += cache_directory_problems(config)
    if need_sources:
        for entry in config.entries():
            problems = _list_problems(entry, report) if entry.listed else _source_problems(entry)
            report.problems += [f"{entry.label}.{problem}" for problem in (*problems, *directory_problems(entry))]
    if report.problems:
        raise ConfigErrors(report.problems, f"{file}: invalid dataset configuration")
    for warning in report.warnings:
        logger.warning("%s: %s", file.name, warning)
    return config


def command_line_values(options: Mapping[str, object] | None) -> dict[str, object]:
    """Those of the command line's options that apply where a dataset does not have the key."""
    return {k: v for k, v in (options or {}).items() if k in COMMAND_LINE_DEFAULTS and v is not None}


def check_mode(config: DatasetConfig, mode: Mode) -> Mode:
    """The mode a run over ``config`` has: audio datasets alone always make it "audio".

    Raises:
        ConfigErrors: datasets that the mode cannot use.
    """
    entries = list(config.entries())
    if mode != "audio" and all(entry.kind == "audio" for entry in entries):
        logger.info("all datasets are audio datasets: using --ltx2_mode audio")
        return "audio"
    wrong = [entry for entry in entries if (entry.kind == "audio") != (mode == "audio")]
    if wrong:
        remedy = (
            "give audio_directory, or use --ltx2_mode video or av"
            if mode == "audio"
            else "move audio datasets to a configuration of their own (--ltx2_mode audio)"
        )
        raise ConfigErrors(
            [f"{e.label}: {_article(e.kind)} dataset cannot be used with --ltx2_mode {mode}; {remedy}" for e in wrong],
            f"{config.path}: datasets do not fit the mode",
        )
    return mode


def _article(kind: Kind) -> str:
    return f"a {kind}" if kind == "video" else f"an {kind}"


def _parse_file(file: Path) -> dict[str, Any]:
    suffix = file.suffix.lower()
    if suffix not in (".toml", ".json"):
        raise UserError(f"{file}: a dataset configuration is a .toml or .json file")
    raw = read_toml(file) if suffix == ".toml" else read_json(file)
    if not isinstance(raw, dict):
        raise UserError(f"{file}: expected an object with the list 'datasets'")
    return raw


def _general(raw: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Parsed values of ``[general]``."""
    sections = ("general", "datasets", "validation_datasets")
    for name in raw:
        if name not in sections:
            near = did_you_mean(name, sections)
            hint = near or (" (it belongs under [general] or [[datasets]])" if name in KEYS else "")
            report.problems.append(f"{name}: unknown section{hint}; known: {', '.join(sections)}")
    table = raw.get("general", {})
    if not isinstance(table, dict):
        report.problems.append(f"general: expected a table [general], got {show(table)}")
        return {}
    values = {}
    for name, value in table.items():
        if name in SOURCES:
            report.problems.append(f"general.{name}: belongs in a [[datasets]] entry")
        elif name in KEYS:
            values[name] = _parse("general", name, value, report)
        else:
            _reject("general", name, None, report)
    return values


def _tables(raw: Mapping[str, Any], section: str, report: Report) -> list[dict[str, Any]]:
    tables = raw.get(section, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        report.problems.append(f"{section}: expected one [[{section}]] table (double brackets) for each dataset")
        return []
    if section == "datasets" and not tables:
        report.problems.append("datasets: expected at least one [[datasets]] entry")
    return tables


def _parse(label: str, name: str, value: object, report: Report) -> Any:
    """The parsed value; on a problem it is noted and the default returned."""
    try:
        return KEYS[name].parse(value)
    except ValueError as expected:
        report.problems.append(f"{label}.{name}: expected {expected}, got {show(value)}")
        return KEYS[name].default


def _reject(label: str, name: str, kind: Kind | None, report: Report) -> None:
    if name in IGNORED:
        report.warnings.append(f"{label}.{name}: {IGNORED[name]}")
    else:
        report.problems.append(f"{label}.{name}: {unknown_key(name, kind)}")


# --- one entry ----------------------------------------------------------------------------------------------


def parse_entry(
    label: str,
    kind: Kind,
    table: Mapping[str, Any],
    fallback: Mapping[str, Any],
    general: Mapping[str, Any],
    file: Path,
    report: Report,
) -> DatasetEntry:
    """The entry with the keys of ``table``; ``report`` takes what is wrong, in place of which it has defaults."""
    values = {name: key.default for name, key in KEYS.items() if kind in key.kinds}
    values.update({name: value for layer in (fallback, general) for name, value in layer.items() if name in values})
    for name, value in table.items():
        if name in values:
            values[name] = _parse(label, name, value, report)
        else:
            _reject(label, name, kind, report)

    given = [name for name in SOURCES if name in table]
    if len(given) > 1 or not (given or values["cache_only"]):
        found = ", ".join(given) or "none"
        report.problems.append(f"{label}: expected exactly one of {', '.join(SOURCES)}, found {found}")
    sources = {name: value for name in SOURCES if (value := values.pop(name, None)) is not None}
    source_key, source_value = next(iter(sources.items()), (None, None))
    listed = source_key == f"{kind}_jsonl_file"
    cache_value = values.pop("cache_directory")
    has_cache = cache_value is not None or (source_value is not None and not listed)
    if not has_cache and (listed or values["cache_only"]):
        report.problems.append(f"{label}.cache_directory: needed with {source_key or 'cache_only'}")
    _check_resolution(label, kind, values, report)
    report.problems += [f"{label}.{problem}" for problem in companion_problems(values, listed=listed)]
    if kind == "video":
        _settle_extraction(label, values, report)
    values["bucket_no_upscale"] = values["bucket_no_upscale"] and values["enable_bucket"]
    source = _resolve(source_value, file.parent) if source_value else None
    if not has_cache:  # stands in, so that the rest of the entry is checked as well
        cache_value = label
    for name in SOURCE_DIRECTORIES:
        if values.get(name) is not None:
            values[name] = _resolve(values[name], file.parent)
    for name in CACHE_DIRECTORIES:
        if values[name] is not None:
            values[name] = _resolve_cache(values[name], file.parent, source_value, source)
    return DatasetEntry(
        label=label,
        kind=kind,
        source=None if values["cache_only"] else source,
        cache_directory=_resolve_cache(cache_value, file.parent, source_value, source),
        listed=listed,
        **values,
    )


def _kind(table: Mapping[str, Any]) -> Kind:
    kinds: tuple[Kind, ...] = ("audio", "image")
    return next((k for k in kinds if any(name in table for name in (f"{k}_directory", f"{k}_jsonl_file"))), "video")


def _resolve(value: str, folder: Path) -> Path:
    path = Path(value)
    beside = folder / path
    return beside.resolve() if path.is_absolute() or beside.exists() else path.resolve()


def _resolve_cache(value: str | None, folder: Path, source_value: str | None, source: Path | None) -> Path:
    """As every directory; one that does not exist yet goes where the source was found, or beside the file."""
    if value is None:
        assert source is not None
        return source
    path = _resolve(value, folder)
    beside = source_value is not None and (folder / source_value).exists()
    in_working_directory = source is not None and source.exists() and not beside
    if path.exists() or in_working_directory:
        return path
    return (folder / value).resolve()


def _check_resolution(label: str, kind: Kind, values: Mapping[str, Any], report: Report) -> None:
    if kind == "audio":  # only names its cache files
        return
    width, height = values["resolution"]
    found = f"got {show([width, height])}"
    step = SPATIAL_STRIDE * values["reference_downscale"]
    because = f" (32 x reference_downscale {values['reference_downscale']})" if step > SPATIAL_STRIDE else ""
    if min(width, height) < step:
        report.problems.append(f"{label}.resolution: expected at least {step} per side{because}, {found}")
    elif values["enable_bucket"]:
        if math.isqrt(width * height) < 2 * step:  # below it buckets of width 0 appear
            report.problems.append(
                f"{label}.resolution: expected an area of at least {2 * step}x{2 * step} with enable_bucket"
                f"{because}, {found}"
            )
    elif width % step or height % step:
        near = [max(floor_to(side + step // 2, step), step) for side in (width, height)]
        report.problems.append(
            f"{label}.resolution: expected multiples of {step}{because} without enable_bucket, {found}; "
            f"nearest: {show(near)}"
        )


def _settle_extraction(label: str, values: dict[str, Any], report: Report) -> None:
    """Clip lengths that the VAE can encode, and modes that make sense with them."""
    wanted = values["target_frames"]
    usable = tuple(sorted({floor_frames(frames) for frames in wanted}))
    changed = {frames: floor_frames(frames) for frames in wanted if floor_frames(frames) != frames}
    if changed and values["frame_extraction"] != "full":
        pairs = ", ".join(f"{old} -> {new}" for old, new in changed.items())
        report.warnings.append(f"{label}.target_frames: lengths must be 8k + 1, rounded down: {pairs}")
    values["target_frames"] = usable
    if values["frame_extraction"] == "chunk" and 1 in usable:
        message = f"{label}.target_frames: with frame_extraction chunk, 1 makes an item of every single frame"
        if len(usable) > 1:
            report.problems.append(f"{message}; remove it")
        else:
            report.warnings.append(message)
    if values["frame_extraction"] == "uniform" and values["frame_sample"] == 1:
        report.warnings.append(f"{label}.frame_sample: uniform extraction of 1 clip is the same as head")
        values["frame_extraction"] = "head"


# --- across entries -----------------------------------------------------------------------------------------


def _list_problems(entry: DatasetEntry, report: Report) -> Iterator[str]:
    if entry.source is None:
        return
    name = entry.source_key
    try:
        listing = read_media_list(entry.source, entry.kind, entry.caption_field)
    except ConfigErrors as error:
        yield from (f"{name}: {problem}" for problem in error.problems)
        return
    except UserError as error:
        yield f"{name}: {error}"
        return
    if not listing.media:
        yield f"{name}: {entry.source} lists nothing"
    yield from listed_reference_problems(entry, listing.media)
    if listing.ignored:
        report.warnings.append(f"{entry.label}.{name}: keys without effect: {', '.join(listing.ignored)}")


def _source_problems(entry: DatasetEntry) -> Iterator[str]:
    if entry.source is None:
        return
    name = entry.source_key
    if not entry.source.is_dir():
        what = "is not a directory" if entry.source.exists() else "does not exist"
        yield f"{name}: {entry.source} {what}"
        return
    files = scan_directory(entry.source, entry.kind)
    if not files:
        present = {media_kind(path) for path in entry.source.iterdir() if path.is_file()}
        others = [f"{kind} files: use {kind}_directory" for kind in ("video", "image", "audio") if kind in present]
        hint = f" (it holds {'; '.join(others)})" if others else ""
        yield f"{name}: {entry.source} holds no {entry.kind} file{hint}"
    for first, second in duplicate_stems(files):
        yield f"{name}: {first.name} and {second.name} would share a cache file; rename one"
