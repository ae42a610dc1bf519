"""How quantised weights lie in checkpoint files.

===========================  ==========================  ===========================================================
file                         weight ``X.weight``         beside it
===========================  ==========================  ===========================================================
official FP8, ComfyUI        FP8 [N, K]                  ``X.weight_scale``, perhaps ``X.input_scale``, ``.comfy_quant``
ComfyUI, older               FP8 [N, K]                  ``X.scale_weight``, perhaps ``X.scale_input``, ``scaled_fp8``
plain cast                   FP8 [N, K]                  nothing: the scale is 1
NF4 of ltx2_quantize_model   codes [N, K / 2] uint8      ``X.scale_weight`` [N, K / block, 1], ``X.nf4_shape`` [2]
int8 of ltx2_quantize_model  int8 [N, K]                 ``X.scale_weight`` [N, blocks, 1]
===========================  ==========================  ===========================================================

NF4 scales have the dtype of the original weights, which holds a largest magnitude exactly, or float32 where the weights
are those that a LoRA of LoftQ starts from (``OwnBase``).

The scales of the inputs were measured for generating and are not used here. Current files also say the format of each
layer in their metadata (``_quantization_metadata``); one that is not FP8 with such scales is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.safetensors_io import TensorInfo

from .fp8 import FP8_DTYPES

Kind = Literal["dense", "fp8", "int8", "nf4"]

NF4_MARK = {"nf4_quantized": "true"}
INT8_MARK = {"int8_quantized": "true"}
NF4_BLOCK_KEY = "nf4_block_size"
OWN_RANK, OWN_ITERATIONS = "loftq_base_rank", "loftq_base_iters"
SCALE, SHAPE = ".scale_weight", ".nf4_shape"  # of the files made here
_SCALES = (".weight_scale", SCALE)
_UNUSED = (".input_scale", ".scale_input", ".comfy_quant", SHAPE)
_SENTINEL = "scaled_fp8"
_LAYERS_KEY = "_quantization_metadata"
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # MXFP8 has exponents
_UNKNOWN = "a quantisation that is not supported; use the bf16 or FP8 file, or one of ltx2_quantize_model.py"
_LISTED = 3


@dataclass(frozen=True)
class OwnBase:
    """What marks NF4 weights that were quantised less the factors of a LoRA, and are too far off without these.

    Attributes:
        rank: of the factors.
        iterations: of quantising and fitting in turn.
    """

    rank: int
    iterations: int

    @property
    def metadata(self) -> dict[str, str]:
        return {OWN_RANK: str(self.rank), OWN_ITERATIONS: str(self.iterations)}


@dataclass(frozen=True)
class Stored:
    """What is quantised among the tensors of a model in a file. Names are the model's.

    Attributes:
        kind: of the file as a whole; single weights of it may be dense.
        scales: name of a quantised weight to that of its scale, ``None`` for a plain cast.
        companions: tensors that are no parameters: scales and what comes with them.
        own_base: of LoftQ, ``None`` for weights that serve any purpose.
    """

    kind: Kind
    scales: Mapping[str, str | None] = field(default_factory=dict)
    companions: frozenset[str] = frozenset()
    own_base: OwnBase | None = None

    def shape(self, name: str, info: TensorInfo) -> tuple[int, ...]:
        """Shape of a tensor once it is dense."""
        if self.kind == "nf4" and name in self.scales:
            return (info.shape[0], 2 * info.shape[1])
        return info.shape


def read_stored(infos: Mapping[str, TensorInfo], metadata: Mapping[str, Any], source: str) -> Stored:
    """Tell from names, dtypes and metadata how the tensors of a model are stored.

    Raises:
        UserError: quantised in a way that is not known, or a scale without its weight, or a weight without its scale.
    """
    companions = frozenset(n for n in infos if n.endswith((*_SCALES, *_UNUSED)) or n == _SENTINEL)
    made_here = _kind_made_here(metadata)
    quantised = [n for n, info in infos.items() if n not in companions and _is_packed(info, made_here)]
    _refuse_others(infos, companions, quantised, source)
    _refuse_formats(metadata.get(_LAYERS_KEY), source)
    scales = {name: _scale_of(name, infos) for name in quantised}
    used = set(scales.values())
    if odd := [n for n in companions if n in used and infos[n].dtype not in _SCALE_DTYPES]:
        names = _list(sorted({str(infos[n].dtype).removeprefix("torch.") for n in odd}))
        raise UserError(f"{source}: {len(odd)} scales are stored as {names} ({_list(odd)}), {_UNKNOWN}")
    if lost := [n for n in companions if n.endswith(_SCALES) and n not in used]:
        raise UserError(
            f"{source}: {len(lost)} scales belong to no quantised weight ({_list(lost)}); the file was changed "
            "after it was quantised. Use the original"
        )
    if made_here and (lost := [name for name, scale in scales.items() if scale is None]):
        what = f"{len(lost)} {made_here.upper()} weights have no scale ({_list(lost)})"
        raise UserError(f"{source}: {what}; make or download it again")
    kind: Kind = made_here or ("fp8" if quantised else "dense")
    return Stored(kind, scales, companions, _own_base(metadata, source) if kind == "nf4" else None)


def scale_matrix(scale: Tensor, shape: tuple[int, ...], key: str) -> Tensor:
    """A scale as it was stored to [1, 1] or [N, G], K / G values sharing one.

    Raises:
        UserError: it fits no weight of ``shape`` (N, ...), K values a row.
    """
    n, k = shape[0], math.prod(shape[1:])
    groups, rest = divmod(scale.numel(), n)
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if rest or not groups or k % groups or scale.shape[0] != n:
        raise UserError(
            f"{key}: a scale {list(scale.shape)} fits no weight {list(shape)}; expected one, one a row, or equal blocks"
        )
    return scale.reshape(n, groups)


def _kind_made_here(metadata: Mapping[str, Any]) -> Literal["int8", "nf4"] | None:
    marks: dict[Literal["int8", "nf4"], Mapping[str, str]] = {"nf4": NF4_MARK, "int8": INT8_MARK}
    return next((kind for kind, mark in marks.items() if mark.items() <= metadata.items()), None)


def _own_base(metadata: Mapping[str, Any], source: str) -> OwnBase | None:
    texts = [metadata[key] for key in (OWN_RANK, OWN_ITERATIONS) if key in metadata]
    if not texts:
        return None
    if len(texts) != 2 or not all(isinstance(text, str) and re.fullmatch(r"[1-9]\d{0,5}", text) for text in texts):
        found = ", ".join(f"{key} {metadata.get(key)!r}" for key in (OWN_RANK, OWN_ITERATIONS))
        raise UserError(
            f"{source}: its metadata says {found}, expected two whole numbers; make the file again with "
            "ltx2_quantize_model.py --loftq_init --loftq_own_base"
        )
    return OwnBase(*map(int, texts))


def _is_packed(info: TensorInfo, made_here: Literal["int8", "nf4"] | None) -> bool:
    own = {"nf4": torch.uint8, "int8": torch.int8}.get(made_here or "")
    return info.dtype in FP8_DTYPES or (info.dtype == own and len(info.shape) == 2)


def _scale_of(name: str, infos: Mapping[str, TensorInfo]) -> str | None:
    layer = name.removesuffix(".weight")
    return next((layer + suffix for suffix in _SCALES if layer + suffix in infos), None)


def _refuse_others(
    infos: Mapping[str, TensorInfo], companions: frozenset[str], quantised: list[str], source: str
) -> None:
    """Integers are weights in a format that nothing here reads."""
    known = {*companions, *quantised}
    others = [n for n, info in infos.items() if n not in known and not info.dtype.is_floating_point]
    if others:
        names = sorted({str(infos[n].dtype).removeprefix("torch.") for n in others})
        raise UserError(
            f"{source}: {len(others)} weights are stored as {', '.join(names)} ({_list(others)}), {_UNKNOWN}"
        )


def _refuse_formats(described: Any, source: str) -> None:
    """``described``: ``{"layers": {name: {"format": ...}}}`` where a file has it."""
    layers = described.get("layers") if isinstance(described, Mapping) else None
    if not isinstance(layers, Mapping):
        return
    formats = {n: str(e["format"]) for n, e in layers.items() if isinstance(e, Mapping) and "format" in e}
    if others := [name for name, format_ in formats.items() if format_ not in _FORMATS]:
        names = _list(sorted({formats[name] for name in others}))
        raise UserError(f"{source}: {len(others)} layers are in the format {names} ({_list(others)}), {_UNKNOWN}")


def _list(names: list[str]) -> str:
    return ", ".join(sorted(names)[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
