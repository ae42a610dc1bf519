"""Cache files of some items to one :class:`Batch`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from musubi_tuner.common.av import AV, Modality
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.safetensors_io import SafetensorsFile
from musubi_tuner.config.model import Mode

from .batch import AudioLatents, Batch, SampleKey, TextEmbeds, VideoLatents
from .cache import Grid, read_audio, read_latents, read_mask, read_text, read_virtual_grid
from .frame_store import BlockPool
from .items import MODALITIES, CachedItem, TrainingSet
from .rows import Rows, stack
from .sampling import BatchSpec


@dataclass(frozen=True)
class LoadedItem:
    """The tensors of one item that its mode uses."""

    key: SampleKey
    fps: float
    text: AV[Tensor]  # [L, D]
    mask: Tensor | None  # [L] bool
    video: Tensor | None = None  # [C, F, H, W]
    audio: Tensor | None = None  # [8, T, 16]; None = no sound
    audio_length: int = 0
    virtual_grid: Grid | None = None
    reference: Tensor | None = None  # [C, F, H, W]
    reference_audio: Tensor | None = None  # [8, T, 16], not padded
    masks: AV[Tensor] = field(default_factory=AV)  # [F, H, W] and [T]


def load_item(
    item: CachedItem,
    mode: Mode,
    key: SampleKey,
    *,
    legacy_text_widths: AV[int] | None = None,
    rows: Rows | None = None,
) -> LoadedItem:
    """Read what ``mode`` uses: an av text cache gives mode video its video part only.

    Args:
        item: its files.
        mode: of the training.
        key: names the sample.
        legacy_text_widths: to split old text caches.
        rows: memory of the batch for the big tensors; without it each has its own.

    Raises:
        UserError: a file is missing, damaged or of another mode.
    """
    allocate = None if rows is None else lambda name, info: rows.take(name, info.shape, info.dtype)
    for_reference = None if rows is None else lambda name, info: rows.take("reference", info.shape, info.dtype)
    text, mask = read_text(item.text, MODALITIES[mode], legacy_text_widths, allocate)
    audio, length = read_audio(item.audio) if mode != "video" and item.audio is not None else (None, 0)
    virtual_grid = read_virtual_grid(item.latents) if mode == "audio" else None
    if mode == "audio" and virtual_grid is None:
        raise UserError(f"{item.latents} was not made in mode audio; cache the latents again with --ltx2_mode audio")
    return LoadedItem(
        key=key,
        fps=item.fps,
        text=text,
        mask=mask,
        video=read_latents(item.latents, allocate) if mode != "audio" else None,
        audio=audio,
        audio_length=length,
        virtual_grid=virtual_grid,
        reference=read_latents(item.reference, for_reference) if item.reference is not None else None,
        reference_audio=_read_reference_audio(item.reference_audio) if item.reference_audio is not None else None,
        masks=_read_masks(item),
    )


def _read_reference_audio(path: Path) -> Tensor:
    """[8, T, 16], the valid steps only."""
    latents, length = read_audio(path)
    if length == 0:
        raise UserError(f"{path}: the reference sound has no valid step; delete it and cache it again")
    return latents[:, :length]


def _read_masks(item: CachedItem) -> AV[Tensor]:
    if item.mask is None:
        return AV()
    parts = read_mask(item.mask)
    return AV(**{modality: parts[modality] for modality, _ in item.mask_parts.items()})


def load_batch(training_set: TrainingSet, spec: BatchSpec, pool: BlockPool | None = None) -> Batch:
    """Load and stack the items of ``spec``, into memory of ``pool`` where there is one."""
    dataset = training_set.datasets[spec.dataset]
    rows = Rows(len(spec.samples), pool or BlockPool())
    loaded = [
        load_item(
            dataset.items[position],
            training_set.mode,
            SampleKey(dataset.items[position].base, dataset.index, repeat),
            legacy_text_widths=training_set.legacy_text_widths,
            rows=rows,
        )
        for position, repeat in spec.samples
    ]
    return collate(loaded, audio_steps=spec.audio_steps, loss_weights=dataset.loss_weights)


def damaged_files(training_set: TrainingSet, keys: Iterable[SampleKey]) -> list[Path]:
    """Cache files of these samples that hold NaN or infinity, or cannot be read.

    They are read again: looking into every batch would cost more than a batch in many thousands is worth.
    """
    datasets = {dataset.index: dataset for dataset in training_set.datasets}
    wanted = {(key.dataset, key.name) for key in keys}
    items = [item for index, dataset in datasets.items() for item in dataset.items if (index, item.base) in wanted]
    paths = dict.fromkeys(path for item in items for path in item.files())
    return [path for path in paths if not _is_finite(path)]


def _is_finite(path: Path) -> bool:
    try:
        tensors = SafetensorsFile(path).read()
        return all(bool(t.isfinite().all()) for _, t in tensors if t.is_floating_point())
    except (UserError, OSError):
        return False


def collate(
    items: Sequence[LoadedItem], *, audio_steps: int | None = None, loss_weights: AV[float] | None = None
) -> Batch:
    """Stack items of one bucket.

    Args:
        items: at least one; equal latent grids (also of the references) and text lengths.
        audio_steps: cut or zero-pad every sound to this many latent steps; ``None`` pads to the longest.
        loss_weights: the dataset's overrides.
    """
    videos = [item.video for item in items if item.video is not None]
    audio = _stack_audio(items, audio_steps)
    return Batch(
        video=VideoLatents(
            latents=stack(videos),  # [B, C, F, H, W]
            fps=torch.tensor([item.fps for item in items], dtype=torch.float32),
        )
        if videos
        else None,
        audio=audio,
        text=TextEmbeds(
            video=_stack_text(items, "video"),
            audio=_stack_text(items, "audio"),
            mask=_stack_masks(items),
        ),
        keys=tuple(item.key for item in items),
        references=AV(video=_stack_references(items), audio=_stack_reference_audio(items)),
        masks=AV(video=_stack_video_masks(items), audio=_stack_audio_masks(items, audio)),
        loss_weights=loss_weights or AV(),
    )


def _stack_audio(items: Sequence[LoadedItem], steps: int | None) -> AudioLatents | None:
    """Zero-padded sounds; an item without sound is all zeros with length 0. ``None`` if no item has any."""
    template = next((item.audio for item in items if item.audio is not None), None)
    if template is None:
        return None
    if steps is None:
        steps = max(item.audio.shape[1] for item in items if item.audio is not None)
    silence = template.new_zeros(template.shape[0], 0, template.shape[2])
    sounds = [silence if item.audio is None else item.audio[:, :steps] for item in items]
    grids = [item.virtual_grid for item in items if item.virtual_grid is not None]
    return AudioLatents(
        latents=torch.stack([pad(sound, (0, 0, 0, steps - sound.shape[1])) for sound in sounds]),  # [B, 8, T, 16]
        lengths=torch.tensor([min(item.audio_length, steps) for item in items], dtype=torch.int64),
        virtual_grid=torch.tensor(grids, dtype=torch.int64) if len(grids) == len(items) else None,
    )


def _stack_references(items: Sequence[LoadedItem]) -> VideoLatents | None:
    """References at the frame rate of their targets; ``None`` if the items have none."""
    references = [item.reference for item in items if item.reference is not None]
    if not references:
        return None
    fps = torch.tensor([item.fps for item in items], dtype=torch.float32)
    return VideoLatents(stack(references), fps)  # [B, C, F, H, W]


def _stack_reference_audio(items: Sequence[LoadedItem]) -> AudioLatents | None:
    """Reference sounds, zero-padded to the longest; they are not cut, whatever happens to the targets."""
    sounds = [item.reference_audio for item in items if item.reference_audio is not None]
    if not sounds:
        return None
    lengths = [sound.shape[1] for sound in sounds]
    padded = [pad(sound, (0, 0, 0, max(lengths) - sound.shape[1])) for sound in sounds]
    return AudioLatents(torch.stack(padded), torch.tensor(lengths, dtype=torch.int64))  # [B, 8, T, 16]


def _stack_video_masks(items: Sequence[LoadedItem]) -> Tensor | None:
    """[B, F, H, W], 0 for an item without a mask; ``None`` if no item has one."""
    template = next((item.masks.video for item in items if item.masks.video is not None), None)
    if template is None:
        return None
    empty = torch.zeros_like(template)
    return torch.stack([empty if item.masks.video is None else item.masks.video for item in items])


def _stack_audio_masks(items: Sequence[LoadedItem], audio: AudioLatents | None) -> Tensor | None:
    """[B, T], 0 where an item has no mask and in the padding; ``None`` if no item has one."""
    if audio is None or all(item.masks.audio is None for item in items):
        return None
    stacked = torch.zeros(len(items), audio.latents.shape[2])
    for row, item in zip(stacked, items, strict=True):
        if item.masks.audio is not None:
            steps = min(item.masks.audio.shape[0], row.shape[0])
            row[:steps] = item.masks.audio[:steps]
    return stacked


def _stack_text(items: Sequence[LoadedItem], modality: Modality) -> Tensor | None:
    parts = [item.text[modality] for item in items]
    return None if any(part is None for part in parts) else stack(parts)  # type: ignore[arg-type]


def _stack_masks(items: Sequence[LoadedItem]) -> Tensor | None:
    """[B, L], or ``None`` when every token counts (the connectors fill padding with learned registers)."""
    if all(item.mask is None or bool(item.mask.all()) for item in items):
        return None
    tokens = next(part for _, part in items[0].text.items()).shape[0]
    return torch.stack([torch.ones(tokens, dtype=torch.bool) if item.mask is None else item.mask for item in items])
