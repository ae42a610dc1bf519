"""LoRAs, DoRAs and LyCORIS files into the weights of a checkpoint, one weight in memory at a time.

``W + sum of multiplier * dW``, with ``dW = alpha / r * up @ down`` of a LoRA, is computed in float32 and rounded once.
Of DoRA and IA3 ``dW`` is what they make of ``W``, less ``W``.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from musubi_tuner.common.dtypes import dtype_name
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.progress import bytes_progress
from musubi_tuner.common.safetensors_io import write_streamed
from musubi_tuner.models.ltx2.keys import transformer_keys
from musubi_tuner.models.ltx2.quantize import is_target
from musubi_tuner.networks.base_weights import BaseWeights
from musubi_tuner.networks.files.formats import lengths_over_base
from musubi_tuner.networks.files.lora_reader import LoraReader
from musubi_tuner.networks.lycoris.files import LycorisReader, adapter_module, mergeable_sizes
from musubi_tuner.quantization.fp8 import FP8_DTYPES, dequantize_fp8, quantize_fp8
from musubi_tuner.quantization.rows import row_chunks

logger = logging.getLogger(__name__)

Adapter = LoraReader | LycorisReader

Output = torch.dtype | Literal["fp8"] | None  # None: as the base stores each weight

_LAYERS = "_quantization_metadata"
_SCALE = ".weight_scale"
_ROUNDED_AWAY = 0.5
_E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class MergedModel:
    """What merging did.

    Attributes:
        merged: weights that LoRAs changed.
        weights: all of the checkpoint's tensors that were written.
        fp8: those of them in FP8.
        lost: |stored - exact| / |change| over all merged weights: of FP8, that of quantising.
    """

    merged: int
    weights: int
    fp8: int
    lost: float


@dataclass(frozen=True)
class _Form:
    """How a tensor is written: its dtype, and of a scaled FP8 weight the key, dtype and shape of the scale."""

    dtype: torch.dtype
    scale: tuple[str, torch.dtype, tuple[int, ...]] | None = None


class _Sum:
    """The squares of what was to change and of what rounding made of it."""

    def __init__(self) -> None:
        self.change = self.error = 0.0

    @property
    def lost(self) -> float:
        return (self.error / self.change) ** 0.5 if self.change else 0.0


def merge_into_model(
    base_path: str | os.PathLike[str],
    loras: Sequence[tuple[Adapter, float]],
    target: Path,
    *,
    output: Output = None,
    device: torch.device | str = "cpu",
) -> MergedModel:
    """Write a checkpoint with LoRAs merged into it; all that they do not touch is copied.

    Args:
        base_path: any checkpoint in full precision or FP8.
        loras: files of any format, and the strength of each.
        target: appears only when complete.
        output: of the transformer: a dtype, ``fp8`` (e4m3 with a scale for each weight, as official files and ComfyUI
            have it), or ``None`` for what the base has. What is no part of the transformer stays as it is.
        device: where products are computed.

    Raises:
        UserError: a LoRA has a module without its weight, or a value is not finite. No file is written then.
    """
    base = BaseWeights(base_path)
    for reader, _ in loras:
        base.require(mergeable_sizes(reader), str(reader.path))
    used = [(reader, m) for reader, m in loras if m != 0]
    parts = {f"{n}.weight": [(r, m) for r, m in used if n in r.infos] for reader, _ in used for n in reader.infos}
    forms = _forms(base, output)
    infos = _infos(base, forms)
    total = _Sum()
    metadata = _metadata(base, forms, loras, output)
    write_streamed(target, infos, _tensors(base, parts, forms, device, total), metadata)
    fp8 = sum(form.dtype in FP8_DTYPES for form in forms.values())
    if total.lost > _ROUNDED_AWAY and output != "fp8":
        logger.warning(
            "rounding moves the weights by %.0f %% of the LoRA's change, which is small beside them; keep the LoRA "
            "as a file of its own, or write a wider --dtype",
            100 * total.lost,
        )
    return MergedModel(len(parts), len(infos), fp8, total.lost)


def _forms(base: BaseWeights, output: Output) -> dict[str, _Form]:
    """Official name -> form of every tensor but the companions of quantised weights."""
    transformer = set(transformer_keys(base.file.tensors))
    names = [n for n in base.keys if n not in base.stored.companions]
    return {n: _form(base, n, output if n in transformer else None) for n in names}


def _form(base: BaseWeights, name: str, output: Output) -> _Form:
    info = base.info(name)
    key = base.scale_key(name)
    if output is None or (output == "fp8" and info.dtype in FP8_DTYPES):
        scale = None if key is None else (key, base.file.tensors[key].dtype, base.file.tensors[key].shape)
        if scale is not None and info.dtype != _E4M3:
            raise UserError(f"{base.path}: {name} is scaled {dtype_name(info.dtype)}; use --dtype bfloat16")
        return _Form(info.dtype, scale)
    if output == "fp8":
        if not is_target(name):
            return _Form(info.dtype)
        return _Form(_E4M3, (base.keys[name].removesuffix(".weight") + _SCALE, torch.float32, ()))
    return _Form(output)


def _infos(base: BaseWeights, forms: Mapping[str, _Form]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor of the result, by key."""
    dropped = _dropped(base, forms)
    infos = {k: (i.dtype, i.shape) for k, i in base.file.tensors.items() if k not in dropped}
    for name, form in forms.items():
        infos[base.keys[name]] = (form.dtype, base.info(name).shape)
        if form.scale is not None:
            infos[form.scale[0]] = form.scale[1:]
    return infos


