"""Latent caches decoded: what the encoder made of the clips."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from musubi_tuner.common.devices import choose_device
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.progress import progress
from musubi_tuner.dataset.cache import (
    CacheName,
    list_caches,
    read_audio,
    read_latents,
    read_virtual_grid,
    split_clip_base,
)
from musubi_tuner.dataset.entries import DatasetEntry
from musubi_tuner.generation.decode import Decoders, Sound
from musubi_tuner.generation.write import write_mp4, write_png, write_wav
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.video_vae import Tiling

from .pictures import frame_strip, wave_bars
from .report import CachedClip

logger = logging.getLogger(__name__)

# Tiles keep any cache within the memory of a small card.
_TILING = Tiling(spatial_tile=512, spatial_overlap=64, temporal_tile=64, temporal_overlap=24)


def decode_caches(
    entries: Sequence[DatasetEntry], checkpoint: Path, output: Path, *, device: str | None, max_clips: int
) -> Mapping[str, Sequence[CachedClip]]:
    """Decode the first ``max_clips`` latent caches of each dataset, to pictures and to files below ``output``.

    Raises:
        UserError: the checkpoint lacks a decoder, or there is no cache at all.
    """
    caches = {entry.label: _of_clips(entry.cache_directory)[:max_clips] for entry in entries}
    if not any(caches.values()):
        folders = ", ".join(str(entry.cache_directory) for entry in entries)
        raise UserError(f"--decode_caches: no latent caches in {folders}; run ltx2_cache_latents.py first")
    where = choose_device(device)
    dtype = torch.float32 if where.type == "cpu" else torch.bfloat16
    decoders = Decoders(Checkpoint.open(checkpoint), dtype=dtype, device=where, tiling=_TILING)
    kinds = {entry.kind for entry in entries if caches[entry.label]}
    decoders.require(video=bool(kinds - {"audio"}), audio=any(audio for c in caches.values() for _, _, audio in c))
    decoded = {}
    for entry in entries:
        folder = output / entry.label.replace("[", "_").replace("]", "")
        decoded[entry.label] = [
            _decode(name, video, audio, decoders, folder=folder, fps=entry.target_fps)
            for name, video, audio in progress(caches[entry.label], desc=f"decoding {entry.label}", unit="cache")
        ]
    decoders.to_cpu()
    return decoded


def _of_clips(directory: Path) -> list[tuple[CacheName, Path, Path | None]]:
    """Latent files with the sound beside them."""
    found = list_caches(directory)
    return [(name, path, found.get(name.sibling("audio"))) for name, path in found.items() if name.kind == "latents"]


def _decode(
    name: CacheName, video: Path, audio: Path | None, decoders: Decoders, *, folder: Path, fps: float
) -> CachedClip:
    try:
        pixels = None if read_virtual_grid(video) else decoders.frames(read_latents(video)[None])
        sound = None
        if audio is not None:
            latents, steps = read_audio(audio)
            sound = decoders.sound(latents[None, :, :steps])
        media = _write(folder, name, pixels, sound, fps)
    except (UserError, OSError) as error:
        return CachedClip(name.base, "", error=str(error))
    shape = [] if pixels is None else [f"{len(pixels)} frames of {pixels.shape[2]}x{pixels.shape[1]}"]
    shape += [] if sound is None else [f"{sound.seconds:.2f} s of sound"]
    return CachedClip(
        name.base,
        ", ".join(shape),
        strip=None if pixels is None else frame_strip(pixels.numpy()),
        wave=() if sound is None else wave_bars(sound.waveform.numpy()),
        media=media,
    )


def _write(folder: Path, name: CacheName, pixels: torch.Tensor | None, sound: Sound | None, fps: float) -> Path:
    stem = str(name).removesuffix(".safetensors")
    if pixels is not None and (len(pixels) > 1 or split_clip_base(name.base)):
        path = folder / f"{stem}.mp4"
        write_mp4(path, pixels, fps, sound)
    elif pixels is not None:
        path = folder / f"{stem}.png"
        write_png(path, pixels[0])
    else:
        assert sound is not None
        path = folder / f"{stem}.wav"
        write_wav(path, sound)
    return path
