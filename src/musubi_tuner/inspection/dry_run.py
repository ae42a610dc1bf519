"""``ltx2_cache_latents.py --dry_run``: what caching would write and how long it would take."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from musubi_tuner.caching.pipeline import Failed, default_workers, read_ahead
from musubi_tuner.caching.run import read_datasets, set_memory_options
from musubi_tuner.common.devices import choose_device
from musubi_tuner.common.dtypes import parse_dtype
from musubi_tuner.common.log import quiet
from musubi_tuner.common.progress import progress
from musubi_tuner.common.tables import count_text, format_bytes, format_table
from musubi_tuner.config.caching import CacheLatentsConfig
from musubi_tuner.config.model import Mode
from musubi_tuner.dataset.buckets import AUDIO_RATE, audio_latent_length, latent_grid
from musubi_tuner.dataset.cache import CacheName, list_caches
from musubi_tuner.dataset.clip_sound import AudioSource
from musubi_tuner.dataset.clips import PreparedClip, base_name, iter_clips, require_files
from musubi_tuner.dataset.entries import DatasetConfig, DatasetEntry
from musubi_tuner.dataset.frames import ClipWindow
from musubi_tuner.dataset.media import MediaError
from musubi_tuner.dataset.plan import ItemPlan, plan_item
from musubi_tuner.dataset.references import reference_shape
from musubi_tuner.dataset.sources import SourceItem, list_items, summarize_problems
from musubi_tuner.models.checkpoint import Checkpoint

from .companions import log_companions
from .examine import unreadable
from .report import time_text

logger = logging.getLogger(__name__)

_HEADER_BYTES = 700  # of a cache file, with its metadata; about
_CHANNELS, _AUDIO_VALUES = 128, 8 * 16  # of a latent cell, of an audio step
_TIMED_ITEMS, _TIMED_SECONDS = 8, 5.0  # of each dataset, for the estimate of decoding


@dataclass(frozen=True)
class Estimate:
    """One dataset."""

    entry: DatasetEntry
    files: int
    failed: int  # by their headers, or without a caption
    missing: int  # references and masks
    clips: int
    cached: int  # clips whose latents have a file of the right name
    megapixels: float  # of all clips
    latent_bytes: int
    audio_bytes: int
    reference_bytes: int
    decode_seconds: float  # of one worker


def run_dry_run(config: CacheLatentsConfig) -> int:
    """Read headers, time a few items, log the tables; nothing is written. The exit status: 1 if a file fails.

    Raises:
        UserError: the dataset configuration is wrong.
    """
    datasets, mode = read_datasets(
        config.dataset, config.checkpoint.ltx2_mode, defaults=config.references.dataset_defaults
    )
    workers = config.dataset.num_workers or default_workers()
    rate = config.without.encode_rate
    with quiet("musubi_tuner.dataset.rates", "musubi_tuner.dataset.clip_sound"):
        estimates = [_estimate(e, config, mode, workers) for e in datasets.entries() if e.source is not None]
        logger.info("%s", _table(estimates))
        logger.info(
            "judged by the headers of the files: damage inside them shows only when they are decoded, which "
            "ltx2_inspect_dataset.py does"
        )
        if rate is None and config.checkpoint.ltx2_checkpoint is not None and mode != "audio":
            rate = _timed_rate(config, datasets)
    _log_time(estimates, rate, workers)
    failed = sum(estimate.failed + estimate.missing for estimate in estimates)
    return 0 if config.dataset.allow_failed else int(failed > 0)


# --- one dataset --------------------------------------------------------------------------------------------


def _estimate(entry: DatasetEntry, config: CacheLatentsConfig, mode: Mode, workers: int) -> Estimate:
    listing = list_items(entry)
    if listing.problems:
        logger.warning("%s: %s", entry.label, summarize_problems(listing.problems))
    plans, failed = _plans(entry, listing.items, _audio_source(config), with_audio=mode == "av", workers=workers)
    clips = [(plan, window) for plan in plans for window in _windows(plan)]
    existing = list_caches(entry.cache_directory)
    item_bytes = parse_dtype(config.encoding.vae_dtype).itemsize
    audio_item_bytes = parse_dtype(config.audio.ltx2_audio_dtype).itemsize
    return Estimate(
        entry,
        files=len(listing.items) + len(listing.problems),
        failed=failed + len(listing.problems),
        missing=log_companions(entry, mode, listing.items),
        clips=len(clips),
        cached=sum(_cache_name(plan, window) in existing for plan, window in clips),
        megapixels=sum(_megapixels(plan, window) for plan, window in clips),
        latent_bytes=sum(_HEADER_BYTES + _latent_values(plan, window) * item_bytes for plan, window in clips),
        audio_bytes=sum(
            _HEADER_BYTES + _audio_latent_steps(plan, window, entry.target_fps) * _AUDIO_VALUES * audio_item_bytes
            for plan, window in clips
            if plan.has_audio and mode != "video"
        ),
        reference_bytes=sum(_reference_bytes(plan, entry, item_bytes) for plan, _ in clips) if mode != "audio" else 0,
        decode_seconds=_decode_seconds(entry, [plan.item for plan in plans], mode, _audio_source(config)),
    )


def _audio_source(config: CacheLatentsConfig) -> AudioSource:
    audio = config.audio
    return AudioSource(audio.ltx2_audio_source, audio.ltx2_audio_dir, audio.ltx2_audio_ext)


def _plans(
    entry: DatasetEntry, items: Sequence[SourceItem], source: AudioSource, *, with_audio: bool, workers: int
) -> tuple[list[ItemPlan], int]:
    """From headers, and the number of files that have no readable one."""

    def work(item: SourceItem) -> Iterator[ItemPlan]:
        require_files(item, with_audio=with_audio)
        yield plan_item(item, entry, source)

    plans, failed = [], 0
    streams = read_ahead(items, work, workers=workers, describe=lambda item: str(item.path))
    with progress(total=len(items), desc=f"{entry.label}: headers", unit="file") as bar:
        for item, results in streams:
            for result in results:
                if isinstance(result, Failed):
                    failed += 1
                    logger.error("%s: %s", item.path.name, unreadable(item, result.error).text)
                else:
                    plans.append(result)
            bar.update()
    return plans, failed


def _windows(plan: ItemPlan) -> Sequence[ClipWindow | None]:
    return (None,) if plan.item.kind == "audio" else plan.windows


def _cache_name(plan: ItemPlan, window: ClipWindow | None) -> CacheName:
    size = plan.size if plan.item.kind == "image" else plan.bucket
    return CacheName(base_name(plan.item, window), "latents", size)


def _megapixels(plan: ItemPlan, window: ClipWindow | None) -> float:
    return plan.bucket[0] * plan.bucket[1] * window.count / 1e6 if window else 0.0


def _latent_values(plan: ItemPlan, window: ClipWindow | None) -> int:
    if window is None:  # the placeholder of a sound
        return _CHANNELS
    frames, height, width = latent_grid(window.count, plan.bucket)
    return _CHANNELS * frames * height * width


def _reference_bytes(plan: ItemPlan, entry: DatasetEntry, item_bytes: int) -> int:
    """Of one clip; control images, of which there may be several, count as one."""
    if entry.reference_cache_directory is None:
        return 0
    frames, size = reference_shape(entry, (), plan.bucket)
    return _HEADER_BYTES + _CHANNELS * math.prod(latent_grid(frames, size)) * item_bytes


def _audio_latent_steps(plan: ItemPlan, window: ClipWindow | None, fps: float) -> int:
    seconds = window.count / fps if window else plan.duration or 0.0
    return audio_latent_length(round(seconds * AUDIO_RATE))


def _decode_seconds(entry: DatasetEntry, items: Sequence[SourceItem], mode: Mode, source: AudioSource) -> float:
    """Of all items with one worker, by the pace of some that are spread over the dataset."""
    step = max(len(items) // _TIMED_ITEMS, 1)
    begin, done = time.perf_counter(), 0
    for item in islice(items, 0, None, step):
        try:
            for _ in iter_clips(item, entry, with_audio=mode == "av", audio_source=source):
                pass
        except MediaError as error:
            logger.error("%s: %s", item.path.name, unreadable(item, error).text)
        done += 1
        if time.perf_counter() - begin > _TIMED_SECONDS:
            break
    return (time.perf_counter() - begin) * len(items) / done if done else 0.0


# --- the encoder --------------------------------------------------------------------------------------------


def _timed_rate(config: CacheLatentsConfig, datasets: DatasetConfig) -> float | None:
    """Megapixels a second of the video VAE on the first clip that can be decoded."""
    from musubi_tuner.models.video_vae import load_video_vae

    clip = next(filter(None, map(_first_clip, datasets.entries())), None)
    if clip is None:
        return None
    path = config.encoding.vae or config.checkpoint.ltx2_checkpoint
    assert path is not None
    assert clip.pixels is not None
    device = choose_device(config.dataset.device)
    vae = load_video_vae(
        Checkpoint.open(path), dtype=parse_dtype(config.encoding.vae_dtype), device=device, decoder=False
    )
    set_memory_options(vae, config)
    pixels = torch.from_numpy(clip.pixels).to(device).permute(3, 0, 1, 2)[None].float().div_(127.5).sub_(1)
    vae.encode(pixels).cpu()  # the first run chooses kernels
    begin = time.perf_counter()
    vae.encode(pixels).cpu()
    return pixels[0, 0].numel() / 1e6 / (time.perf_counter() - begin)


def _first_clip(entry: DatasetEntry) -> PreparedClip | None:
    for item in list_items(entry).items:
        try:
            clip = next(iter_clips(item, entry, with_audio=False), None)
        except MediaError:
            continue
        if clip is not None:
            return clip
    return None


# --- what is said -------------------------------------------------------------------------------------------


def _table(estimates: Sequence[Estimate]) -> str:
    rows = [
        [
            e.entry.label,
            e.entry.kind,
            e.files,
            e.failed,
            e.clips,
            e.cached,
            format_bytes(e.latent_bytes),
            format_bytes(e.audio_bytes),
            format_bytes(e.reference_bytes),
        ]
        for e in estimates
    ]
    headers = ("dataset", "kind", "files", "failed", "clips", "cached before", "latents", "sound", "references")
    total = format_bytes(sum(e.latent_bytes + e.audio_bytes + e.reference_bytes for e in estimates))
    clips = sum(e.clips for e in estimates)
    title = f"dry run: {clips} clips, {total} of latent caches (nothing is written)"
    return format_table(headers, rows, title=title)


def _log_time(estimates: Sequence[Estimate], rate: float | None, workers: int) -> None:
    decode = sum(e.decode_seconds for e in estimates) / workers
    megapixels = sum(e.megapixels for e in estimates)
    logger.info("decoding: about %s with %s (timed on a few files)", time_text(decode), count_text(workers, "worker"))
    if not megapixels:
        return
    if rate is None:
        logger.info(
            "encoding: %.0f megapixels; give --encode_rate, or --ltx2_checkpoint to time one clip, for an estimate",
            megapixels,
        )
        return
    encode = megapixels / rate
    logger.info("encoding: about %s for %.0f megapixels at %.3g a second", time_text(encode), megapixels, rate)
    logger.info("together: about %s, since decoding runs ahead", time_text(max(decode, encode)))