def _dropped(base: BaseWeights, forms: Mapping[str, _Form]) -> set[str]:
    """Keys of companions (scales of weights and inputs, marks) that have nothing to stand beside any more."""
    if any(form.dtype in FP8_DTYPES for form in forms.values()):
        return set()
    return {base.keys[name] for name in base.stored.companions}


def _tensors(
    base: BaseWeights,
    parts: Mapping[str, Sequence[tuple[Adapter, float]]],
    forms: Mapping[str, _Form],
    device: torch.device | str,
    total: _Sum,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the result, in the order of the base."""
    names = {base.keys[n]: n for n in forms}
    scales = {base.scale_key(n) for n in forms} - {None}
    keys = [k for k in base.file.tensors if k not in scales and k not in _dropped(base, forms)]
    sizes = {k: base.file.tensors[k].nbytes for k in keys}
    for key, tensor in bytes_progress(base.file.read(keys), sizes, desc="merging"):
        name = names.get(key)
        if name is None:
            yield key, tensor
            continue
        form = forms[name]
        if name not in parts and tensor.dtype == form.dtype:
            yield key, tensor
            if form.scale is not None:
                yield form.scale[0], base.file.read_one(form.scale[0])
            continue
        stored, scale = _merged(base, name, tensor, _Delta(parts.get(name, ()), name, device), form, total)
        yield key, stored
        if form.scale is not None:
            yield form.scale[0], scale.to(form.scale[1]).reshape(form.scale[2])


class _Delta:
    """What all adapters add to one weight, made a few rows at a time."""

    def __init__(self, parts: Sequence[tuple[Adapter, float]], name: str, device: torch.device | str) -> None:
        self.device = torch.device(device)
        module = name.removesuffix(".weight")
        sums = [(r, m) for r, m in parts if isinstance(r, LoraReader) and not r.infos[module].dora]
        loras = [r.read(module).folded(m).to(torch.float32) for r, m in sums]
        self._up = torch.cat([m.up for m in loras], dim=1).to(device) if loras else None  # [N, R]
        self._down = torch.cat([m.down for m in loras]).to(device) if loras else None  # [R, K]
        others = [part for part in parts if part not in sums]
        self._others = [(adapter_module(r, module).to(device), m, lengths_over_base(r.format)) for r, m in others]
        self.empty = not (loras or self._others)

    def rows(self, rows: slice, weight: Tensor) -> Tensor:
        """``weight``: the same rows of the base."""
        found = [] if self._up is None else [self._up[rows] @ self._down]
        found += [module.change(rows, weight, m, over_base=over_base) for module, m, over_base in self._others]
        return sum(found[1:], found[0])


def _merged(
    base: BaseWeights, name: str, tensor: Tensor, delta: _Delta, form: _Form, total: _Sum
) -> tuple[Tensor, Tensor | None]:
    """A weight with its deltas in the form in which it is written, and its scale [1 or N, G].

    Raises:
        UserError: it is not finite so.
    """
    rows_of = tensor.reshape(tensor.shape[0], -1) if tensor.dim() else tensor.reshape(1, 1)
    stored_scale = base.scale(name)
    limit = torch.finfo(form.dtype).max
    exact = form.dtype if form.scale is None else torch.float32
    result = torch.empty(rows_of.shape, dtype=exact)
    for rows in row_chunks(*rows_of.shape):
        weight = _dense(rows_of[rows], _rows_of_scale(stored_scale, rows)).to(delta.device)
        change = None if delta.empty else delta.rows(rows, weight)
        if change is not None:
            weight += change
            total.change += float(torch.linalg.vector_norm(change)) ** 2
        largest = max(abs(float(v)) for v in torch.aminmax(weight))
        if not largest <= (torch.finfo(torch.float32).max if form.dtype in FP8_DTYPES else limit):
            raise UserError(f"{name} overflows as {dtype_name(form.dtype)} once merged, or is not finite")
        stored = (weight.clamp(-limit, limit) if form.scale is None and largest > limit else weight).to(exact)
        if change is not None and form.scale is None:
            total.error += float(torch.linalg.vector_norm(weight - stored.float())) ** 2
        _as_bytes(result)[rows] = _as_bytes(stored.cpu())
    if form.scale is None:
        return result.view(tensor.shape), None
    quantised, scale = _quantised(result, form)
    if not delta.empty:
        total.error += float(torch.linalg.vector_norm(_dense(quantised, scale).sub_(result))) ** 2
    return quantised.view(tensor.shape), scale


def _as_bytes(tensor: Tensor) -> Tensor:
    """Rows of bytes: PyTorch does not copy FP8 into a slice on every device."""
    return tensor.view(torch.uint8)


def _rows_of_scale(scale: Tensor | None, rows: slice) -> Tensor | None:
    return scale if scale is None or scale.shape[0] == 1 else scale[rows]


def _quantised(weight: Tensor, form: _Form) -> tuple[Tensor, Tensor]:
    """e4m3 and a scale [1 or N, G] that the scale's dtype holds exactly."""
    count = torch.Size(form.scale[2]).numel()
    shape = (1, 1) if count == 1 else (weight.shape[0], count // weight.shape[0])
    quantised, scale = quantize_fp8(weight, shape)
    if form.scale[1] == torch.float32:
        return quantised, scale
    # Rounding the scale after dividing by it would cost accuracy.
    scale = scale.to(form.scale[1]).float()
    largest = torch.finfo(_E4M3).max
    shares = weight.view(weight.shape[0], shape[1], -1) / scale.unsqueeze(-1)
    return shares.clamp_(-largest, largest).to(_E4M3).view_as(weight), scale


def _dense(stored: Tensor, scale: Tensor | None) -> Tensor:
    """Rows of a tensor in float32, memory of its own."""
    return stored.to(torch.float32, copy=True) if scale is None else dequantize_fp8(stored, scale, torch.float32)


def _metadata(
    base: BaseWeights, forms: Mapping[str, _Form], loras: Sequence[tuple[Adapter, float]], output: Output
) -> dict[str, str]:
    """The base's, with what was merged and which layers are FP8 now."""
    kept = dict(base.file.metadata)
    merged = [{"file": r.path.name, "multiplier": m} for r, m in loras]
    earlier = json.loads(kept.get("merged_loras", "[]"))
    kept["merged_loras"] = json.dumps([*earlier, *merged])
    if not any(form.dtype in FP8_DTYPES for form in forms.values()):
        kept.pop(_LAYERS, None)
    elif output == "fp8":
        known = json.loads(kept.get(_LAYERS, "{}"))
        layers = dict(known.get("layers", {}))
        for name, form in forms.items():
            if form.scale is not None and form.scale[0].endswith(_SCALE):
                layers[base.keys[name].removesuffix(".weight")] = {"format": "float8_e4m3fn"}
        kept[_LAYERS] = json.dumps({"format_version": "1.0", **known, "layers": layers})
    return kept
