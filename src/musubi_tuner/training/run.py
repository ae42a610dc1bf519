"""From flags to a finished run: checks, data, model, network, optimizer, loop."""

from __future__ import annotations

import logging
import secrets
import time
from dataclasses import replace

from accelerate.utils import broadcast_object_list

from musubi_tuner.assembly.quantization import loftq_request, quantization_settings
from musubi_tuner.assembly.transformer import check_memory
from musubi_tuner.common.errors import ConfigErrors
from musubi_tuner.config.notices import without_effect
from musubi_tuner.config.references import resolve_strategy
from musubi_tuner.config.rules_training import mode_fits
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.dataset.entries import DatasetConfig
from musubi_tuner.dataset.items import TrainingSet
from musubi_tuner.generation.decode import Decoders
from musubi_tuner.generation.run import Job
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.ltx2.quantize import check_quantization

from .calibration import calibrated
from .data import make_loader, read_datasets, validation_set
from .dry_run import run_dry_run
from .hub import make_uploader
from .memory_outlook import memory_outlook, told_with
from .optimization import (
    check_fused_backward,
    fused_backward_pass,
    make_optimizer,
    parameter_names,
    warn_of_rates,
    weight_actions,
    weight_average,
)
from .outlook import by_stream
from .plan import report_plan, run_facts
from .previews import Previewer, make_decoders, prepare_jobs, wants_previews, warn_of_other_connectors
from .references import check_references
from .resume import find_resumed, resume_settings
from .saving import Saver
from .setup import (
    Compute,
    audio_watch,
    check_choices,
    check_model,
    load_model,
    loop_settings,
    make_compute,
    make_scaler,
    run_schedule,
    streams_built,
    task_settings,
)
from .state import Progress
from .summary import RunSummary, written_files
from .tracking import CudaMemoryLog, ScalarLog, Tracking, start_trackers
from .trainer import Listener, Trainer
from .validation import make_validator, wants_validation
from .version import resolve_version

logger = logging.getLogger(__name__)


def train(config: TrainNetworkConfig, explicit: frozenset[str]) -> int:
    """Run ``ltx2_train_network.py``.

    Raises:
        UserError: anything that the user can mend; before the model is loaded where possible.
    """
    check_choices(config)
    checkpoint = Checkpoint.open(config.checkpoint.ltx2_checkpoint)
    checkpoint.require("transformer", "training")
    version = resolve_version(config.version, explicit="ltx_version" in explicit, checkpoint=checkpoint)
    datasets, config = read_datasets(config)
    if unfit := list(mode_fits(config)):  # again: the datasets may have changed the mode
        raise ConfigErrors(unfit, "invalid arguments")
    config = _with_implied(config, explicit)
    check_references(config, datasets)
    resumed = find_resumed(config)
    compute = make_compute(config)
    world_size = compute.accelerator.num_processes
    check_fused_backward(config.optimizer, compute.mixed_precision, world_size, compute.device)
    quantization = quantization_settings(config.quantization, compute.device, config.calibration)
    check_quantization(checkpoint, quantization)
    edits = check_model(config, checkpoint)
    loftq = loftq_request(
        config.calibration, config.network.network_dim, checkpoint, iterations_given="loftq_iters" in explicit
    )
    check_memory(config.memory.settings, checkpoint, device=compute.device, dtype=compute.dtype)
    progress = resumed.progress if resumed else Progress(seed=_seed(config))
    loader = make_loader(config, datasets, checkpoint, seed=progress.seed, world_size=world_size, device=compute.device)
    schedule = run_schedule(config, loader, compute.accelerator)
    validation = validation_set(config, datasets, checkpoint) if wants_validation(config, datasets) else None
    _warn_of_defaults(config, explicit, progress)
    memory = memory_outlook(config, checkpoint, compute, quantization, loader.plan)
    memory.check(ignore=config.memory.ignore_memory_estimate)

    # Gemma comes and goes before the transformer is loaded: they need not fit into memory together.
    jobs, decoders = _previews(config, checkpoint, datasets, loader.plan.training_set, compute)
    task = task_settings(config, version, compute, progress.seed, loader.plan.training_set.sample_keys())
    with told_with(memory):
        quantization = calibrated(config, checkpoint, quantization, loader.plan, task, streams_built(config), edits)
        transformer, network = load_model(config, checkpoint, compute, progress.seed, quantization, edits, loftq)
    optimizer = make_optimizer(config, network)
    names = parameter_names(network, optimizer)
    warn_of_rates(config, optimizer)
    loop = loop_settings(config, schedule, optimizer, compute.accelerator)
    average = weight_average(config, network)
    if resumed:
        resumed.restore(network, optimizer, names, resume_settings(config, loop), average)
        compute.accelerator.wait_for_everyone()  # the first process tidies the folder that all have read from
    scaler = make_scaler(compute, progress)
    facts = run_facts(config, version, progress, loop, schedule, loader, optimizer, task, compute)
    report_plan(config, optimizer, names, loader, facts, loop, memory)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if config.validation.dry_run:
        return run_dry_run(config, transformer, parameters, loader.plan, task, memory)

    tracking = Tracking(compute.accelerator)
    listeners = _logs(config, tracking, compute)
    previewer = None
    if compute.accelerator.is_main_process:
        settings, uploader = resume_settings(config, loop), make_uploader(config.hub)
        listeners.append(Saver(config, facts, network, optimizer, names, settings, scaler, average, uploader))
        if decoders is not None:
            previewer = Previewer(
                config, jobs, decoders, transformer, network, optimizer, compute.device, compute.dtype, tracking
            )
            listeners.append(previewer)
    validator = None
    if validation is not None:
        validator = make_validator(config, validation, task, transformer, network, optimizer, loop, tracking)
        listeners.append(validator)  # after those of the first process alone, for which the others wait here
    start_trackers(compute.accelerator, config)
    watch, norm_groups = audio_watch(config), by_stream(names, parameters)
    actions = weight_actions(config, network, average)
    first_step, started = progress.global_step, time.time()
    trainer = Trainer(
        transformer,
        parameters,
        optimizer,
        loader,
        task,
        loop,
        progress,
        listeners,
        scaler,
        audio_watch=watch,
        weight_actions=actions,
        norm_groups=norm_groups,
        fused=fused_backward_pass(config.optimizer, optimizer, norm_groups),
    )
    with told_with(memory):
        trainer.run()
    compute.accelerator.end_training()
    RunSummary(
        first_step=first_step,
        progress=progress,
        seconds=time.time() - started,
        validation=validator.last if validator else {},
        files=written_files(config.save.output_dir, config.save.output_name, started),
        peak_memory=memory.peak(),
    ).log()
    return 1 if previewer and previewer.failures else 0


