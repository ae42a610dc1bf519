"""What changes the weights in a run, made from its flags: optimizer, schedule, limit and average of the weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from musubi_tuner.common.errors import ConfigErrors, UserError
from musubi_tuner.config.network import NetworkConfig
from musubi_tuner.config.optimizer import OptimizerConfig
from musubi_tuner.config.rules_optimizer import fused_backward
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.networks.adapter_network import AdapterNetwork
from musubi_tuner.networks.param_groups import flag_rates, param_groups

from .fused_backward import FusedBackward, check_steps_in_parts
from .lr_plan import make_plan, schedule_settings
from .optimizers import create_optimizer, is_schedule_free, sets_own_rates
from .weights import MaxNorm, WeightAction, WeightAverage

logger = logging.getLogger(__name__)


def make_optimizer(config: TrainNetworkConfig, network: AdapterNetwork) -> torch.optim.Optimizer:
    settings = config.optimizer
    groups = param_groups(
        network,
        settings.learning_rate,
        settings.audio_lr,
        settings.lr_args,
        loraplus_lr_ratio=network.args.loraplus_lr_ratio,
    )
    return create_optimizer(settings.optimizer_type, groups, settings.optimizer_args)


def parameter_names(network: AdapterNetwork, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters, in the order of its groups."""
    names = {id(p): n for n, p in network.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def weight_average(config: TrainNetworkConfig, network: AdapterNetwork) -> WeightAverage | None:
    settings = config.network
    if settings.ema_decay is None:
        return None
    return WeightAverage(network, settings.ema_decay, settings.ema_update_every)


def weight_actions(
    config: TrainNetworkConfig, network: AdapterNetwork, average: WeightAverage | None
) -> list[WeightAction]:
    """What happens to the weights after each step: the limit first, so that the average is of limited weights."""
    limit = config.network.scale_weight_norms
    actions: list[WeightAction] = [] if limit is None else [MaxNorm(network, limit)]
    return actions if average is None else [*actions, average]


def check_optimizer(settings: OptimizerConfig, network: NetworkConfig, loraplus_lr_ratio: str | None) -> None:
    """Make optimizer and schedule for stand-ins of the groups that the flags may give."""
    rates = flag_rates(settings.learning_rate, settings.audio_lr, settings.lr_args, loraplus_lr_ratio)
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(8, 4))], "lr": rate, "label": str(index)}
        for index, rate in enumerate(rates)
    ]
    optimizer = create_optimizer(settings.optimizer_type, groups, settings.optimizer_args)
    # The length of the run is known only with the data; a schedule is tried again then.
    schedule = schedule_settings(replace(settings, lr_warmup_steps=0, lr_decay_steps=0), total_steps=1)
    make_plan(settings, schedule, optimizer)
    if is_schedule_free(optimizer) and (network.ema_decay is not None or network.scale_weight_norms is not None):
        raise UserError(
            f"--optimizer_type {settings.optimizer_type} averages the weights itself; leave out --ema_decay and "
            "--scale_weight_norms"
        )


def check_fused_backward(settings: OptimizerConfig, mixed_precision: str, processes: int, device: torch.device) -> None:
    """Refuse ``--fused_backward_pass`` where a step needs all gradients at once; say what it does to clipping.

    Raises:
        ConfigErrors: with this precision, accumulation or number of processes.
        UserError: this optimizer cannot.
    """
    if not settings.fused_backward_pass:
        return
    if problems := list(fused_backward(settings.gradient_accumulation_steps, mixed_precision, processes)):
        raise ConfigErrors(problems, "invalid arguments")

    def make(weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        groups = [{"params": weights, "lr": settings.learning_rate, "label": "0"}]
        optimizer = create_optimizer(settings.optimizer_type, groups, settings.optimizer_args)
        if is_schedule_free(optimizer):
            optimizer.train()
        return optimizer

    check_steps_in_parts(make, f"--optimizer_type {settings.optimizer_type}", device)
    if settings.max_grad_norm > 0:
        logger.warning(
            "--fused_backward_pass: the common norm of all gradients is not known while weights are stepped; "
            "--max_grad_norm %g limits the gradient of each weight by itself (0 turns it off)",
            settings.max_grad_norm,
        )


def fused_backward_pass(
    settings: OptimizerConfig, optimizer: torch.optim.Optimizer, norm_groups: Mapping[str, Sequence[torch.nn.Parameter]]
) -> FusedBackward | None:
    if not settings.fused_backward_pass:
        return None
    return FusedBackward(optimizer, max_norm=settings.max_grad_norm, groups=norm_groups)


def warn_of_rates(config: TrainNetworkConfig, optimizer: torch.optim.Optimizer) -> None:
    """Say which flags of the schedule an optimizer has no use for."""
    settings = config.optimizer
    asked = settings.lr_scheduler_type or settings.lr_scheduler
    scheduled = asked not in ("constant", "adafactor") or settings.lr_warmup_steps
    if is_schedule_free(optimizer) and scheduled:
        logger.warning(
            "--optimizer_type %s needs no schedule: --lr_scheduler and --lr_warmup_steps have no effect; for a warm-up "
            "use --optimizer_args warmup_steps=N",
            settings.optimizer_type,
        )
    elif sets_own_rates(optimizer) and scheduled:
        logger.warning(
            "Adafactor with relative_step sets its own rates: --lr_scheduler and --lr_warmup_steps have no effect; "
            "to use them give --optimizer_args relative_step=False"
        )
    elif settings.lr_scheduler_type and settings.lr_warmup_steps:
        logger.warning("--lr_scheduler_type %s takes no --lr_warmup_steps", settings.lr_scheduler_type)
    elif asked in ("constant", "piecewise_constant") and settings.lr_warmup_steps:
        logger.warning("--lr_scheduler %s has no warm-up; use constant_with_warmup", asked)
