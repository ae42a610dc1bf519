"""Layers of LyCORIS as a network: attached together, loaded and saved."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.common.errors import UserError
from musubi_tuner.config.network import LYCORIS
from musubi_tuner.networks.adapter_math import delta_norm
from musubi_tuner.networks.adapter_network import AdapterNetwork, LoadReport, compare_modules
from musubi_tuner.networks.attached import Switch
from musubi_tuner.networks.files.formats import Format
from musubi_tuner.networks.targets import modality_of
from musubi_tuner.networks.verdict import StreamChange, Verdict

from .files import LycorisFile, LycorisModule, LycorisReader, stored_over_base, write_lycoris
from .layer import LycorisLinear
from .options import LycorisOptions

_NAMES = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "ia3": "IA3"}


class LycorisNetwork(AdapterNetwork):
    """Layers adapted by algorithms of LyCORIS, held outside of the transformer.

    Attributes:
        modules_by_name: dotted path in the transformer -> :class:`LycorisLinear`.
        options: what it was made with; ``None``: a file.
    """

    module_name = LYCORIS
    modules_by_name: dict[str, LycorisLinear]

    def __init__(
        self, modules: Mapping[str, LycorisLinear], switch: Switch, options: LycorisOptions | None = None
    ) -> None:
        super().__init__(modules, switch, None if options is None else options.args)
        self.options = options

    @torch.no_grad()
    def apply_max_norm_regularization(self, max_norm: float, device: torch.device) -> tuple[int, float, float]:
        """Scale changes of a larger Frobenius norm down, all factors of a layer alike; IA3 has none.

        Returns:
            How many were scaled, the mean and the largest norm afterwards.
        """
        norms, scaled = [], 0
        for module in self.modules_by_name.values():
            if module.kind == "ia3":
                continue
            norm = delta_norm(module.kind, module.tensors(), module.scale)
            if norm > max_norm:
                factors = list(module.tensors().items())
                _shrink(dict(factors), max_norm / norm)
                norm, scaled = max_norm, scaled + 1
            norms.append(norm)
        return (scaled, sum(norms) / len(norms), max(norms)) if norms else (0, 0.0, 0.0)

    # --- files ---

    @torch.no_grad()
    def load_weights(self, file: str | os.PathLike[str] | LycorisFile) -> LoadReport:
        """Fill the parameters and alphas from a file of any format.

        Modules of the audio branch may be missing on either side (a warning), others may not.

        Raises:
            UserError: the file is no adapter of LTX-2, or its modules are not those of the network.
        """
        file = as_lycoris(file)
        report = compare_modules(self.modules_by_name, file.modules, file.source)
        for name in report.matched:
            _check(name, self.modules_by_name[name], file.modules[name], file.source)
        for name in report.matched:
            _fill(self.modules_by_name[name], file.modules[name], file.format)
        return report

    def verdict(self) -> Verdict:
        """What the weights change: of DoRA before lengths are applied, of IA3 the norm of the factors."""
        streams = {}
        for stream in ("video", "audio", "cross"):
            norms = [_norm(m) for name, m in self.modules_by_name.items() if modality_of(name) == stream]
            if norms:
                unchanged = sum(norm == 0 for norm in norms)
                streams[stream] = StreamChange(len(norms), unchanged, math.sqrt(sum(norm**2 for norm in norms)))
        return Verdict(streams)

    @torch.no_grad()
    def save_checked(
        self,
        path: str | os.PathLike[str],
        verdict: Verdict,
        dtype: torch.dtype | None,
        metadata: Mapping[str, str],
        *,
        fmt: Format = "native",
    ) -> Path:
        """Write a file, which is read back and compared bit for bit before it gets its name.

        Raises:
            UserError: a value is not finite.
        """
        modules = {name: _stored(module, fmt) for name, module in self.modules_by_name.items()}
        return write_lycoris(path, modules, fmt, dtype=dtype, metadata=metadata)

    def described_args(self) -> dict[str, Any]:
        """Of a network made from a file nothing."""
        return {} if self.options is None else self.options.described()

    def describe(self) -> str:
        """One line for the log."""
        kinds = Counter(_label(module) for module in self.modules_by_name.values())
        text = ", ".join(f"{label} {count}" for label, count in kinds.items())
        return f"LyCORIS ({text}): {self.describe_counts()}"


def as_lycoris(file: str | os.PathLike[str] | LycorisFile) -> LycorisFile:
    """A file that may have been read already."""
    return file if isinstance(file, LycorisFile) else LycorisReader(file).read_all()


def _check(name: str, module: LycorisLinear, given: LycorisModule, source: str) -> None:
    own = {k: tuple(t.shape) for k, t in module.tensors().items()}
    found = {k: tuple(t.shape) for k, t in given.tensors.items()}
    if own == found and (module.dora is None) == (given.lengths is None):
        return
    if module.kind != given.kind:
        text = f"{_NAMES[given.kind]}, that of the network {_NAMES[module.kind]}"
    elif own != found:
        text = f"of the sizes {found}, that of the network of {own}"
    else:
        text = "without DoRA, that of the network with it" if given.lengths is None else "DoRA, that of the network not"
    raise UserError(
        f"{source}: {name} is {text}; use the algo, --network_dim, factor and dora_wd that it was trained with, or "
        "--dim_from_weights"
    )


def _fill(module: LycorisLinear, given: LycorisModule, fmt: Format) -> None:
    for name, tensor in module.tensors().items():
        tensor.copy_(given.tensors[name])
    if module.kind != "ia3":
        module.set_alpha(given.alpha or float(module.rank or 1))
    if given.lengths is not None:
        over_base = stored_over_base(fmt, given.lengths)
        module.set_lengths(given.lengths.reshape(module.dora_scale.shape), over_base=over_base)


def _stored(module: LycorisLinear, fmt: Format) -> LycorisModule:
    tensors = {k: t.detach() for k, t in module.tensors().items()}
    lengths = None if module.dora is None else module.lengths(over_base=fmt == "comfy")
    return LycorisModule(module.kind, tensors, module.alpha_value, lengths)


def _norm(module: LycorisLinear) -> float:
    return delta_norm(module.kind, module.tensors(), module.scale)


def _shrink(factors: Mapping[str, Tensor], ratio: float) -> None:
    """Multiply the product of factors by a ratio, shared among them."""
    for factor in factors.values():
        factor.mul_(ratio ** (1 / len(factors)))


def _label(module: LycorisLinear) -> str:
    rank = f" of rank {module.rank}" if module.rank else ""
    return f"{_NAMES[module.kind]}{rank}{' with DoRA' if module.dora is not None else ''}"
