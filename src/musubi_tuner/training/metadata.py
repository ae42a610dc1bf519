"""What a LoRA file says about how it was trained (``ss_*`` and modelspec keys, all strings)."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.networks.verdict import VERDICT, Verdict

from .references import audio_flags


@dataclass(frozen=True)
class RunFacts:
    """Values that are known only once the run is set up."""

    version: str
    session_id: str
    started_at: float
    seed: int
    num_items: int
    batches_per_epoch: int
    num_epochs: int
    max_train_steps: int
    warmup_steps: int
    preset: str
    shifted_logit_mode: str
    optimizer: str
    mixed_precision: str
    datasets: list[dict[str, Any]]
    reference_downscale: int = 1
    num_with_reference: int = 0


def training_metadata(
    config: TrainNetworkConfig, facts: RunFacts, *, step: int, epoch: int, verdict: Verdict
) -> dict[str, str]:
    """Metadata of a file saved at a step, beside the network's own; the minimum only with ``--no_metadata``."""
    values: dict[str, Any] = {"ss_base_model_version": f"ltx2_{facts.version}"}
    if facts.reference_downscale != 1:  # sampling needs it, so it is no matter of choice
        values |= dict.fromkeys(
            ("ss_reference_downscale_factor", "reference_downscale_factor"), facts.reference_downscale
        )
    if config.network.metadata:
        values |= _full(config, facts) | {"ss_steps": step, "ss_epoch": epoch} | _modelspec(config, facts)
        values[VERDICT] = verdict.to_json()
    return {k: str(v) for k, v in values.items() if v is not None}


def _full(config: TrainNetworkConfig, facts: RunFacts) -> Mapping[str, Any]:
    optimizer, timestep = config.optimizer, config.timestep
    values = {
        "session_id": facts.session_id,
        "training_started_at": facts.started_at,
        "training_finished_at": time.time(),
        "output_name": config.save.output_name,
        "learning_rate": optimizer.learning_rate,
        "audio_lr": optimizer.audio_lr,
        "lr_args": json.dumps(list(optimizer.lr_args)) if optimizer.lr_args else None,
        "lr_scheduler": optimizer.lr_scheduler_type or optimizer.lr_scheduler,
        "lr_warmup_steps": facts.warmup_steps,
        "optimizer": facts.optimizer,
        "max_grad_norm": optimizer.max_grad_norm,
        "scale_weight_norms": config.network.scale_weight_norms,
        "num_train_items": facts.num_items,
        "num_batches_per_epoch": facts.batches_per_epoch,
        "num_epochs": facts.num_epochs,
        "max_train_steps": facts.max_train_steps,
        "gradient_accumulation_steps": optimizer.gradient_accumulation_steps,
        "gradient_checkpointing": config.memory.settings.checkpointing,
        "gradient_checkpointing_cpu_offload": config.memory.settings.offload_inputs,
        "network_dropout": config.network.network_dropout,
        **base_weights_facts(config),
        "mixed_precision": facts.mixed_precision,
        "full_fp16": config.precision.full_fp16,
        "full_bf16": config.precision.full_bf16,
        "fp8_base": config.quantization.fp8_base,
        "fp8_w8a8": config.quantization.fp8_w8a8,
        "int8_base": config.quantization.int8_base,
        "nf4_base": config.quantization.nf4_base,
        "loftq_init": config.calibration.loftq_init,
        "awq_calibration": config.calibration.awq_calibration,
        "seed": facts.seed,
        "training_comment": config.network.training_comment,
        "guidance_scale": config.preview.guidance_scale,
        "loss_type": config.loss.loss_type,
        "weighting_scheme": "none",  # whatever was asked for
        "mode_scale": timestep.mode_scale,
        "timestep_sampling": timestep.timestep_sampling,
        "logit_mean": timestep.logit_mean,
        "logit_std": timestep.logit_std,
        "sigmoid_scale": timestep.sigmoid_scale,
        "discrete_flow_shift": timestep.discrete_flow_shift,
        "num_timestep_buckets": timestep.num_timestep_buckets,
        "shifted_logit_mode": facts.shifted_logit_mode,
        "shifted_logit_eps": timestep.shifted_logit_eps,
        "shifted_logit_uniform_prob": timestep.shifted_logit_uniform_prob,
        "min_timestep": timestep.min_timestep,
        "max_timestep": timestep.max_timestep,
        "ltx_version": facts.version,
        "ltx_mode": config.checkpoint.ltx2_mode,
        "lora_target_preset": facts.preset,
        **_references(config),
        "datasets": json.dumps(facts.datasets),
        "sd_model_name": config.checkpoint.ltx2_checkpoint.name if config.checkpoint.ltx2_checkpoint else None,
        "vae_name": config.checkpoint.ltx2_checkpoint.name if config.checkpoint.ltx2_checkpoint else None,
    }
    return {f"ss_{k}": v for k, v in values.items()}


def base_weights_facts(config: TrainNetworkConfig) -> dict[str, str]:
    """What was merged into the base model, where anything was: the LoRA belongs to that model."""
    network = config.network
    if not network.base_weights:
        return {}
    names, multipliers = [path.name for path in network.base_weights], list(network.base_weights_multiplier)
    return {"base_weights": json.dumps(names), "base_weights_multiplier": json.dumps(multipliers)}


def _references(config: TrainNetworkConfig) -> Mapping[str, Any]:
    strategy = config.references.ic_lora_strategy
    values: dict[str, Any] = {"ic_lora_strategy": strategy}
    if strategy == "v2v":
        values["v2v_training"] = True
    elif config.loss.ltx2_first_frame_conditioning_p > 0 and config.checkpoint.ltx2_mode != "audio":
        values["i2v_training"] = True
    if strategy == "audio_ref_only_ic":  # sampling has to do the same
        values |= audio_flags(config)
    return values


def _modelspec(config: TrainNetworkConfig, facts: RunFacts) -> Mapping[str, Any]:
    save, timestep = config.save, config.timestep
    bounds = (timestep.min_timestep, timestep.max_timestep)
    values = {
        "sai_model_spec": "1.0.0",
        "architecture": save.metadata_arch or "LTX2/lora",
        "implementation": "https://github.com/Lightricks/LTX-2",
        "title": save.metadata_title or save.output_name,
        "resolution": save.metadata_reso or "1280x720",
        "date": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(facts.started_at)),
        "author": save.metadata_author,
        "description": save.metadata_description,
        "license": save.metadata_license,
        "tags": save.metadata_tags,
        "timestep_range": f"{bounds[0] or 0},{bounds[1] or 1000}" if any(b is not None for b in bounds) else None,
    }
    return {f"modelspec.{k}": v for k, v in values.items()}
