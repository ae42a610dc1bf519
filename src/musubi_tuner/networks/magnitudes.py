"""DoRA's magnitudes as ComfyUI means them.

A layer with DoRA is ``m * (W + dW) / |W + dW|``, a norm for each output. ComfyUI divides by ``|W|`` instead, so its
file holds ``m * |W| / |W + dW|``.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from musubi_tuner.common.errors import UserError

from .adapter_file import AdapterFile
from .adapter_keys import DOWN, MAGNITUDE, UP, is_lora
from .base_weights import BaseWeights
from .convert import Magnitudes
from .formats import Format


def comfy_magnitudes(source: AdapterFile, fmt: Format, checkpoint: Path | None) -> Magnitudes | None:
    """What becomes of magnitudes on the way to or from ComfyUI's format; ``None``: nothing.

    Raises:
        UserError: the checkpoint is needed and was not given, or is not that of the LoRA.
    """
    adapted = [n for n, r in source.adapters.modules.items() if MAGNITUDE in r and is_lora(r)]
    if not adapted or (source.format == "comfy") == (fmt == "comfy"):
        return None
    if checkpoint is None:
        raise UserError(
            f"{source.path}: {len(adapted)} modules are DoRA, whose magnitudes mean something else in ComfyUI; "
            "to convert them the weights are needed: give --ltx2_checkpoint"
        )
    base = BaseWeights(checkpoint)
    tensors = source.file.tensors
    shapes = {n: tuple(tensors[source.roles(n)[r]].shape for r in (UP, DOWN)) for n in adapted}
    base.require([(n, (up[0], down[1])) for n, (up, down) in shapes.items()], str(source.path))

    def converted(name: str, magnitude: Tensor) -> Tensor:
        ratio = _norm_ratio(source, base, name)
        return magnitude.float() * ratio if fmt == "comfy" else magnitude.float() / ratio

    return converted


def _norm_ratio(source: AdapterFile, base: BaseWeights, name: str) -> Tensor:
    """|W| / |W + dW| for each output, [N]."""
    weight = base.dense(f"{name}.weight")
    before = weight.norm(dim=1)
    up, note = source.up(name)
    weight.addmm_(up.float() * note.scale(source.rank(name)), source.read(name, DOWN).float())
    return before / weight.norm(dim=1)
