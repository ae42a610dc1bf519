"""Flags of ``ltx2_train_network.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .caching import CAPTION_FIELD_HELP
from .flag import flag
from .model import CheckpointConfig, GemmaConfig, PrecisionConfig, VersionConfig
from .references import ReferenceConfig
from .sampling import PreviewConfig, SampleConditioningConfig, SampleDecodeConfig


def steps_or_share(text: str) -> float:
    """``"100"``, ``"0.1"`` or ``"10%"``; below 1 is a share of the run.

    Raises:
        ValueError: for anything else.
    """
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if value < 0 or (value >= 1 and value != int(value)):
        raise ValueError("expected whole steps, a share below 1, or N%")
    return value


TargetPreset = Literal["t2v", "v2v", "audio", "audio_ref_only_ic", "full"]


@dataclass(frozen=True)
class MemoryConfig:
    """Attention and memory."""

    sdpa: bool = flag(False, "PyTorch scaled dot-product attention (the default)")
    flash_attn: bool = flag(False, "FlashAttention 2 (not available yet)")
    flash3: bool = flag(False, "FlashAttention 3 (not available yet)")
    gradient_checkpointing: bool = flag(False, "recompute block activations in the backward pass")
    blocks_to_swap: int = flag(0, "transformer blocks kept on the CPU (not available yet)")
    use_pinned_memory_for_block_swap: bool = flag(False, "pinned memory for block swapping (not available yet)")
    fp8_base: bool = flag(False, "base weights in FP8 (not available yet)")
    fp8_scaled: bool = flag(False, "quantise the base weights to scaled FP8 (not available yet)")


@dataclass(frozen=True)
class DataConfig:
    """Dataset."""

    dataset_config: Path | None = flag(None, "dataset configuration, TOML or JSON (this or --dataset_manifest)")
    dataset_manifest: Path | None = flag(None, "manifest that caching saved; needs neither sources nor configuration")
    max_data_loader_n_workers: int = flag(8, "processes that read batches ahead (at most the CPU count); 0 = none")
    persistent_data_loader_workers: bool = flag(False, "keep the loader processes between epochs")
    separate_audio_buckets: bool | None = flag(None, "keep items with and without sound in separate batches")
    audio_bucket_strategy: Literal["pad", "truncate"] | None = flag(None, "bring audio lengths of a bucket together")
    audio_bucket_interval: float | None = flag(None, "step of the audio length buckets, seconds")
    caption_field: str | None = flag(None, CAPTION_FIELD_HELP, metavar="NAME")
    min_audio_batches_per_accum: int = flag(
        0, "batches with sound in every optimizer step at least, over all processes, while they last; 0 = off"
    )
    audio_batch_probability: float | None = flag(
        None, "probability that the next batch is one with sound, while there are both kinds (not given: off)"
    )
    audio_only_sequence_resolution: int = flag(
        64, "mode audio: side of the virtual video for the timestep shift; 0 = as cached"
    )


@dataclass(frozen=True)
class NetworkConfig:
    """Network."""

    network_module: str = flag("networks.lora_ltx2", "network to train")
    network_dim: int | None = flag(None, "rank (not given: the network's default, 4)")
    network_alpha: float = flag(1.0, "the delta is scaled by alpha / rank")
    network_dropout: float | None = flag(None, "dropout on the rank dimension")
    network_args: tuple[str, ...] = flag((), "options of the network, key=value")
    network_weights: Path | None = flag(None, "start from this LoRA file")
    scale_weight_norms: float | None = flag(None, "largest Frobenius norm of a delta; larger ones are scaled back")
    ema_decay: float | None = flag(None, "keep a running average of the network, saved as *-ema.safetensors (0.99)")
    ema_update_every: int = flag(1, "optimizer steps between two updates of the running average")
    lora_target_preset: TargetPreset = flag("t2v", "which linear layers are adapted")
    training_comment: str | None = flag(None, "free text for the metadata")
    metadata: bool = flag(True, "write the full training metadata into the LoRA file")


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and schedule."""

    optimizer_type: str = flag(
        "AdamW",
        "AdamW, AdamW8bit, PagedAdamW8bit, PagedAdam8bit, Lion8bit, Adafactor, Lion, Prodigy, AdamWScheduleFree, CAME, "
        "Muon; or a class of torch.optim or of any module (module.Class)",
    )
    optimizer_args: tuple[str, ...] = flag((), "options of the optimizer, key=value")
    learning_rate: float = flag(2e-6, "learning rate")
    audio_lr: float | None = flag(None, "learning rate of modules whose name contains audio_")
    lr_args: tuple[str, ...] = flag((), "learning rates by module, regex=lr")
    max_grad_norm: float = flag(1.0, "gradient norm clipping; 0 = off")
    lr_scheduler: str = flag(
        "constant",
        "constant, constant_with_warmup, linear, cosine, cosine_with_restarts, cosine_with_min_lr, polynomial, "
        "inverse_sqrt, warmup_stable_decay, piecewise_constant, rex, adafactor",
    )
    lr_scheduler_type: str = flag("", "class of torch.optim.lr_scheduler or module.Class, instead of --lr_scheduler")
    lr_scheduler_args: tuple[str, ...] = flag((), "options of the schedule or of the scheduler class, key=value")
    lr_warmup_steps: float = flag(0, "warm-up steps, or a share of the run (below 1, or N%)", convert=steps_or_share)
    lr_decay_steps: float = flag(
        0, "steps of warmup_stable_decay's decay, or a share of the run (below 1, or N%)", convert=steps_or_share
    )
    lr_scheduler_num_cycles: int = flag(
        1, "cycles of cosine_with_restarts; half periods of cosine_with_min_lr and warmup_stable_decay"
    )
    lr_scheduler_power: float = flag(1.0, "power of polynomial")
    lr_scheduler_timescale: int | None = flag(None, "timescale of inverse_sqrt (not given: the warm-up, or 10000)")
    lr_scheduler_min_lr_ratio: float | None = flag(
        None, "floor relative to the learning rate, of cosine_with_min_lr, warmup_stable_decay (0) and rex (0.01)"
    )
    max_train_steps: int = flag(1600, "optimizer steps")
    max_train_epochs: int | None = flag(None, "epochs; wins over --max_train_steps")
    gradient_accumulation_steps: int = flag(1, "batches per optimizer step")
    seed: int | None = flag(None, "seed of everything random (not given: drawn and logged)")


