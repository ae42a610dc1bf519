"""From the flags of quantisation to what the loader is asked for."""

from __future__ import annotations

import logging
import os

import torch

from musubi_tuner.common.errors import UserError
from musubi_tuner.config.memory import QuantizationConfig
from musubi_tuner.models.ltx2.quantize import Quantization

logger = logging.getLogger(__name__)

_VARIABLES = {"fp8": "LTX2_FP8_CALC_DEVICE", "nf4": "LTX2_NF4_CALC_DEVICE"}
_DEVICES = {"cpu": "cpu", "cuda": "cuda", "gpu": "cuda"}


def quantization_settings(config: QuantizationConfig, device: torch.device) -> Quantization | None:
    """What ``--fp8_base`` or ``--nf4_base`` asks for; ``None`` for neither.

    Weights are quantised where ``--quantize_device`` or the format's environment variable says, else on ``device``.

    Raises:
        UserError: the variable names no device.
    """
    if not (config.fp8_base or config.nf4_base):
        return None
    kind = "nf4" if config.nf4_base else "fp8"
    return Quantization(
        kind=kind,
        requantise=config.fp8_scaled,
        block_size=config.nf4_block_size,
        device=_calculation_device(config.quantize_device, _VARIABLES[kind], device),
    )


def _calculation_device(asked: str | None, variable: str, device: torch.device) -> torch.device:
    source = "--quantize_device"
    if asked is None and (text := os.environ.get(variable, "").strip()):
        source, asked = variable, _DEVICES.get(text.lower())
        if asked is None:
            raise UserError(f"{variable}={text}: expected one of {', '.join(_DEVICES)}")
    if asked is None or asked == device.type:
        return device
    if asked == "cuda" and not torch.cuda.is_available():
        logger.warning("%s cuda: no GPU that PyTorch can use; quantising on the CPU", source)
        return torch.device("cpu")
    return torch.device(asked)
