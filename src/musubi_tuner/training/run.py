"""From flags to a finished run: checks, data, model, network, optimizer, loop."""

from __future__ import annotations

import logging
import math
import os
import secrets
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list

from musubi_tuner.assembly.transformer import assemble_transformer
from musubi_tuner.common.av import AV
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.seeding import derive_seed
from musubi_tuner.common.tables import format_bytes
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.dataset.buckets import SPATIAL_STRIDE
from musubi_tuner.dataset.loader import BatchLoader
from musubi_tuner.diffusion.timesteps import NoiseLevelSampler, default_shifted_logit_mode
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.ltx2.transformer import LTX2Transformer
from musubi_tuner.networks.lora_ltx2 import LoRANetwork
from musubi_tuner.networks.param_groups import param_groups
from musubi_tuner.networks.resolve import resolve_network_module

from .data import make_loader, read_datasets
from .lr_schedulers import ScheduleSettings, lr_factor, resolve_steps
from .metadata import RunFacts
from .optimizers import create_optimizer, optimizer_class
from .previews import Previewer, make_decoders, prepare_jobs, wants_previews
from .report import log_training_plan
from .saving import Saver
from .state import Progress, find_latest_state, read_progress, restore_network, restore_optimizer
from .step import TaskSettings
from .tracking import ScalarLog, log_folder, start_trackers, tracker_names
from .trainer import Listener, LoopSettings, Trainer
from .version import resolve_version

logger = logging.getLogger(__name__)


# The other processes wait in the next step while the first one renders previews and saves.
_PATIENCE = timedelta(hours=2)
_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """Where and in what dtype the run computes."""

    accelerator: Accelerator
    device: torch.device
    dtype: torch.dtype
    mixed_precision: str


def train(config: TrainNetworkConfig, explicit: frozenset[str]) -> int:
    """Run ``ltx2_train_network.py``.

    Raises:
        UserError: anything that the user can mend; before the model is loaded where possible.
    """
    _check_choices(config)
    checkpoint = Checkpoint.open(config.checkpoint.ltx2_checkpoint)
    checkpoint.require("transformer", "training")
    version = resolve_version(config.version, explicit="ltx_version" in explicit, checkpoint=checkpoint)
    datasets, config = read_datasets(config)
    config = _with_implied(config, explicit)
    resumed = _resumed(config)
    compute = _compute(config)
    progress = resumed.progress if resumed else Progress(seed=_seed(config))
    loader = make_loader(config, datasets, checkpoint, seed=progress.seed)
    _warn_of_defaults(config, explicit, progress)

    # Gemma comes and goes before the transformer is loaded: they need not fit into memory together.
    jobs = prepare_jobs(config, checkpoint, datasets, device=compute.device) if wants_previews(config) else []
    decoders = make_decoders(config, checkpoint, device=compute.device) if jobs else None
    transformer, network = _model(config, checkpoint, compute, progress.seed)
    optimizer = _optimizer(config, network)
    names = _parameter_names(network, optimizer)
    loop = _loop_settings(config, loader, optimizer, compute.accelerator)
    if resumed:
        resumed.restore(network, optimizer, names, _resume_settings(config, loop))
    task = _task_settings(config, version, compute, progress.seed)
    scaler = _scaler(compute, progress)
    facts = _facts(config, version, progress, loop, loader, optimizer, task, compute)
    _report_plan(config, network, transformer, facts, loop)

    listeners: list[Listener] = [ScalarLog(compute.accelerator)]
    if compute.accelerator.is_main_process:
        listeners.append(Saver(config, facts, network, optimizer, names, _resume_settings(config, loop), scaler))
    previewer = None
    if jobs and compute.accelerator.is_main_process:
        previewer = Previewer(config, jobs, decoders, transformer, network, compute.device, compute.dtype)
        listeners.append(previewer)
    start_trackers(compute.accelerator, config)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    Trainer(transformer, parameters, optimizer, loader, task, loop, progress, listeners, scaler).run()
    compute.accelerator.end_training()
    logger.info("done: %d steps, files in %s", progress.global_step, config.save.output_dir)
    return 1 if previewer and previewer.failures else 0


