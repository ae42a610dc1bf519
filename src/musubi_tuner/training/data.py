"""The training data of a run: configuration, caches held against the checkpoint, batches."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from musubi_tuner.common.av import AV
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.dataset.discovery import discover
from musubi_tuner.dataset.entries import DatasetConfig
from musubi_tuner.dataset.fingerprint import EncoderIds, RepairCommands, check_caches
from musubi_tuner.dataset.items import TrainingSet
from musubi_tuner.dataset.loader import BatchLoader
from musubi_tuner.dataset.manifest import load_dataset_manifest
from musubi_tuner.dataset.sampling import BatchPlan
from musubi_tuner.dataset.schema import check_mode, load_dataset_config
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.ltx2.config import TransformerConfig

from .audio_batches import audio_mixing, report_sound
from .references import reference_downscale, reference_modalities

logger = logging.getLogger(__name__)


def read_datasets(config: TrainNetworkConfig) -> tuple[DatasetConfig, TrainNetworkConfig]:
    """The datasets of the configuration or the manifest, and the run's flags with the mode that the datasets imply.

    Raises:
        UserError, ConfigErrors: what is wrong in the file.
    """
    data = config.data
    options = {
        **_reference_options(config),
        "separate_audio_buckets": data.separate_audio_buckets,
        "audio_bucket_strategy": data.audio_bucket_strategy,
        "audio_bucket_interval": data.audio_bucket_interval,
        "caption_field": data.caption_field,
    }
    if data.dataset_manifest is not None:
        datasets = load_dataset_manifest(data.dataset_manifest, command_line=options)
    else:
        assert data.dataset_config is not None
        datasets = load_dataset_config(data.dataset_config, command_line=options, need_sources=False)
    mode = check_mode(datasets, config.checkpoint.ltx2_mode)
    return datasets, replace(config, checkpoint=replace(config.checkpoint, ltx2_mode=mode))


def _reference_options(config: TrainNetworkConfig) -> dict[str, int]:
    settings = config.references
    return {"reference_frames": settings.reference_frames, "reference_downscale": settings.reference_downscale}


def make_loader(
    config: TrainNetworkConfig,
    datasets: DatasetConfig,
    checkpoint: Checkpoint,
    *,
    seed: int,
    world_size: int,
    device: torch.device,
) -> BatchLoader:
    """Batches of the cached items, for ``device``.

    Raises:
        ConfigErrors: no items, or caches that another checkpoint, mode or configuration made.
        UserError: references of different relative sizes; batches with sound are asked for, and there are none.
    """
    training_set = _checked_set(config, datasets, checkpoint)
    plan = BatchPlan(training_set, seed, mixing=audio_mixing(config, world_size))
    report_sound(plan, config.checkpoint.ltx2_mode)
    return BatchLoader(plan, workers=config.data.max_data_loader_n_workers, device=device)


def validation_set(config: TrainNetworkConfig, datasets: DatasetConfig, checkpoint: Checkpoint) -> TrainingSet:
    """The cached items of the validation datasets.

    Raises:
        ConfigErrors: no items, or caches that another checkpoint, mode or configuration made.
    """
    return _checked_set(config, datasets, checkpoint, validation=True)


def _checked_set(
    config: TrainNetworkConfig, datasets: DatasetConfig, checkpoint: Checkpoint, *, validation: bool = False
) -> TrainingSet:
    mode = config.checkpoint.ltx2_mode
    widths = text_widths(checkpoint)
    training_set = discover(
        datasets,
        mode,
        validation=validation,
        legacy_text_widths=widths,
        references=reference_modalities(config),
    )
    gemma = config.gemma
    check_caches(
        training_set,
        encoders=EncoderIds(
            video_vae=checkpoint.encoder_id("video_vae"),
            audio_vae=checkpoint.encoder_id("audio_vae"),
            text=checkpoint.encoder_id("text"),
        ),
        commands=RepairCommands(
            dataset_config=config.data.dataset_config or datasets.made_from,
            ltx2_checkpoint=config.checkpoint.ltx2_checkpoint,
            mode=mode,
            gemma=("--gemma_root", str(gemma.gemma_root)) if gemma.gemma_root else (),
            latents=tuple(part for k, v in _reference_options(config).items() if v != 1 for part in (f"--{k}", str(v))),
            manifest=config.data.dataset_manifest,
        ),
        text_widths=widths,
    )
    reference_downscale(training_set)
    return training_set


def text_widths(checkpoint: Checkpoint) -> AV[int]:
    """Widths of the text embeddings that the checkpoint's transformer reads."""
    shapes = {key: tuple(info.shape) for key, info in checkpoint.tensors.items()}
    transformer = TransformerConfig.from_metadata(checkpoint.config.get("transformer"), shapes)
    if transformer.has_caption_projection:
        return AV(video=transformer.caption_channels, audio=transformer.caption_channels)
    return AV(video=transformer.width, audio=transformer.audio_width)
