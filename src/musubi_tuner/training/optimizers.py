"""Optimizers by name, what they are made from, and the weights that they train, evaluate and save."""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from musubi_tuner.common.errors import UserError, did_you_mean
from musubi_tuner.common.log import warn_once

logger = logging.getLogger(__name__)

# Short names, without regard to case, to the class that implements them.
_SHORT_NAMES = {
    "": "torch.optim.AdamW",
    "adamw": "torch.optim.AdamW",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "pagedadamw8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "pagedadam8bit": "bitsandbytes.optim.PagedAdam8bit",
    "lion8bit": "bitsandbytes.optim.Lion8bit",
    "adafactor": "transformers.optimization.Adafactor",
    "lion": "pytorch_optimizer.Lion",
    "prodigy": "pytorch_optimizer.Prodigy",
    "adamwschedulefree": "pytorch_optimizer.ScheduleFreeAdamW",
    "came": "pytorch_optimizer.CAME",
    "muon": "pytorch_optimizer.Muon",
}
Groups = list[dict[str, Any]]
_NO_CLOSURE = inspect.Parameter("closure", inspect.Parameter.KEYWORD_ONLY, default=None)


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
            options[key.strip()] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            options[key.strip()] = text
    return options


def import_class(path: str, flag: str, known: Sequence[str] = ()) -> type:
    """The class of a dotted path.

    Raises:
        UserError: the package is not installed or has no such class.
    """
    module_name, _, class_name = path.rpartition(".")
    if not all(part.isidentifier() for part in path.split(".")):
        raise UserError(f"{flag}: expected the name of a class, such as package.module.Class")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except ModuleNotFoundError as error:
        package = (error.name or module_name).partition(".")[0]
        raise UserError(f"{flag} needs the package {package}: pip install {package}") from None
    except AttributeError:
        names = f"; known short names: {', '.join(known)}" if known else ""
        raise UserError(f"{flag}: {module_name} has no class {class_name}{names}") from None


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class behind ``--optimizer_type``: a short name, a class of ``torch.optim``, or ``module.Class``.

    Raises:
        UserError: the package is not installed or has no such class.
    """
    path = _SHORT_NAMES.get(name.lower(), name if "." in name else f"torch.optim.{name}")
    cls = import_class(path, f"--optimizer_type {name}", [n for n in _SHORT_NAMES if n])
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise UserError(f"--optimizer_type {name}: {path} is no subclass of torch.optim.Optimizer")
    if inspect.signature(cls.step).parameters.get("closure", _NO_CLOSURE).default is inspect.Parameter.empty:
        raise UserError(
            f"--optimizer_type {name}: {path} evaluates the loss several times a step (its step() needs a closure), "
            "which the training loop does not do; choose another optimizer"
        )
    return cls


def create_optimizer(name: str, groups: Groups, args: Sequence[str] = ()) -> torch.optim.Optimizer:
    """An optimizer over parameter groups that carry their own ``lr``.

    Raises:
        UserError: unknown optimizer, missing package, or an option it does not take.
    """
    cls = optimizer_class(name)
    options = parse_key_values(args, "--optimizer_args")
    _check_options(cls, options)
    lr = groups[0]["lr"]
    if cls is torch.optim.AdamW and not {"fused", "foreach"} & options.keys():
        options["fused"] = True  # one pass over each parameter instead of one for each operation
    if cls.__name__ == "Adafactor" and "relative_step" in _parameters_of(cls):
        lr, groups, options = _for_adafactor(lr, groups, options)
    if cls.__module__.startswith("pytorch_optimizer."):
        lr, groups, options = _for_pytorch_optimizer(cls, lr, groups, options)
    if cls.__name__ == "Prodigy" and len({group["lr"] for group in groups}) > 1:
        raise UserError(
            "--optimizer_type Prodigy finds one step size for all groups: it takes a single learning rate, so leave "
            "out --audio_lr, --lr_args and loraplus_lr_ratio (a rate of 0 is allowed and freezes)"
        )
    try:
        return cls(groups, lr=lr, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"--optimizer_args: {cls.__name__} refuses them: {error}") from None


def _for_adafactor(lr: float, groups: Groups, options: dict[str, Any]) -> tuple[float | None, Groups, dict[str, Any]]:
    """Adafactor with ``relative_step`` makes its own rates and wants to be given none."""
    relative = options.setdefault("relative_step", True)
    if options.get("warmup_init") and not relative:
        warn_once(logger, "warmup_init", "--optimizer_args warmup_init=True: sets relative_step=True as well")
        relative = options["relative_step"] = True
    if not relative:
        return lr, groups, options
    if len(groups) > 1:
        message = "Adafactor with relative_step sets its own rates; those of --audio_lr, --lr_args have no effect"
        warn_once(logger, "relative_step", message)
    return None, [{k: v for k, v in group.items() if k != "lr"} for group in groups], options


def _for_pytorch_optimizer(
    cls: type, lr: float, groups: Groups, options: dict[str, Any]
) -> tuple[float, Groups, dict[str, Any]]:
    if cls.__name__ != "Muon":
        return lr, groups, options
    # Scaled so that an update is as large as AdamW's: one --learning_rate then suits both kinds of group.
    options.setdefault("use_adjusted_lr", True)
    return lr, [part for group in groups for part in _matrices_apart(group)], options


def _matrices_apart(group: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Muon orthogonalises matrices; vectors, scalars and kernels of a group go to its AdamW."""
    for matrices in (True, False):
        params = [p for p in group["params"] if (p.dim() == 2) == matrices]
        if params:
            label = group["label"] if matrices else f"{group['label']} adamw"
            yield {**group, "params": params, "label": label, "use_muon": matrices}


