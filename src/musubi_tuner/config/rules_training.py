"""Rules across the flags of ``ltx2_train_network.py``, checked before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .network import LYCORIS, NetworkConfig
from .rules_common import dtypes, file_name, folder, missing, samples
from .rules_memory import awq, blocks, compilation, gpu, loftq, training_quantization
from .rules_memory import training as training_memory
from .rules_optimizer import optimizer_combinations, optimizer_ranges
from .rules_references import references
from .rules_saving import resume_exists, rotation, uploads
from .training import TrainNetworkConfig
from .unavailable import unavailable


def required(config: TrainNetworkConfig) -> Iterable[str]:
    """Files and folders that a run cannot do without, and whether they exist."""
    if config.timestep.show_timesteps is not None:
        return
    needed = {
        "ltx2_checkpoint": config.checkpoint.ltx2_checkpoint,
        "output_dir": config.save.output_dir,
    }
    for name, value in needed.items():
        if value is None:
            yield f"--{name} is required"
    data = config.data
    if data.dataset_config is None and data.dataset_manifest is None:
        yield "--dataset_config is required, or else --dataset_manifest"
    if data.dataset_config is not None and data.dataset_manifest is not None:
        yield "--dataset_config and --dataset_manifest exclude each other; give one"
    yield from missing(
        {
            "dataset_config": data.dataset_config,
            "dataset_manifest": data.dataset_manifest,
            **{k: v for k, v in needed.items() if k != "output_dir"},
            "network_weights": config.network.network_weights,
            "lycoris_config": config.network.lycoris_config,
            "sample_prompts": config.preview.sample_prompts,
            "log_tracker_config": config.tracking.log_tracker_config,
            "gemma_root": config.gemma.gemma_root,
            "gemma_safetensors": config.gemma.gemma_safetensors,
        }
    )
    yield from (message for p in config.network.base_weights for message in missing({"base_weights": p}))
    yield from folder("output_dir", config.save.output_dir)
    yield from file_name("output_name", config.save.output_name)
    yield from resume_exists(config.save, config.hub)


def ranges(config: TrainNetworkConfig) -> Iterable[str]:
    """Numbers outside their range."""
    optimizer, timestep, loss, data = config.optimizer, config.timestep, config.loss, config.data
    audio = config.audio_loss
    at_least_one = {
        "gradient_accumulation_steps": optimizer.gradient_accumulation_steps,
        "max_train_steps": optimizer.max_train_steps,
        "max_train_epochs": optimizer.max_train_epochs,
        "network_dim": config.network.network_dim,
        "save_every_n_steps": config.save.save_every_n_steps,
        "save_every_n_epochs": config.save.save_every_n_epochs,
        "sample_every_n_steps": config.preview.sample_every_n_steps,
        "sample_every_n_epochs": config.preview.sample_every_n_epochs,
        "validate_every_n_steps": config.validation.validate_every_n_steps,
        "validate_every_n_epochs": config.validation.validate_every_n_epochs,
        "log_cuda_memory_every_n_steps": config.tracking.log_cuda_memory_every_n_steps,
        "ddp_timeout": config.processes.ddp_timeout,
        # 0 would remove each file as soon as it is written.
        "save_last_n_steps": config.save.save_last_n_steps,
        "save_last_n_epochs": config.save.save_last_n_epochs,
        "save_last_n_steps_state": config.save.save_last_n_steps_state,
        "save_last_n_epochs_state": config.save.save_last_n_epochs_state,
    }
    yield from (f"--{k}: expected at least 1, got {v}" for k, v in at_least_one.items() if v is not None and v < 1)
    not_negative = {
        "learning_rate": optimizer.learning_rate,
        "audio_lr": optimizer.audio_lr,
        "max_grad_norm": optimizer.max_grad_norm,
        "video_loss_weight": loss.video_loss_weight,
        "audio_loss_weight": loss.audio_loss_weight,
        "max_data_loader_n_workers": data.max_data_loader_n_workers,
        "audio_loss_balance_min": audio.audio_loss_balance_min,
        "audio_loss_balance_target_ratio": audio.audio_loss_balance_target_ratio,
        "audio_silence_regularizer_weight": audio.audio_silence_regularizer_weight,
        "audio_supervision_warmup_steps": audio.audio_supervision_warmup_steps,
    }
    yield from (f"--{k}: expected 0 or more, got {v}" for k, v in not_negative.items() if v is not None and v < 0)
    positive = {
        "logit_std": timestep.logit_std,
        "huber_delta": loss.huber_delta,
        "audio_bucket_interval": data.audio_bucket_interval,
        "discrete_flow_shift": timestep.discrete_flow_shift,
        "sigmoid_scale": timestep.sigmoid_scale,
        "audio_loss_balance_eps": audio.audio_loss_balance_eps,
        "audio_loss_balance_max": audio.audio_loss_balance_max,
        "audio_loss_balance_ema_init": audio.audio_loss_balance_ema_init,
        "audio_supervision_check_interval": audio.audio_supervision_check_interval,
    }
    yield from (f"--{k}: expected more than 0, got {v}" for k, v in positive.items() if v is not None and v <= 0)
    shares = {
        "caption_dropout_rate": loss.caption_dropout_rate,
        "ltx2_first_frame_conditioning_p": loss.ltx2_first_frame_conditioning_p,
        "shifted_logit_uniform_prob": timestep.shifted_logit_uniform_prob,
        "audio_supervision_min_ratio": audio.audio_supervision_min_ratio,
    }
    yield from (f"--{k}: expected 0 to 1, got {v}" for k, v in shares.items() if not 0 <= v <= 1)
    if not 0 <= timestep.shifted_logit_eps <= 0.499:
        yield f"--shifted_logit_eps: expected 0 to 0.499, got {timestep.shifted_logit_eps}"
    if data.audio_only_sequence_resolution != 0 and data.audio_only_sequence_resolution < 32:
        yield f"--audio_only_sequence_resolution: expected 0 or 32 and more, got {data.audio_only_sequence_resolution}"
    low, high = timestep.min_timestep or 0, 1000 if timestep.max_timestep is None else timestep.max_timestep
    if not 0 <= low < high <= 1000:
        yield f"--min_timestep {low} --max_timestep {high}: expected 0 <= min < max <= 1000"
    if timestep.num_timestep_buckets is not None and timestep.num_timestep_buckets < 2:
        yield f"--num_timestep_buckets: expected at least 2, got {timestep.num_timestep_buckets}"


def audio_balance(config: TrainNetworkConfig) -> Iterable[str]:
    """Numbers of the audio balance outside their range."""
    audio = config.audio_loss
    if not 0 < audio.audio_loss_balance_beta <= 1:
        yield f"--audio_loss_balance_beta: expected more than 0, at most 1, got {audio.audio_loss_balance_beta}"
    if not 0 < audio.audio_loss_balance_ema_decay < 1:
        yield f"--audio_loss_balance_ema_decay: expected between 0 and 1, got {audio.audio_loss_balance_ema_decay}"
    low, high = audio.audio_loss_balance_min, audio.audio_loss_balance_max
    if low > high:
        yield f"--audio_loss_balance_min {low} --audio_loss_balance_max {high}: expected min <= max"
    if audio.audio_loss_balance_mode == "inv_freq" and audio.audio_loss_balance_ema_init > 1:
        yield (
            "--audio_loss_balance_ema_init: expected at most 1 with inv_freq, where it is a share of batches, got "
            f"{audio.audio_loss_balance_ema_init}"
        )


def mode_fits(config: TrainNetworkConfig) -> Iterable[str]:
    """Flags about sound that the mode has no use for."""
    audio, mode = config.audio_loss, config.checkpoint.ltx2_mode
    wanted = {
        "audio_loss_balance_mode ema_mag": (audio.audio_loss_balance_mode == "ema_mag", ("av",)),
        "audio_loss_balance_mode inv_freq": (audio.audio_loss_balance_mode == "inv_freq", ("av", "audio")),
        "audio_silence_regularizer": (audio.audio_silence_regularizer, ("av",)),
        "audio_supervision_mode": (audio.audio_supervision_mode != "off", ("av",)),
    }
    for name, (is_on, modes) in wanted.items():
        if is_on and mode not in modes:
            yield f"--{name} needs --ltx2_mode {' or '.join(modes)}, got {mode}"


def audio_batches(config: TrainNetworkConfig) -> Iterable[str]:
    """How batches with sound are spread."""
    quota, probability = config.data.min_audio_batches_per_accum, config.data.audio_batch_probability
    accumulation = config.optimizer.gradient_accumulation_steps
    if quota < 0:
        yield f"--min_audio_batches_per_accum: expected 0 or more, got {quota}"
    elif quota > accumulation:
        yield (
            f"--min_audio_batches_per_accum {quota}: expected at most --gradient_accumulation_steps ({accumulation}); "
            "lower it, or accumulate more batches"
        )
    if probability is None:
        return
    if not 0 <= probability <= 1:
        yield f"--audio_batch_probability: expected 0 to 1, got {probability}"
    if quota != 0:
        yield "--min_audio_batches_per_accum and --audio_batch_probability exclude each other; give one of them"


def combinations(config: TrainNetworkConfig) -> Iterable[str]:
    """Flags that exclude or need each other."""
    gemma, preview = config.gemma, config.preview
    if gemma.gemma_load_in_8bit and gemma.gemma_load_in_4bit:
        yield "--gemma_load_in_8bit and --gemma_load_in_4bit exclude each other"
    if gemma.gemma_safetensors and (gemma.gemma_load_in_8bit or gemma.gemma_load_in_4bit):
        yield "--gemma_safetensors cannot be loaded in 8 or 4 bit; use --gemma_root"
    if config.version.ltx2_audio_only_model and config.checkpoint.ltx2_mode != "audio":
        yield f"--ltx2_audio_only_model needs --ltx2_mode audio, got {config.checkpoint.ltx2_mode}"
    wants_samples = preview.sample_at_first or preview.sample_every_n_steps or preview.sample_every_n_epochs
    if wants_samples and preview.sample_prompts is None:
        yield "--sample_at_first and --sample_every_n_* need --sample_prompts"
    network = config.network
    if network.dim_from_weights and network.network_weights is None:
        yield "--dim_from_weights needs --network_weights, whose ranks it takes"
    if len(network.base_weights_multiplier) > len(network.base_weights):
        count, files = len(network.base_weights_multiplier), len(network.base_weights)
        yield f"--base_weights_multiplier: {count} values for {files} files of --base_weights; give one each or fewer"
    yield from lycoris(network)
    yield from blocks(config.memory)
    yield from training_memory(config.memory)
    yield from training_quantization(config.quantization)
    yield from loftq(config.calibration, config.quantization, config.network)
    yield from awq(config.calibration, config.quantization)
    yield from compilation(config.compilation)
    yield from gpu(config.cuda)
    yield from dtypes({"vae_dtype": config.precision.vae_dtype})
    yield from samples(config.decode, config.checkpoint.ltx2_mode)
    yield from rotation(config.save)
    yield from uploads(config.save, config.hub)
    if config.tracking.log_with in ("tensorboard", "all") and config.tracking.logging_dir is None:
        yield f"--log_with {config.tracking.log_with} needs --logging_dir"


def lycoris(network: NetworkConfig) -> Iterable[str]:
    """Flags of LyCORIS networks alone."""
    if network.network_module != LYCORIS:
        given = {"lycoris_config": network.lycoris_config, "init_lokr_norm": network.init_lokr_norm}
        names = " and ".join(f"--{name}" for name, value in given.items() if value is not None)
        if names:
            yield f"{names}: only with --network_module {LYCORIS}, got {network.network_module}"
    elif network.network_weights is not None and network.init_lokr_norm is not None:
        yield "--init_lokr_norm and --network_weights exclude each other: both say where the network starts"
    if network.init_lokr_norm is not None and not 0 < network.init_lokr_norm < float("inf"):
        yield f"--init_lokr_norm: expected more than 0, got {network.init_lokr_norm:g}"


_RULES = (
    required,
    unavailable,
    ranges,
    optimizer_ranges,
    audio_balance,
    mode_fits,
    audio_batches,
    references,
    combinations,
    optimizer_combinations,
)


def all_rules(parsed: Any) -> list[str]:
    """Every violation, in the order of the rules above."""
    config: TrainNetworkConfig = parsed.config
    return [v for rule in _RULES for v in rule(config)]
