"""What a run is about to do: facts for the metadata, tables for the log."""

from __future__ import annotations

import logging
import math
import secrets
import time
from typing import Any

from musubi_tuner.common.tables import format_bytes, format_table
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.dataset.items import MODALITIES
from musubi_tuner.dataset.loader import BatchLoader
from musubi_tuner.dataset.sampling import BatchPlan, BatchSpec
from musubi_tuner.memory.estimate import Estimate

from .metadata import RunFacts
from .outlook import (
    Trained,
    batch_size,
    modality_warnings,
    tokens_per_step,
    trained_by_stream,
)
from .references import reference_downscale
from .run_checks import CheckedRun
from .run_parts import RunData, RunModel

logger = logging.getLogger(__name__)


def run_facts(checked: CheckedRun, data: RunData, model: RunModel) -> RunFacts:
    """What the metadata of every file of the run says."""
    loader, loop, optimizer = data.loader, model.loop, model.optimizer
    batches = loader.batches_per_epoch(loop.world_size)
    updates = math.ceil(batches / loop.accumulation)
    options = ",".join(f"{k}={v}" for k, v in optimizer.defaults.items() if k != "lr")
    return RunFacts(
        version=checked.version,
        session_id=str(secrets.randbelow(2**32)),
        started_at=time.time(),
        seed=checked.progress.seed,
        num_items=len(data.training_set),
        batches_per_epoch=batches,
        num_epochs=math.ceil(loop.total_steps / updates),
        max_train_steps=loop.total_steps,
        warmup_steps=data.schedule.warmup_steps,
        preset=checked.config.network.lora_target_preset,
        shifted_logit_mode=model.task.sampler.shifted_logit_mode,
        optimizer=f"{type(optimizer).__module__}.{type(optimizer).__name__}({options})",
        mixed_precision=checked.compute.mixed_precision,
        datasets=_describe_datasets(loader),
        reference_downscale=reference_downscale(data.training_set),
        num_with_reference=sum(
            item.reference is not None or item.reference_audio is not None for item in data.training_set.items()
        ),
    )


def report_plan(checked: CheckedRun, data: RunData, model: RunModel, facts: RunFacts) -> None:
    """Log what will be trained, how long and in how much memory, and warn where a modality gets nothing."""
    config, memory, loop = checked.config, data.memory, model.loop
    mode, plan = config.checkpoint.ltx2_mode, data.loader.plan
    silence = config.audio_loss.audio_silence_regularizer
    trained = trained_by_stream(model.names, model.parameters)
    specs = plan.for_epoch(0)
    sizes = [batch_size(plan, spec, silence=silence) for spec in specs]
    weights = memory.request.weights
    rate = config.optimizer.learning_rate
    _log_training_plan(
        trained,
        facts={
            "model": f"LTX-{facts.version}, {mode}, {format_bytes(sum(weights.blocks) + weights.rest)} frozen",
            "precision": facts.mixed_precision,
            "optimizer": facts.optimizer.partition("(")[0],
            "learning rate": f"{rate:g}, {loop.lr_plan.name}, {facts.warmup_steps} warm-up steps",
            "items": facts.num_items,
            **_reference_facts(config, facts),
            **_sound(mode, plan, specs),
            "batches an epoch": len(specs),
            "steps": f"{facts.max_train_steps} of {loop.accumulation} x {loop.world_size} batches",
            "epochs": facts.num_epochs,
            "tokens a step": _spread(tokens_per_step(sizes, loop.accumulation * loop.world_size)),
            "seed": facts.seed,
            "memory, about": _memory(memory.estimate),
        },
    )
    for warning in modality_warnings(
        mode,
        trained,
        # The voice of a recording is learnt by the modules of sound, also where video is generated beside it.
        learning=("audio",) if config.references.ic_lora_strategy == "audio_ref_only_ic" else MODALITIES[mode],
        weights=_loss_weights(config, plan),
        has_sound=any(item.has_sound for item in plan.training_set.items()),
        silence=silence,
        audio_lr=config.optimizer.audio_lr,
    ):
        logger.warning("%s", warning)


def _sound(mode: str, plan: BatchPlan, specs: list[BatchSpec]) -> dict[str, object]:
    if mode != "av":
        return {}
    return {"batches with sound": f"{sum(plan.has_sound(spec) for spec in specs)} of {len(specs)} an epoch"}


def _spread(values: list[int]) -> str:
    """Least, mean and most."""
    return f"{min(values)} to {max(values)}, mean {sum(values) / len(values):.0f}"


def _memory(estimate: Estimate) -> str:
    on_host = f", {format_bytes(estimate.host)} of host memory" if estimate.on_gpu else ""
    return f"{format_bytes(estimate.device)}{on_host}; may be off by {format_bytes(estimate.uncertainty)}"


def _loss_weights(config: TrainNetworkConfig, plan: BatchPlan) -> dict[str, list[float]]:
    """Of the datasets, or where they have none the flag's."""
    flags = {"video": config.loss.video_loss_weight, "audio": config.loss.audio_loss_weight}
    overrides = [dataset.loss_weights for dataset in plan.training_set.datasets]
    return {name: [weight if own[name] is None else own[name] for own in overrides] for name, weight in flags.items()}


def _reference_facts(config: TrainNetworkConfig, facts: RunFacts) -> dict[str, object]:
    strategy = config.references.ic_lora_strategy
    size = f", downscale {facts.reference_downscale}" if strategy == "v2v" else ""
    return {} if strategy == "none" else {"references": f"{strategy}, {facts.num_with_reference} items{size}"}


def _describe_datasets(loader: BatchLoader) -> list[dict[str, Any]]:
    """What the metadata of the LoRA says of the data; no paths."""
    return [
        {"kind": d.kind, "items": len(d.items), "batch_size": d.batch_size, "num_repeats": d.num_repeats}
        for d in loader.plan.training_set.datasets
    ]


def _log_training_plan(trained: dict[str, Trained], *, facts: dict[str, object]) -> None:
    """Modules and parameters by stream, and the run's length."""
    labels = {"video": "video", "audio": "audio", "cross": "between them"}
    rows = [
        [labels[stream], count.modules, count.params, format_bytes(4 * count.params)]
        for stream, count in trained.items()
    ]
    logger.info(format_table(["stream", "modules", "parameters", "fp32 size"], rows, title="What will be trained"))
    logger.info(format_table(["setting", "value"], list(facts.items())))
