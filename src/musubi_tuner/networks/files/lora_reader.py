"""Reading LoRA files of every format: each combination of prefix and suffix, with or without ``.alpha``."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from musubi_tuner.common.dtypes import dtype_name
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.safetensors_io import SafetensorsFile, TensorInfo
from musubi_tuner.networks.names import canonical_name

from .formats import Format, format_of
from .lora_file import LoraFile, LoraModule, ModuleInfo
from .peft_config import peft_alpha, peft_config

logger = logging.getLogger(__name__)

# lora_A may be followed by PEFT's adapter name ("default").
_KEY = re.compile(
    r"(?P<module>.+?)\.(?:(?P<down>lora_down|lora_A|lora\.down)|(?P<up>lora_up|lora_B|lora\.up))(?:\.\w+)?\.weight"
)
_ALPHA = ".alpha"
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


@dataclass(frozen=True)
class _Keys:
    down: str
    up: str
    dora: str | None = None


def detect_format(keys: Iterable[str]) -> Format:
    """The format of a LoRA file by the prefix of its keys.

    Raises:
        UserError: no key belongs to a LoRA.
    """
    spelled = [k for k in keys if _KEY.fullmatch(k)]
    if not spelled:
        raise UserError(f"is no LoRA: {_EXPECTED}")
    return format_of(spelled[0])


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
