"""What made a cache file, and whether it is still what would be made now.

Every cache carries a ``cache_key``, a hash of all that determines its content, beside the parts that a person
or the training script wants to compare on their own. Files of other programs have none of this; they are
accepted where their shapes fit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import stat
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

from musubi_tuner.common.av import AV, Modality
from musubi_tuner.common.errors import ConfigErrors
from musubi_tuner.config.model import Mode

from .cache import legacy_slice
from .files import scan_directory
from .items import MODALITIES, CachedItem, CacheProblem, EncoderRecord, Repair, TrainingSet

logger = logging.getLogger(__name__)

NAMES_SHOWN = 5

# Settings that are also metadata entries of their own.
_PUBLIC = ("target_fps", "bucket", "start_frame", "reference_frames", "reference_downscale")


# --- provenance ---------------------------------------------------------------------------------------------


def cache_key(parts: Mapping[str, object]) -> str:
    """SHA-256 over named values, independent of their order."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def source_stamp(*paths: Path) -> dict[str, str]:
    """Size and modification time of a file, or of several (all images of a directory) with their order."""
    if len(paths) == 1 and not stat.S_ISDIR((only := paths[0].stat()).st_mode):  # thousands of times at every start
        return {"source_size": str(only.st_size), "source_mtime_ns": str(only.st_mtime_ns)}
    files = [file for path in paths for file in (scan_directory(path, "image") if path.is_dir() else [path])]
    stats = [file.stat() for file in files]
    stamp = {
        "source_size": str(sum(s.st_size for s in stats)),
        "source_mtime_ns": str(max((s.st_mtime_ns for s in stats), default=0)),
    }
    # Renamed or exchanged files keep the sum and the latest date.
    frames = [[f.name, s.st_size, s.st_mtime_ns] for f, s in zip(files, stats, strict=True)]
    return stamp | {"source_frames": cache_key({"frames": frames})}


def provenance(
    source: Path | Sequence[Path],
    encoder: EncoderRecord | None,
    settings: Mapping[str, object],
    *,
    content_in_settings: bool = False,
) -> dict[str, str]:
    """Metadata of a cache file.

    Args:
        source: the file (or directory of images) that is encoded, or several that are encoded together.
        encoder: what encodes it; ``None`` = nothing does (a placeholder).
        settings: everything else that determines the content, JSON values.
        content_in_settings: ``settings`` hold the content itself (a caption), so a new date of the source does
            not matter.
    """
    sources = [source] if isinstance(source, Path) else source
    stamp = source_stamp(*sources)
    identity = {"encoder_id": encoder.id if encoder else "", **({} if content_in_settings else stamp)}
    if encoder and encoder.replaces:
        identity["encoder_replaces"] = encoder.replaces
    own = {name: str(settings[name]) for name in _PUBLIC if settings.get(name) is not None}
    return {
        **stamp,
        **identity,
        **own,
        "source_name": ", ".join(path.name for path in sources),
        "settings": json.dumps(settings, sort_keys=True, ensure_ascii=False, default=str),
        "cache_key": cache_key({**identity, "settings": settings}),
    }


def stale_reason(cached: Mapping[str, str], current: Mapping[str, str]) -> str | None:
    """Why a cache with metadata ``cached`` is not what ``current`` would make; ``None`` if it is.

    A cache without a key is not judged here.
    """
    if "cache_key" not in cached or cached["cache_key"] == current["cache_key"]:
        return None
    if any(cached.get(name) != current.get(name) for name in ("encoder_id", "encoder_replaces")):
        return "another checkpoint"
    old, new = cached_settings(cached), cached_settings(current)
    changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return f"changed: {', '.join(changed)}" if changed else "the source file changed"


def encoder_record(metadata: Mapping[str, str]) -> EncoderRecord | None:
    """The encoder that :func:`provenance` wrote, if any."""
    made_by = metadata.get("encoder_id")
    return EncoderRecord(made_by, metadata.get("encoder_replaces")) if made_by else None


def cached_settings(metadata: Mapping[str, str]) -> Mapping[str, object]:
    """The settings that :func:`provenance` wrote; empty for files of other programs."""
    return _parse_settings(metadata.get("settings", "{}"))


@lru_cache(maxsize=1024)
def _parse_settings(text: str) -> Mapping[str, object]:
    try:
        settings = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return settings if isinstance(settings, dict) else {}


# --- the training side --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncoderIds:
    """Fingerprints of the checkpoint's encoders; ``None`` = it has none, so caches cannot be compared."""

    video_vae: str | None = None
    audio_vae: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class RepairCommands:
    """How a user makes the caches of a run again."""

    dataset_config: Path | None  # None: not known, of a manifest that does not say what it was made from
    ltx2_checkpoint: Path
    mode: str
    gemma: tuple[str, ...] = field(default_factory=tuple)  # ("--gemma_root", "/models/gemma")
    latents: tuple[str, ...] = field(default_factory=tuple)  # flags that latents depend on, as this run has them
    manifest: Path | None = None  # that has to be saved anew as well

    def __getitem__(self, repair: Repair) -> str:
        text = repair != "latents"
        parts = [
            *("python", "ltx2_cache_text_encoder_outputs.py" if text else "ltx2_cache_latents.py"),
            *("--dataset_config", self.dataset_config or "<dataset configuration>"),
            *("--ltx2_checkpoint", self.ltx2_checkpoint),
            *("--ltx2_mode", self.mode),
            *((self.gemma or ("--gemma_root", "<folder>")) if text else self.latents),
            *(() if repair == "text anew" else ("--skip_existing",)),
            *(("--save_dataset_manifest", self.manifest) if self.manifest else ()),
        ]
        return " ".join(f'"{part}"' if " " in str(part) else str(part) for part in parts)


