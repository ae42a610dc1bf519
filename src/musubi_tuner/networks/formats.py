"""LoRA files: four spellings of the same thing.

========== ======================================================= =========================================
format     keys                                                    scale of the delta
========== ======================================================= =========================================
native     ``lora_unet_<flat>.lora_down|lora_up.weight, .alpha``   alpha / r
musubi     the same with ``lora_unet_model_<flat>``                alpha / r
comfy      ``diffusion_model.<dotted>.lora_A|lora_B.weight``       1: alpha / r is folded into B
diffusers  ``transformer.<dotted>.lora_A|lora_B.weight``           1, or alpha / r of PEFT's configuration
========== ======================================================= =========================================

In memory a file is :class:`LoraFile`: canonical module names to factors. Reading accepts every combination of
prefix and suffix, with or without ``.alpha``.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from musubi_tuner.common.dtypes import dtype_name
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.safetensors_io import SafetensorsFile, TensorInfo
from musubi_tuner.common.text_files import read_text

from .hashes import TensorSpec, write_safetensors
from .names import MUSUBI_PREFIX, NATIVE_PREFIX, canonical_name, comfy_name, diffusers_name, flat_name

logger = logging.getLogger(__name__)

Format = Literal["native", "musubi", "comfy", "diffusers"]

SPELLINGS: dict[str, Callable[[str], str]] = {
    "native": lambda name: NATIVE_PREFIX + flat_name(name),
    "musubi": lambda name: MUSUBI_PREFIX + flat_name(name),
    "comfy": comfy_name,
    "diffusers": diffusers_name,
}
FORMATS: tuple[str, ...] = tuple(SPELLINGS)

# lora_A may be followed by PEFT's adapter name ("default").
_KEY = re.compile(
    r"(?P<module>.+?)\.(?:(?P<down>lora_down|lora_A|lora\.down)|(?P<up>lora_up|lora_B|lora\.up))(?:\.\w+)?\.weight"
)
_ALPHA = ".alpha"
_DORA = ".dora_scale"
_DORA_KEY = re.compile(r"(?P<module>.+?)\.(?:dora_scale|lora_magnitude_vector(?:\.\w+)?(?:\.weight)?)")
_EXPECTED = "expected pairs of lora_down/lora_up or lora_A/lora_B weights"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_UNSUPPORTED = {
    r".*\.lokr_.*": "LyCORIS LoKr",
    r".*\.hada_.*": "LyCORIS LoHa",
    r".*\.oft_blocks": "LyCORIS OFT",
    r".*\.on_input": "LyCORIS IA3",
    r".*\.diff(_b)?": "full-difference",
    r".*\.lora_mid\.weight": "Tucker-decomposed",
    r".*\.lora_(B|up)(\.\w+)?\.bias": "LoRA with bias",
}
PEFT_METADATA = "lora_adapter_metadata"
_PEFT_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class ModuleInfo:
    """Sizes of one adapted Linear (in_features K, out_features N), known from the header."""

    rank: int
    in_features: int
    out_features: int
    dtype: torch.dtype
    alpha: float | None = None  # None: the rank
    dora: bool = False

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class LoraModule:
    """Factors of one adapted Linear; its weight changes by ``alpha / r * up @ down``."""

    down: Tensor  # [r, K]
    up: Tensor  # [N, r]
    alpha: float | None = None  # None: the rank
    dora_scale: Tensor | None = None  # [N, 1] lengths of the adapted weight's rows

    @property
    def info(self) -> ModuleInfo:
        (rank, in_features), out_features = self.down.shape, self.up.shape[0]
        dtype = torch.promote_types(self.down.dtype, self.up.dtype)
        return ModuleInfo(rank, in_features, out_features, dtype, self.alpha, self.dora_scale is not None)

    def delta(self, multiplier: float = 1.0) -> Tensor:
        """The change of the weight, [N, K] in float32."""
        return (self.up.float() * (multiplier * self.info.scale)) @ self.down.float()

    def folded(self, multiplier: float = 1.0) -> LoraModule:
        """The delta times ``multiplier``, with alpha = r; ``up`` becomes float32 unless nothing changes."""
        scale = multiplier * self.info.scale
        return replace(self, up=self.up if scale == 1 else self.up.float() * scale, alpha=None)

    def to(self, dtype: torch.dtype) -> LoraModule:
        return replace(self, down=self.down.to(dtype), up=self.up.to(dtype))


@dataclass(frozen=True)
class LoraFile:
    """A LoRA in memory, under canonical names."""

    modules: Mapping[str, LoraModule]
    metadata: Mapping[str, str]
    format: Format = "native"
    source: str = "the LoRA"  # what messages call it


def lengths_over_base(fmt: Format) -> bool:
    """Whether a format's lengths of DoRA are divided by the base weight's norms, as ComfyUI does.

    Elsewhere they are divided by those of the base weight and the delta together.
    """
    return fmt == "comfy"


@dataclass(frozen=True)
class _Keys:
    down: str
    up: str
    dora: str | None = None


# --- reading ---


def detect_format(keys: Iterable[str]) -> Format:
    """The format of a LoRA file by the prefix of its keys.

    Raises:
        UserError: no key belongs to a LoRA.
    """
    spelled = [k for k in keys if _KEY.fullmatch(k)]
    if not spelled:
        raise UserError(f"is no LoRA: {_EXPECTED}")
    first = spelled[0]
    if first.startswith(NATIVE_PREFIX):
        return "musubi" if first.startswith(MUSUBI_PREFIX) else "native"
    return "diffusers" if first.startswith(("transformer.", "connectors.", "base_model.")) else "comfy"


class LoraReader:
    """A LoRA file of which names and sizes are known; factors are read one module at a time.

    Attributes:
        path, metadata, format: of the file.
        infos: canonical module name -> :class:`ModuleInfo`.
        ignored: keys that are no part of a LoRA.

    Raises:
        UserError: the file is missing, is no safetensors file, no LoRA, of another model, or inconsistent.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = SafetensorsFile(path)
        self.path = self._file.path
        self.metadata = self._file.metadata
        try:
            keys = sorted(self._file.tensors)
            self._keys = self._pairs(keys)
            self.format = detect_format(keys)
            self.infos = {name: self._info(name, pair) for name, pair in self._keys.items()}
            self._add_alphas()
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None

    def read(self, name: str) -> LoraModule:
        """Factors of one module, by canonical name.

        Raises:
            UserError: they hold NaN or infinity.
        """
        keys = self._keys[name]
        down, up = (_readable(self._file.read_one(k)) for k in (keys.down, keys.up))
        lengths = _readable(self._file.read_one(keys.dora)).view(-1, 1) if keys.dora else None
        if not all(t.isfinite().all() for t in (down, up, lengths) if t is not None):
            raise UserError(f"{self.path}: {name} holds NaN or infinity; the LoRA is broken")
        return LoraModule(down, up, self.infos[name].alpha, lengths)

    def read_all(self) -> LoraFile:
        return LoraFile({name: self.read(name) for name in self.infos}, self.metadata, self.format, str(self.path))

    def _pairs(self, keys: list[str]) -> dict[str, _Keys]:
        """Canonical name -> keys of both factors."""
        found: dict[str, dict[str, str]] = {}
        foreign: set[str] = set()
        ignored: list[str] = []
        for key in keys:
            match = _KEY.fullmatch(key)
            if match is None:
                _check_other_key(key)
                if not (key.endswith(_ALPHA) or _DORA_KEY.fullmatch(key)):
                    ignored.append(key)
                continue
            role = "down" if match["down"] else "up"
            name = canonical_name(match["module"])
            if name is None:
                foreign.add(match["module"])
            elif role in found.setdefault(name, {}):
                raise UserError(f"{key} and {found[name][role]} are the same module")
            else:
                found[name][role] = key
        self._check_pairs(found, foreign, keys)
        if ignored:
            logger.warning("%s: %d tensors are no part of a LoRA, such as %s", self.path, len(ignored), ignored[0])
        self.ignored = tuple(ignored)
        lengths = {canonical_name(m["module"]): m[0] for m in map(_DORA_KEY.fullmatch, keys) if m}
        if stray := lengths.keys() - found.keys():
            raise UserError(f"{lengths[stray.pop()]} belongs to no pair of factors; the file is incomplete")
        return {name: _Keys(**roles, dora=lengths.get(name)) for name, roles in found.items()}

    def _check_pairs(self, found: Mapping[str, Mapping[str, str]], foreign: set[str], keys: list[str]) -> None:
        if not found and not foreign:
            example = f" such as {keys[0]}" if keys else ""
            raise UserError(f"is no LoRA: {len(keys)} tensors{example}, {_EXPECTED}")
        if foreign:
            whose = "some modules" if found else "a LoRA of another model"
            count = f"{len(foreign)} of {len(foreign) + len(found)}"
            raise UserError(f"{whose}: {count} are unknown to LTX-2, such as {min(foreign)}")
        for name, roles in found.items():
            if len(roles) == 1:
                have, lack = ("lora_down", "lora_up") if "down" in roles else ("lora_up", "lora_down")
                raise UserError(f"{name} has {have} but no {lack} weight; the file is incomplete")

    def _info(self, name: str, keys: _Keys) -> ModuleInfo:
        down, up = (self._file.tensors[k] for k in (keys.down, keys.up))
        if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != up.shape[1]:
            raise UserError(f"{name}: shapes {down.shape} and {up.shape} are no pair [r, in] and [out, r]")
        if down.shape[0] == 0:
            raise UserError(f"{name} has rank 0")
        dtype = torch.promote_types(*(_read_dtype(info, name) for info in (down, up)))
        if keys.dora is not None:
            shape = list(self._file.tensors[keys.dora].shape)
            if shape not in ([up.shape[0], 1], [up.shape[0]]):
                raise UserError(f"{keys.dora} is {shape}, expected {[up.shape[0], 1]}: one length for each output")
        return ModuleInfo(down.shape[0], down.shape[1], up.shape[0], dtype, dora=keys.dora is not None)

    def _add_alphas(self) -> None:
        """Fill in alpha from the tensors, else from PEFT's configuration."""
        config = peft_config(self.path, self.metadata, self.format)
        for name, info in self.infos.items():
            module = _KEY.fullmatch(self._keys[name].down)["module"]
            if module + _ALPHA in self._file.tensors:
                stored = self._file.read_one(module + _ALPHA)
                if stored.numel() != 1:
                    raise UserError(f"{module}{_ALPHA}: {list(stored.shape)}, expected one number")
                alpha = float(stored)
                if not abs(alpha) < float("inf"):
                    raise UserError(f"{module}{_ALPHA} is {alpha}")
                alpha = alpha or None  # 0 stands for the rank
            else:
                alpha = peft_alpha(config, name, info.rank)
            self.infos[name] = replace(info, alpha=alpha)


