"""What a dataset configuration says, with every value resolved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .buckets import SPATIAL_STRIDE, Size, choose_bucket
from .files import ItemFiles, Kind
from .frames import Extraction, ExtractionRule


@dataclass(frozen=True)
class DatasetEntry:
    """One ``[[datasets]]`` or ``[[validation_datasets]]`` entry with every value resolved."""

    label: str  # its place in the file, "datasets[1]"
    kind: Kind
    source: Path | None  # directory of the media, or the JSONL file that lists them; None with cache_only
    cache_directory: Path
    resolution: Size = (960, 544)
    caption_extension: str = ".txt"  # of caption files in a directory
    caption_field: str = "caption"  # of captions in a JSONL file
    batch_size: int = 1
    num_repeats: int = 1
    enable_bucket: bool = False
    bucket_no_upscale: bool = False
    separate_audio_buckets: bool = False
    video_loss_weight: float | None = None
    audio_loss_weight: float | None = None
    cache_only: bool = False
    listed: bool = False  # source is a JSONL file
    # references and masks, found by the stem of the target
    reference_directory: Path | None = None
    control_directory: Path | None = None  # references that are named as control images are
    reference_cache_directory: Path | None = None
    reference_frames: int = 1
    reference_downscale: int = 1  # the target's size is so many times the reference's
    reference_audio_directory: Path | None = None
    reference_audio_cache_directory: Path | None = None
    mask_directory: Path | None = None
    audio_mask_directory: Path | None = None
    # video
    target_frames: tuple[int, ...] = (1,)
    frame_extraction: Extraction = "head"
    frame_stride: int = 1
    frame_sample: int = 1
    max_frames: int = 129
    source_fps: float | None = None  # None: detected for each file
    target_fps: float = 25.0
    # audio
    audio_bucket_strategy: Literal["pad", "truncate"] = "pad"
    audio_bucket_interval: float = 2.0  # seconds
    # of a manifest: the caches that are used; None: all in cache_directory that belong to the dataset
    files: tuple[ItemFiles, ...] | None = field(default=None, repr=False)

    def bucket(self, size: Size) -> Size | None:
        """The bucket of an item of ``size`` (width, height); None: too small for one without enlarging."""
        return choose_bucket(
            size,
            self.resolution,
            enable_bucket=self.enable_bucket,
            no_upscale=self.bucket_no_upscale,
            step=self.bucket_step,
        )

    @property
    def bucket_step(self) -> int:
        """Pixels that the sides of a bucket are multiples of, so that those of a reference are multiples of 32."""
        return SPATIAL_STRIDE * self.reference_downscale

    @property
    def source_key(self) -> str:
        """The key of the configuration that gives ``source``."""
        return f"{self.kind}_jsonl_file" if self.listed else f"{self.kind}_directory"

    @property
    def extraction(self) -> ExtractionRule:
        return ExtractionRule(
            self.frame_extraction, self.target_frames, self.frame_stride, self.frame_sample, self.max_frames
        )


@dataclass(frozen=True)
class DatasetConfig:
    """A whole configuration file or manifest."""

    datasets: tuple[DatasetEntry, ...]
    validation: tuple[DatasetEntry, ...]
    path: Path
    made_from: Path | None = None  # of a manifest: the configuration that was cached, if it says so

    @property
    def reference_downscale(self) -> int | None:
        """That of the training datasets with references; ``None`` if there are none, or several values."""
        values = {entry.reference_downscale for entry in self.datasets if entry.reference_cache_directory is not None}
        return values.pop() if len(values) == 1 else None

    def entries(self) -> Iterator[DatasetEntry]:
        """Training entries, then validation entries."""
        yield from self.datasets
        yield from self.validation
