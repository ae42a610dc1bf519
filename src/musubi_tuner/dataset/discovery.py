"""Which cached items a run has, found from the configuration and the headers of the cache files.

Only items of the configuration, or files of the manifest, count: a cache directory may hold leftovers and files of
other programs.
"""

from __future__ import annotations

import gc
import logging
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from musubi_tuner.common.av import AV, Modality
from musubi_tuner.common.errors import ConfigErrors, UserError
from musubi_tuner.config.model import Mode

from .buckets import IMAGE_FPS, audio_bucket_step
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
from .companion_caches import Companions, CompanionSearch
from .entries import DatasetConfig, DatasetEntry
from .find import Find, counts_report, explain_empty, remarks
from .fingerprint import cached_settings, encoder_record
from .items import CachedDataset, CachedItem, CacheProblem, MadeBy, Repair, TrainingSet
from .listed_files import ListedFiles
from .mismatch import latents_mismatch, text_mismatch
from .source_changes import SourceChanges
from .sources import SourceItem, list_items

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
    with _no_collections():
        finds = [CacheSearch(entry, mode, references).run() for entry in entries]
    empty = [find for find in finds if not find.items and not find.problems]
    if empty:
        raise ConfigErrors([explain_empty(find) for find in empty], f"{config.path}: no cached items")
    for line in counts_report(finds, mode, "validation" if validation else "training"):
        logger.info(line)
    for find in finds:
        for warning in remarks(find, mode):
            logger.warning("%s: %s", find.entry.label, warning)
    return TrainingSet(
        mode,
        tuple(_dataset(index, find) for index, find in enumerate(finds)),
        legacy_text_widths,
        tuple(problem for find in finds for problem in find.problems),
    )


@contextmanager
def _no_collections() -> Iterator[None]:
    """Nearly all that is made for thousands of files is kept; looking for garbage in it takes a seventh of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# --- one dataset --------------------------------------------------------------------------------------------


class CacheSearch:
    """Finds the cached items of one dataset."""

    def __init__(self, entry: DatasetEntry, mode: Mode, references: Collection[Modality] = ()) -> None:
        self.entry = entry
        self.mode = mode
        self.found = Find(entry)
        present = list_caches(entry.cache_directory)
        self.listed = None if entry.files is None else ListedFiles(entry.files)
        self.names = {n: path for n, path in present.items() if self.listed is None or n in self.listed}
        self.strangers = [n for n in present if n not in self.names and n.kind == "latents"]
        self.changes = SourceChanges()
        self._items: dict[str, SourceItem] = {}  # the sources, by stem
        self.captions = self._captions()
        self.companions = CompanionSearch(
            entry, mode, references, self.names, None if self.captions is None else self._items, self.changes
        )
        self._texts: dict[Path, TextHeader | None] = {}

    def run(self) -> Find:
        for stem, name, header in self.current_clips():
            self._add_item(stem, name, header)
        self.found.incomplete = self.companions.missing
        self.found.problems += self.companions.problems
        self.found.redated = self.changes.redated
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
        self._items = {item.stem: item for item in listing.items}
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
        source = self._items.get(self._stem(name))
        of_today = source is None or self.changes.is_of_today(header.metadata, source.path)
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
        if self.is_of_another_source(stem, latents):
            cause = f"the {self.entry.kind} is another file than when it was cached"
            self.found.problems.append(CacheProblem(cause, name.base, "latents"))
        companions = self.companions.find(stem, name, latents, audio)
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

    def is_of_another_source(self, stem: str, latents: LatentHeader) -> bool:
        """Whether the file named ``stem`` is not the one that ``latents`` were made of, as far as is known."""
        return stem in self._items and self.changes.differs(latents.metadata, self._items[stem].path)

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


def _dataset(index: int, find: Find) -> CachedDataset:
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