def peft_config(path: Path, metadata: Mapping[str, str], fmt: Format) -> dict[str, Any]:
    """PEFT's configuration of a LoRA file: in its metadata, else in the file beside it; ``{}`` where there is none.

    Raises:
        UserError: it is not JSON.
    """
    try:
        if PEFT_METADATA in metadata:
            packed = json.loads(metadata[PEFT_METADATA])
            return {k.removeprefix("transformer."): v for k, v in packed.items()}
        beside = path.with_name(_PEFT_CONFIG)
        if fmt == "diffusers" and beside.is_file():
            return json.loads(read_text(beside))
    except json.JSONDecodeError as error:
        raise UserError(f"the LoRA's PEFT configuration is not JSON: {error}") from None
    return {}


def refuse_dora(readers: Iterable[LoraReader]) -> None:
    """Raise UserError for a file with DoRA, which is more than a sum of products."""
    for reader in readers:
        if any(info.dora for info in reader.infos.values()):
            raise UserError(
                f"{reader.path}: DoRA cannot be merged here, since its lengths depend on the base weight; use the file "
                "as it is, in training --base_weights, or merge it into a checkpoint with ltx2_merge_lora_to_model.py"
            )


def load_lora(path: str | os.PathLike[str]) -> LoraFile:
    """Read a LoRA file of any format.

    Raises:
        UserError: see :class:`LoraReader` and :meth:`LoraReader.read`.
    """
    return LoraReader(path).read_all()


