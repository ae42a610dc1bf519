"""Writing LoRA files in every format, a module at a time."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.common.dtypes import dtype_name
from musubi_tuner.common.errors import UserError

from .formats import FLAT, SPELLINGS, Format
from .hashes import TensorSpec, write_safetensors
from .lora_file import LoraFile, LoraModule, ModuleInfo
from .peft_config import PEFT_METADATA

logger = logging.getLogger(__name__)


def save_lora(
    lora: LoraFile,
    path: str | os.PathLike[str],
    fmt: Format = "native",
    *,
    dtype: torch.dtype | None = None,
    emit_alpha: bool = False,
    metadata: Mapping[str, str] | None = None,
    require_finite: bool = True,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write a LoRA in a format; see :func:`write_lora`. ``metadata`` is added to the LoRA's own."""
    infos = {
        name: replace(info, dtype=dtype or info.dtype)
        for name, info in ((name, module.info) for name, module in lora.modules.items())
    }
    return write_lora(
        path,
        fmt,
        infos,
        lora.modules.__getitem__,
        metadata={**lora.metadata, **(metadata or {})},
        emit_alpha=emit_alpha,
        require_finite=require_finite,
        check=check,
    )


def write_lora(
    path: str | os.PathLike[str],
    fmt: Format,
    infos: Mapping[str, ModuleInfo],
    produce: Callable[[str], LoraModule],
    *,
    metadata: Mapping[str, str],
    emit_alpha: bool = False,
    require_finite: bool = True,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write a LoRA file whose modules are produced one at a time.

    Args:
        path: appears only when complete.
        fmt: ``native`` and ``musubi`` always hold alpha (float32, whatever the dtype of the factors); in the
            others alpha / r is folded into B in float32.
        infos: canonical name to sizes and dtype of what ``produce`` returns for it.
        produce: called once per name.
        metadata: strings; hashes are added.
        emit_alpha: write alpha = r in the folded formats too.
        require_finite: fail on NaN and infinity (also those made by a narrow dtype), else only warn.
        check: looks at the complete file before it gets its name, and raises if that must not be.

    Raises:
        UserError: not finite.
    """
    flat = fmt in FLAT
    if fmt == "diffusers" and any(info.dora for info in infos.values()):
        raise UserError("DoRA is saved in native or ComfyUI files; make others of those with ltx2_convert_lora.py")
    suffixes = ("lora_down", "lora_up") if flat else ("lora_A", "lora_B")
    specs, roles = [], {}
    for name, info in infos.items():
        spelled = SPELLINGS[fmt](name)
        down, up = (f"{spelled}.{suffix}.weight" for suffix in suffixes)
        specs.append(TensorSpec(down, info.dtype, (info.rank, info.in_features)))
        specs.append(TensorSpec(up, info.dtype, (info.out_features, info.rank)))
        roles[down], roles[up] = (name, "down"), (name, "up")
        if flat or emit_alpha:
            specs.append(TensorSpec(f"{spelled}.alpha", torch.float32, ()))
            roles[f"{spelled}.alpha"] = (name, "alpha")
        if info.dora:  # as exact as alpha: rounded to half precision, lengths lose what was trained
            specs.append(TensorSpec(f"{spelled}.dora_scale", torch.float32, (info.out_features, 1)))
            roles[f"{spelled}.dora_scale"] = (name, "dora_scale")

    current: dict[str, LoraModule] = {}  # the module at hand; both factors follow one another in the file

    def tensor(key: str) -> Tensor:
        name, role = roles[key]
        info = infos[name]
        if role == "alpha":
            return torch.tensor(float((info.alpha if flat else None) or info.rank))
        if name not in current:
            module = produce(name)
            module = (module if flat else module.folded()).to(info.dtype)
            _check_finite(name, module, require_finite)
            current.clear()
            current[name] = module
        tensor = getattr(current[name], role)
        return tensor.float() if role == "dora_scale" else tensor

    kept = {k: v for k, v in metadata.items() if k != PEFT_METADATA}  # its alpha no longer holds
    return write_safetensors(path, specs, tensor, {"format": "pt", **kept}, check=check)


def _check_finite(name: str, module: LoraModule, required: bool) -> None:
    if all(t.isfinite().all() for t in (module.down, module.up, module.dora_scale) if t is not None):
        return
    dtype = dtype_name(module.down.dtype)
    message = f"{name} holds NaN or infinity as {dtype}"
    if required:
        raise UserError(message + ("; use bfloat16 or float32" if dtype == "float16" else ""))
    logger.warning(message)