def _parameters_of(cls: type) -> dict[str, inspect.Parameter]:
    """Named parameters of the constructor; where it passes others on, of its base classes too."""
    found: dict[str, inspect.Parameter] = {}
    for ancestor in cls.__mro__:
        if "__init__" not in vars(ancestor) or ancestor in (object, torch.optim.Optimizer):
            continue
        parameters = inspect.signature(ancestor.__init__).parameters
        found = {**parameters, **found}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return found


def _check_options(cls: type, options: Mapping[str, Any]) -> None:
    """Refuse options that the class does not name; several classes swallow them without a word."""
    parameters = _parameters_of(cls)
    swallows = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if swallows and not cls.__module__.startswith("pytorch_optimizer."):
        return  # what it takes cannot be told from outside
    named = (p for p in parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
    known = [p.name for p in named if p.name not in ("self", "params", "lr", "defaults")]
    for key in options:
        if key == "lr":
            raise UserError("--optimizer_args lr: the learning rate is set with --learning_rate")
        if key not in known:
            raise UserError(
                f"--optimizer_args: {cls.__name__} has no option {key!r}{did_you_mean(key, known)}; "
                f"known: {', '.join(known)}"
            )


# --- what an optimizer says of itself ---


def sets_own_rates(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the groups have no learning rate because the optimizer makes it (Adafactor's relative_step)."""
    return any(group["lr"] is None for group in optimizer.param_groups)


def is_schedule_free(optimizer: torch.optim.Optimizer | type[torch.optim.Optimizer]) -> bool:
    """Whether it trains other weights than it evaluates, and is told so with ``train()`` and ``eval()``."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Rate of each group by its label; with an estimated distance d (Prodigy) also ``d*lr/<label>``."""
    rates = {g.get("label", str(i)): _rate(optimizer, g) for i, g in enumerate(optimizer.param_groups)}
    adapted = {
        f"d*lr/{g.get('label', i)}": float(g["d"]) * _rate(optimizer, g)
        for i, g in enumerate(optimizer.param_groups)
        if "d" in g
    }
    return rates | adapted


def _rate(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float:
    if group["lr"] is not None:
        return float(group["lr"])
    stepped = [p for p in group["params"] if "step" in optimizer.state.get(p, {})]
    return float(optimizer._get_lr(group, optimizer.state[stepped[0]])) if stepped else 0.0


@contextmanager
def evaluation_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Run a block with the weights to save and to look at; afterwards those in training are back, bit for bit."""
    if not is_schedule_free(optimizer):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [p.detach().clone() for p in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()  # interpolates back, which rounds
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
