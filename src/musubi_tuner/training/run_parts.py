"""The second and third step of a run: its data, then its model with what trains it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter

from musubi_tuner.dataset.items import TrainingSet
from musubi_tuner.dataset.loader import BatchLoader
from musubi_tuner.generation.decode import Decoders
from musubi_tuner.generation.run import Job
from musubi_tuner.models.ltx2.transformer import LTX2Transformer
from musubi_tuner.networks.adapter_network import AdapterNetwork

from .calibration import calibrated
from .compute import make_scaler
from .data import make_loader, validation_set
from .lr_schedulers import ScheduleSettings
from .memory_outlook import MemoryOutlook, memory_outlook, told_with
from .optimization import make_optimizer, parameter_names, warn_of_rates, weight_average
from .previews import make_decoders, prepare_jobs, wants_previews, warn_of_other_connectors
from .resume import resume_settings
from .run_checks import CheckedRun, warn_of_defaults
from .setup import load_model, loop_settings, run_schedule, streams_built, task_settings
from .step import TaskSettings
from .trainer import LoopSettings
from .validation import wants_validation
from .weights import WeightAverage


@dataclass(frozen=True)
class RunData:
    """What a run reads, how long it is, and what memory it will take."""

    loader: BatchLoader
    schedule: ScheduleSettings
    validation: TrainingSet | None
    memory: MemoryOutlook

    @property
    def training_set(self) -> TrainingSet:
        return self.loader.plan.training_set


@dataclass(frozen=True)
class RunModel:
    """What a run trains and with what."""

    transformer: LTX2Transformer
    network: AdapterNetwork
    optimizer: torch.optim.Optimizer
    names: list[str]  # of the optimizer's parameters
    average: WeightAverage | None
    scaler: torch.amp.GradScaler | None
    task: TaskSettings
    loop: LoopSettings
    settings: dict[str, Any]  # what must not change when the run is resumed

    @property
    def parameters(self) -> list[Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


@dataclass(frozen=True)
class PreviewParts:
    """The prompts to render, encoded, and what decodes them; only on the process that renders."""

    jobs: list[Job]
    decoders: Decoders | None


def make_data(checked: CheckedRun) -> RunData:
    """Find the cached items and hold them against the checkpoint.

    Raises:
        UserError, ConfigErrors: no items, caches that do not fit, or less memory than the run needs.
    """
    config, compute = checked.config, checked.compute
    loader = make_loader(
        config,
        checked.datasets,
        checked.checkpoint,
        seed=checked.progress.seed,
        world_size=compute.accelerator.num_processes,
        device=compute.device,
    )
    schedule = run_schedule(config, loader, compute.accelerator)
    validates = wants_validation(config, checked.datasets)
    validation = validation_set(config, checked.datasets, checked.checkpoint) if validates else None
    warn_of_defaults(checked)
    memory = memory_outlook(config, checked.checkpoint, compute, checked.quantization, loader.plan)
    memory.check(ignore=config.memory.ignore_memory_estimate)
    return RunData(loader, schedule, validation, memory)


def make_preview_parts(checked: CheckedRun, data: RunData) -> PreviewParts:
    """Encode the prompts. Gemma comes and goes here, so that it and the transformer need not fit together."""
    config, compute = checked.config, checked.compute
    if not (wants_previews(config) and compute.accelerator.is_main_process):
        return PreviewParts([], None)
    warn_of_other_connectors(config, data.training_set, checked.checkpoint)
    jobs = prepare_jobs(config, checked.checkpoint, checked.datasets, device=compute.device)
    return PreviewParts(jobs, make_decoders(config, checked.checkpoint, device=compute.device) if jobs else None)


def make_model(checked: CheckedRun, data: RunData) -> RunModel:
    """Load the transformer, put the network on it, and bring both and the optimizer to where the run starts.

    Raises:
        UserError: memory does not suffice, or the resumed state belongs to another network, optimizer or base.
    """
    config, compute, seed = checked.config, checked.compute, checked.progress.seed
    task = task_settings(config, checked.version, compute, seed, data.training_set.sample_keys())
    transformer, network = _loaded(checked, data, task)
    optimizer = make_optimizer(config, network)
    names = parameter_names(network, optimizer)
    warn_of_rates(config, optimizer)
    loop = loop_settings(config, data.schedule, optimizer, compute.accelerator)
    own_base = checked.loftq is not None and checked.loftq.own_base
    settings, average = resume_settings(config, loop, own_base=own_base), weight_average(config, network)
    if checked.resumed:
        checked.resumed.restore(network, optimizer, names, settings, average)
        compute.accelerator.wait_for_everyone()  # the first process tidies the folder that all have read from
    return RunModel(
        transformer=transformer,
        network=network,
        optimizer=optimizer,
        names=names,
        average=average,
        scaler=make_scaler(compute, checked.progress),
        task=task,
        loop=loop,
        settings=settings,
    )


def _loaded(checked: CheckedRun, data: RunData, task: TaskSettings) -> tuple[LTX2Transformer, AdapterNetwork]:
    config, checkpoint = checked.config, checked.checkpoint
    with told_with(data.memory):
        quantization = calibrated(
            config, checkpoint, checked.quantization, data.loader.plan, task, streams_built(config), checked.edits
        )
        return load_model(config, checkpoint, checked.compute, task.seed, quantization, checked.edits, checked.loftq)
