"""Which weights of the transformer are quantised, and what a request means for a file."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.safetensors_io import TensorInfo
from musubi_tuner.quantization.awq import ActivationAware
from musubi_tuner.quantization.fp8_products import Fp8Products
from musubi_tuner.quantization.packed import Fp8, Int8, Method, Nf4, Packed
from musubi_tuner.quantization.stored import Stored, read_stored

from .keys import transformer_keys

if TYPE_CHECKING:
    from musubi_tuner.models.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

# Makes a packed weight of a dense one, given its name and the method for it.
Quantize = Callable[[str, Tensor, Method], Packed]

# Attention and feed-forward of the blocks. Gates, norms, tables, embeddings and heads stay dense: they are small.
_TARGET = re.compile(
    r"transformer_blocks\.\d+\."
    r"(((audio_)?attn[12]|audio_to_video_attn|video_to_audio_attn)\.(to_[qkv]|to_out\.0)|(audio_)?ff\.net\.(0\.proj|2))"
    r"\.weight"
)


def is_target(name: str) -> bool:
    """Whether a tensor of the transformer is a weight that quantising concerns."""
    return _TARGET.fullmatch(name) is not None


@dataclass(frozen=True)
class Quantization:
    """A request for a quantised transformer.

    Attributes:
        kind: format to hold.
        requantise: ``--fp8_scaled``, which is for dense files only.
        block_size: of NF4; that of a file which is NF4 already wins.
        device: where weights are quantised.
        by_row: FP8 with a scale for each row, which products in FP8 need, rather than for blocks of it.
        products: how these products are computed; ``None``: weights are dequantised.
        calibrate: needs full precision, for a calibration to make something of it.
        magnitudes: mean abs(input) [K] by the names of the weights that were calibrated.
        strength: of the calibration, 0 to 1.
        corrected: a LoRA of LoftQ starts on it, so it may be one that is made for that.
    """

    kind: Literal["fp8", "int8", "nf4"]
    requantise: bool = False
    block_size: int = 32
    device: torch.device | str = "cpu"
    by_row: bool = False
    products: Fp8Products | None = None
    calibrate: bool = False
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    strength: float = 0.0
    corrected: bool = False

    @property
    def method(self) -> Nf4 | Int8 | Fp8:
        if self.kind == "nf4":
            return Nf4(self.block_size)
        if self.kind == "int8":
            return Int8()
        return Fp8(None) if self.by_row else Fp8()

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of those that ask for it."""
        further = {
            "fp8_scaled": self.requantise,
            "fp8_w8a8": self.by_row,
            "awq_calibration": self.calibrate,
            "loftq_init": self.corrected,
        }
        return (f"{self.kind}_base", *(name for name, asked in further.items() if asked))

    def method_for(self, name: str) -> Method:
        """For the weight of that name."""
        if name not in self.magnitudes:
            return self.method
        return ActivationAware(self.method, self.magnitudes[name], self.strength)


def quantize_plainly(name: str, weight: Tensor, method: Method) -> Packed:
    """Nothing but the method."""
    return method.quantize(weight)


@dataclass(frozen=True)
class WeightPlan:
    """What becomes of the tensors of a file; names are the transformer's.

    Attributes:
        kept: quantised weights that stay as they are.
        expanded: quantised weights that become dense.
        quantised: dense weights that are quantised while they are loaded.
    """

    stored: Stored
    kept: frozenset[str] = frozenset()
    expanded: frozenset[str] = frozenset()
    quantised: frozenset[str] = frozenset()


def stored_transformer(checkpoint: Checkpoint) -> Stored:
    """How the transformer of a file is stored, known from the header alone."""
    names = {name: checkpoint.tensors[key] for name, key in transformer_keys(checkpoint.tensors).items()}
    return read_stored(names, checkpoint.metadata, str(checkpoint.path))


def check_quantization(checkpoint: Checkpoint, quantization: Quantization | None) -> Stored:
    """How the transformer of a file is stored; whether it can be loaded as asked, known from the header alone.

    Raises:
        UserError: the file is quantised in another way than ``quantization`` asks for.
    """
    stored = stored_transformer(checkpoint)
    wanted = quantization.kind if quantization is not None else "dense"
    if stored.own_base is not None and not (wanted == "nf4" and quantization is not None and quantization.corrected):
        raise UserError(
            f"{checkpoint.path}: its NF4 weights lack what a LoRA of rank {stored.own_base.rank} starts at "
            "(--loftq_own_base), so they are for ltx2_train_network.py --nf4_base --loftq_init --network_dim "
            f"{stored.own_base.rank} only; for all else use the original, or an NF4 file without --loftq_own_base"
        )
    if stored.kind in ("nf4", "int8") and wanted != stored.kind:
        given = () if quantization is None else quantization.flags
        instead = f" instead of {' '.join(f'--{name}' for name in given)}" if given else ""
        raise UserError(
            f"{checkpoint.path} holds {stored.kind.upper()} weights; add --{stored.kind}_base{instead}, or use the "
            "original file"
        )
    if stored.kind == "nf4" and quantization is not None and quantization.calibrate:
        raise UserError(
            f"{checkpoint.path} holds NF4 weights already; --awq_calibration needs full precision: use the original "
            "file, or leave it out"
        )
    if stored.kind == "fp8" and wanted in ("nf4", "int8"):
        raise UserError(
            f"{checkpoint.path} holds FP8 weights; --{wanted}_base needs full precision: use the bf16 file, or "
            "--fp8_base"
        )
    if stored.kind == "fp8" and quantization is not None and quantization.requantise:
        raise UserError(f"{checkpoint.path} holds FP8 weights already; leave out --fp8_scaled and keep --fp8_base")
    return stored


def plan_weights(
    stored: Stored, infos: Mapping[str, TensorInfo], quantization: Quantization | None, source: str
) -> WeightPlan:
    """Decide for every weight of a file that passed :func:`check_quantization`; what is notable goes to the log."""
    packed = frozenset(stored.scales) & infos.keys()
    if quantization is None:
        if packed:
            logger.warning(
                "%s holds FP8 weights, which become dense: twice the memory; add --fp8_base to keep them", source
            )
        return WeightPlan(stored, expanded=packed)
    if stored.kind != "dense":
        kept = frozenset(filter(is_target, packed))
        logger.info("%s: %d weights are %s already", source, len(kept), stored.kind.upper())
        return WeightPlan(stored, kept=kept, expanded=packed - kept)
    if quantization.kind == "fp8" and not quantization.requantise:
        logger.warning("%s is not FP8: quantising it with scales, as --fp8_scaled does", source)
    targets = {name for name in infos if is_target(name)}
    fitting = frozenset(name for name in targets if quantization.method.fits(infos[name].shape))
    if left := len(targets) - len(fitting):
        logger.warning("%d weights stay dense: their rows are no whole number of quantisation blocks", left)
    logger.info("quantising %d weights to %s", len(fitting), quantization.kind.upper())
    return WeightPlan(stored, quantised=fitting)