TimestepSampling = Literal[
    "shifted_logit_normal",
    "sigma",
    "uniform",
    "sigmoid",
    "shift",
    "flux_shift",
    "flux2_shift",
    "qwen_shift",
    "logsnr",
    "qinglong_flux",
    "qinglong_qwen",
]


@dataclass(frozen=True)
class TimestepConfig:
    """Timesteps."""

    timestep_sampling: TimestepSampling = flag(
        "shifted_logit_normal", "distribution of noise levels (sigma means shifted_logit_normal)"
    )
    logit_mean: float = flag(0.0, "shifted_logit_normal: added to the shift; logsnr: mean of the log SNR")
    logit_std: float = flag(1.0, "shifted_logit_normal, logsnr: standard deviation of the normal distribution")
    shifted_logit_mode: Literal["legacy", "stretched"] | None = flag(
        None, "variant of the sampler; not given: legacy for 2.0, stretched for 2.3"
    )
    shifted_logit_eps: float = flag(1e-3, "stretched: lowest noise level, values below are reflected")
    shifted_logit_uniform_prob: float = flag(0.1, "stretched: share of uniform draws")
    shifted_logit_shift: float | None = flag(None, "shift; not given: by the number of tokens")
    discrete_flow_shift: float = flag(1.0, "shift: odds of the noise level are multiplied by this")
    sigmoid_scale: float = flag(1.0, "sigmoid and the *_shift samplings: standard deviation of the logits")
    min_timestep: int | None = flag(None, "lowest noise level, 0 to 1000")
    max_timestep: int | None = flag(None, "highest noise level, 0 to 1000")
    preserve_distribution_shape: bool = flag(False, "draw again until a level is in range instead of squeezing")
    num_timestep_buckets: int | None = flag(None, "spread the levels of an epoch evenly over so many quantiles")
    independent_audio_timestep: bool = flag(False, "draw the audio noise level apart from the video's")
    weighting_scheme: Literal["none", "logit_normal", "mode", "cosmap", "sigma_sqrt"] = flag(
        "none", "no effect: LTX-2 is trained with equal weight at every noise level"
    )
    mode_scale: float = flag(1.29, "no effect: belongs to --weighting_scheme mode")
    show_timesteps: Literal["image", "console"] | None = flag(
        None, "show the distribution of noise levels for --height, --width and --sample_num_frames, and exit"
    )


