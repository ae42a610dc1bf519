"""Flags of the dataset that is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .caching import CAPTION_FIELD_HELP
from .flag import flag


@dataclass(frozen=True)
class DataConfig:
    """Dataset."""

    dataset_config: Path | None = flag(None, "dataset configuration, TOML or JSON (this or --dataset_manifest)")
    dataset_manifest: Path | None = flag(None, "manifest that caching saved; needs neither sources nor configuration")
    max_data_loader_n_workers: int = flag(
        8, "threads that read batches ahead (at most the CPU count); 0 = no more than the next"
    )
    persistent_data_loader_workers: bool = flag(False, "no effect: threads read batches, and cost nothing to start")
    separate_audio_buckets: bool | None = flag(None, "keep items with and without sound in separate batches")
    audio_bucket_strategy: Literal["pad", "truncate"] | None = flag(None, "bring audio lengths of a bucket together")
    audio_bucket_interval: float | None = flag(None, "step of the audio length buckets, seconds")
    caption_field: str | None = flag(None, CAPTION_FIELD_HELP, metavar="NAME")
    min_audio_batches_per_accum: int = flag(
        0, "batches with sound in every optimizer step at least, over all processes, while they last; 0 = off"
    )
    audio_batch_probability: float | None = flag(
        None, "probability that the next batch is one with sound, while there are both kinds (not given: off)"
    )
    audio_only_sequence_resolution: int = flag(
        64, "mode audio: side of the virtual video for the timestep shift; 0 = as cached"
    )
