"""The learning rates of a run: which rates the optimizer's groups have at which step.

A plan is a function of the step alone, so a resumed run needs nothing but its step to go on with the same rates.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from musubi_tuner.common.errors import UserError
from musubi_tuner.config.optimizer import OptimizerConfig

from .lr_schedulers import ScheduleSettings, check_schedule, lr_factor, resolve_steps
from .optimizers import import_class, is_schedule_free, parse_key_values, sets_own_rates


class LrPlan(Protocol):
    """Sets what a step's rates are."""

    name: str

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Give the groups their rates for the step with 0-based index ``step``."""


@dataclass(frozen=True)
class FactorPlan:
    """A named schedule: its factor times the base rate of each group."""

    name: str
    settings: ScheduleSettings
    base_lrs: tuple[float, ...]

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        factor = lr_factor(self.name, step, self.settings)
        for group, base in zip(optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor


@dataclass(frozen=True)
class TablePlan:
    """What a scheduler class gives: the values of every group at every step."""

    name: str
    table: tuple[tuple[Mapping[str, Any], ...], ...]

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        for group, values in zip(optimizer.param_groups, self.table[step], strict=True):
            group.update(values)


@dataclass(frozen=True)
class OwnRates:
    """The optimizer makes its own."""

    name: str = "adafactor"

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        pass


def schedule_settings(config: OptimizerConfig, total_steps: int) -> ScheduleSettings:
    """The schedule's settings in steps of a run of known length.

    Raises:
        UserError: the schedule does not exist, or cannot work with its settings.
    """
    settings = ScheduleSettings(
        total_steps=total_steps,
        warmup_steps=resolve_steps(config.lr_warmup_steps, total_steps),
        decay_steps=resolve_steps(config.lr_decay_steps, total_steps),
        num_cycles=config.lr_scheduler_num_cycles,
        power=config.lr_scheduler_power,
        timescale=config.lr_scheduler_timescale,
        min_lr_ratio=config.lr_scheduler_min_lr_ratio,
        learning_rate=config.learning_rate,
        options=parse_key_values(config.lr_scheduler_args, "--lr_scheduler_args"),
    )
    if not config.lr_scheduler_type and config.lr_scheduler != "adafactor":
        check_schedule(config.lr_scheduler, settings)
    return settings


def make_plan(config: OptimizerConfig, settings: ScheduleSettings, optimizer: torch.optim.Optimizer) -> LrPlan:
    """The plan that the flags ask for and the optimizer allows.

    Call it before a resumed state overwrites the groups: the flags of this run rule.

    Raises:
        UserError: a scheduler class that does not exist or refuses its arguments.
    """
    if sets_own_rates(optimizer):
        return OwnRates()
    base_lrs = tuple(group["lr"] for group in optimizer.param_groups)
    if is_schedule_free(optimizer):
        return FactorPlan("constant", ScheduleSettings(settings.total_steps), base_lrs)
    if config.lr_scheduler_type:
        table = _table(config.lr_scheduler_type, settings.options, optimizer, settings.total_steps)
        return TablePlan(config.lr_scheduler_type, table)
    if config.lr_scheduler == "adafactor":
        check_schedule("adafactor", settings)
    return FactorPlan(config.lr_scheduler, settings, base_lrs)


_SCHEDULED = ("lr", "betas", "momentum")  # what scheduler classes change in a group


class _Shadow(torch.optim.Optimizer):
    """Groups like an optimizer's that train nothing, for a scheduler to act on."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        groups = [
            {**{k: v for k, v in g.items() if k != "params"}, "params": [torch.nn.Parameter(torch.zeros(1))]}
            for g in optimizer.param_groups
        ]
        super().__init__(groups, dict(optimizer.defaults))

    def step(self, closure: Any = None) -> None:
        pass

    def values(self) -> tuple[dict[str, Any], ...]:
        return tuple({k: g[k] for k in _SCHEDULED if k in g} for g in self.param_groups)


def _table(
    name: str, options: Mapping[str, Any], optimizer: torch.optim.Optimizer, total_steps: int
) -> tuple[tuple[dict[str, Any], ...], ...]:
    path = name if "." in name else f"torch.optim.lr_scheduler.{name}"
    cls = import_class(path, f"--lr_scheduler_type {name}")
    if not inspect.isclass(cls) or not callable(getattr(cls, "step", None)):
        raise UserError(f"--lr_scheduler_type {name}: {path} is not a scheduler class")
    required = [p.name for p in inspect.signature(cls.step).parameters.values() if p.default is p.empty]
    if len(required) > 1:
        raise UserError(
            f"--lr_scheduler_type {name}: needs {', '.join(required[1:])} at each step; only schedules of the step "
            "alone can be used"
        )
    shadow = _Shadow(optimizer)
    try:
        scheduler = cls(shadow, **options)
        rows = [shadow.values()]
        for _ in range(total_steps - 1):
            shadow.step()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of resuming and of chained schedulers, which nobody can act on
                scheduler.step()
            rows.append(shadow.values())
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"--lr_scheduler_args: {name} refuses them: {error}") from None
    return tuple(rows)
