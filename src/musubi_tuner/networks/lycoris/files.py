"""LyCORIS files: LoKr, LoHa, IA3 and LoRA side by side, with or without the lengths of DoRA.

Keys are ``lora_unet_<flat>.<tensor>`` with ``.alpha``, as the library writes them (format ``native``), or
``diffusion_model.<dotted>.<tensor>`` (``comfy``), which ComfyUI and this trainer read as well. In ``comfy`` a pair of
LoRA factors is called lora_A and lora_B and alpha / r is in B.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.progress import progress
from musubi_tuner.common.safetensors_io import SafetensorsFile
from musubi_tuner.networks.adapter_math import DORA, DOWN, UP, Kind, delta_rows, kind_of, scale_of, shape_of
from musubi_tuner.networks.files.adapter_file import AdapterFile
from musubi_tuner.networks.files.adapter_keys import ALPHA, MAGNITUDE, is_lora
from musubi_tuner.networks.files.adapter_keys import DOWN as DOWN_ROLE
from musubi_tuner.networks.files.adapter_keys import UP as UP_ROLE
from musubi_tuner.networks.files.formats import SPELLINGS, Format, lengths_over_base
from musubi_tuner.networks.files.hashes import TensorSpec, write_safetensors
from musubi_tuner.networks.files.lora_file import LoraModule
from musubi_tuner.networks.files.lora_reader import LoraReader

_TINY = 1e-30
_ROLES = {DOWN_ROLE: DOWN, UP_ROLE: UP, MAGNITUDE: DORA}


@dataclass(frozen=True)
class LycorisModule:
    """Tensors of one adapted layer by their names in the library, as stored.

    Attributes:
        alpha: ``None``: the rank.
        lengths: of DoRA.
    """

    kind: Kind
    tensors: Mapping[str, Tensor]
    alpha: float | None
    lengths: Tensor | None = None

    @property
    def shape(self) -> tuple[int | None, int | None]:
        """(N, K) of the layer; of IA3 one of them is ``None``."""
        return shape_of(self.kind, self.tensors)

    def to(self, device: torch.device | str) -> LycorisModule:
        """In float32, where products are computed."""
        lengths = None if self.lengths is None else self.lengths.to(device, torch.float32)
        return replace(self, tensors={k: t.to(device, torch.float32) for k, t in self.tensors.items()}, lengths=lengths)

    @classmethod
    def of(cls, lora: LoraModule) -> LycorisModule:
        return cls("lora", {UP: lora.up, DOWN: lora.down}, lora.alpha, lora.dora_scale)

    @property
    def of_inputs(self) -> bool:
        """Whether there is a length of DoRA for each input instead of each output."""
        return self.lengths is not None and self.lengths.dim() == 2 and self.lengths.shape[0] == 1

    def rows(self, rows: slice) -> Tensor:
        """Rows of dW, before lengths of DoRA are applied; not of IA3."""
        return delta_rows(self.kind, self.tensors, scale_of(self.kind, self.tensors, self.alpha), rows)

    def change(self, rows: slice, weight: Tensor, multiplier: float, *, over_base: bool) -> Tensor:
        """What is added to these rows of a weight, float32; not with lengths of inputs, which need all rows.

        Args:
            weight: the rows of the base weight, [n, K].
            over_base: see :func:`lengths_over_base`.
        """
        if self.kind == "ia3":
            factors = self.tensors["weight"]
            return weight * multiplier * (factors if bool(self.tensors["on_input"]) else factors[rows, None])
        if self.lengths is None:
            return self.rows(rows) * multiplier
        adapted = weight + self.rows(rows)
        norms = (weight if over_base else adapted).norm(dim=1, keepdim=True).clamp(min=_TINY)
        return (adapted * (self.lengths.view(-1, 1)[rows] / norms) - weight) * multiplier


@dataclass(frozen=True)
class LycorisFile:
    """A LyCORIS file in memory, under canonical names."""

    modules: Mapping[str, LycorisModule]
    metadata: Mapping[str, str]
    format: Format
    source: str


class LycorisReader:
    """A LyCORIS file of which names are known; tensors are read one module at a time.

    Attributes:
        path, metadata, format: of the file.
        names: canonical names of the modules.

    Raises:
        UserError: the file is missing, no adapter, of another model, or inconsistent.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = AdapterFile(path)
        self.path, self.metadata, self.format = self._file.path, self._file.metadata, self._file.format
        self.names = list(self._file.adapters.modules)
        for name in self.names:
            try:
                kind_of([_ROLES.get(role, role) for role in self._file.roles(name)])
            except UserError as error:
                raise UserError(f"{self.path}: {name}: {error}") from None

    @property
    def decomposed(self) -> list[str]:
        """Modules with lengths of DoRA."""
        return [name for name in self.names if MAGNITUDE in self._file.roles(name)]

    @property
    def infos(self) -> Mapping[str, object]:
        """The modules by name."""
        return dict.fromkeys(self.names)

    def read(self, name: str) -> LycorisModule:
        """The tensors of one module, by canonical name.

        Raises:
            UserError: they hold NaN or infinity, or do not fit each other.
        """
        roles, alpha, tensors = self._file.roles(name), None, {}
        for role in roles:
            if role == ALPHA:
                alpha = float(self._file.read(name, role).reshape(-1)[0]) or None
            elif role == UP_ROLE:
                tensors[UP], note = self._file.up(name)
                alpha = note.alpha
            else:
                tensors[_ROLES.get(role, role)] = self._file.read(name, role)
        lengths = tensors.pop(DORA, None)
        module = LycorisModule(kind_of(tensors), tensors, alpha, lengths)
        try:
            N, K = module.shape
            if lengths is not None and lengths.numel() not in (N, K):
                raise UserError(f"dora_scale {list(lengths.shape)} is no length for each of {N} outputs or {K} inputs")
        except UserError as error:
            raise UserError(f"{self.path}: {name}: {error}") from None
        return module

    def read_all(self) -> LycorisFile:
        modules = {name: self.read(name) for name in self.names}
        return LycorisFile(modules, self.metadata, self.format, str(self.path))


