"""From the flags of quantisation to what the loader is asked for."""

from __future__ import annotations

import logging
import os

import torch

from musubi_tuner.common.errors import UserError
from musubi_tuner.config.memory import QuantizationConfig
from musubi_tuner.models.ltx2.quantize import Quantization
from musubi_tuner.quantization.fp8_products import Fp8Products, find_products

logger = logging.getLogger(__name__)

_VARIABLES = {"fp8": "LTX2_FP8_CALC_DEVICE", "int8": "LTX2_INT8_CALC_DEVICE", "nf4": "LTX2_NF4_CALC_DEVICE"}
_DEVICES = {"cpu": "cpu", "cuda": "cuda", "gpu": "cuda"}


def quantization_settings(config: QuantizationConfig, device: torch.device) -> Quantization | None:
    """What ``--fp8_base``, ``--int8_base`` or ``--nf4_base`` asks for; ``None`` for none of them.

    Weights are quantised where ``--quantize_device`` or the format's environment variable says, else on ``device``.

    Raises:
        UserError: the variable names no device.
    """
    kind = config.kind
    if kind is None:
        return None
    return Quantization(
        kind=kind,
        requantise=config.fp8_scaled,
        block_size=config.nf4_block_size,
        device=_calculation_device(config.quantize_device, _VARIABLES[kind], device),
        by_row=config.fp8_w8a8,
        products=_products(config, device) if config.fp8_w8a8 else None,
    )


def _products(config: QuantizationConfig, device: torch.device) -> Fp8Products | None:
    """The same weights with or without, so that what is trained does not depend on the card."""
    products = find_products(device, backward=config.fp8_gradients)
    if products is None:
        logger.warning(
            "--fp8_w8a8: no FP8 products on %s; weights are dequantised instead, which is slower and more exact",
            torch.cuda.get_device_name(device) if device.type == "cuda" else device,
        )
    elif products.kernel == "reference":
        logger.warning("--fp8_w8a8: products of FP8 numbers in float32 on %s, for trying it: nothing is faster", device)
    return products


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
