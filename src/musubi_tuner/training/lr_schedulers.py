"""Learning-rate schedules as pure functions of the step.

A schedule gives the factor on every group's base learning rate. Having no state, it needs none in a resume.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.registry import Registry


@dataclass(frozen=True)
class ScheduleSettings:
    """What schedules are made from; steps are optimizer steps."""

    total_steps: int
    warmup_steps: int = 0
    num_cycles: int = 1
    min_lr_ratio: float | None = None


Shape = Callable[[int, ScheduleSettings], float]
SCHEDULES: Registry[Shape] = Registry("lr_scheduler")


def resolve_steps(value: float, total_steps: int) -> int:
    """Steps as they are, a share below 1 as its part of the run."""
    return int(value) if value >= 1 else int(value * total_steps)


def lr_factor(name: str, step: int, settings: ScheduleSettings) -> float:
    """Factor on the base learning rate for the step with 0-based index ``step``, warm-up included."""
    shape = SCHEDULES[name]
    if step < settings.warmup_steps and name not in _WITHOUT_WARMUP:
        return step / max(1, settings.warmup_steps)
    return shape(step, settings)


def _progress(step: int, settings: ScheduleSettings) -> float:
    """Share of the run after the warm-up that has passed, in [0, 1]."""
    span = max(1, settings.total_steps - settings.warmup_steps)
    return min(1.0, (step - settings.warmup_steps) / span)


@SCHEDULES.register("constant")
def _constant(step: int, settings: ScheduleSettings) -> float:
    return 1.0


_WITHOUT_WARMUP = frozenset({"constant"})


@SCHEDULES.register("constant_with_warmup")
def _constant_with_warmup(step: int, settings: ScheduleSettings) -> float:
    return 1.0


@SCHEDULES.register("linear")
def _linear(step: int, settings: ScheduleSettings) -> float:
    return 1.0 - _progress(step, settings)


@SCHEDULES.register("cosine")
def _cosine(step: int, settings: ScheduleSettings) -> float:
    return 0.5 * (1 + math.cos(math.pi * _progress(step, settings)))


@SCHEDULES.register("cosine_with_restarts")
def _cosine_with_restarts(step: int, settings: ScheduleSettings) -> float:
    progress = _progress(step, settings)
    if progress >= 1:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * ((settings.num_cycles * progress) % 1.0)))


@SCHEDULES.register("cosine_with_min_lr")
def _cosine_with_min_lr(step: int, settings: ScheduleSettings) -> float:
    floor = settings.min_lr_ratio
    if floor is None:
        raise UserError("--lr_scheduler cosine_with_min_lr needs --lr_scheduler_min_lr_ratio")
    return floor + (1 - floor) * _cosine(step, settings)
