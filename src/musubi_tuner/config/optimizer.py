"""Flags of the optimizer, its schedule and the length of a run."""

from __future__ import annotations

from dataclasses import dataclass

from .flag import flag


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
    fused_backward_pass: bool = flag(
        False, "step each weight within the backward pass and free its gradient; --max_grad_norm then limits each alone"
    )
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
