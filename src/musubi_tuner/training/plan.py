"""What a run is about to do: facts for the metadata, tables for the log."""

from __future__ import annotations

import logging
import math
import secrets
import time
from typing import Any

import torch

from musubi_tuner.common.tables import format_bytes, format_table
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.dataset.loader import BatchLoader
from musubi_tuner.models.ltx2.transformer import LTX2Transformer
from musubi_tuner.networks.lora_ltx2 import LoRANetwork

from .lr_schedulers import ScheduleSettings
from .metadata import RunFacts
from .references import reference_downscale
from .setup import Compute
from .state import Progress
from .step import TaskSettings
from .trainer import LoopSettings

logger = logging.getLogger(__name__)


def run_facts(
    config: TrainNetworkConfig,
    version: str,
    progress: Progress,
    loop: LoopSettings,
    schedule: ScheduleSettings,
    loader: BatchLoader,
    optimizer: torch.optim.Optimizer,
    task: TaskSettings,
    compute: Compute,
) -> RunFacts:
    batches = loader.batches_per_epoch(loop.world_size)
    updates = math.ceil(batches / loop.accumulation)
    options = ",".join(f"{k}={v}" for k, v in optimizer.defaults.items() if k != "lr")
    return RunFacts(
        version=version,
        session_id=str(secrets.randbelow(2**32)),
        started_at=time.time(),
        seed=progress.seed,
        num_items=len(loader.plan.training_set),
        batches_per_epoch=batches,
        num_epochs=math.ceil(loop.total_steps / updates),
        max_train_steps=loop.total_steps,
        warmup_steps=schedule.warmup_steps,
        preset=config.network.lora_target_preset,
        shifted_logit_mode=task.sampler.shifted_logit_mode,
        optimizer=f"{type(optimizer).__module__}.{type(optimizer).__name__}({options})",
        mixed_precision=compute.mixed_precision,
        datasets=_describe_datasets(loader),
        reference_downscale=reference_downscale(loader.plan.training_set),
        num_with_reference=sum(
            item.reference is not None or item.reference_audio is not None for item in loader.plan.training_set.items()
        ),
    )


def report_plan(
    config: TrainNetworkConfig,
    network: LoRANetwork,
    transformer: LTX2Transformer,
    facts: RunFacts,
    loop: LoopSettings,
) -> None:
    base_bytes = sum(p.numel() * p.element_size() for p in transformer.parameters())
    rate = config.optimizer.learning_rate
    _log_training_plan(
        network,
        # The voice of a recording is learnt by the modules of sound, also where video is generated beside it.
        mode="audio" if config.references.ic_lora_strategy == "audio_ref_only_ic" else config.checkpoint.ltx2_mode,
        facts={
            "model": f"LTX-{facts.version}, {config.checkpoint.ltx2_mode}, {format_bytes(base_bytes)} frozen",
            "precision": facts.mixed_precision,
            "optimizer": facts.optimizer.partition("(")[0],
            "learning rate": f"{rate:g}, {loop.lr_plan.name}, {facts.warmup_steps} warm-up steps",
            "items": facts.num_items,
            **_reference_facts(config, facts),
            "batches an epoch": facts.batches_per_epoch,
            "steps": f"{facts.max_train_steps} of {loop.accumulation} x {loop.world_size} batches",
            "epochs": facts.num_epochs,
            "seed": facts.seed,
        },
    )


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


def _log_training_plan(network: LoRANetwork, *, mode: str, facts: dict[str, object]) -> None:
    """Modules and parameters per modality, and the run's length."""
    counts = {kind: count for kind, count in network.summary().items() if count.modules}
    rows = [[kind, count.modules, count.params, format_bytes(4 * count.params)] for kind, count in counts.items()]
    logger.info(format_table(["stream", "modules", "parameters", "fp32 size"], rows, title="What will be trained"))
    logger.info(format_table(["setting", "value"], list(facts.items())))
    for wanted in {"video": ("video",), "audio": ("audio",), "av": ("video", "audio")}[mode]:
        if wanted not in counts:
            logger.warning(
                "mode %s, but no %s module is trained; see --lora_target_preset and include_patterns",
                mode,
                wanted,
            )
