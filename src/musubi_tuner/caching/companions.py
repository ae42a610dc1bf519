"""References and masks of one dataset, made when the latents of its targets are."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musubi_tuner.common.progress import progress
from musubi_tuner.dataset.cache import CacheKind, CacheName
from musubi_tuner.dataset.companions import CompanionListing, Companions, missing_lines
from musubi_tuner.dataset.entries import DatasetEntry
from musubi_tuner.dataset.files import media_kind

from .companion_outputs import Work, companion_work
from .encoders import Encoders, explained
from .latent_outputs import Target
from .pipeline import (
    Failed,
    Output,
    RunOptions,
    Summary,
    default_workers,
    outdated,
    read_ahead,
    remove_orphans,
    remove_partial,
    stop_if_full,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Ready:
    """What is to be encoded and written for one piece of work."""

    content: Any
    due: Sequence[Output]
    reasons: Sequence[str | None]  # of each: why; None = it was current, but all are made again
    current: int  # files that are kept
    produced: Sequence[CacheName]


def cache_companions(
    entry: DatasetEntry,
    companions: CompanionListing,
    targets: Sequence[Target],
    encoders: Encoders,
    options: RunOptions,
    summary: Summary,
    *,
    complete: bool,
) -> None:
    """Cache what accompanies ``targets``; those whose own latents failed get nothing.

    Args:
        complete: the targets are all that the dataset has; else no old file is deleted.
    """
    _remove_partial(entry)
    summary.missing += missing_lines(entry, companions)
    cached = [t for t in targets if (entry.cache_directory / str(t.name)).is_file()]
    _warn_of_other_parts(entry, companions, cached)
    run = _Run(entry, encoders, options, summary)
    run.all(list(companion_work(entry, companions, cached, encoders)))
    if complete and not (companions.missing or options.keep_cache or summary.failed_in(entry.label)):
        run.remove_orphans()


def _warn_of_other_parts(entry: DatasetEntry, companions: CompanionListing, targets: Sequence[Target]) -> None:
    later = [t for t in targets if t.window is not None and t.window.start > 0]
    if any(_is_moving(companions.of(t.item)) for t in later):
        logger.warning(
            "%s: the reference of a clip always begins with its video's first frame, also for the %d clips that begin "
            "later (frame_extraction %s)",
            *(entry.label, len(later), entry.frame_extraction),
        )


def _is_moving(companions: Companions) -> bool:
    return len(companions.references) == 1 and media_kind(companions.references[0]) != "image"


def _directories(entry: DatasetEntry) -> Iterator[tuple[Path, CacheKind]]:
    if entry.reference_cache_directory is not None:
        yield entry.reference_cache_directory, "latents"
    if entry.reference_audio_cache_directory is not None:
        yield entry.reference_audio_cache_directory, "audio"


def _remove_partial(entry: DatasetEntry) -> None:
    for directory, kind in _directories(entry):
        remove_partial(directory, (kind,))


class _Run:
    """Reads ahead in threads, encodes and writes in this one."""

    def __init__(self, entry: DatasetEntry, encoders: Encoders, options: RunOptions, summary: Summary) -> None:
        self.entry = entry
        self.mode = encoders.recipe.mode
        self.options = options
        self.summary = summary
        self.produced: dict[str, set[CacheName]] = {"reference": set(), "reference audio": set(), "mask": set()}

    def all(self, works: Sequence[Work]) -> None:
        if not works:
            return
        workers = self.options.workers or default_workers()
        streams = read_ahead(works, self._prepare, workers=workers, describe=lambda work: work.name)
        with progress(total=len(works), desc=f"{self.entry.label}: references and masks", unit="file") as bar:
            for work, results in streams:
                for result in results:
                    self._take(work, result)
                bar.update()

    def _prepare(self, work: Work) -> Iterator[_Ready]:
        outputs = [output for output in work.outputs() if output is not None]
        reasons = [outdated(output) for output in outputs]
        due = [
            (output, reason)
            for output, reason in zip(outputs, reasons, strict=True)
            if reason is not None or not self.options.skip_existing
        ]
        wanted = [output for output, _ in due]
        yield _Ready(
            work.read(wanted) if wanted else None,
            wanted,
            [reason for _, reason in due],
            len(outputs) - len(due),
            [name for output in outputs if (name := CacheName.parse(output.path.name)) is not None],
        )

    def _take(self, work: Work, result: _Ready | Failed) -> None:
        label = self.entry.label
        if isinstance(result, Failed):
            self.summary.fail(label, work.role, work.name, result.error)
            return
        kind = "mask" if work.role == "audio mask" else work.role
        self.produced[kind].update(result.produced)
        self.summary.count_reasons(result.reasons)
        if result.due:
            try:
                work.store(result.content, result.due)
            except Exception as error:
                stop_if_full(error, result.due[0].path.parent)
                self.summary.fail(label, work.role, work.name, explained(error))
                return
        tally = self.summary.tally(label, work.role)
        tally.encoded += len(result.due)
        tally.current += result.current

    def remove_orphans(self) -> None:
        """Delete references and masks of clips that the dataset no longer has, or no longer has one for.

        What this mode does not make is left alone.
        """
        entry, removed = self.entry, remove_orphans(self.entry.cache_directory, self.produced["mask"], ("mask",))
        if entry.reference_cache_directory is not None and self.mode != "audio":
            removed += remove_orphans(entry.reference_cache_directory, self.produced["reference"], ("latents",))
        if entry.reference_audio_cache_directory is not None and self.mode != "video":
            sounds = self.produced["reference audio"]
            removed += remove_orphans(entry.reference_audio_cache_directory, sounds, ("audio",))
        if removed:
            logger.info("%s: deleted %d references and masks of no clip", entry.label, len(removed))
