"""Which files the references and masks of a dataset's targets go to, how they are read and encoded.

What several clips share is one :class:`Work`: it is decoded and encoded once and written for each of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from musubi_tuner.common.av import AV
from musubi_tuner.common.dtypes import dtype_name
from musubi_tuner.dataset.buckets import Size, latent_grid
from musubi_tuner.dataset.cache import (
    PREPARATION,
    PREPARATION_KEY,
    read_audio_header,
    read_latent_header,
    read_mask_header,
    write_audio,
    write_latents,
    write_mask,
)
from musubi_tuner.dataset.companions import CompanionListing, Companions, Role
from musubi_tuner.dataset.entries import DatasetEntry
from musubi_tuner.dataset.files import media_kind
from musubi_tuner.dataset.fingerprint import provenance, source_stamp
from musubi_tuner.dataset.masks import read_audio_masks, read_masks
from musubi_tuner.dataset.references import read_reference, read_reference_sound, reference_shape

from .encoders import Encoders
from .latent_outputs import Target
from .pipeline import Output


@dataclass(frozen=True)
class Work:
    """Cache files that are made together."""

    role: Role
    name: str  # of the source, for messages
    targets: tuple[Target, ...]  # whose files these are
    outputs: Callable[[], Sequence[Output | None]]  # of each target; None = it has no such file
    read: Callable[[Sequence[Output]], Any]  # decode what the given outputs need; called in a thread
    store: Callable[[Any, Sequence[Output]], None]  # encode and write


def companion_work(
    entry: DatasetEntry, companions: CompanionListing, targets: Sequence[Target], encoders: Encoders
) -> Iterator[Work]:
    """All there is to make for ``targets``, references first."""
    yield from _reference_work(entry, companions, targets, encoders)
    yield from _sound_work(entry, companions, targets, encoders)
    yield from _mask_work(entry, companions, targets)


# --- references ---------------------------------------------------------------------------------------------


def _reference_work(
    entry: DatasetEntry, companions: CompanionListing, targets: Sequence[Target], encoders: Encoders
) -> Iterator[Work]:
    groups: dict[tuple[tuple[Path, ...], Size], list[Target]] = defaultdict(list)
    for target in targets:
        if references := companions.of(target.item).references:
            groups[references, target.bucket].append(target)
    for (references, bucket), group in groups.items():
        yield _one_reference(entry, references, bucket, group, encoders)


def _one_reference(
    entry: DatasetEntry, references: tuple[Path, ...], bucket: Size, targets: Sequence[Target], encoders: Encoders
) -> Work:
    directory = entry.reference_cache_directory
    assert directory is not None
    frames, size = reference_shape(entry, references, bucket)

    def outputs() -> list[Output]:
        metadata = _reference_metadata(entry, references, bucket, frames, encoders)
        grid = latent_grid(frames, size)
        return [
            Output(directory / str(t.name), metadata, fits=lambda path: read_latent_header(path).grid == grid)
            for t in targets
        ]

    def store(pixels: np.ndarray, due: Sequence[Output]) -> None:
        latents = encoders.pictures([pixels])[0]
        for output in due:
            write_latents(output.path, latents, output.metadata, frame_count=frames)

    return Work(
        "reference",
        references[0].name,
        tuple(targets),
        outputs,
        read=lambda due: read_reference(references, entry, frames=frames, size=size),
        store=store,
    )


def _reference_metadata(
    entry: DatasetEntry, references: Sequence[Path], bucket: Size, frames: int, encoders: Encoders
) -> dict[str, str]:
    settings: dict[str, object] = {
        "bucket": f"{bucket[0]}x{bucket[1]}",
        "reference_frames": frames,
        "reference_downscale": entry.reference_downscale,
        "dtype": dtype_name(encoders.recipe.video_dtype),
    }
    if _is_video(references[0]):
        settings |= {"target_fps": entry.target_fps, "source_fps": entry.source_fps}
    metadata = provenance(references, encoders.recipe.video_vae, settings)
    return {
        **metadata,
        PREPARATION_KEY: PREPARATION,
        "target_fps": str(entry.target_fps),
    }  # an image does not change with it


def _is_video(path: Path) -> bool:
    return path.is_dir() or media_kind(path) != "image"


# --- sound --------------------------------------------------------------------------------------------------


def _sound_work(
    entry: DatasetEntry, companions: CompanionListing, targets: Sequence[Target], encoders: Encoders
) -> Iterator[Work]:
    groups: dict[Path, list[Target]] = defaultdict(list)
    for target in targets:
        if (path := companions.of(target.item).reference_audio) is not None:
            groups[path].append(target)
    for path, group in groups.items():
        yield _one_sound(entry, path, group, encoders)


def _one_sound(entry: DatasetEntry, path: Path, targets: Sequence[Target], encoders: Encoders) -> Work:
    directory, recipe = entry.reference_audio_cache_directory, encoders.recipe
    assert directory is not None

    def outputs() -> list[Output]:
        settings = {"max_seconds": recipe.reference_audio_seconds, "dtype": dtype_name(recipe.audio_dtype)}
        metadata = provenance(path, recipe.audio_vae, settings)
        return [
            Output(
                directory / str(t.name.sibling("audio")),
                metadata,
                fits=lambda path: read_audio_header(path).channels > 0,
            )
            for t in targets
        ]

    def store(waveform: np.ndarray, due: Sequence[Output]) -> None:
        latents = encoders.sound(waveform)
        for output in due:
            write_audio(output.path, latents, output.metadata)

    return Work(
        "reference audio",
        path.name,
        tuple(targets),
        outputs,
        read=lambda due: read_reference_sound(path, recipe.reference_audio_seconds),
        store=store,
    )


# --- masks --------------------------------------------------------------------------------------------------


def _mask_work(entry: DatasetEntry, companions: CompanionListing, targets: Sequence[Target]) -> Iterator[Work]:
    groups: dict[Path, list[Target]] = defaultdict(list)
    for target in targets:
        found = companions.of(target.item)
        if found.mask is not None or found.audio_mask is not None:
            groups[target.item.path].append(target)
    for group in groups.values():
        yield _masks_of_item(entry, companions.of(group[0].item), group)


def _masks_of_item(entry: DatasetEntry, found: Companions, targets: Sequence[Target]) -> Work:
    by_path = {entry.cache_directory / str(t.name.sibling("mask")): t for t in targets}
    sources = [path for path in (found.mask, found.audio_mask) if path is not None]

    def outputs() -> list[Output | None]:
        return [_mask_output(entry, found, path, target) for path, target in by_path.items()]

    def read(due: Sequence[Output]) -> list[AV[torch.Tensor]]:
        return _read_masks(entry, found, [by_path[output.path] for output in due])

    def store(masks: Sequence[AV[torch.Tensor]], due: Sequence[Output]) -> None:
        for mask, output in zip(masks, due, strict=True):
            write_mask(output.path, mask, output.metadata)

    role: Role = "mask" if found.mask is not None else "audio mask"
    return Work(role, sources[0].name, tuple(targets), outputs, read, store)


def _audio_steps(entry: DatasetEntry, found: Companions, target: Target) -> int | None:
    """Latent steps of the target's sound, if that is cached and has a mask."""
    sound = entry.cache_directory / str(target.name.sibling("audio"))
    return read_audio_header(sound).steps if found.audio_mask is not None and sound.is_file() else None


