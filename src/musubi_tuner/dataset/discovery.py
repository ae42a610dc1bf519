"""Which cached items a run has, found from the configuration and the headers of the cache files.

Only items of the configuration, or files of the manifest, count: a cache directory may hold leftovers and files of
other programs.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from musubi_tuner.common.av import AV, Modality
from musubi_tuner.common.errors import ConfigErrors, UserError
from musubi_tuner.common.tables import format_table
from musubi_tuner.config.model import Mode

from .buckets import IMAGE_FPS, audio_bucket_step, bucket_sizes, pixel_frames, pixel_size
from .cache import (
    EXTRACTION_KEY,
    AudioHeader,
    CacheName,
    LatentHeader,
    TextHeader,
    list_caches,
    read_audio_header,
    read_latent_header,
    read_text_header,
    split_clip_base,
)
from .companion_caches import SOUND, Companions, CompanionSearch
from .entries import DatasetConfig, DatasetEntry
from .fingerprint import cached_settings, encoder_record, short_list, source_stamp
from .frames import can_start_at
from .items import MODALITIES, CachedDataset, CachedItem, CacheProblem, MadeBy, Repair, TrainingSet
from .listed_files import ListedFiles
from .sources import list_items

logger = logging.getLogger(__name__)


def discover(
    config: DatasetConfig,
    mode: Mode,
    *,
    validation: bool = False,
    legacy_text_widths: AV[int] | None = None,
    references: Collection[Modality] = (),
) -> TrainingSet:
    """The cached items of the training (or validation) datasets, with a report in the log.

    Caches that must not be used are returned as ``problems``, for
    :func:`musubi_tuner.dataset.fingerprint.check_caches` to report together with those of other checkpoints.

    Args:
        config: the dataset configuration; sources need not exist.
        mode: of the run, as :func:`musubi_tuner.dataset.schema.check_mode` gives it.
        validation: use the validation datasets.
        legacy_text_widths: widths of the video and audio embeddings, to split caches that hold ``text_*`` alone.
        references: modalities that are trained with references, where a dataset has them.

    Raises:
        ConfigErrors: a dataset without any usable item, with the counts of each stage and what to do.
    """
    entries = config.validation if validation else config.datasets
    finds = [CacheSearch(entry, mode, references).run() for entry in entries]
    empty = [find for find in finds if not find.items and not find.problems]
    if empty:
        raise ConfigErrors([_explain_empty(find) for find in empty], f"{config.path}: no cached items")
    for line in _report(finds, mode, "validation" if validation else "training"):
        logger.info(line)
    for find in finds:
        for warning in _warnings(find, mode):
            logger.warning("%s: %s", find.entry.label, warning)
    return TrainingSet(
        mode,
        tuple(_dataset(index, find) for index, find in enumerate(finds)),
        legacy_text_widths,
        tuple(problem for find in finds for problem in find.problems),
    )


# --- one dataset --------------------------------------------------------------------------------------------


@dataclass
class _Find:
    """What was found of one dataset, stage by stage; names are base names."""

    entry: DatasetEntry
    sources: int | None = None  # None: the sources are not there, every cache counts
    items: list[CachedItem] = field(default_factory=list)
    problems: list[CacheProblem] = field(default_factory=list)
    latents: int = 0
    texts: int = 0
    strangers: list[str] = field(default_factory=list)  # no item of the dataset has this name
    leftovers: list[str] = field(default_factory=list)  # from other settings, beside a current cache
    uncached: list[str] = field(default_factory=list)  # sources without latents
    textless: list[str] = field(default_factory=list)
    soundless: list[str] = field(default_factory=list)
    cut_otherwise: list[str] = field(default_factory=list)  # sources of which clips may be missing
    incomplete: Mapping[str, list[str]] = field(default_factory=dict)  # without a reference or mask: what, to names
    changed: list[str] = field(default_factory=list)  # since the manifest was saved
    uncaptioned: int = 0


class CacheSearch:
    """Finds the cached items of one dataset."""

    def __init__(self, entry: DatasetEntry, mode: Mode, references: Collection[Modality] = ()) -> None:
        self.entry = entry
        self.mode = mode
        self.found = _Find(entry)
        present = list_caches(entry.cache_directory)
        self.listed = None if entry.files is None else ListedFiles(entry.files)
        self.names = {n: path for n, path in present.items() if self.listed is None or n in self.listed}
        self.strangers = [n for n in present if n not in self.names and n.kind == "latents"]
        self.companions = CompanionSearch(entry, mode, references, self.names)
        self._paths: dict[str, Path] = {}  # of the sources, by stem
        self.captions = self._captions()
        self._texts: dict[Path, TextHeader | None] = {}

    def run(self) -> _Find:
        for stem, name, header in self.current_clips():
            self._add_item(stem, name, header)
        self.found.incomplete = self.companions.missing
        self.found.problems += self.companions.problems
        self._note_missing()
        return self.found

    def current_clips(self) -> Iterator[tuple[str, CacheName, LatentHeader]]:
        """The latents that belong to the dataset, each with the stem of its source; the others are noted."""
        found = self.found
        found.strangers += [name.base for name in self.strangers]
        by_stem: dict[str, list[CacheName]] = defaultdict(list)
        for name in self.names:
            if name.kind == "text":
                found.texts += 1
            if name.kind != "latents":
                continue
            found.latents += 1
            stem = self._stem(name)
            if self.captions is not None and stem not in self.captions:
                found.strangers.append(name.base)
            else:
                by_stem[stem].append(name)
        found.uncached = [stem for stem in self.captions or () if stem not in by_stem]
        for stem, names in by_stem.items():
            for name, header in self._current(names):
                yield stem, name, header

    def _captions(self) -> dict[str, str] | None:
        """Caption by stem, or ``None`` when the sources are not there."""
        if self.entry.source is None or not self.entry.source.exists():
            return None
        listing = list_items(self.entry)
        self.found.sources = len(listing.items) + len(listing.problems)
        self.found.uncaptioned = len(listing.problems)
        self._paths = {item.stem: item.path for item in listing.items}
        return {item.stem: item.caption for item in listing.items}

    def _stem(self, name: CacheName) -> str:
        clip = split_clip_base(name.base) if self.entry.kind == "video" else None
        return clip[0] if clip else name.base

    def _current(self, names: list[CacheName]) -> list[tuple[CacheName, LatentHeader]]:
        """The current clips of one source. Outdated ones matter only if there are no others, or if they are listed."""
        current: list[tuple[CacheName, LatentHeader]] = []
        outdated: list[tuple[str, str]] = []
        for name in names:
            header = self._header(read_latent_header, name, "latents")
            if header is None:
                continue
            cause = latents_mismatch(self.entry, self.mode, name, header)
            if cause is None:
                current.append((name, header))
            else:
                outdated.append((name.base, cause))
        current, older = self._latest(current)
        self.found.leftovers += older
        if self.listed is None and self._cut_otherwise([header for _, header in current]):
            self.found.cut_otherwise.append(self._stem(names[0]))
        if current and self.listed is None:
            self.found.leftovers += [base for base, _ in outdated]
        else:
            self.found.problems += [CacheProblem(cause, base, "latents") for base, cause in outdated]
        return current

    def _latest(
        self, current: list[tuple[CacheName, LatentHeader]]
    ) -> tuple[list[tuple[CacheName, LatentHeader]], list[str]]:
        """One cache of each clip, and the names of those left out.

        Sizes in names change with the source or the resolution, so an older cache may lie beside that of today: it
        shows another picture, or the same one twice. Made from the source as it is now wins, then the last made.
        """
        by_base: dict[str, list[tuple[CacheName, LatentHeader]]] = defaultdict(list)
        for name, header in current:
            by_base[name.base].append((name, header))
        if len(by_base) == len(current):
            return current, []
        kept = {max(same, key=lambda one: self._rank(*one))[0] for same in by_base.values()}
        return [one for one in current if one[0] in kept], [name.base for name, _ in current if name not in kept]

    def _rank(self, name: CacheName, header: LatentHeader) -> tuple[bool, int]:
        source = self._paths.get(self._stem(name))
        try:
            stamp = source_stamp(source) if source else {}
        except OSError:
            stamp = {}
        of_today = all(header.metadata.get(key) == value for key, value in stamp.items())
        return of_today, self.names[name].stat().st_mtime_ns

    def _cut_otherwise(self, clips: list[LatentHeader]) -> bool:
        """Whether all clips of a source were cut under another rule, which may have given fewer."""
        if self.entry.kind != "video" or not clips:
            return False
        rules = {header.metadata.get(EXTRACTION_KEY) for header in clips}
        return None not in rules and self.entry.extraction.record not in rules

    def _add_item(self, stem: str, name: CacheName, latents: LatentHeader) -> None:
        text = self._text(stem, name.base)
        if text is None:
            return
        text_path, text_header = text
        audio_path, audio = self.find_audio(name)
        if audio is None and self.mode == "audio":
            self.found.problems.append(CacheProblem("audio latents are missing", name.base, "latents"))
            return
        companions = self.companions.find(name, latents, audio)
        if companions is None:
            return
        if audio is None:
            self.found.soundless.append(name.base)
        elif _made_from_other_states(latents.metadata, audio.metadata):
            cause = "sound and picture were cached from different states of the source file"
            self.found.problems.append(CacheProblem(cause, name.base, "latents"))
        if self.listed is not None and self.listed.differ(name, latents, audio):
            self.found.changed.append(name.base)
        is_video = self.entry.kind == "video"
        fps = float(latents.metadata.get("target_fps", self.entry.target_fps)) if is_video else IMAGE_FPS
        self.found.items.append(
            CachedItem(
                base=name.base,
                latents=self.names[name],
                text=text_path,
                grid=latents.grid,
                text_tokens=text_header.tokens,
                fps=fps,
                audio=audio_path,
                audio_steps=audio.steps if audio else 0,
                text_widths=text_header.widths,
                legacy_text_width=text_header.legacy_width,
                reference=companions.reference,
                reference_grid=companions.reference_grid,
                reference_audio=companions.reference_audio,
                reference_audio_steps=companions.reference_audio_steps,
                mask=companions.mask,
                mask_parts=companions.mask_parts,
                made_by=_made_by(latents, audio, text_header, companions),
            )
        )

    def _text(self, stem: str, base: str) -> tuple[Path, TextHeader] | None:
        """The text cache of a source; a problem is noted once for each file."""
        name = self.find_text(stem, base)
        if name is None:
            if self.listed is None:
                self.found.textless.append(base)
            return None
        path = self.names[name]
        if path not in self._texts:
            header = self._header(read_text_header, name, "text")
            cause = header and text_mismatch(self.mode, header, (self.captions or {}).get(stem))
            if cause:
                self.found.problems.append(CacheProblem(cause, name.base, "text"))
            self._texts[path] = header
        header = self._texts[path]
        return (path, header) if header is not None else None

    def find_text(self, stem: str, base: str) -> CacheName | None:
        """The name of the text cache of a clip; ``None`` if there is none."""
        options = [CacheName(stem, "text")]
        if base not in (self.captions or {}):  # else it is the text of a source that is named like this clip
            options.append(CacheName(base, "text"))
        return next((name for name in options if name in self.names), None)

    def find_audio(self, name: CacheName) -> tuple[Path, AudioHeader] | tuple[None, None]:
        """The sound of a clip; damaged files are noted."""
        if self.mode == "video":
            return None, None
        options = (name.sibling("audio"), CacheName(name.base, "audio"))
        audio_name = next((n for n in options if n in self.names), None)
        header = self._header(read_audio_header, audio_name, "latents") if audio_name else None
        return (self.names[audio_name], header) if audio_name and header else (None, None)

    def _header(self, read, name: CacheName, repair: Repair):  # type: ignore[no-untyped-def]
        """A header, or ``None`` with the problem noted when the file is damaged."""
        try:
            return read(self.names[name])
        except UserError as error:
            self.found.problems.append(CacheProblem(f"unreadable cache: {error}", name.base, repair))
            return None

    def _note_missing(self) -> None:
        """What a manifest lists and the mode needs is there, or it is a problem."""
        if self.listed is None:
            return
        wanted = {"latents": self.listed.latents, "text": self.listed.texts}
        wanted["mask"] = self.listed.masks
        if self.mode != "video":
            wanted["audio"] = self.listed.sounds
        for kind, names in wanted.items():
            cause = (
                f"{kind} caches that the manifest lists are not in {self.entry.cache_directory}; copy them there, or "
                "cache again"
            )
            repair: Repair = "text" if kind == "text" else "latents"
            self.found.problems += [CacheProblem(cause, str(n), repair) for n in names if n not in self.names]


def _made_from_other_states(latents: Mapping[str, str], audio: Mapping[str, str]) -> bool:
    """Whether one file gave both and changed in between (mode video was cached again, mode av was not)."""
    same_name = "source_name" in latents and latents["source_name"] == audio.get("source_name")
    same_file = same_name and cached_settings(audio).get("audio_source") != "audio_files"
    return same_file and latents.get("source_mtime_ns") != audio.get("source_mtime_ns")


@lru_cache(maxsize=4096)
def _shared(made_by: MadeBy) -> MadeBy:
    """One object for all equal records: thousands of items have the same."""
    return made_by


def _made_by(latents: LatentHeader, audio: AudioHeader | None, text: TextHeader, companions: Companions) -> MadeBy:
    reference, sound = companions.reference_header, companions.reference_audio_header
    headers = [header for header in (latents, audio, text, reference, sound) if header is not None]
    return _shared(
        MadeBy(
            video_vae=encoder_record(latents.metadata),
            audio_vae=encoder_record(audio.metadata) if audio else None,
            text=encoder_record(text.metadata),
            reference_video=encoder_record(reference.metadata) if reference else None,
            reference_audio=encoder_record(sound.metadata) if sound else None,
            recorded=all("cache_key" in header.metadata for header in headers),
        )
    )


# --- what a header must agree with --------------------------------------------------------------------------


def latents_mismatch(entry: DatasetEntry, mode: Mode, name: CacheName, header: LatentHeader) -> str | None:
    """Why latents do not belong to a dataset as it is configured now; ``None`` if they do."""
    if header.has_virtual_grid != (mode == "audio"):
        made = "audio" if header.has_virtual_grid else "video or av"
        return f"latents were made in mode {made}, this run is mode {mode}"
    if mode == "audio":
        return None
    if entry.kind == "image":
        if header.grid[0] != 1:
            return f"latents have {header.grid[0]} frames in an image dataset"
    elif cause := _clip_mismatch(entry, name, header):
        return cause
    return _bucket_mismatch(entry, header)


def _clip_mismatch(entry: DatasetEntry, name: CacheName, header: LatentHeader) -> str | None:
    count = pixel_frames(header.grid)
    if entry.frame_extraction == "full":
        if count > entry.max_frames:
            return f"latents have {count} frames, max_frames is {entry.max_frames}"
    elif count not in entry.target_frames:
        return f"latents have {count} frames, target_frames is {list(entry.target_frames)}"
    clip = split_clip_base(name.base)
    if clip and not can_start_at(entry.extraction, clip[1], count):
        return f"latents start at frame {clip[1]}, where frame_extraction {entry.frame_extraction} takes no clip"
    metadata = header.metadata
    fps = metadata.get("target_fps")
    if fps is not None and float(fps) != entry.target_fps:
        return f"latents were made with target_fps {float(fps):g}, the configuration says {entry.target_fps:g}"
    settings = cached_settings(metadata)
    if "source_fps" in settings and settings["source_fps"] != entry.source_fps:
        return (
            f"latents were made with source_fps {settings['source_fps'] or 'detected'}, "
            f"the configuration says {entry.source_fps or 'detected'}"
        )
    return None


def _bucket_mismatch(entry: DatasetEntry, header: LatentHeader) -> str | None:
    size = pixel_size(header.grid)
    area = entry.resolution[0] * entry.resolution[1]
    # Other programs choose buckets, or the item's own size, without being asked to.
    foreign = "cache_key" not in header.metadata
    if size == entry.resolution:
        return None
    if (entry.bucket_no_upscale or foreign) and size[0] * size[1] <= area:
        return None
    if entry.enable_bucket and size in bucket_sizes(entry.resolution, entry.bucket_step):
        return None
    width, height = entry.resolution
    with_buckets = " with buckets" if entry.enable_bucket else ""
    return f"latents have {size[0]}x{size[1]} pixels, resolution is {width}x{height}{with_buckets}"


def text_mismatch(mode: Mode, header: TextHeader, caption: str | None) -> str | None:
    """Why text embeddings do not belong to an item; ``caption`` is ``None`` where it is not known."""
    missing = [modality for modality in MODALITIES[mode] if header.widths[modality] is None]
    made_in_video = header.metadata.get("ltx2_mode") == "video"
    if missing and (header.legacy_width is None or header.widths or made_in_video):
        return f"text embeddings lack the {' and '.join(missing)} part that mode {mode} needs"
    cached = header.metadata.get("caption1")
    if caption is not None and cached is not None and "cache_key" in header.metadata and cached != caption:
        return "captions changed since they were encoded"
    return None


# --- what is said -------------------------------------------------------------------------------------------


def _dataset(index: int, find: _Find) -> CachedDataset:
    entry = find.entry
    return CachedDataset(
        index=index,
        kind=entry.kind,
        items=tuple(find.items),
        batch_size=entry.batch_size,
        num_repeats=entry.num_repeats,
        separate_audio_buckets=entry.separate_audio_buckets,
        audio_strategy=entry.audio_bucket_strategy,
        audio_step=audio_bucket_step(entry.audio_bucket_interval),
        loss_weights=AV(entry.video_loss_weight, entry.audio_loss_weight),
    )


def _explain_empty(find: _Find) -> str:
    """Counts of each stage, and the first thing to do."""
    entry = find.entry
    sources = "not read" if find.sources is None else str(find.sources)
    counts = (
        f"{entry.label}: sources {sources}, latent caches {find.latents}, text caches {find.texts}, "
        f"both 0 (in {entry.cache_directory})"
    )
    if find.uncaptioned and find.uncaptioned == find.sources:
        return f"{counts}; no source has a caption file *{entry.caption_extension}"
    if entry.files is not None:
        return f"{counts}; the manifest lists no items: cache both latents and text, then save it again"
    if find.latents == 0:
        return f"{counts}; run ltx2_cache_latents.py with this configuration"
    if find.textless:
        return f"{counts}; run ltx2_cache_text_encoder_outputs.py with this configuration"
    if find.incomplete:
        lacks = "; ".join(_incomplete(find))
        return f"{entry.label}: no item is complete: {lacks}; run ltx2_cache_latents.py with this configuration"
    return f"{counts}; the caches ({short_list(find.strangers)}) belong to other sources than {entry.source}"


def _incomplete(find: _Find) -> Iterable[str]:
    for what, names in find.incomplete.items():
        why = " (which a reference needs)" if what == SOUND else ""
        yield f"no cached {what}{why} for {short_list(names, shown=5)}"


def _report(finds: list[_Find], mode: Mode, purpose: str) -> Iterable[str]:
    rows = []
    for find in finds:
        sound = len(find.items) - len(find.soundless)
        row = [find.entry.label, find.entry.kind, "-" if find.sources is None else find.sources, len(find.items)]
        rows.append(row + ([] if mode == "video" else [sound]))
    headers = ["dataset", "kind", "sources", "items", *([] if mode == "video" else ["with sound"])]
    yield format_table(headers, rows, title=f"cached items for {purpose}, mode {mode}")
    total = sum(len(find.items) for find in finds)
    if mode == "av" and total:
        sound = total - sum(len(find.soundless) for find in finds)
        yield f"{sound} of {total} items have sound ({sound / total:.0%})"


def _warnings(find: _Find, mode: Mode) -> Iterable[str]:
    entry = find.entry
    if find.uncached:
        yield f"no cached latents for {short_list(find.uncached)}; left out"
    if find.textless:
        yield f"no cached text for {short_list(find.textless)}; left out (ltx2_cache_text_encoder_outputs.py)"
    yield from (f"{lacks}; left out (ltx2_cache_latents.py)" for lacks in _incomplete(find))
    if find.uncaptioned:
        yield f"{find.uncaptioned} sources without a readable caption; left out"
    if find.strangers:
        owner = "no item of this dataset" if entry.files is None else "no item of the manifest"
        yield f"caches of {owner} are ignored: {short_list(find.strangers)}"
    if find.changed:
        yield f"cached again with other sizes since the manifest was saved: {short_list(find.changed)}"
    if find.leftovers:
        yield f"caches from other settings are ignored: {short_list(find.leftovers)}"
    if find.cut_otherwise:
        yield (
            f"{short_list(find.cut_otherwise)}: cached with other settings of frame_extraction than "
            f"{entry.extraction.record!r}, so clips may be missing; run ltx2_cache_latents.py with --skip_existing"
        )
    if mode == "av" and entry.kind == "video" and find.items and len(find.soundless) == len(find.items):
        yield (
            "no item has cached sound; if the clips have any, run ltx2_cache_latents.py with --ltx2_mode av "
            "--skip_existing"
        )
    if entry.kind == "video" and entry.frame_extraction != "full":
        counts = {clip[2] for item in find.items if (clip := split_clip_base(item.base))}
        absent = [frames for frames in entry.target_frames if counts and frames not in counts]
        if absent:
            yield f"target_frames {absent}: no cached clip has this length"
