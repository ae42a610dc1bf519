"""Training with references: what the flags and the datasets say of it, before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from musubi_tuner.common.av import Modality
from musubi_tuner.common.errors import ConfigErrors, UserError
from musubi_tuner.conditioning.reference import AudioReferenceRules
from musubi_tuner.config.references import ReferenceStrategy
from musubi_tuner.config.rules_references import references as reference_rules
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.dataset.entries import DatasetConfig
from musubi_tuner.dataset.items import TrainingSet

logger = logging.getLogger(__name__)

_KINDS: Mapping[ReferenceStrategy, Modality] = {"v2v": "video", "audio_ref_only_ic": "audio"}
_DIRECTORIES: Mapping[Modality, str] = {
    "video": "reference_cache_directory",
    "audio": "reference_audio_cache_directory",
}


def reference_modalities(config: TrainNetworkConfig) -> tuple[Modality, ...]:
    """Which references a run trains with; its strategy must be resolved."""
    kind = _KINDS.get(config.references.ic_lora_strategy)  # type: ignore[call-overload]
    return () if kind is None else (kind,)


def check_references(config: TrainNetworkConfig, datasets: DatasetConfig) -> None:
    """Hold the strategy, already resolved, against the datasets; references that it does not use are told of.

    Raises:
        ConfigErrors: the strategy does not fit the mode, or datasets lack what it needs.
    """
    settings = config.references
    problems = list(reference_rules(config))
    used = reference_modalities(config)
    for modality in used:
        problems += _lacking(settings.ic_lora_strategy, _DIRECTORIES[modality], datasets)
    if problems:
        raise ConfigErrors(problems, f"{datasets.path}: references")
    for modality, key in _DIRECTORIES.items():
        unused = [entry.label for entry in datasets.datasets if getattr(entry, key) is not None]
        if modality not in used and unused:
            logger.warning(
                "%s of %s is ignored with --ic_lora_strategy %s", key, ", ".join(unused), settings.ic_lora_strategy
            )
    _warn_of_unused_flags(config)


def _lacking(strategy: str, key: str, datasets: DatasetConfig) -> list[str]:
    lacking = [entry.label for entry in datasets.datasets if getattr(entry, key) is None]
    if not lacking:
        return []
    advice = "add it with its sources and run ltx2_cache_latents.py, or use --ic_lora_strategy none"
    if len(lacking) == len(datasets.datasets):
        return [f"--ic_lora_strategy {strategy} needs references, and no dataset has a {key}; {advice}"]
    if strategy == "audio_ref_only_ic":
        return [f"{label}: --ic_lora_strategy {strategy} needs a {key} in every dataset; {advice}" for label in lacking]
    logger.info("%s: without references, trained as they are", ", ".join(lacking))
    return []


def audio_flags(config: TrainNetworkConfig) -> dict[str, bool]:
    """The flags of reference sounds by name."""
    settings = config.references
    return {
        "audio_ref_use_negative_positions": config.conditioning.audio_ref_use_negative_positions,
        "audio_ref_mask_cross_attention_to_reference": settings.audio_ref_mask_cross_attention_to_reference,
        "audio_ref_mask_reference_from_text_attention": settings.audio_ref_mask_reference_from_text_attention,
    }


def _warn_of_unused_flags(config: TrainNetworkConfig) -> None:
    strategy = config.references.ic_lora_strategy
    flags = {
        **audio_flags(config),
        "audio_ref_identity_guidance_scale": config.references.audio_ref_identity_guidance_scale,
    }
    given = [f"--{name}" for name, value in flags.items() if value]
    if given and strategy != "audio_ref_only_ic":
        logger.warning("%s: no effect on training with --ic_lora_strategy %s", ", ".join(given), strategy)


def audio_reference_rules(config: TrainNetworkConfig) -> AudioReferenceRules:
    settings = config.references
    return AudioReferenceRules(
        negative_positions=config.conditioning.audio_ref_use_negative_positions,
        hidden_from_video=settings.audio_ref_mask_cross_attention_to_reference,
        hidden_from_text=settings.audio_ref_mask_reference_from_text_attention,
    )


def reference_downscale(training_set: TrainingSet) -> int:
    """How many times the size of their references the targets of a run are; 1 without references.

    Raises:
        UserError: not the same for all. Sampling has to know it, and the LoRA's metadata hold one.
    """
    grids = [(item.grid, item.reference_grid) for item in training_set.items() if item.reference_grid is not None]
    scales = {target[1] // reference[1] for target, reference in grids}  # discovery has refused any that are not whole
    if len(scales) > 1:
        found = ", ".join(map(str, sorted(scales)))
        raise UserError(f"the datasets have references of several reference_downscale: {found}; a LoRA has one for all")
    return max(scales, default=1)
