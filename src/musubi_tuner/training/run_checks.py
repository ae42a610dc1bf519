"""The first step of a run: everything that can be found wrong from flags and headers, before anything is read."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, replace
from typing import Any

from accelerate.utils import broadcast_object_list

from musubi_tuner.assembly.base import Base
from musubi_tuner.assembly.quantization import LoftQRequest, loftq_request, quantization_settings
from musubi_tuner.assembly.transformer import check_memory
from musubi_tuner.common.errors import ConfigErrors
from musubi_tuner.common.log import quiet
from musubi_tuner.config.network import LYCORIS
from musubi_tuner.config.notices import without_effect
from musubi_tuner.config.references import resolve_strategy
from musubi_tuner.config.rules_training import mode_fits
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.dataset.entries import DatasetConfig
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.ltx2.load import build_transformer, transformer_config
from musubi_tuner.models.ltx2.quantize import check_quantization, stored_transformer

from .compute import Compute, make_compute
from .data import read_datasets
from .optimization import check_fused_backward, make_optimizer, parameter_names
from .previews import wants_previews
from .references import check_references
from .resume import Resumed, find_resumed, resume_settings
from .setup import check_choices, check_model, make_network, ready_to_train, streams_built
from .state import Progress
from .version import resolve_version

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckedRun:
    """What is known of a run once its flags are checked."""

    config: TrainNetworkConfig  # with what flags and datasets imply filled in
    explicit: frozenset[str]  # flags that were given
    base: Base
    version: str
    datasets: DatasetConfig
    compute: Compute
    loftq: LoftQRequest | None
    resumed: Resumed | None
    settings: dict[str, Any]  # what must not change when the run is resumed
    progress: Progress  # where the run starts; the loop moves it

    @property
    def checkpoint(self) -> Checkpoint:
        return self.base.checkpoint


def check_run(config: TrainNetworkConfig, explicit: frozenset[str]) -> CheckedRun:
    """Check a run and find where it starts.

    Raises:
        UserError, ConfigErrors: flags, checkpoint, datasets, launch or state do not fit together.
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
    base, loftq = _checked_base(config, explicit, checkpoint, compute)
    own_base = stored_transformer(checkpoint).own_base
    if own_base is not None:  # what a resumed run is held against
        config = replace(config, calibration=replace(config.calibration, loftq_iters=own_base.iterations))
    settings = resume_settings(config, compute.accelerator.num_processes, own_base=own_base is not None)
    if resumed is not None:
        resumed.check_settings(settings)
        _check_resumed(resumed, config, base)
    return CheckedRun(
        config=config,
        explicit=explicit,
        base=base,
        version=version,
        datasets=datasets,
        compute=compute,
        loftq=loftq,
        resumed=resumed,
        settings=settings,
        progress=resumed.progress if resumed else Progress(seed=_seed(config)),
    )


def warn_of_defaults(checked: CheckedRun) -> None:
    """Log what the flags leave open, and what of them has no effect."""
    config, explicit, seed = checked.config, checked.explicit, checked.progress.seed
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
    if config.optimizer.seed not in (None, seed):
        logger.warning("--seed %d: the resumed run goes on with its own, %d", config.optimizer.seed, seed)


def _checked_base(
    config: TrainNetworkConfig, explicit: frozenset[str], checkpoint: Checkpoint, compute: Compute
) -> tuple[Base, LoftQRequest | None]:
    """How the base weights are to be held, and how the LoRA starts on them.

    Raises:
        UserError, ConfigErrors: the checkpoint or the device does not allow it.
    """
    world_size = compute.accelerator.num_processes
    check_fused_backward(config.optimizer, compute.mixed_precision, world_size, compute.device)
    quantization = quantization_settings(config.quantization, compute.device, config.calibration)
    check_quantization(checkpoint, quantization)
    edits = check_model(config, checkpoint)
    loftq = loftq_request(
        config.calibration, config.network.network_dim, checkpoint, iterations_given="loftq_iters" in explicit
    )
    base = Base(checkpoint, streams_built(config), compute.dtype, compute.device, quantization, edits)
    check_memory(config.memory.settings, base)
    return base, loftq


def _check_resumed(resumed: Resumed, config: TrainNetworkConfig, base: Base) -> None:
    """Hold a state against the network and optimizer of the run, made for a transformer that is not loaded.

    Raises:
        UserError: it is of another network or optimizer.
    """
    with quiet("musubi_tuner.networks"):  # what is to be said of the network is said when it is made to be trained
        network = make_network(config, build_transformer(transformer_config(base.checkpoint), base.streams))
    ready_to_train(config, network, base.dtype)
    optimizer = make_optimizer(config, network)
    resumed.check_parts(network, optimizer, parameter_names(network, optimizer))


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
        elif network.network_module == LYCORIS:
            logger.info("LyCORIS without --lora_target_preset: using no_gates, all linear layers but the gates")
            network = replace(network, lora_target_preset="no_gates")
    if wants_previews(config) and not (config.gemma.gemma_root or config.gemma.gemma_safetensors):
        if not config.preview.use_precached_sample_prompts:
            logger.info(
                "previews read the cached prompts; --gemma_root or --gemma_safetensors encodes them at the start"
            )
        config = replace(config, preview=replace(config.preview, use_precached_sample_prompts=True))
    strategy = resolve_strategy(references.ic_lora_strategy, network.lora_target_preset)
    return replace(config, network=network, references=replace(references, ic_lora_strategy=strategy))
