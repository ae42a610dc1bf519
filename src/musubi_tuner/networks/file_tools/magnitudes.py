"""DoRA's magnitudes as ComfyUI means them.

A layer with DoRA is ``m * (W + dW) / |W + dW|``, a norm for each output. ComfyUI divides by ``|W|`` instead, so its
file holds ``m * |W| / |W + dW|``.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from musubi_tuner.common.errors import UserError
from musubi_tuner.networks.base_weights import BaseWeights
from musubi_tuner.networks.files.adapter_file import AdapterFile
from musubi_tuner.networks.files.adapter_keys import MAGNITUDE
from musubi_tuner.networks.files.formats import Format
from musubi_tuner.networks.lycoris.files import LycorisReader
from musubi_tuner.quantization.rows import row_chunks

from .convert import Magnitudes


def comfy_magnitudes(source: AdapterFile, fmt: Format, checkpoint: Path | None) -> Magnitudes | None:
    """What becomes of magnitudes on the way to or from ComfyUI's format; ``None``: nothing.

    Raises:
        UserError: the checkpoint is needed and was not given, or is not that of the LoRA.
    """
    adapted = [n for n, r in source.adapters.modules.items() if MAGNITUDE in r and not source.of_inputs(n)]
    if not adapted or (source.format == "comfy") == (fmt == "comfy"):
        return None
    if checkpoint is None:
        raise UserError(
            f"{source.path}: {len(adapted)} modules are DoRA, whose magnitudes mean something else in ComfyUI; "
            "to convert them the weights are needed: give --ltx2_checkpoint"
        )
    base, reader = BaseWeights(checkpoint), LycorisReader(source.path)
    base.require([(n, reader.read(n).shape) for n in adapted], str(source.path))

    def converted(name: str, magnitude: Tensor) -> Tensor:
        ratio = _norm_ratio(reader, base, name)
        return magnitude.float() * ratio if fmt == "comfy" else magnitude.float() / ratio

    return converted


def _norm_ratio(reader: LycorisReader, base: BaseWeights, name: str) -> Tensor:
    """|W| / |W + dW| for each output, [N]."""
    weight, module = base.dense(f"{name}.weight"), reader.read(name).to("cpu")
    before = weight.norm(dim=1)
    for rows in row_chunks(*weight.shape):
        weight[rows] += module.rows(rows)
    return before / weight.norm(dim=1)
