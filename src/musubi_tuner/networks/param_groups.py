"""Learning rates per module: optimizer groups of a network."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from musubi_tuner.common.errors import UserError

from .network_args import parse_network_args
from .targets import compile_patterns, longest_match

logger = logging.getLogger(__name__)


def param_groups(
    network: nn.Module,
    learning_rate: float,
    audio_lr: float | None = None,
    lr_args: Sequence[str] = (),
    loraplus_lr_ratio: float | None = None,
) -> list[dict[str, Any]]:
    """Groups ``{"params", "lr", "label"}`` for an optimizer.

    A module's rate is that of the longest pattern of ``lr_args`` found (``re.search``) in its name, else
    ``audio_lr`` if the name contains ``audio_`` (both cross-modal directions do), else ``learning_rate``.
    Modules whose rate is 0 are frozen.

    Args:
        network: its children are the modules, named ``lora_unet_...``.
        lr_args: ``pattern=rate``, split at the last ``=``.
        loraplus_lr_ratio: LoRA+ (Hayou et al. 2024, arXiv:2402.12354): the up factors learn this much faster.

    Raises:
        UserError: unreadable pattern or rate, or every module is frozen.
    """
    rates = dict(_read_rate(item) for item in lr_args)
    patterns = compile_patterns(rates, "--lr_args")
    default_label = "unet" if audio_lr is None else "unet_video"
    groups: dict[str, dict[str, Any]] = {}
    for name, module in network.named_children():
        pattern = longest_match(patterns, name)
        if pattern is not None:
            label, lr = f"unet_{pattern}", rates[pattern]
        elif audio_lr is not None and "audio_" in name:
            label, lr = "unet_audio", audio_lr
        else:
            label, lr = default_label, learning_rate
        if lr == 0:
            module.requires_grad_(False)
            continue
        for parameter_name, parameter in module.named_parameters():
            faster = loraplus_lr_ratio is not None and "lora_up" in parameter_name
            full_label, rate = (f"{label} plus", lr * loraplus_lr_ratio) if faster else (label, lr)
            group = groups.setdefault(full_label, {"params": [], "lr": rate, "label": full_label})
            group["params"].append(parameter)
    _warn_unmatched(patterns, [name for name, _ in network.named_children()])
    if not groups:
        raise UserError("every module of the network has learning rate 0; there is nothing to train")
    return list(groups.values())


def flag_rates(
    learning_rate: float, audio_lr: float | None, lr_args: Sequence[str], loraplus_lr_ratio: str | None
) -> list[float]:
    """The different rates that the groups of a network may get, without those that freeze; at least one.

    Raises:
        UserError: unreadable pattern, rate or ratio.
    """
    rates = dict(_read_rate(item) for item in lr_args)
    compile_patterns(rates, "--lr_args")
    found = dict.fromkeys([learning_rate, learning_rate if audio_lr is None else audio_lr, *rates.values()])
    if loraplus_lr_ratio is not None:
        ratio = parse_network_args({"loraplus_lr_ratio": loraplus_lr_ratio}).loraplus_lr_ratio
        found |= dict.fromkeys([rate * ratio for rate in found])
    return [rate for rate in found if rate > 0] or [1.0]


def _read_rate(item: str) -> tuple[str, float]:
    pattern, equals, text = item.rpartition("=")
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not (equals and pattern and 0 <= rate < float("inf")):
        raise UserError(f"--lr_args {item!r}: expected pattern=rate such as audio_attn=1e-6")
    return pattern, rate


def _warn_unmatched(patterns: Sequence[re.Pattern[str]], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(pattern.search(name) for name in names):
            logger.warning("--lr_args: %r matches no module of the network", pattern.pattern)
