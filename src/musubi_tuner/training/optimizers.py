"""Optimizers by name."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Sequence
from typing import Any

import torch

from musubi_tuner.common.errors import UserError

# Short names, without regard to case, to the class that implements them.
_SHORT_NAMES = {
    "": "torch.optim.AdamW",
    "adamw": "torch.optim.AdamW",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "pagedadamw8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "lion8bit": "bitsandbytes.optim.Lion8bit",
    "adafactor": "transformers.optimization.Adafactor",
    "prodigy": "prodigyopt.Prodigy",
}


def parse_key_values(pairs: Sequence[str], flag: str) -> dict[str, Any]:
    """``["betas=(0.9, 0.99)", "mode=fast"]`` to a dictionary; bare words stay strings.

    Raises:
        UserError: a pair without ``=``.
    """
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"{flag}: expected key=value, got {pair!r}")
        try:
            options[key.strip()] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[key.strip()] = text
    return options


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class behind ``--optimizer_type``: a short name, a class of ``torch.optim``, or ``module.Class``.

    Raises:
        UserError: the package is not installed or has no such class, or it is a schedule-free optimizer.
    """
    path = _SHORT_NAMES.get(name.lower(), name if "." in name else f"torch.optim.{name}")
    module_name, _, class_name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except ModuleNotFoundError:
        package = module_name.partition(".")[0]
        raise UserError(f"--optimizer_type {name} needs the package {package}: pip install {package}") from None
    except AttributeError:
        raise UserError(
            f"--optimizer_type {name}: {module_name} has no class {class_name}; "
            f"known short names: {', '.join(n for n in _SHORT_NAMES if n)}"
        ) from None
    if callable(getattr(cls, "train", None)):
        # They refuse to step, and save other weights than they train, unless they are told of each change.
        raise UserError(f"--optimizer_type {name}: schedule-free optimizers are not available in this version")
    return cls


def create_optimizer(name: str, groups: list[dict[str, Any]], args: Sequence[str] = ()) -> torch.optim.Optimizer:
    """An optimizer over parameter groups that carry their own ``lr``.

    Raises:
        UserError: unknown optimizer, missing package, or an option it does not take.
    """
    cls = optimizer_class(name)
    options = parse_key_values(args, "--optimizer_args")
    on_cuda = any(p.is_cuda for g in groups for p in g["params"])
    if cls is torch.optim.AdamW and on_cuda and not {"fused", "foreach"} & options.keys():
        options["fused"] = True  # one kernel for all parameters instead of one for each operation
    try:
        return cls(groups, lr=groups[0]["lr"], **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"--optimizer_args: {cls.__name__} refuses them: {error}") from None