def check_caches(
    training_set: TrainingSet,
    *,
    encoders: EncoderIds,
    commands: RepairCommands,
    text_widths: AV[int] | None = None,
) -> None:
    """Refuse caches that another checkpoint, mode or configuration made.

    Args:
        training_set: from :func:`musubi_tuner.dataset.discovery.discover`.
        encoders: fingerprints of the checkpoint that is trained.
        commands: named in the messages.
        text_widths: widths of the embeddings that the checkpoint's transformer reads.

    Raises:
        ConfigErrors: one line for each cause, with the number of caches, some names and the repairing command.
    """
    items, mode = list(training_set.items()), training_set.mode
    problems = [*training_set.problems]
    for made in _made_in(mode):
        problems += _encoder_problems(items, made, getattr(encoders, made.encoder))
    if text_widths is not None:
        reported = {problem.name for problem in problems if problem.repair == "text"}
        for item in items:
            if item.base not in reported:
                problems += _width_problems(item, text_widths, mode)
    if problems:
        raise ConfigErrors(
            [_describe(group, commands) for group in _by_cause(problems)],
            "the caches do not fit this run",
        )
    _warn_unchecked(training_set, encoders)


def _by_cause(problems: Iterable[CacheProblem]) -> list[list[CacheProblem]]:
    groups: dict[tuple[str, Repair], list[CacheProblem]] = defaultdict(list)
    for problem in problems:
        groups[problem.cause, problem.repair].append(problem)
    return list(groups.values())


def _describe(group: list[CacheProblem], commands: RepairCommands) -> str:
    names = list(dict.fromkeys(problem.name for problem in group))
    return f"{short_list(names)}: {group[0].cause}; run: {commands[group[0].repair]}"


def short_list(names: list[str], shown: int = NAMES_SHOWN) -> str:
    """``a, b, c and 17 more (20 in all)``"""
    if len(names) <= shown:
        return ", ".join(names)
    return f"{', '.join(names[:shown])} and {len(names) - shown} more ({len(names)} in all)"


@dataclass(frozen=True)
class _Made:
    """One kind of cache content."""

    encoder: str  # field of EncoderIds
    what: str
    flag: str  # that names another file with the encoder
    repair: Repair
    record: str  # field of MadeBy


_MADE: Mapping[Modality | Literal["text"], _Made] = {
    "video": _Made("video_vae", "video latents", "--vae", "latents", "video_vae"),
    "audio": _Made("audio_vae", "audio latents", "--ltx2_checkpoint", "latents", "audio_vae"),
    "text": _Made("text", "text embeddings", "--ltx2_text_encoder_checkpoint", "text", "text"),
}
_MADE_REFERENCES: Mapping[Modality, _Made] = {
    "video": _Made("video_vae", "references", "--vae", "latents", "reference_video"),
    "audio": _Made("audio_vae", "reference sounds", "--ltx2_checkpoint", "latents", "reference_audio"),
}


def _made_in(mode: Mode) -> list[_Made]:
    # Mode audio keeps a placeholder instead of video latents, which no encoder made.
    modalities = MODALITIES[mode]
    return [*(_MADE[m] for m in modalities), *(_MADE_REFERENCES[m] for m in modalities), _MADE["text"]]


def _encoder_problems(items: Iterable[CachedItem], made: _Made, own: str | None) -> list[CacheProblem]:
    """Caches of another checkpoint than that with the encoder ``own`` or, if there are none, from a mixture."""
    wrong, by_encoder = [], defaultdict(list)
    for item in items:
        record: EncoderRecord | None = getattr(item.made_by, made.record)
        if record is None:
            continue
        by_encoder[record.id].append(item.base)
        if own is not None and not record.belongs_to(own):
            wrong.append(item.base)
    cause = f"{made.what} were made with another checkpoint"
    if not wrong and len(by_encoder) > 1:
        wrong = min(by_encoder.values(), key=len)
        cause = f"{made.what} were made with another encoder than the rest; use the same {made.flag} for all"
    return [CacheProblem(cause, base, made.repair) for base in wrong]


def _width_problems(item: CachedItem, expected: AV[int], mode: str) -> list[CacheProblem]:
    """At most one: text embeddings of other widths than the transformer reads."""
    needed = [(modality, width) for modality, width in expected.items() if mode in ("av", modality)]
    if item.legacy_text_width is not None and not item.text_widths:
        if all(legacy_slice(item.legacy_text_width, modality, expected) is not None for modality, _ in needed):
            return []
        found = str(item.legacy_text_width)
    else:
        # A part that is missing altogether is discovery's to report.
        if all(item.text_widths[modality] in (width, None) for modality, width in needed):
            return []
        found = " and ".join(f"{item.text_widths[modality]} ({modality})" for modality, _ in needed)
    wanted = " and ".join(f"{width} ({modality})" for modality, width in needed)
    cause = f"text embeddings have the width {found}, this checkpoint needs {wanted}"
    return [CacheProblem(cause, item.base, "text anew")]


def _warn_unchecked(training_set: TrainingSet, encoders: EncoderIds) -> None:
    foreign = [item.base for item in training_set.items() if not item.made_by.recorded]
    if foreign:
        logger.warning(
            "%s: caches without a record of the checkpoint that made them; their shapes fit, so they are used",
            short_list(foreign),
        )
    used = list(dict.fromkeys(made.encoder for made in _made_in(training_set.mode)))
    unknown = [name.replace("_", " ") for name in used if getattr(encoders, name) is None]
    if unknown:
        logger.warning(
            "the checkpoint holds no %s encoder, so it is not checked which checkpoint made the caches",
            ", ".join(unknown),
        )