def _logs(config: TrainNetworkConfig, tracking: Tracking, compute: Compute) -> list[Listener]:
    every = config.tracking.log_cuda_memory_every_n_steps
    logs: list[Listener] = [ScalarLog(tracking)]
    return [*logs, CudaMemoryLog(tracking, compute.device, every)] if every else logs


def _previews(
    config: TrainNetworkConfig,
    checkpoint: Checkpoint,
    datasets: DatasetConfig,
    training_set: TrainingSet,
    compute: Compute,
) -> tuple[list[Job], Decoders | None]:
    """The prompts to render, encoded, and what decodes them, on the process that renders; Gemma comes and goes here."""
    if not (wants_previews(config) and compute.accelerator.is_main_process):
        return [], None
    warn_of_other_connectors(config, training_set, checkpoint)
    jobs = prepare_jobs(config, checkpoint, datasets, device=compute.device)
    return jobs, make_decoders(config, checkpoint, device=compute.device) if jobs else None


def _seed(config: TrainNetworkConfig) -> int:
    if config.optimizer.seed is not None:
        return config.optimizer.seed
    drawn = [secrets.randbelow(2**32)]
    broadcast_object_list(drawn)  # all processes use the first one's
    logger.info("--seed not given: drew %d", drawn[0])
    return drawn[0]


def _with_implied(config: TrainNetworkConfig, explicit: frozenset[str]) -> TrainNetworkConfig:
    """Fill in what one flag implies for another."""
    network, references = config.network, config.references
    if "lora_target_preset" not in explicit:
        if config.checkpoint.ltx2_mode == "audio":
            logger.info("--ltx2_mode audio: using --lora_target_preset audio")
            network = replace(network, lora_target_preset="audio")
        elif references.ic_lora_strategy == "audio_ref_only_ic":
            logger.info("--ic_lora_strategy audio_ref_only_ic: using the --lora_target_preset of that name")
            network = replace(network, lora_target_preset="audio_ref_only_ic")
    if wants_previews(config) and not (config.gemma.gemma_root or config.gemma.gemma_safetensors):
        if not config.preview.use_precached_sample_prompts:
            logger.info(
                "previews read the cached prompts; --gemma_root or --gemma_safetensors encodes them at the start"
            )
        config = replace(config, preview=replace(config.preview, use_precached_sample_prompts=True))
    strategy = resolve_strategy(references.ic_lora_strategy, network.lora_target_preset)
    return replace(config, network=network, references=replace(references, ic_lora_strategy=strategy))


def _warn_of_defaults(config: TrainNetworkConfig, explicit: frozenset[str], progress: Progress) -> None:
    for notice in without_effect(config, explicit):
        logger.warning("%s", notice)
    if config.memory.settings.attention == "sdpa" and not config.memory.sdpa:
        logger.info("no attention kernel named: using --sdpa")
    if "learning_rate" not in explicit:
        logger.warning("--learning_rate not given: using 2e-6; LoRA runs usually use about 1e-4")
    if "network_alpha" not in explicit:
        logger.warning("--network_alpha not given: using 1, so the LoRA acts with 1/rank of its strength")
    if not (config.save.convert_to_comfy or config.save.save_original_lora):
        logger.warning("--no_convert_to_comfy and --no_save_original_lora leave no format: the original is kept")
    if config.optimizer.seed not in (None, progress.seed):
        logger.warning("--seed %d: the resumed run goes on with its own, %d", config.optimizer.seed, progress.seed)