@dataclass(frozen=True)
class Resumed:
    """A state folder that has been read but not yet applied."""

    folder: Path
    progress: Progress
    settings: dict[str, Any]
    optimizer: dict[str, Any]

    def restore(
        self,
        network: LoRANetwork,
        optimizer: torch.optim.Optimizer,
        names: list[str],
        settings: dict[str, Any],
    ) -> None:
        """Put weights and optimizer back.

        Raises:
            UserError: the state was made with settings that differ where they must not.
        """
        different = [f"{k} {self.settings.get(k)} (now {v})" for k, v in settings.items() if self.settings.get(k) != v]
        if different:
            raise UserError(
                f"{self.folder}: was saved with {'; '.join(different)}; resume with the same values, or start a new "
                "run from the LoRA with --network_weights"
            )
        restore_network(self.folder, network)
        restore_optimizer(self.folder, self.optimizer, optimizer, names)
        logger.info("resumed from %s at step %d", self.folder, self.progress.global_step)


def _check_choices(config: TrainNetworkConfig) -> None:
    """Raise UserError for a wrong optimizer, schedule or network option before anything is loaded."""
    settings = config.optimizer
    optimizer_class(settings.optimizer_type)
    lr_factor(settings.lr_scheduler, 0, ScheduleSettings(1, min_lr_ratio=settings.lr_scheduler_min_lr_ratio))
    _network_options(config)


def _network_options(config: TrainNetworkConfig) -> dict[str, str]:
    options = {"lora_target_preset": config.network.lora_target_preset}
    for text in config.network.network_args:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--network_args: expected key=value, got {text!r}")
        options[key.strip()] = value
    return options


def _resumed(config: TrainNetworkConfig) -> Resumed | None:
    folder = config.save.resume
    if folder is None and config.save.autoresume:
        folder = find_latest_state(config.save.output_dir, config.save.output_name)
        if folder is None:
            logger.info("--autoresume: no state in %s, starting from scratch", config.save.output_dir)
    if folder is None:
        return None
    progress, settings, optimizer = read_progress(folder)
    return Resumed(folder, progress, settings, optimizer)


def _seed(config: TrainNetworkConfig) -> int:
    if config.optimizer.seed is not None:
        return config.optimizer.seed
    drawn = [secrets.randbelow(2**32)]
    broadcast_object_list(drawn)  # all processes use the first one's
    logger.info("--seed not given: drew %d", drawn[0])
    return drawn[0]


def _with_implied(config: TrainNetworkConfig, explicit: frozenset[str]) -> TrainNetworkConfig:
    """Fill in what one flag implies for another."""
    if config.checkpoint.ltx2_mode == "audio" and "lora_target_preset" not in explicit:
        logger.info("--ltx2_mode audio: using --lora_target_preset audio")
        config = replace(config, network=replace(config.network, lora_target_preset="audio"))
    return config


def _warn_of_defaults(config: TrainNetworkConfig, explicit: frozenset[str], progress: Progress) -> None:
    if "learning_rate" not in explicit:
        logger.warning("--learning_rate not given: using 2e-6; LoRA runs usually use about 1e-4")
    if "network_alpha" not in explicit:
        logger.warning("--network_alpha not given: using 1, so the LoRA acts with 1/rank of its strength")
    if config.optimizer.lr_scheduler == "constant" and config.optimizer.lr_warmup_steps:
        logger.warning("--lr_scheduler constant has no warm-up; use constant_with_warmup")
    if config.optimizer.seed not in (None, progress.seed):
        logger.warning("--seed %d: the resumed run goes on with its own, %d", config.optimizer.seed, progress.seed)