def _check_other_key(key: str) -> None:
    """Complain about a key that changes the result but is not understood."""
    for pattern, kind in _UNSUPPORTED.items():
        if re.fullmatch(pattern, key):
            hint = ""
            if kind.startswith("LyCORIS"):
                hint = "; training goes on from it with --network_module lycoris.kohya"
            raise UserError(f"{key}: a {kind} file, expected LoRA or DoRA (down/up pairs){hint}")


def _read_dtype(info: TensorInfo, name: str) -> torch.dtype:
    """What :func:`_readable` makes of a stored tensor."""
    if info.dtype in _DTYPES:
        return info.dtype
    if info.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return torch.bfloat16  # holds them exactly
    raise UserError(f"{name}: factors of type {dtype_name(info.dtype)}, expected floating point")


def _readable(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in _DTYPES else tensor.to(torch.bfloat16)


def peft_alpha(config: Mapping[str, Any], name: str, rank: int) -> float | None:
    """alpha of a module by PEFT's rules: the first pattern that ends its path, else the common one."""
    alpha = config.get("lora_alpha")
    path = diffusers_name(name).partition(".")[2]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            alpha = value
            break
    if alpha is None:
        return None
    return float(alpha) * (rank**0.5 if config.get("use_rslora") else 1.0)


# --- writing ---


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
    flat = fmt in ("native", "musubi")
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
            specs.append(TensorSpec(spelled + _ALPHA, torch.float32, ()))
            roles[spelled + _ALPHA] = (name, "alpha")
        if info.dora:  # as exact as alpha: rounded to half precision, lengths lose what was trained
            specs.append(TensorSpec(spelled + _DORA, torch.float32, (info.out_features, 1)))
            roles[spelled + _DORA] = (name, "dora_scale")

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
