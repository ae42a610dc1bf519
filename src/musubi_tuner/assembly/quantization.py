"""From the flags of quantisation to what the loader is asked for."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch

from musubi_tuner.common.errors import UserError
from musubi_tuner.config.memory import CalibrationConfig, QuantizationConfig
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.ltx2.keys import in_mode
from musubi_tuner.models.ltx2.quantize import Quantization, Quantize, is_target, quantize_plainly, stored_transformer
from musubi_tuner.networks.files.loftq_factors import StoredLoftQ
from musubi_tuner.networks.loftq import LoftQ
from musubi_tuner.networks.lora_network import LoRANetwork
from musubi_tuner.quantization.fp8_products import Fp8Products, find_products
from musubi_tuner.quantization.stored import NF4_BLOCK_KEY

from .base import Base

logger = logging.getLogger(__name__)

_VARIABLES = {"fp8": "LTX2_FP8_CALC_DEVICE", "int8": "LTX2_INT8_CALC_DEVICE", "nf4": "LTX2_NF4_CALC_DEVICE"}
_NOTHING = "--loftq_init: none of the adapted layers is quantised; change the LoRA targets"
_DEVICES = {"cpu": "cpu", "cuda": "cuda", "gpu": "cuda"}


@dataclass(frozen=True)
class LoftQRequest:
    """How the LoRA of a quantised base starts.

    Attributes:
        iterations: of the alternation.
        file: the factors of a base that is quantised already; ``None``: they are made while it is loaded.
    """

    iterations: int
    file: StoredLoftQ | None = None


def quantization_settings(
    config: QuantizationConfig, device: torch.device, calibration: CalibrationConfig | None = None
) -> Quantization | None:
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
        calibrate=calibration is not None and calibration.awq_calibration,
        corrected=calibration is not None and calibration.loftq_init,
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


def loftq_request(
    calibration: CalibrationConfig, rank: int | None, checkpoint: Checkpoint, *, iterations_given: bool
) -> LoftQRequest | None:
    """What ``--loftq_init`` asks for, known from headers and little more; ``None`` without it.

    Raises:
        UserError: the checkpoint is quantised already, and no factors of this rank, made with it, are beside it.
    """
    if not calibration.loftq_init or rank is None:
        return None
    stored = stored_transformer(checkpoint)
    if stored.kind != "nf4":
        return LoftQRequest(calibration.loftq_iters)
    made_with = 1 if stored.own_base is None else stored.own_base.iterations
    if iterations_given and calibration.loftq_iters != made_with:
        logger.warning(
            "--loftq_iters %d has no effect: %s was quantised with %d, and ltx2_quantize_model.py --loftq_own_base "
            "makes one with more",
            calibration.loftq_iters,
            checkpoint.path.name,
            made_with,
        )
    file = StoredLoftQ(checkpoint.path, rank, checkpoint.metadata.get(NF4_BLOCK_KEY), stored.own_base)
    file.check_base(checkpoint.path)
    return LoftQRequest(made_with, file)


class LoftQStart:
    """The start of a network that is not yet applied: read at once, or made with the weights.

    Attributes:
        quantize: for the loader.

    Raises:
        UserError: none of the adapted weights is of those that are quantised.
    """

    def __init__(self, request: LoftQRequest, network: LoRANetwork, base: Base) -> None:
        self._total = len(network.modules_by_name)
        if not any(is_target(f"{name}.weight") for name in network.modules_by_name):
            raise UserError(_NOTHING)
        self.quantize: Quantize = quantize_plainly
        if request.file is not None:
            names = stored_transformer(base.checkpoint).scales
            packed = [name for name in names if is_target(name) and in_mode(name, base.streams)]
            self._started = request.file.start(
                network.modules_by_name, [name.removesuffix(".weight") for name in packed]
            )
        else:
            loftq = LoftQ(network.modules_by_name, request.iterations)
            self.quantize, self._started = loftq.quantize, loftq.started

    def report(self) -> None:
        """To be called after loading.

        Raises:
            UserError: none of the adapted weights is quantised.
        """
        if not self._started:
            raise UserError(_NOTHING)
        logger.info("LoftQ: %d of %d modules start from what quantising lost", len(self._started), self._total)


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
