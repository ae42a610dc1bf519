"""Small cache files and training sets for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from musubi_tuner.common.av import AV
from musubi_tuner.dataset.cache import CacheName, write_audio, write_latents, write_mask, write_text
from musubi_tuner.dataset.items import CachedDataset, CachedItem, TrainingSet

CHANNELS, TOKENS, VIDEO_WIDTH, AUDIO_WIDTH = 4, 6, 5, 3
WIDTHS = AV(VIDEO_WIDTH, AUDIO_WIDTH)


def write_item(
    directory: Path,
    base: str,
    *,
    stem: str | None = None,
    grid: tuple[int, int, int] = (2, 1, 2),
    audio_steps: int = 0,
    value: float = 1.0,
    text: AV[int] = WIDTHS,
    virtual_grid: tuple[int, int, int] | None = None,
    metadata: dict[str, dict[str, str]] | None = None,
    frame_count: int | None = None,
) -> CachedItem:
    """Caches filled with ``value``, with ``audio_steps`` steps of sound (0: no file)."""
    metadata = metadata or {}
    size = (grid[2] * 32, grid[1] * 32)
    latents = directory / str(CacheName(base, "latents", size))
    write_latents(
        latents,
        torch.full((CHANNELS, *grid), value),
        metadata.get("latents", {}),
        virtual_grid=virtual_grid,
        frame_count=frame_count,
    )
    audio = None
    if audio_steps:
        audio = directory / str(CacheName(base, "audio", size))
        write_audio(audio, torch.full((8, audio_steps, 16), value), metadata.get("audio", {}))
    text_path = directory / str(CacheName(stem or base, "text"))
    embeds = text.map(lambda width: torch.full((TOKENS, width), value))
    write_text(text_path, embeds, torch.ones(TOKENS), metadata.get("text", {}), caption=f"caption of {base}")
    return CachedItem(
        base, latents, text_path, grid, TOKENS, 25.0, audio=audio, audio_steps=audio_steps, text_widths=text
    )


def write_reference(
    directory: Path, target: CachedItem, grid: tuple[int, int, int], metadata: dict[str, str] | None = None
) -> Path:
    """A reference of 2s with the latent ``grid``, under the name of its target's latents."""
    directory.mkdir(exist_ok=True)
    path = directory / target.latents.name
    write_latents(path, torch.full((CHANNELS, *grid), 2.0), metadata or {})
    return path


def write_reference_audio(
    directory: Path, target: CachedItem, steps: int, metadata: dict[str, str] | None = None
) -> Path:
    """A reference sound of 2s, under the name of its target's sound."""
    directory.mkdir(exist_ok=True)
    path = directory / str(CacheName.parse(target.latents.name).sibling("audio"))
    write_audio(path, torch.full((8, steps, 16), 2.0), metadata or {})
    return path


def write_item_mask(target: CachedItem, masks: AV[torch.Tensor]) -> Path:
    """A mask beside its target's latents."""
    path = target.latents.parent / str(CacheName.parse(target.latents.name).sibling("mask"))
    write_mask(path, masks, {})
    return path


def one_dataset(items: list[CachedItem], mode: str = "av", **options: object) -> TrainingSet:
    kind = "audio" if mode == "audio" else "video"
    return TrainingSet(mode, (CachedDataset(0, kind, tuple(items), **options),))  # type: ignore[arg-type]