@dataclass(frozen=True)
class LossConfig:
    """Loss and conditioning."""

    loss_type: Literal["mse", "mae", "l1", "huber", "smooth_l1"] = flag("mse", "error of each latent value")
    huber_delta: float = flag(1.0, "where huber and smooth_l1 turn linear")
    video_loss_weight: float = flag(1.0, "weight of the video loss")
    audio_loss_weight: float = flag(1.0, "weight of the audio loss")
    caption_dropout_rate: float = flag(0.0, "probability to train a sample without its caption")
    ltx2_first_frame_conditioning_p: float = flag(0.1, "probability to keep a sample's first latent frame clean")


@dataclass(frozen=True)
class AudioLossConfig:
    """Balance and supervision of the audio loss."""

    audio_loss_balance_mode: Literal["none", "inv_freq", "ema_mag"] = flag(
        "none", "adapt the weight of the audio loss: to how rare sound is, or to the size of the losses (mode av)"
    )
    audio_loss_balance_beta: float = flag(0.01, "inv_freq: rate at which the share of batches with sound is followed")
    audio_loss_balance_eps: float = flag(0.05, "inv_freq: lowest share to divide by")
    audio_loss_balance_min: float = flag(0.05, "lowest weight that balancing gives")
    audio_loss_balance_max: float = flag(4.0, "highest weight that balancing gives")
    audio_loss_balance_ema_init: float = flag(1.0, "start of the running means")
    audio_loss_balance_target_ratio: float = flag(0.33, "ema_mag: audio loss to reach, relative to the video loss")
    audio_loss_balance_ema_decay: float = flag(0.99, "ema_mag: decay of the running means of the losses")
    audio_silence_regularizer: bool = flag(False, "mode av: train clips without sound on silence")
    audio_silence_regularizer_weight: float = flag(1.0, "the audio loss of such clips is multiplied by this")
    audio_supervision_mode: Literal["off", "warn", "error"] = flag(
        "off", "mode av: what to do when too few batches have sound"
    )
    audio_supervision_warmup_steps: int = flag(50, "batches before the first check")
    audio_supervision_check_interval: int = flag(50, "batches between checks")
    audio_supervision_min_ratio: float = flag(0.9, "share of batches that must have sound")


