"""Which files an item's latents go to, and what determines their content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from musubi_tuner.common.dtypes import dtype_name
from musubi_tuner.config.model import Mode
from musubi_tuner.dataset.buckets import (
    AUDIO_RATE,
    SPATIAL_STRIDE,
    Size,
    audio_latent_length,
    floor_frames,
    latent_frames,
    latent_grid,
)
from musubi_tuner.dataset.cache import (
    EXTRACTION_KEY,
    PREPARATION,
    PREPARATION_KEY,
    CacheName,
    Grid,
    read_audio_header,
    read_latent_header,
    read_virtual_grid,
)
from musubi_tuner.dataset.clip_sound import AudioSource
from musubi_tuner.dataset.clips import base_name
from musubi_tuner.dataset.entries import DatasetEntry
from musubi_tuner.dataset.fingerprint import provenance
from musubi_tuner.dataset.frames import ClipWindow
from musubi_tuner.dataset.items import EncoderRecord
from musubi_tuner.dataset.sources import SourceItem

from .pipeline import Output

_AUDIO_STEPS_TOLERANCE = 2  # of foreign caches, whose sound was cut by other rules


@dataclass(frozen=True)
class VirtualGeometry:
    """The video that stands for a sound in mode audio; it decides the timestep shift."""

    fps: float = 25.0
    sequence_resolution: int = 64  # fixed side in pixels; 0 = target_resolution
    target_resolution: int | None = None  # side in pixels; None = the dataset's resolution

    def grid(self, seconds: float, resolution: Size) -> Grid:
        """Latent (F, H, W) for a sound of ``seconds``."""
        frames = latent_frames(floor_frames(max(round(seconds * self.fps), 1)))
        width, height = self._size(resolution)
        return frames, max(height // SPATIAL_STRIDE, 1), max(width // SPATIAL_STRIDE, 1)

    def _size(self, resolution: Size) -> Size:
        side = self.sequence_resolution or self.target_resolution
        return (side, side) if side else resolution


@dataclass(frozen=True)
class LatentRecipe:
    """What determines the latents of a run beside the sources.

    Tiles of the VAE are left out: they approximate the same latents, and who turns them on for the few clips
    that do not fit into memory wants to keep the rest.
    """

    mode: Mode
    video_vae: EncoderRecord | None
    audio_vae: EncoderRecord | None
    video_dtype: torch.dtype = torch.bfloat16  # in mode audio: of the placeholder
    audio_dtype: torch.dtype = torch.float16
    audio_source: AudioSource = AudioSource()
    virtual: VirtualGeometry = VirtualGeometry()
    placeholder_channels: int = 128
    reference_audio_seconds: float | None = None  # longest sound of a reference; None = any


@dataclass(frozen=True)
class Target:
    """One clip, image or sound by the name of its latents."""

    name: CacheName
    item: SourceItem
    bucket: Size  # (width, height)
    window: ClipWindow | None  # None: a sound without picture
    original_size: Size | None


@dataclass(frozen=True)
class ClipOutputs:
    """The cache files of one clip; ``audio`` is ``None`` where no sound is asked for."""

    target: Target
    latents: Output
    audio: Output | None = field(default=None)


def clip_outputs(
    recipe: LatentRecipe,
    entry: DatasetEntry,
    item: SourceItem,
    *,
    bucket: Size,
    window: ClipWindow | None,
    original_size: Size | None,
) -> ClipOutputs:
    """Files and metadata for one clip, image or sound. The source is asked for its size and date."""
    size = original_size if item.kind == "image" and original_size else bucket
    name = CacheName(base_name(item, window), "latents", size)
    target = Target(name, item, bucket, window, original_size)
    if item.kind == "audio":
        return _sound_outputs(recipe, entry, target)

    video = _clip_settings(entry, item, bucket, window) | {"dtype": dtype_name(recipe.video_dtype)}
    frames = window.count if window else 1
    latents = Output(
        entry.cache_directory / str(name),
        provenance(item.path, recipe.video_vae, video)
        | {PREPARATION_KEY: PREPARATION}
        | ({EXTRACTION_KEY: entry.extraction.record} if item.kind == "video" else {}),
        fits=lambda path: read_latent_header(path).grid == latent_grid(frames, bucket),
    )
    if recipe.mode != "av" or item.kind == "image":
        return ClipOutputs(target, latents)
    sound = _clip_sound(recipe, entry, item, name.sibling("audio"), bucket=bucket, window=window)
    return ClipOutputs(target, latents, sound)


def _clip_settings(
    entry: DatasetEntry, item: SourceItem, bucket: Size, window: ClipWindow | None
) -> Mapping[str, object]:
    settings: dict[str, object] = {"bucket": f"{bucket[0]}x{bucket[1]}"}
    if item.kind == "video" and window is not None:
        settings |= {
            "target_fps": entry.target_fps,
            "source_fps": entry.source_fps,
            "start_frame": window.start,
            "frames": window.count,
        }
    return settings


def _clip_sound(
    recipe: LatentRecipe,
    entry: DatasetEntry,
    item: SourceItem,
    name: CacheName,
    *,
    bucket: Size,
    window: ClipWindow | None,
) -> Output | None:
    source = recipe.audio_source.locate(item)
    if not source.is_file():
        return None
    clip = dict(_clip_settings(entry, item, bucket, window))
    clip.pop("bucket")  # the picture's size does not change the sound
    settings = clip | {"audio_source": recipe.audio_source.kind_for(item), "dtype": dtype_name(recipe.audio_dtype)}
    steps = audio_latent_length(int((window.count if window else 1) / entry.target_fps * AUDIO_RATE))
    return Output(
        entry.cache_directory / str(name),
        provenance(source, recipe.audio_vae, settings) | {"bucket": f"{bucket[0]}x{bucket[1]}"},
        fits=lambda path: abs(read_audio_header(path).steps - steps) <= _AUDIO_STEPS_TOLERANCE,
    )


def _sound_outputs(recipe: LatentRecipe, entry: DatasetEntry, target: Target) -> ClipOutputs:
    item, name = target.item, target.name
    virtual = recipe.virtual
    geometry: dict[str, object] = {"virtual_fps": virtual.fps, "sequence_resolution": virtual.sequence_resolution}
    if not virtual.sequence_resolution:
        geometry["virtual_size"] = virtual.target_resolution or list(entry.resolution)
    placeholder = geometry | {"channels": recipe.placeholder_channels, "dtype": dtype_name(recipe.video_dtype)}
    return ClipOutputs(
        target,
        Output(
            entry.cache_directory / str(name),
            provenance(item.path, None, placeholder),
            fits=lambda path: read_virtual_grid(path) is not None,
        ),
        Output(
            entry.cache_directory / str(name.sibling("audio")),
            provenance(item.path, recipe.audio_vae, {"dtype": dtype_name(recipe.audio_dtype)}),
            fits=lambda path: read_audio_header(path).channels > 0,
        ),
    )
