"""LoRA files that become part of the base model while it is loaded (``--base_weights``)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from musubi_tuner.common.errors import UserError

from .adapter_network import absent_modules
from .formats import LoraReader, lengths_over_base

logger = logging.getLogger(__name__)

_Part = tuple[LoraReader, float]


def open_base_weights(paths: Sequence[Path], multipliers: Sequence[float]) -> list[_Part]:
    """The files and their strengths; a missing strength is 1.

    Raises:
        UserError: a file is no LoRA of LTX-2.
    """
    strengths = [*multipliers, *[1.0] * (len(paths) - len(multipliers))]
    return [(LoraReader(path), strength) for path, strength in zip(paths, strengths, strict=True)]


def weight_edits(
    parts: Sequence[_Part], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Callable[[Tensor], Tensor]]:
    """For each weight that the files change, by parameter name, what makes the changed one of it.

    The sum is taken in float32 and rounded once. A file's factors are read when their weight comes by.

    Args:
        shapes: of all the transformer's parameters.

    Raises:
        UserError: a file adapts what the transformer does not have, or has in another size.
    """
    concerned: dict[str, list[_Part]] = {}
    for reader, strength in parts:
        linears = {name.removesuffix(".weight") for name in shapes if name.endswith(".weight")}
        absent = absent_modules(reader.infos, linears, str(reader.path))
        if absent:
            logger.warning("%s: %d modules are left out, such as %s", reader.path, len(absent), absent[0])
        for module in reader.infos.keys() - set(absent):
            _check_size(reader, module, shapes[f"{module}.weight"])
            concerned.setdefault(module, []).append((reader, strength))
        logger.info("merging %s x %g into the base: %d modules", reader.path.name, strength, len(reader.infos))
    return {f"{module}.weight": _edit(module, using) for module, using in concerned.items()}


def _edit(module: str, using: Sequence[_Part]) -> Callable[[Tensor], Tensor]:
    def edit(weight: Tensor) -> Tensor:
        base = weight.float()
        changed = base.clone()
        for reader, strength in using:
            part = reader.read(module).on(base.device)
            changed += part.change(base, strength, over_base=lengths_over_base(reader.format))
        return changed.to(weight.dtype)

    return edit


def _check_size(reader: LoraReader, module: str, shape: tuple[int, ...]) -> None:
    info = reader.infos[module]
    if (info.out_features, info.in_features) != tuple(shape):
        raise UserError(
            f"{reader.path}: {module} is made for a layer of {info.in_features} -> {info.out_features} features, "
            f"the model's has {shape[1]} -> {shape[0]}; it is a LoRA of another model"
        )