def open_adapter(path: str | os.PathLike[str]) -> LoraReader | LycorisReader:
    """An adapter file of any format: plain LoRA and DoRA, or with other algorithms of LyCORIS.

    Raises:
        UserError: see the classes.
    """
    return LycorisReader(path) if is_lycoris_file(path) else LoraReader(path)


def is_lycoris_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file holds more than pairs of LoRA factors, or lengths of inputs; what is no adapter does not."""
    names = SafetensorsFile(path).tensors
    if any(part in name for name in names for part in (".lokr_", ".hada_", ".on_input")):
        return not all(is_lora(roles) for roles in AdapterFile(path).adapters.modules.values())
    return any(name.endswith(f".{DORA}") and info.shape[:1] == (1,) for name, info in names.items())


def adapter_module(reader: LoraReader | LycorisReader, name: str) -> LycorisModule:
    """One module of a file of either kind."""
    found = reader.read(name)
    return LycorisModule.of(found) if isinstance(found, LoraModule) else found


def mergeable_sizes(reader: LoraReader | LycorisReader) -> list[tuple[str, tuple[int | None, int | None]]]:
    """Modules of a file that is to become part of weights, with the (N, K) of their layers; ``None``: any.

    Raises:
        UserError: a module cannot be merged a few rows at a time.
    """
    if isinstance(reader, LoraReader):
        return [(n, (i.out_features, i.in_features)) for n, i in reader.infos.items()]
    modules = {name: reader.read(name) for name in progress(reader.names, desc="reading", unit="module", leave=False)}
    special = [n for n, m in modules.items() if m.of_inputs]
    if special:
        raise UserError(
            f"{reader.path}: {len(special)} modules are DoRA with a length for each input (wd_on_output=False), such "
            f"as {special[0]}, which is not merged into weights; use the file as it is"
        )
    return [(name, module.shape) for name, module in modules.items()]


# --- writing ---


def write_lycoris(
    path: str | os.PathLike[str],
    modules: Mapping[str, LycorisModule],
    fmt: Format,
    *,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
) -> Path:
    """Write a file, which is read back and compared before it gets its name.

    Args:
        modules: canonical name -> float32 tensors; lengths are as the format has them.
        dtype: of the tensors; alpha and lengths, which half precision would round too much, are float32 always.

    Raises:
        UserError: a value is not finite, or the file does not hold what it should.
    """
    makers = {key: make for name, module in modules.items() for key, make in _keys(name, module, fmt, dtype)}
    tensors = {key: make() for key, make in makers.items()}
    for key, tensor in tensors.items():
        if not tensor.float().isfinite().all():
            raise UserError(f"{key} holds NaN or infinity as {str(tensor.dtype).removeprefix('torch.')}")
    specs = [TensorSpec(key, t.dtype, tuple(t.shape)) for key, t in tensors.items()]
    return write_safetensors(
        path, specs, tensors.__getitem__, {"format": "pt", **metadata}, check=lambda written: _compare(written, tensors)
    )


def _keys(
    name: str, module: LycorisModule, fmt: Format, dtype: torch.dtype | None
) -> Iterable[tuple[str, Callable[[], Tensor]]]:
    """Keys of one module and what makes their tensors."""
    spelled = SPELLINGS[fmt](name)
    folded = fmt == "comfy" and module.kind == "lora"
    names = {DOWN: "lora_A.weight", UP: "lora_B.weight"} if folded else {}
    scale = scale_of(module.kind, module.tensors, module.alpha) if folded else 1.0

    def stored(tensor: Tensor, factor: float = 1.0) -> Callable[[], Tensor]:
        wide = tensor if factor == 1 else tensor.float() * factor
        return lambda: (wide.to(dtype) if dtype and wide.is_floating_point() else wide).cpu().contiguous()

    for role, tensor in module.tensors.items():
        yield f"{spelled}.{names.get(role, role)}", stored(tensor, scale if role == UP else 1.0)
    if module.lengths is not None:
        yield f"{spelled}.{DORA}", lambda: module.lengths.float().cpu().contiguous()
    if module.kind != "ia3" and not folded and module.alpha is not None:
        yield f"{spelled}.alpha", lambda: torch.tensor(module.alpha, dtype=torch.float32)


def _compare(path: Path, tensors: Mapping[str, Tensor]) -> None:
    written = SafetensorsFile(path)
    different = [key for key in {**tensors, **written.tensors} if key not in tensors or key not in written.tensors]
    different = different or [key for key, tensor in tensors.items() if not torch.equal(written.read_one(key), tensor)]
    if different:
        raise UserError(f"{path}: {len(different)} tensors are not those of the network, such as {different[0]}")


def stored_over_base(fmt: Format, lengths: Tensor) -> bool:
    """Whether a file's lengths are of outputs as ComfyUI means them."""
    return lengths_over_base(fmt) and lengths.dim() == 2 and lengths.shape[1] == 1