def _mask_output(entry: DatasetEntry, found: Companions, path: Path, target: Target) -> Output | None:
    steps, window = _audio_steps(entry, found, target), target.window
    settings: dict[str, object] = {"target_fps": entry.target_fps, "source_fps": entry.source_fps}
    if window is not None:
        settings |= {"start_frame": window.start, "frames": window.count}
    sources: list[Path] = []
    grid = None
    if found.mask is not None and window is not None:
        sources.append(found.mask)
        settings |= {"bucket": f"{target.bucket[0]}x{target.bucket[1]}", "mask": found.mask.name}
        grid = latent_grid(window.count, target.bucket)
    if found.audio_mask is not None and steps is not None:
        sources.append(found.audio_mask)
        # Where a clip lies on its source's clock depends on the source.
        settings |= {"audio_steps": steps, "audio_mask": found.audio_mask.name, "item": source_stamp(target.item.path)}
    if not sources:
        return None
    return Output(path, provenance(sources, None, settings), fits=lambda path: _mask_shapes(path) == (grid, steps))


def _mask_shapes(path: Path) -> tuple[object, object]:
    header = read_mask_header(path)
    return header.grid, header.audio_steps


def _read_masks(entry: DatasetEntry, found: Companions, targets: Sequence[Target]) -> list[AV[torch.Tensor]]:
    item, bucket, size = targets[0].item, targets[0].bucket, targets[0].original_size
    video: Mapping[Target, np.ndarray] = {}
    audio: Mapping[Target, np.ndarray] = {}
    pictures = [(t, t.window) for t in targets if found.mask is not None and t.window is not None]
    if found.mask is not None and pictures:
        windows = [window for _, window in pictures]
        masks = read_masks(found.mask, item, entry, windows, bucket=bucket, size=size)
        video = {target: mask for (target, _), mask in zip(pictures, masks, strict=True)}
    sounds = [(t, steps) for t in targets if (steps := _audio_steps(entry, found, t)) is not None]
    if found.audio_mask is not None and sounds:
        clips = [(target.window, steps) for target, steps in sounds]
        masks = read_audio_masks(found.audio_mask, item, entry, clips)
        audio = {target: mask for (target, _), mask in zip(sounds, masks, strict=True)}
    return [AV(_tensor(video.get(target)), _tensor(audio.get(target))) for target in targets]


def _tensor(mask: np.ndarray | None) -> torch.Tensor | None:
    return None if mask is None else torch.from_numpy(np.ascontiguousarray(mask))
