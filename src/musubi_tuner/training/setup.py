"""The parts of a run, made from its flags."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from musubi_tuner.assembly.base import Base
from musubi_tuner.assembly.quantization import LoftQRequest
from musubi_tuner.assembly.transformer import assemble_transformer
from musubi_tuner.common.av import AV
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.seeding import derive_seed
from musubi_tuner.config.model import Mode
from musubi_tuner.config.network import LYCORIS
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.dataset.batch import SampleKey
from musubi_tuner.dataset.buckets import SPATIAL_STRIDE
from musubi_tuner.dataset.loader import BatchLoader
from musubi_tuner.diffusion.balance import BalanceSettings
from musubi_tuner.diffusion.level_pool import LevelPool
from musubi_tuner.diffusion.timesteps import NoiseLevelSampler, default_shifted_logit_mode
from musubi_tuner.memory.compilation import check_backend
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.ltx2.load import Edits, check_editable, transformer_shapes
from musubi_tuner.models.ltx2.transformer import LTX2Transformer
from musubi_tuner.networks.adapter_network import AdapterNetwork
from musubi_tuner.networks.files.lora_reader import LoraReader
from musubi_tuner.networks.lora_ltx2 import check_arguments, check_file_arguments
from musubi_tuner.networks.lycoris.files import LycorisReader
from musubi_tuner.networks.merge_on_load import open_base_weights, weight_edits
from musubi_tuner.networks.network_args import parse_network_args
from musubi_tuner.networks.resolve import BUILT_IN, resolve_network_module

from .audio_watch import AudioWatch
from .compute import Compute
from .distributed import check_launch
from .lr_plan import make_plan, schedule_settings
from .lr_schedulers import ScheduleSettings
from .optimization import check_optimizer
from .references import audio_reference_rules
from .step import TaskSettings
from .supervision import SupervisionSettings
from .tracking import check_trackers
from .trainer import LoopSettings

logger = logging.getLogger(__name__)


def network_options(config: TrainNetworkConfig) -> dict[str, Any]:
    """Keywords of the network's making, from ``--network_args`` and the flags that only some networks have."""
    network = config.network
    options: dict[str, Any] = {"lora_target_preset": network.lora_target_preset}
    if network.network_module == LYCORIS:
        options |= {"lycoris_config": network.lycoris_config, "init_lokr_norm": network.init_lokr_norm}
    for text in config.network.network_args:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--network_args: expected key=value, got {text!r}")
        options[key.strip()] = value
    return options


def made_with(config: TrainNetworkConfig) -> dict[str, Any]:
    """Keywords with which a network is made."""
    return {"dropout": config.network.network_dropout, **network_options(config)}


def file_options(config: TrainNetworkConfig) -> dict[str, Any]:
    """Options of a network whose modules are those of a file."""
    chosen = ("lora_target_preset", "lycoris_config", "init_lokr_norm")
    options = {k: v for k, v in network_options(config).items() if k not in chosen}
    return {"dropout": config.network.network_dropout, **options}


def check_model(config: TrainNetworkConfig, checkpoint: Checkpoint) -> Edits:
    """What ``--base_weights`` makes of the weights; says before they are loaded what does not fit them.

    Raises:
        UserError: network options or files of ``--base_weights`` that do not fit the checkpoint.
    """
    settings = config.network
    shapes = transformer_shapes(checkpoint, streams_built(config))
    if settings.dim_from_weights and settings.network_dim is not None:
        logger.warning("--network_dim has no effect: --dim_from_weights takes the ranks of --network_weights")
    linears = [n.removesuffix(".weight") for n, shape in shapes.items() if n.endswith(".weight") and len(shape) == 2]
    if settings.network_module in BUILT_IN and not settings.dim_from_weights:
        check_arguments(linears, settings.network_dim, settings.network_alpha, **made_with(config))
    elif settings.network_module == LYCORIS:
        reading = layers_read(config, linears)
        if config.quantization.nf4_base or config.quantization.fp8_base or config.quantization.int8_base:
            resolve_network_module(LYCORIS).refuse_quantised(reading)
    if settings.base_weights:
        check_editable(checkpoint)
    return weight_edits(open_base_weights(settings.base_weights, settings.base_weights_multiplier), shapes)


