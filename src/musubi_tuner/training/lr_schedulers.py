"""Learning-rate schedules as pure functions of the step.

A schedule gives the factor on every group's base learning rate. Having no state, it needs none in a resume.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from musubi_tuner.common.errors import UserError, did_you_mean
from musubi_tuner.common.registry import Registry


@dataclass(frozen=True)
class ScheduleSettings:
    """What schedules are made from; steps are optimizer steps."""

    total_steps: int
    warmup_steps: int = 0
    decay_steps: int = 0  # of warmup_stable_decay
    num_cycles: int = 1
    power: float = 1.0  # of polynomial
    timescale: int | None = None  # of inverse_sqrt
    min_lr_ratio: float | None = None
    learning_rate: float = 1.0  # what the absolute floor of polynomial is relative to
    options: Mapping[str, Any] = field(default_factory=dict)  # --lr_scheduler_args


Factor = Callable[[int, ScheduleSettings], float]


@dataclass(frozen=True)
class Schedule:
    """A named schedule: its factor, whether the common linear warm-up goes before it, the options it reads."""

    factor: Factor
    common_warmup: bool
    options: tuple[str, ...]


SCHEDULES: Registry[Schedule] = Registry("lr_scheduler")


def _schedule(name: str, *, common_warmup: bool = True, options: tuple[str, ...] = ()) -> Callable[[Factor], Factor]:
    def enter(factor: Factor) -> Factor:
        SCHEDULES.register(name)(Schedule(factor, common_warmup, options))
        return factor

    return enter


def resolve_steps(value: float, total_steps: int) -> int:
    """Steps as they are, a share below 1 as its part of the run."""
    return int(value) if value >= 1 else int(value * total_steps)


def lr_factor(name: str, step: int, settings: ScheduleSettings) -> float:
    """Factor on the base learning rate for the step with 0-based index ``step``, warm-up included."""
    schedule = SCHEDULES[name]
    if step < settings.warmup_steps and schedule.common_warmup:
        return step / max(1, settings.warmup_steps)
    return schedule.factor(step, settings)


def check_schedule(name: str, settings: ScheduleSettings) -> None:
    """Raise UserError for an unknown schedule, options it does not take, and settings it cannot work with."""
    known = SCHEDULES[name].options
    for key in settings.options:
        if key not in known:
            takes = f"known: {', '.join(known)}" if known else "it takes none"
            raise UserError(f"--lr_scheduler_args: {name} has no option {key!r}{did_you_mean(key, known)}; {takes}")
    for step in (0, settings.warmup_steps, settings.total_steps - 1):
        lr_factor(name, step, settings)


def _number(settings: ScheduleSettings, key: str, default: float) -> float:
    value = settings.options.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"--lr_scheduler_args {key}={value}: expected a number")
    return float(value)


def _progress(step: int, settings: ScheduleSettings) -> float:
    """Share of the run after the warm-up that has passed, in [0, 1]."""
    span = max(1, settings.total_steps - settings.warmup_steps)
    return min(1.0, (step - settings.warmup_steps) / span)


@_schedule("constant", common_warmup=False)
@_schedule("constant_with_warmup")
def _constant(step: int, settings: ScheduleSettings) -> float:
    return 1.0


@_schedule("linear")
def _linear(step: int, settings: ScheduleSettings) -> float:
    return 1.0 - _progress(step, settings)


@_schedule("cosine")
def _cosine(step: int, settings: ScheduleSettings) -> float:
    return 0.5 * (1 + math.cos(math.pi * _progress(step, settings)))


@_schedule("cosine_with_restarts")
def _cosine_with_restarts(step: int, settings: ScheduleSettings) -> float:
    progress = _progress(step, settings)
    if progress >= 1:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * ((settings.num_cycles * progress) % 1.0)))


@_schedule("cosine_with_min_lr")
def _cosine_with_min_lr(step: int, settings: ScheduleSettings) -> float:
    floor = settings.min_lr_ratio
    if floor is None:
        raise UserError("--lr_scheduler cosine_with_min_lr needs --lr_scheduler_min_lr_ratio")
    # Half periods, so that one cycle ends at the floor and two come back to the start.
    wave = 0.5 * (1 + math.cos(math.pi * settings.num_cycles * _progress(step, settings)))
    return floor + (1 - floor) * wave


@_schedule("polynomial", options=("lr_end",))
def _polynomial(step: int, settings: ScheduleSettings) -> float:
    end, start = _number(settings, "lr_end", 1e-7), settings.learning_rate
    if not 0 <= end < start:
        raise UserError(
            f"--lr_scheduler polynomial ends at {end:g}, which must be below --learning_rate, {start:g}; "
            "set the end with --lr_scheduler_args lr_end=..."
        )
    return (end + (start - end) * (1.0 - _progress(step, settings)) ** settings.power) / start


@_schedule("inverse_sqrt")
def _inverse_sqrt(step: int, settings: ScheduleSettings) -> float:
    timescale = settings.timescale or settings.warmup_steps or 10_000
    return math.sqrt(timescale / (step + timescale - settings.warmup_steps))


_RAMPS: dict[str, Callable[[float, int], float]] = {  # from 1 down to 0 while the progress goes from 0 to 1
    "linear": lambda progress, cycles: 1.0 - progress,
    "cosine": lambda progress, cycles: 0.5 * (1.0 + math.cos(math.pi * cycles * progress)),
    "1-sqrt": lambda progress, cycles: 1.0 - math.sqrt(progress),
}


def _ramp(settings: ScheduleSettings, key: str, default: str) -> Callable[[float, int], float]:
    name = settings.options.get(key, default)
    if name not in _RAMPS:
        raise UserError(f"--lr_scheduler_args {key}={name}: expected one of {', '.join(_RAMPS)}")
    return _RAMPS[name]


@_schedule("warmup_stable_decay", common_warmup=False, options=("warmup_type", "decay_type"))
def _warmup_stable_decay(step: int, settings: ScheduleSettings) -> float:
    warmup, decay, floor = settings.warmup_steps, settings.decay_steps, settings.min_lr_ratio or 0.0
    rise, fall = _ramp(settings, "warmup_type", "linear"), _ramp(settings, "decay_type", "cosine")
    start_of_decay = settings.total_steps - decay
    if start_of_decay < warmup:
        raise UserError(
            f"--lr_scheduler warmup_stable_decay: {warmup} warm-up steps and {decay} steps of decay are more than "
            f"the run's {settings.total_steps}; lower --lr_warmup_steps or --lr_decay_steps"
        )
    if step < warmup:
        factor = rise(1.0 - step / warmup, 1)
    elif step < start_of_decay:
        factor = 1.0
    else:
        factor = fall(min(1.0, (step - start_of_decay) / max(1, decay)), settings.num_cycles)
    return floor + (1 - floor) * factor


@_schedule("rex", common_warmup=False, options=("rex_alpha", "rex_beta"))
def _rex(step: int, settings: ScheduleSettings) -> float:
    """Reflected exponential (Chen et al. 2022, arXiv:2107.04197): stays high for long, then falls fast."""
    floor = 0.01 if settings.min_lr_ratio is None else settings.min_lr_ratio
    alpha, beta = _number(settings, "rex_alpha", 0.1), _number(settings, "rex_beta", 0.9)
    if alpha <= 0 or beta < 0:
        raise UserError(f"--lr_scheduler_args rex_alpha={alpha:g} rex_beta={beta:g}: expected alpha > 0 and beta >= 0")
    if step < settings.warmup_steps:
        return floor + (1 - floor) * step / settings.warmup_steps
    left = 1.0 - _progress(step, settings)
    return floor + (1 - floor) * left / (alpha + beta * left)


@_schedule("piecewise_constant", common_warmup=False, options=("step_rules",))
def _piecewise_constant(step: int, settings: ScheduleSettings) -> float:
    limits, last = _step_rules(str(settings.options.get("step_rules", "")))
    return next((factor for end, factor in limits if step < end), last)


def _step_rules(text: str) -> tuple[list[tuple[int, float]], float]:
    """``"1:100,0.1:200,0.01"``: factor 1 before step 100, 0.1 before step 200, then 0.01."""
    *rules, last = text.split(",")
    try:
        pairs = [rule.split(":") for rule in rules]
        return sorted((int(end), float(factor)) for factor, end in pairs), float(last)
    except ValueError:
        raise UserError(
            f"--lr_scheduler piecewise_constant: step_rules {text!r}, expected factor:step,...,factor such as "
            "--lr_scheduler_args step_rules=1:100,0.1:200,0.01"
        ) from None


@_schedule("adafactor", common_warmup=False)
def _adafactor(step: int, settings: ScheduleSettings) -> float:
    raise UserError(
        "--lr_scheduler adafactor is for --optimizer_type Adafactor with relative_step, which sets its own rates; "
        "choose another schedule"
    )