def _compute(config: TrainNetworkConfig) -> Compute:
    precision = config.precision.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision is None:
        precision = "bf16" if torch.cuda.is_available() else "no"
        logger.info("--mixed_precision not given: using %s", precision)
    if precision not in _DTYPES:
        raise UserError(f"mixed precision {precision!r}: expected one of {', '.join(_DTYPES)}; use --mixed_precision")
    accelerator = Accelerator(
        mixed_precision="no",  # dtypes are set here, tensor by tensor; autocast would only add casts
        log_with=tracker_names(config.tracking) or None,
        project_dir=log_folder(config.tracking),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise UserError(
            f"accelerate is set up for {accelerator.distributed_type.value}, which this trainer does not support; run "
            "accelerate config again, or accelerate launch --multi_gpu"
        )
    return Compute(accelerator, accelerator.device, _DTYPES[precision], precision)


def _model(
    config: TrainNetworkConfig, checkpoint: Checkpoint, compute: Compute, seed: int
) -> tuple[LTX2Transformer, LoRANetwork]:
    settings = config.network
    module = resolve_network_module(settings.network_module)

    def make(transformer: LTX2Transformer) -> LoRANetwork:
        return module.create_network(
            1.0,
            settings.network_dim,
            settings.network_alpha,
            transformer,
            dropout=settings.network_dropout,
            **_network_options(config),
        )

    mode = config.checkpoint.ltx2_mode
    streams = mode
    if mode == "audio" and not config.version.ltx2_audio_only_model:
        streams = "av"
        logger.info(
            "mode audio with the whole transformer: modules of the attention between the streams get no gradient, "
            "since there is no video; --ltx2_audio_only_model leaves them out and loads a sixth of the weights"
        )
    torch.manual_seed(derive_seed(seed, "network"))  # the LoRA starts at random values
    transformer, network = assemble_transformer(
        checkpoint,
        streams=streams,
        dtype=compute.dtype,
        device=compute.device,
        network=make,
        gradient_checkpointing=config.memory.gradient_checkpointing,
    )
    if settings.network_weights is not None:
        network.load_weights(settings.network_weights)
    network.train()
    return transformer, network


def _optimizer(config: TrainNetworkConfig, network: LoRANetwork) -> torch.optim.Optimizer:
    settings = config.optimizer
    groups = param_groups(
        network,
        settings.learning_rate,
        settings.audio_lr,
        settings.lr_args,
        loraplus_lr_ratio=network.args.loraplus_lr_ratio,
    )
    return create_optimizer(settings.optimizer_type, groups, settings.optimizer_args)


def _parameter_names(network: LoRANetwork, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters, in the order of its groups."""
    names = {id(p): n for n, p in network.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _loop_settings(
    config: TrainNetworkConfig, loader: BatchLoader, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> LoopSettings:
    settings = config.optimizer
    world = accelerator.num_processes
    updates = math.ceil(loader.batches_per_epoch(world) / settings.gradient_accumulation_steps)
    total = settings.max_train_steps
    if settings.max_train_epochs is not None:
        total = settings.max_train_epochs * updates
    return LoopSettings(
        total_steps=total,
        accumulation=settings.gradient_accumulation_steps,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler=settings.lr_scheduler,
        schedule=ScheduleSettings(
            total_steps=total,
            warmup_steps=resolve_steps(settings.lr_warmup_steps, total),
            num_cycles=settings.lr_scheduler_num_cycles,
            min_lr_ratio=settings.lr_scheduler_min_lr_ratio,
        ),
        # Taken before a resumed state overwrites them: the flags of this run rule.
        base_lrs=tuple(group["lr"] for group in optimizer.param_groups),
        rank=accelerator.process_index,
        world_size=world,
    )


def _task_settings(config: TrainNetworkConfig, version: str, compute: Compute, seed: int) -> TaskSettings:
    timestep, loss = config.timestep, config.loss
    resolution = config.data.audio_only_sequence_resolution
    sampler = NoiseLevelSampler(
        sampling=timestep.timestep_sampling,
        shifted_logit_mode=timestep.shifted_logit_mode or default_shifted_logit_mode(version),
        mean=timestep.logit_mean,
        std=timestep.logit_std,
        eps=timestep.shifted_logit_eps,
        uniform_prob=timestep.shifted_logit_uniform_prob,
        shift=timestep.shifted_logit_shift,
        min_sigma=(timestep.min_timestep or 0) / 1000,
        max_sigma=(1000 if timestep.max_timestep is None else timestep.max_timestep) / 1000,
    )
    return TaskSettings(
        sampler=sampler,
        seed=seed,
        device=compute.device,
        dtype=compute.dtype,
        loss_type=loss.loss_type,
        huber_delta=loss.huber_delta,
        weights=AV(video=loss.video_loss_weight, audio=loss.audio_loss_weight),
        first_frame_p=loss.ltx2_first_frame_conditioning_p,
        caption_dropout_rate=loss.caption_dropout_rate,
        independent_audio_timestep=timestep.independent_audio_timestep,
        audio_only_side=max(resolution // SPATIAL_STRIDE, 1) if resolution else None,
    )


def _resume_settings(config: TrainNetworkConfig, loop: LoopSettings) -> dict[str, Any]:
    """What must not change between saving and resuming."""
    return {
        "ltx2_checkpoint": config.checkpoint.ltx2_checkpoint.name,
        "ltx2_mode": config.checkpoint.ltx2_mode,
        "optimizer_type": config.optimizer.optimizer_type.lower(),
        "gradient_accumulation_steps": loop.accumulation,
        "network_module": config.network.network_module,
        "processes": loop.world_size,
    }


def _scaler(compute: Compute, progress: Progress) -> torch.amp.GradScaler | None:
    if compute.mixed_precision != "fp16":
        return None
    scaler = torch.amp.GradScaler(compute.device.type)
    if progress.scaler:
        scaler.load_state_dict(progress.scaler)
    return scaler


def _facts(
    config: TrainNetworkConfig,
    version: str,
    progress: Progress,
    loop: LoopSettings,
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
        warmup_steps=loop.schedule.warmup_steps,
        preset=config.network.lora_target_preset,
        shifted_logit_mode=task.sampler.shifted_logit_mode,
        optimizer=f"{type(optimizer).__module__}.{type(optimizer).__name__}({options})",
        mixed_precision=compute.mixed_precision,
        datasets=_describe_datasets(loader),
    )


def _report_plan(
    config: TrainNetworkConfig,
    network: LoRANetwork,
    transformer: LTX2Transformer,
    facts: RunFacts,
    loop: LoopSettings,
) -> None:
    base_bytes = sum(p.numel() * p.element_size() for p in transformer.parameters())
    rate = config.optimizer.learning_rate
    log_training_plan(
        network,
        mode=config.checkpoint.ltx2_mode,
        facts={
            "model": f"LTX-{facts.version}, {config.checkpoint.ltx2_mode}, {format_bytes(base_bytes)} frozen",
            "precision": facts.mixed_precision,
            "optimizer": facts.optimizer.partition("(")[0],
            "learning rate": f"{rate:g}, {loop.lr_scheduler}, {facts.warmup_steps} warm-up steps",
            "items": facts.num_items,
            "batches an epoch": facts.batches_per_epoch,
            "steps": f"{facts.max_train_steps} of {loop.accumulation} x {loop.world_size} batches",
            "epochs": facts.num_epochs,
            "seed": facts.seed,
        },
    )


def _describe_datasets(loader: BatchLoader) -> list[dict[str, Any]]:
    """What the metadata of the LoRA says of the data; no paths."""
    return [
        {"kind": d.kind, "items": len(d.items), "batch_size": d.batch_size, "num_repeats": d.num_repeats}
        for d in loader.plan.training_set.datasets
    ]
