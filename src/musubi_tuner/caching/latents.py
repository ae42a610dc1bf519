"""Media files to latent caches.

Threads decode, resize and cut ahead; this thread encodes and writes. A clip's sound is written before its
video latents, so latents that exist are complete even after an interruption. References and masks follow when
a dataset's targets are done (``companions.py``).
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch

from musubi_tuner.common.progress import progress
from musubi_tuner.common.tables import count_text
from musubi_tuner.dataset.buckets import floor_frames
from musubi_tuner.dataset.cache import CacheKind, CacheName, list_caches, split_clip_base, write_audio, write_latents
from musubi_tuner.dataset.clips import PreparedClip, base_name, iter_clips, require_files
from musubi_tuner.dataset.companions import find_companions
from musubi_tuner.dataset.entries import DatasetConfig, DatasetEntry
from musubi_tuner.dataset.frame_store import BlockPool
from musubi_tuner.dataset.frames import ClipWindow
from musubi_tuner.dataset.plan import plan_item
from musubi_tuner.dataset.sources import SourceItem, list_items

from .companions import cache_companions
from .encoders import AudioEncoder, Encoders, VideoEncoder, explained
from .latent_outputs import ClipOutputs, LatentRecipe, Target, clip_outputs
from .pipeline import (
    Failed,
    Output,
    RunOptions,
    StoppedError,
    Summary,
    default_workers,
    outdated,
    read_ahead,
    remove_orphans,
    remove_partial,
    settle_kept,
    stop_if_full,
)

logger = logging.getLogger(__name__)

_MOST_PENDING_BYTES = 1 << 30  # of decoded clips that wait for others of their shape
_KINDS: tuple[CacheKind, ...] = ("latents", "audio", "dino", "mask")  # kept or deleted together


def cache_latents(
    config: DatasetConfig,
    recipe: LatentRecipe,
    *,
    video_vae: VideoEncoder | None,
    audio_vae: AudioEncoder | None,
    options: RunOptions = RunOptions(),  # noqa: B008 (frozen)
) -> Summary:
    """Encode every item of the training and validation datasets.

    A failing item is counted and left out; files of failed items are never half-written.

    Args:
        config: the datasets.
        recipe: what determines the latents.
        video_vae: not needed in mode audio.
        audio_vae: not needed in mode video.
        options: how to run.
    """
    summary = Summary(strict=options.strict)
    encoders = Encoders(recipe, video_vae, audio_vae)
    with suppress(StoppedError):
        for entry in config.entries():
            if entry.source is not None:
                _DatasetRun(entry, encoders, options, summary).run()
    return summary


# --- one dataset --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """A decoded clip and the files it is for; ``None`` = that file is current."""

    clip: PreparedClip
    outputs: ClipOutputs
    latents: Output | None
    audio: Output | None
    reasons: tuple[str | None, ...]  # for each file to be made: why; None = it was current, but all are made again


@dataclass(frozen=True)
class _Current:
    """A clip whose files are all current, so that it was not decoded."""

    outputs: ClipOutputs
    silent: bool = False


class _DatasetRun:
    """Caches one dataset."""

    def __init__(
        self,
        entry: DatasetEntry,
        encoders: Encoders,
        options: RunOptions,
        summary: Summary,
    ) -> None:
        self.entry = entry
        self.recipe = encoders.recipe
        self.encoders = encoders
        self.options = options
        self.summary = summary
        self.targets: dict[CacheName, Target] = {}
        self.lengths: dict[int, int] = defaultdict(int)  # videos by clip length
        self.videos = 0  # read to their end
        self.pool = BlockPool()
        self.groups = _Groups(options.batch_size or entry.batch_size)
        remove_partial(entry.cache_directory, _KINDS)
        # Read once: which caches each source has now.
        self.existing: dict[str, list[CacheName]] = defaultdict(list)
        for name in list_caches(entry.cache_directory):
            if name.kind == "latents":
                clip = split_clip_base(name.base) if entry.kind == "video" else None
                self.existing[clip[0] if clip else name.base].append(name)

    def run(self) -> None:
        entry, label = self.entry, self.entry.label
        listing = list_items(entry)
        self.summary.leave_out(label, entry.kind, listing.problems)
        companions = find_companions(entry, listing.items, self.recipe.mode)
        streams = read_ahead(
            listing.items,
            self._prepare,
            workers=self.options.workers or default_workers(),
            describe=lambda item: str(item.path),
        )
        with progress(total=len(listing.items), desc=f"{label} ({entry.kind})", unit="file") as bar:
            for item, results in streams:
                lengths, failed = set(), False
                for result in results:
                    lengths |= self._take(item, result)
                    failed = failed or isinstance(result, Failed)
                self.videos += item.kind == "video" and not failed
                for length in lengths if not failed else ():
                    self.lengths[length] += 1
                if item.kind == "video" and not (lengths or failed):
                    self.summary.count_short(label, item.path.name)
                bar.update()
            for jobs in self.groups.rest():
                self._encode(jobs)
        self._finish(complete=not listing.problems)
        cache_companions(
            entry,
            companions,
            list(self.targets.values()),
            self.encoders,
            self.options,
            self.summary,
            complete=not listing.problems,
        )

    def _finish(self, *, complete: bool) -> None:
        label = self.entry.label
        for length in self.entry.target_frames if self.entry.frame_extraction != "full" else ():
            short = self.videos - self.lengths[length]
            if short > 0:
                logger.warning(
                    "%s: %d of %s gave no clip of %s",
                    label,
                    short,
                    count_text(self.videos, "video"),
                    count_text(length, "frame"),
                )
        if not self.targets and not self.summary.failed_in(label):
            self.summary.empty.append(label)
            return
        if self.options.keep_cache:
            return
        if self.summary.failed_in(label) or not complete:
            logger.info("%s: no old cache files are deleted, since some items could not be cached", label)
            return
        if removed := remove_orphans(self.entry.cache_directory, self.targets, _KINDS):
            logger.info(
                "%s: deleted %s that the dataset no longer produces", label, count_text(len(removed), "cache file")
            )

    # --- in worker threads

    def _prepare(self, item: SourceItem) -> Iterator[_Job | _Current]:
        if self.options.skip_existing and (current := self._current_clips(item)) is not None:
            yield from current
            return
        recipe = self.recipe
        clips = iter_clips(
            item,
            self.entry,
            with_audio=recipe.mode == "av",
            audio_source=recipe.audio_source,
            pool=self.pool,
        )
        for clip in clips:
            outputs = clip_outputs(
                recipe,
                self.entry,
                item,
                bucket=clip.bucket,
                window=clip.window,
                original_size=clip.original_size,
            )
            yield self._job(clip, outputs)

    def _job(self, clip: PreparedClip, outputs: ClipOutputs) -> _Job:
        wanted = {"latents": outputs.latents, "audio": outputs.audio if clip.waveform is not None else None}
        reasons: list[str | None] = []
        for name, output in wanted.items():
            if output is None:
                continue
            reason = outdated(output)
            if reason is None and self.options.skip_existing:
                wanted[name] = None
            else:
                reasons.append(reason)
        return _Job(clip, outputs, wanted["latents"], wanted["audio"], tuple(reasons))

    def _current_clips(self, item: SourceItem) -> list[_Current] | None:
        """The item's clips if, by its header, all its caches are current; ``None`` if it must be decoded."""
        if item.stem not in self.existing:
            return None
        require_files(item, with_audio=self.recipe.mode == "av")
        plan = plan_item(item, self.entry, self.recipe.audio_source)
        windows: tuple[ClipWindow | None, ...] = (None,) if item.kind == "audio" else plan.windows
        # Headers may count frames wrongly. A cache beyond what they promise, of a length that is wanted, may be
        # a real clip: then only decoding tells.
        names = {base_name(item, window) for window in windows}
        if any(name.base not in names and self._is_wanted(name) for name in self.existing[item.stem]):
            return None
        clips = []
        for window in windows:
            outputs = clip_outputs(
                self.recipe, self.entry, item, bucket=plan.bucket, window=window, original_size=plan.size
            )
            sound = outputs.audio if plan.has_audio else None
            if outdated(outputs.latents) or (sound is not None and outdated(sound)):
                return None
            clips.append(_Current(outputs, silent=item.kind == "video" and not plan.has_audio))
        return clips or None

    def _is_wanted(self, name: CacheName) -> bool:
        clip = split_clip_base(name.base)
        if clip is None:
            return False
        if self.entry.frame_extraction == "full":
            return clip[2] <= floor_frames(self.entry.max_frames)
        return clip[2] in self.entry.target_frames

    # --- in the encoding thread

    def _take(self, item: SourceItem, result: _Job | _Current | Failed) -> set[int]:
        """Count or encode one result; returns the clip length, if any."""
        modality = "audio" if item.kind == "audio" else item.kind
        if isinstance(result, Failed):
            self.summary.fail(self.entry.label, modality, item.path.name, result.error)
            return set()
        target = result.outputs.target
        name = target.name
        self.targets[name] = target
        if isinstance(result, _Current):
            self.summary.of_earlier_version += settle_kept(result.outputs.latents)
            self._count_current(result, item, name.base)
        else:
            self.summary.count_reasons(result.reasons)
            for jobs in self.groups.add(result):
                self._encode(jobs)
        clip = split_clip_base(name.base)
        return {clip[2]} if clip and item.kind == "video" else set()

    def _count_current(self, result: _Current, item: SourceItem, base: str) -> None:
        label = self.entry.label
        if item.kind != "audio":
            self.summary.tally(label, item.kind).current += 1
        if item.kind == "audio" or (self.recipe.mode == "av" and item.kind == "video"):
            tally = self.summary.tally(label, "audio")
            if result.silent:
                tally.no_audio += 1
                self.summary.silent.append(base)
                self._drop_old_sound(result.outputs)
            else:
                tally.current += 1

    def _encode(self, jobs: list[_Job]) -> None:
        """Sound first, then the pictures together; a clip whose sound fails gets no latents."""
        pictures = [job for job in jobs if self._encode_sound(job)]
        if pictures and not self._store_latents(pictures, alone=len(pictures) == 1):
            for job in pictures:  # one of them failed: find out which
                self._store_latents([job], alone=True)

    def _encode_sound(self, job: _Job) -> bool:
        clip, label = job.clip, self.entry.label
        if self.recipe.mode == "video" or clip.item.kind == "image":
            return True
        tally = self.summary.tally(label, "audio")
        if clip.waveform is None:
            tally.no_audio += 1
            self.summary.silent.append(f"{clip.base_name} ({'; '.join(clip.notes) or 'no sound'})")
            self._drop_old_sound(job.outputs)
        elif job.audio is None:
            tally.current += 1
        else:
            try:
                write_audio(job.audio.path, self.encoders.sound(clip.waveform), job.audio.metadata)
            except Exception as error:
                stop_if_full(error, self.entry.cache_directory)
                self.summary.fail(label, "audio", clip.base_name, error)
                return False
            tally.encoded += 1
            if clip.silent_end:
                self.summary.partly_silent.append(f"{clip.base_name} (its last {clip.silent_end:.2f} s)")
        return True

    def _drop_old_sound(self, outputs: ClipOutputs) -> None:
        """A clip that has lost its sound must not be trained with the old one."""
        outputs.latents.path.with_name(str(outputs.target.name.sibling("audio"))).unlink(missing_ok=True)

    def _store_latents(self, jobs: list[_Job], *, alone: bool) -> bool:
        """``False`` if a batch of several failed, of which nothing is then counted."""
        label, kind = self.entry.label, jobs[0].clip.item.kind
        wanted = [(job.clip, job.latents) for job in jobs if job.latents is not None]
        try:
            for job in jobs:
                if job.latents is None:
                    self.summary.of_earlier_version += settle_kept(job.outputs.latents)
            if wanted:
                self._write_latents(wanted)
        except Exception as error:
            stop_if_full(error, self.entry.cache_directory)
            if alone:
                self.summary.fail(label, kind, jobs[0].clip.base_name, explained(error))
            return alone
        if kind != "audio":
            tally = self.summary.tally(label, kind)
            tally.encoded += len(wanted)
            tally.current += len(jobs) - len(wanted)
        return True

    def _write_latents(self, wanted: list[tuple[PreparedClip, Output]]) -> None:
        """Encode clips of one shape together and write each."""
        if wanted[0][0].pixels is None:
            for clip, output in wanted:
                self._write_placeholder(clip, output)
            return
        latents = self.encoders.pictures([clip.pixels for clip, _ in wanted if clip.pixels is not None])
        for (clip, output), latent in zip(wanted, latents, strict=True):
            frames = clip.window.count if clip.item.kind == "video" and clip.window else None
            write_latents(output.path, latent, output.metadata, frame_count=frames)

    def _write_placeholder(self, clip: PreparedClip, output: Output) -> None:
        grid = self.recipe.virtual.grid(clip.duration, self.entry.resolution)
        zeros = torch.zeros(self.recipe.placeholder_channels, 1, 1, 1, dtype=self.recipe.video_dtype)
        write_latents(output.path, zeros, output.metadata, virtual_grid=grid)


class _Groups:
    """Collects jobs of equal shape into batches, holding a bounded amount of decoded pixels."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._groups: dict[tuple[int, ...] | None, list[_Job]] = defaultdict(list)

    def add(self, job: _Job) -> Iterator[list[_Job]]:
        """The batches that are due with this job: a full one, and large ones when too much is waiting."""
        shape = None if job.clip.pixels is None else job.clip.pixels.shape
        self._groups[shape].append(job)
        if len(self._groups[shape]) >= self._batch_size:
            yield self._groups.pop(shape)
        while sum(map(_pending_bytes, self._groups.values())) > _MOST_PENDING_BYTES:
            yield self._groups.pop(max(self._groups, key=lambda shape: _pending_bytes(self._groups[shape])))

    def rest(self) -> Iterator[list[_Job]]:
        while self._groups:
            yield self._groups.popitem()[1]


def _pending_bytes(jobs: list[_Job]) -> int:
    return sum(job.clip.pixels.nbytes for job in jobs if job.clip.pixels is not None)