def layers_read(config: TrainNetworkConfig, linears: Sequence[str]) -> list[str]:
    """Those of the layers whose base weights the network reads, and so wants dense: LyCORIS's with ``dora_wd``.

    Raises:
        UserError: options of the network that do not fit the layers.
    """
    settings = config.network
    if settings.network_module != LYCORIS:
        return []
    bridge = resolve_network_module(LYCORIS)
    if settings.dim_from_weights:
        return bridge.decomposed_in_file(settings.network_weights, linears)
    return bridge.decomposed_layers(linears, settings.network_dim, settings.network_alpha, made_with(config))


def streams_built(config: TrainNetworkConfig) -> Mode:
    """Which modules of the transformer a run has: ``video``, ``av`` or ``audio``."""
    mode = config.checkpoint.ltx2_mode
    return "av" if mode == "audio" and not config.version.ltx2_audio_only_model else mode


def make_network(config: TrainNetworkConfig, transformer: LTX2Transformer) -> AdapterNetwork:
    """The network of a run, with the weights of ``--network_weights``; ``transformer`` may be on the meta device."""
    settings = config.network
    module = resolve_network_module(settings.network_module)
    if settings.dim_from_weights:
        options = file_options(config)
        return module.create_network_from_weights(1.0, settings.network_weights, transformer, **options)
    sizes = settings.network_dim, settings.network_alpha
    network = module.create_network(1.0, *sizes, transformer, **made_with(config))
    if settings.network_weights is not None:
        network.load_weights(settings.network_weights)
    return network


def ready_to_train(config: TrainNetworkConfig, network: AdapterNetwork, dtype: torch.dtype) -> None:
    """Bring a network into the dtype and mode of training; ``dtype``: what a run computes in."""
    if config.precision.full_fp16 or config.precision.full_bf16:
        network.to(dtype=dtype)
    network.train()


def load_model(
    config: TrainNetworkConfig, base: Base, seed: int, loftq: LoftQRequest | None
) -> tuple[LTX2Transformer, AdapterNetwork]:
    """The transformer with the network on it, both ready to train; ``seed`` is the run's."""
    if base.streams != config.checkpoint.ltx2_mode:
        logger.info(
            "mode audio with the whole transformer: modules of the attention between the streams get no gradient, "
            "since there is no video; --ltx2_audio_only_model leaves them out and loads a sixth of the weights"
        )
    torch.manual_seed(derive_seed(seed, "network"))  # the LoRA starts at random values
    transformer, network = assemble_transformer(
        base,
        network=partial(make_network, config),
        compilation=config.compilation.settings,
        memory=config.memory.settings,
        loftq=loftq,
    )
    ready_to_train(config, network, base.dtype)
    return transformer, network


def run_schedule(config: TrainNetworkConfig, loader: BatchLoader, accelerator: Accelerator) -> ScheduleSettings:
    """The run's length and what its schedule is made from."""
    settings = config.optimizer
    updates = math.ceil(loader.batches_per_epoch(accelerator.num_processes) / settings.gradient_accumulation_steps)
    total = settings.max_train_steps
    if settings.max_train_epochs is not None:
        total = settings.max_train_epochs * updates
    return schedule_settings(settings, total)


