"""What the headers of cache files must agree with: the dataset as it is configured now."""

from __future__ import annotations

from musubi_tuner.config.model import Mode

from .buckets import bucket_sizes, pixel_frames, pixel_size
from .cache import CacheName, LatentHeader, TextHeader, split_clip_base
from .entries import DatasetEntry
from .fingerprint import cached_settings
from .frames import can_start_at
from .items import MODALITIES


def latents_mismatch(entry: DatasetEntry, mode: Mode, name: CacheName, header: LatentHeader) -> str | None:
    """Why latents do not belong to a dataset as it is configured now; ``None`` if they do.

    A dataset of caches alone need not repeat what they were made with: its defaults demand nothing.
    """
    if header.has_virtual_grid != (mode == "audio"):
        made = "audio" if header.has_virtual_grid else "video or av"
        return f"latents were made in mode {made}, this run is mode {mode}"
    if mode == "audio":
        return None
    if entry.kind == "image":
        if header.grid[0] != 1:
            return f"latents have {header.grid[0]} frames in an image dataset"
    elif not _is_unsaid(entry, "target_frames") and (cause := _clip_mismatch(entry, name, header)):
        return cause
    return None if _is_unsaid(entry, "resolution") else _bucket_mismatch(entry, header)


def _is_unsaid(entry: DatasetEntry, key: str) -> bool:
    plain = entry.frame_extraction == DatasetEntry.frame_extraction
    return entry.cache_only and plain and getattr(entry, key) == getattr(DatasetEntry, key)


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
