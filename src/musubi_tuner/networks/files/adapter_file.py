"""Reading an adapter file of any kind and format: LoRA, DoRA, LyCORIS."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from musubi_tuner.common.dtypes import dtype_name
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.safetensors_io import SafetensorsFile, TensorInfo
from musubi_tuner.networks.adapter_math import kind_of, shape_of

from .adapter_keys import ALPHA, DOWN, MAGNITUDE, UP, Adapters, is_lora, parse_keys
from .alpha_notes import AlphaNote, read_notes, unfold
from .formats import FLAT, Format
from .peft_config import PEFT_METADATA, peft_alpha, peft_config

KEPT_PEFT = "musubi_peft_config"  # in the metadata: PEFT's configuration, for the way back
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
_INTEGERS = ("on_input", "bias_indices", "bias_size")


class AdapterFile:
    """An adapter file of any kind and format, of which only the header has been read.

    Raises:
        UserError: the file is missing, no adapter, of another model, or inconsistent.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = SafetensorsFile(path)
        self.path, self.metadata = self.file.path, self.file.metadata
        try:
            self.adapters: Adapters = parse_keys(self.file.tensors)
            for name in self.adapters.modules:
                self._check(name)
            self._peft = peft_config(self.path, self.metadata, self.adapters.format)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        self._notes = read_notes(self.metadata)

    @property
    def format(self) -> Format:
        return self.adapters.format

    def roles(self, name: str) -> dict[str, str]:
        return self.adapters.modules[name]

    def read(self, name: str, role: str) -> Tensor:
        """One tensor.

        Raises:
            UserError: it holds NaN or infinity.
        """
        tensor = self.file.read_one(self.roles(name)[role])
        if not tensor.float().isfinite().all():
            raise UserError(f"{self.path}: {self.roles(name)[role]} holds NaN or infinity; the file is broken")
        return tensor

    def rank(self, name: str) -> int:
        return self.file.tensors[self.roles(name)[DOWN]].shape[0]

    def of_inputs(self, name: str) -> bool:
        """Whether a module of DoRA has a magnitude for each input, [1, K], instead of for each output."""
        key = self.roles(name).get(MAGNITUDE)
        shape = () if key is None else self.file.tensors[key].shape
        return len(shape) == 2 and shape[0] == 1

    def up(self, name: str) -> tuple[Tensor, AlphaNote]:
        """B of a LoRA module before anything was folded into it, and its alpha; ``None`` where the file has none."""
        up = self.read(name, UP)
        if ALPHA in self.roles(name):
            alpha = self.read(name, ALPHA)
            return up, AlphaNote(float(alpha.reshape(-1)[0]) or float(self.rank(name)), alpha.dtype, up.dtype)
        given = peft_alpha(self._peft, name, self.rank(name))
        if given is not None:
            return up, AlphaNote(given, torch.float32, up.dtype)
        usual, others = self._notes
        note = others.get(name, usual)
        before = None if note is None else unfold(up, note, self.rank(name))
        if before is not None:
            return before, note
        alpha = None if self.format in FLAT else float(self.rank(name))
        return up, AlphaNote(alpha, torch.float32, up.dtype)

    def peft_text(self) -> str | None:
        """PEFT's configuration, of this file or noted in it, where every alpha is what it says."""
        text = self.metadata.get(PEFT_METADATA) or self.metadata.get(KEPT_PEFT)
        if text is None and self._peft:
            text = json.dumps({f"transformer.{k}": v for k, v in self._peft.items()})
        if text is None:
            return None
        config = peft_config(self.path, {PEFT_METADATA: text}, "diffusers")
        plain = [n for n in self.adapters.modules if is_lora(self.roles(n))]
        agree = all(peft_alpha(config, n, self.rank(n)) == self.up(n)[1].alpha for n in plain)
        return text if agree else None

    def _check(self, name: str) -> None:
        infos = {role: self.file.tensors[key] for role, key in self.roles(name).items()}
        for role, info in infos.items():
            if info.dtype not in FLOATS and role not in _INTEGERS:
                raise UserError(f"{self.roles(name)[role]}: {dtype_name(info.dtype)}, expected floating point")
        if ALPHA in infos and torch.Size(infos[ALPHA].shape).numel() != 1:
            raise UserError(f"{self.roles(name)[ALPHA]}: {list(infos[ALPHA].shape)}, expected one number")
        if not is_lora(infos):
            _check_lycoris(name, infos)
            return
        down, up = infos[DOWN].shape, infos[UP].shape
        if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
            raise UserError(f"{name}: shapes {down} and {up} are no pair [r, in] and [out, r]")
        if down[0] == 0:
            raise UserError(f"{name} has rank 0")
        if MAGNITUDE in infos:
            count = torch.Size(infos[MAGNITUDE].shape).numel()
            if count != (down[1] if self.of_inputs(name) else up[0]):
                key, shape = self.roles(name)[MAGNITUDE], list(infos[MAGNITUDE].shape)
                raise UserError(f"{key} {shape} is no magnitude for each of {up[0]} outputs (or {down[1]} inputs)")


def _check_lycoris(name: str, infos: Mapping[str, TensorInfo]) -> None:
    """LoKr and LoHa have all their factors, which fit each other; of convolutions (Tucker) that is not known."""
    if any(r.startswith(("lokr_w", "hada_w")) for r in infos) and not infos.keys() & {"lokr_t2", "hada_t1", "hada_t2"}:
        tensors = {role: info for role, info in infos.items() if role not in (ALPHA, MAGNITUDE)}
        try:
            shape_of(kind_of(tensors), tensors)
        except UserError as error:
            raise UserError(f"{name}: {error}; the file is incomplete or broken") from None