def loop_settings(
    config: TrainNetworkConfig,
    schedule: ScheduleSettings,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> LoopSettings:
    settings = config.optimizer
    return LoopSettings(
        total_steps=schedule.total_steps,
        accumulation=settings.gradient_accumulation_steps,
        max_grad_norm=settings.max_grad_norm,
        lr_plan=make_plan(settings, schedule, optimizer),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )


def level_sampler(config: TrainNetworkConfig, version: str) -> NoiseLevelSampler:
    timestep = config.timestep
    return NoiseLevelSampler(
        sampling=timestep.timestep_sampling,
        shifted_logit_mode=timestep.shifted_logit_mode or default_shifted_logit_mode(version),
        mean=timestep.logit_mean,
        std=timestep.logit_std,
        eps=timestep.shifted_logit_eps,
        uniform_prob=timestep.shifted_logit_uniform_prob,
        shift=timestep.shifted_logit_shift,
        flow_shift=timestep.discrete_flow_shift,
        sigmoid_scale=timestep.sigmoid_scale,
        preserve_shape=timestep.preserve_distribution_shape,
        min_sigma=(timestep.min_timestep or 0) / 1000,
        max_sigma=(1000 if timestep.max_timestep is None else timestep.max_timestep) / 1000,
    )


def task_settings(
    config: TrainNetworkConfig, version: str, compute: Compute, seed: int, samples: Sequence[SampleKey]
) -> TaskSettings:
    """``samples`` are all of an epoch."""
    loss, buckets = config.loss, config.timestep.num_timestep_buckets
    resolution = config.data.audio_only_sequence_resolution
    return TaskSettings(
        sampler=level_sampler(config, version),
        seed=seed,
        device=compute.device,
        dtype=compute.dtype,
        loss_type=loss.loss_type,
        huber_delta=loss.huber_delta,
        weights=AV(video=loss.video_loss_weight, audio=loss.audio_loss_weight),
        first_frame_p=loss.ltx2_first_frame_conditioning_p,
        caption_dropout_rate=loss.caption_dropout_rate,
        independent_audio_timestep=config.timestep.independent_audio_timestep,
        audio_reference=audio_reference_rules(config),
        level_pool=None if buckets is None else LevelPool(seed, buckets, samples),
        silence_weight=config.audio_loss.audio_silence_regularizer_weight
        if config.audio_loss.audio_silence_regularizer
        else None,
        audio_only_side=max(resolution // SPATIAL_STRIDE, 1) if resolution else None,
    )


def audio_watch(config: TrainNetworkConfig) -> AudioWatch:
    settings = config.audio_loss
    balance = supervision = None
    if settings.audio_loss_balance_mode != "none":
        balance = BalanceSettings(
            mode=settings.audio_loss_balance_mode,
            beta=settings.audio_loss_balance_beta,
            eps=settings.audio_loss_balance_eps,
            minimum=settings.audio_loss_balance_min,
            maximum=settings.audio_loss_balance_max,
            ema_init=settings.audio_loss_balance_ema_init,
            target_ratio=settings.audio_loss_balance_target_ratio,
            ema_decay=settings.audio_loss_balance_ema_decay,
        )
    if settings.audio_supervision_mode != "off":
        supervision = SupervisionSettings(
            mode=settings.audio_supervision_mode,
            warmup=settings.audio_supervision_warmup_steps,
            interval=settings.audio_supervision_check_interval,
            min_ratio=settings.audio_supervision_min_ratio,
        )
    return AudioWatch(config.loss.audio_loss_weight, balance, supervision)


def check_choices(config: TrainNetworkConfig) -> None:
    """Raise UserError for a wrong launch, optimizer, schedule, tracker, network option or LoRA file, at once."""
    check_launch(os.environ)
    check_trackers(config.tracking)
    if config.compilation.settings is not None:
        check_backend(config.compilation.settings)
    options = network_options(config)
    check_optimizer(config.optimizer, config.network, options.get("loraplus_lr_ratio"))
    if config.network.network_module in BUILT_IN:
        args = parse_network_args(options)
        if args.use_dora and config.calibration.loftq_init:
            raise UserError(
                "--loftq_init and --network_args use_dora exclude each other: the lengths of DoRA are those of the "
                "quantised weights; leave one out"
            )
        if config.network.dim_from_weights:
            check_file_arguments(file_options(config))
    elif config.network.network_module == LYCORIS:
        bridge = resolve_network_module(LYCORIS)
        if config.network.dim_from_weights:
            bridge.check_file_arguments(file_options(config))
        else:
            bridge.check_formats(made_with(config), comfy=config.save.convert_to_comfy)
    else:
        resolve_network_module(config.network.network_module)  # says what is wrong with the name
    if config.network.network_weights is not None:
        # Says what is wrong with the file.
        (LycorisReader if config.network.network_module == LYCORIS else LoraReader)(config.network.network_weights)
    open_base_weights(config.network.base_weights, config.network.base_weights_multiplier)