@dataclass(frozen=True)
class SaveConfig:
    """Saving and resuming."""

    output_dir: Path | None = flag(None, "folder of the LoRA files (required)")
    output_name: str = flag("ltx2_lora", "name of the LoRA files")
    save_every_n_epochs: int | None = flag(None, "save every so many epochs")
    save_every_n_steps: int | None = flag(None, "save every so many optimizer steps")
    save_last_n_epochs: int | None = flag(None, "keep only the files of the last so many epochs")
    save_last_n_steps: int | None = flag(None, "keep only the files of the last so many steps")
    save_last_n_epochs_state: int | None = flag(None, "the same for state folders")
    save_last_n_steps_state: int | None = flag(None, "the same for state folders")
    save_state: bool = flag(False, "also save what --resume needs, at each save")
    save_state_on_train_end: bool = flag(False, "save the state at the end only")
    resume: Path | None = flag(None, "state folder to continue from")
    autoresume: bool = flag(False, "continue from the latest state in --output_dir, if there is one")
    save_precision: Literal["float", "fp32", "fp16", "bf16"] = flag("bf16", "dtype of the LoRA files")
    save_checkpoint_metadata: bool = flag(False, "write a .json with loss, lr, step and epoch beside each LoRA")
    convert_to_comfy: bool = flag(True, "also write *.comfy.safetensors")
    save_original_lora: bool = flag(True, "keep the original format beside the ComfyUI one")
    metadata_title: str | None = flag(None, "title in the LoRA's metadata (not given: --output_name)")
    metadata_author: str | None = flag(None, "author in the LoRA's metadata")
    metadata_description: str | None = flag(None, "description in the LoRA's metadata")
    metadata_license: str | None = flag(None, "licence in the LoRA's metadata")
    metadata_tags: str | None = flag(None, "tags in the LoRA's metadata, comma separated")


@dataclass(frozen=True)
class TrackingConfig:
    """Logging."""

    logging_dir: Path | None = flag(None, "folder of the logs")
    log_with: Literal["tensorboard", "wandb", "all"] | None = flag(None, "tracker (with --logging_dir: tensorboard)")
    log_prefix: str = flag("", "start of the log folder's name")
    log_tracker_name: str = flag("network_train", "TensorBoard: folder below it; wandb: project")
    log_tracker_config: Path | None = flag(None, "TOML file with a table of options for each tracker")
    log_config: bool = flag(False, "log the flags, without tokens and paths")
    wandb_run_name: str | None = flag(None, "name of the run in Weights & Biases")
    wandb_api_key: str | None = flag(None, "key of Weights & Biases (not given: as wandb login left it); never logged")
    log_cuda_memory_every_n_steps: int | None = flag(None, "log the memory of the GPU every so many steps")


@dataclass(frozen=True)
class ValidationConfig:
    """Validation."""

    validate_every_n_steps: int | None = flag(
        None, "loss on the validation datasets every so many optimizer steps, and after the last"
    )
    validate_every_n_epochs: int | None = flag(None, "the same every so many epochs")
    dry_run: bool = flag(
        False, "check everything, pass one batch of each bucket forward and backward, tell the plan, write nothing"
    )


@dataclass(frozen=True)
class ProcessesConfig:
    """Several processes."""

    ddp_timeout: int | None = flag(None, "minutes that processes wait for each other (not given: 120)")
    ddp_gradient_as_bucket_view: bool = flag(False, "no effect: gradients are averaged once a step, without DDP")
    ddp_static_graph: bool = flag(False, "no effect: gradients are averaged once a step, without DDP")


@dataclass(frozen=True)
class TrainNetworkConfig:
    """``ltx2_train_network.py``"""

    checkpoint: CheckpointConfig = CheckpointConfig()
    version: VersionConfig = VersionConfig()
    gemma: GemmaConfig = GemmaConfig()
    precision: PrecisionConfig = PrecisionConfig()
    memory: MemoryConfig = MemoryConfig()
    data: DataConfig = DataConfig()
    network: NetworkConfig = NetworkConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    timestep: TimestepConfig = TimestepConfig()
    loss: LossConfig = LossConfig()
    audio_loss: AudioLossConfig = AudioLossConfig()
    references: ReferenceConfig = ReferenceConfig()
    preview: PreviewConfig = PreviewConfig()
    conditioning: SampleConditioningConfig = SampleConditioningConfig()
    decode: SampleDecodeConfig = SampleDecodeConfig()
    save: SaveConfig = SaveConfig()
    tracking: TrackingConfig = TrackingConfig()
    validation: ValidationConfig = ValidationConfig()
    processes: ProcessesConfig = ProcessesConfig()
