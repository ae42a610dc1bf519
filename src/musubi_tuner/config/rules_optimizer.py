"""Rules of the flags for the optimizer, its schedule and what acts on the weights between steps."""

from __future__ import annotations

from collections.abc import Iterable

from .training import TrainNetworkConfig


def optimizer_ranges(config: TrainNetworkConfig) -> Iterable[str]:
    """Numbers outside their range."""
    optimizer, network = config.optimizer, config.network
    at_least_one = {
        "lr_scheduler_num_cycles": optimizer.lr_scheduler_num_cycles,
        "lr_scheduler_timescale": optimizer.lr_scheduler_timescale,
        "ema_update_every": network.ema_update_every,
    }
    yield from (f"--{k}: expected at least 1, got {v}" for k, v in at_least_one.items() if v is not None and v < 1)
    positive = {
        "lr_scheduler_power": optimizer.lr_scheduler_power,
        "scale_weight_norms": network.scale_weight_norms,
    }
    yield from (f"--{k}: expected more than 0, got {v}" for k, v in positive.items() if v is not None and v <= 0)
    ratio = optimizer.lr_scheduler_min_lr_ratio
    if ratio is not None and not 0 <= ratio <= 1:
        yield f"--lr_scheduler_min_lr_ratio: expected 0 to 1, got {ratio}"
    if network.ema_decay is not None and not 0 < network.ema_decay < 1:
        yield f"--ema_decay: expected between 0 and 1, such as 0.99, got {network.ema_decay}"


def optimizer_combinations(config: TrainNetworkConfig) -> Iterable[str]:
    """Flags that exclude or need each other."""
    optimizer, precision = config.optimizer, config.precision
    if optimizer.lr_scheduler == "adafactor" and not optimizer.lr_scheduler_type and optimizer.lr_warmup_steps:
        yield "--lr_scheduler adafactor takes no --lr_warmup_steps; use --optimizer_args warmup_init=True"
    if optimizer.fused_backward_pass:
        yield from fused_backward(optimizer.gradient_accumulation_steps, precision.mixed_precision)
    if config.network.ema_update_every != 1 and config.network.ema_decay is None:
        yield "--ema_update_every needs --ema_decay"
    if precision.full_fp16 and precision.full_bf16:
        yield "--full_fp16 and --full_bf16 exclude each other"
    for name, asked in (("fp16", precision.full_fp16), ("bf16", precision.full_bf16)):
        if asked and precision.mixed_precision not in (None, name):
            yield f"--full_{name} needs --mixed_precision {name}, got {precision.mixed_precision}"


def fused_backward(accumulation: int, mixed_precision: str | None, processes: int = 1) -> Iterable[str]:
    """What needs all gradients at once, and so does not go with ``--fused_backward_pass``."""
    if accumulation > 1:
        yield (
            f"--fused_backward_pass steps in each backward pass and cannot add up {accumulation} of them; leave it "
            "out, or use a larger batch_size instead of --gradient_accumulation_steps"
        )
    if mixed_precision == "fp16":
        yield (
            "--fused_backward_pass does not go with --mixed_precision fp16, which drops a step when any gradient "
            "overflows; use --mixed_precision bf16"
        )
    if processes > 1:
        yield (
            f"--fused_backward_pass steps before {processes} processes can average their gradients; leave it out, or "
            "train in one process"
        )
