"""The cached items of a training run: where their files are and what decides how they are batched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from musubi_tuner.common.av import AV, Modality
from musubi_tuner.config.model import Mode

from .batch import SampleKey
from .cache import Grid
from .files import Kind

# What a mode trains, and so which text embeddings it reads.
MODALITIES: Mapping[Mode, tuple[Modality, ...]] = {
    "video": ("video",),
    "av": ("video", "audio"),
    "audio": ("audio",),
}

AudioStrategy = Literal["pad", "truncate"]
# The caching script that puts it right; "text anew": with --skip_existing it would keep the file.
Repair = Literal["latents", "text", "text anew"]


@dataclass(frozen=True)
class EncoderRecord:
    """What made a cache, by its fingerprint."""

    id: str
    replaces: str | None = None  # the checkpoint's own encoder, where another file was named instead of it

    def belongs_to(self, own: str) -> bool:
        """Whether the cache was made by, or on purpose for, the checkpoint whose own encoder is ``own``."""
        return own in (self.id, self.replaces)


@dataclass(frozen=True)
class MadeBy:
    """Which encoders made an item's caches, as their metadata says; ``None`` = not recorded."""

    video_vae: EncoderRecord | None = None
    audio_vae: EncoderRecord | None = None
    text: EncoderRecord | None = None
    reference_video: EncoderRecord | None = None
    reference_audio: EncoderRecord | None = None
    recorded: bool = True  # False: some file carries no metadata of ours at all


@dataclass(frozen=True)
class CachedItem:
    """One clip, image or sound with all the caches that the mode needs."""

    base: str  # "clip_00000-049"
    latents: Path
    text: Path
    grid: Grid  # latent (F, H, W)
    text_tokens: int
    fps: float
    audio: Path | None = None
    audio_steps: int = 0  # 0 = no sound
    text_widths: AV[int] = field(default_factory=AV)  # of the separate embeddings
    legacy_text_width: int | None = None
    reference: Path | None = None
    reference_grid: Grid | None = None
    reference_audio: Path | None = None
    reference_audio_steps: int = 0
    mask: Path | None = None
    mask_parts: AV[bool] = field(default_factory=AV)  # what is read of the mask file
    made_by: MadeBy = MadeBy()

    @property
    def has_sound(self) -> bool:
        return self.audio_steps > 0

    def files(self) -> Iterator[Path]:
        """All its cache files."""
        paths = (self.latents, self.audio, self.text, self.reference, self.reference_audio, self.mask)
        return (path for path in paths if path is not None)


@dataclass(frozen=True)
class CachedDataset:
    """The items of one ``[[datasets]]`` entry and its batching options."""

    index: int  # in the configuration
    kind: Kind
    items: tuple[CachedItem, ...]
    batch_size: int = 1
    num_repeats: int = 1
    separate_audio_buckets: bool = False
    audio_strategy: AudioStrategy = "pad"
    audio_step: int = 50  # latent steps between audio buckets
    loss_weights: AV[float] = field(default_factory=AV)


@dataclass(frozen=True)
class CacheProblem:
    """A cache that must not be used as it is."""

    cause: str  # equal for all caches with the same cause
    name: str
    repair: Repair


@dataclass(frozen=True)
class TrainingSet:
    """All that is needed to load batches; small enough to be sent to loader processes."""

    mode: Mode
    datasets: tuple[CachedDataset, ...]
    legacy_text_widths: AV[int] | None = None  # widths of video and audio embeddings, to split old text caches
    problems: tuple[CacheProblem, ...] = ()  # found by discovery, reported by fingerprint.check_caches

    def __len__(self) -> int:
        return sum(len(dataset.items) for dataset in self.datasets)

    def sample_keys(self) -> list[SampleKey]:
        """Names of all samples of an epoch, repeats included, in the order of the files."""
        return [
            SampleKey(item.base, dataset.index, repeat)
            for dataset in self.datasets
            for item in dataset.items
            for repeat in range(dataset.num_repeats)
        ]

    def items(self) -> Iterator[CachedItem]:
        for dataset in self.datasets:
            yield from dataset.items
