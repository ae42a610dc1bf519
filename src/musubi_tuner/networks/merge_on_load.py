"""Adapter files that become part of the base model while it is loaded (``--base_weights``)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.common.errors import UserError
from musubi_tuner.quantization.rows import row_chunks

from .adapter_network import absent_modules
from .base_weights import fits
from .files.formats import lengths_over_base
from .files.lora_reader import LoraReader
from .lycoris.files import LycorisReader, adapter_module, mergeable_sizes, open_adapter

logger = logging.getLogger(__name__)

_Part = tuple[LoraReader | LycorisReader, float]


def open_base_weights(paths: Sequence[Path], multipliers: Sequence[float]) -> list[_Part]:
    """The files and their strengths; a missing strength is 1.

    Raises:
        UserError: a file is no adapter of LTX-2.
    """
    strengths = [*multipliers, *[1.0] * (len(paths) - len(multipliers))]
    return [(open_adapter(path), strength) for path, strength in zip(paths, strengths, strict=True)]


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
        sizes = dict(mergeable_sizes(reader))
        absent = absent_modules(sizes, linears, str(reader.path))
        if absent:
            logger.warning("%s: %d modules are left out, such as %s", reader.path, len(absent), absent[0])
        for module in sizes.keys() - set(absent):
            _check_size(reader, module, sizes[module], shapes[f"{module}.weight"])
            concerned.setdefault(module, []).append((reader, strength))
        logger.info("merging %s x %g into the base: %d modules", reader.path.name, strength, len(sizes))
    return {f"{module}.weight": _edit(module, using) for module, using in concerned.items()}


def _edit(module: str, using: Sequence[_Part]) -> Callable[[Tensor], Tensor]:
    def edit(weight: Tensor) -> Tensor:
        parts = [(adapter_module(r, module).to(weight.device), m, lengths_over_base(r.format)) for r, m in using]
        changed = torch.empty_like(weight)
        for rows in row_chunks(*weight.shape):
            base = weight[rows].float()
            changed[rows] = base + sum(part.change(rows, base, m, over_base=over) for part, m, over in parts)
        return changed

    return edit


def _check_size(
    reader: LoraReader | LycorisReader, module: str, size: tuple[int | None, int | None], shape: tuple[int, ...]
) -> None:
    if not fits(shape, size):
        raise UserError(
            f"{reader.path}: {module} is made for a layer of {size[1] or 'any'} -> {size[0] or 'any'} features, "
            f"the model's has {shape[1]} -> {shape[0]}; it is a LoRA of another model"
        )
