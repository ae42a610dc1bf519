"""LoRA and DoRA modules as a network: attached together, loaded and saved."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from musubi_tuner.common.errors import UserError

from .adapter_network import AdapterNetwork, LoadReport, compare_modules
from .attached import Switch
from .dora import DoRALinear
from .files.formats import Format, lengths_over_base
from .files.lora_file import LoraFile, LoraModule
from .files.lora_reader import load_lora
from .files.lora_writer import save_lora
from .lora import LoRALinear
from .max_norm import limit_norms
from .network_args import NetworkArgs
from .shared_input import SharedProjections, share_inputs
from .verdict import Verdict, check_file, measure


class _Trained(Mapping[str, LoraModule]):
    """Canonical names to what training has changed, made one at a time when it is asked for."""

    def __init__(self, modules: Mapping[str, LoRALinear], fmt: Format) -> None:
        self._modules = modules
        self._over_base = lengths_over_base(fmt)

    def __getitem__(self, name: str) -> LoraModule:
        module = self._modules[name]
        lengths = module.lengths(over_base=self._over_base) if isinstance(module, DoRALinear) else None
        return LoraModule(*module.trained_factors(), lengths)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


class LoRANetwork(AdapterNetwork):
    """Low-rank deltas for Linear layers of a transformer, held outside of it.

    Attributes:
        modules_by_name: dotted path in the transformer -> :class:`LoRALinear`.
    """

    module_name = "networks.lora_ltx2"
    modules_by_name: dict[str, LoRALinear]

    def __init__(self, modules: Mapping[str, LoRALinear], switch: Switch, args: NetworkArgs | None = None) -> None:
        super().__init__(modules, switch, args)
        self._shared: list[SharedProjections] = []

    # --- attaching ---

    def apply_to(self, transformer: nn.Module) -> None:
        """Patch the forward of every target Linear of ``transformer`` and freeze the transformer."""
        super().apply_to(transformer)
        self._shared = share_inputs(transformer, self.modules_by_name)

    def detach(self) -> None:
        """Undo :meth:`apply_to`."""
        super().detach()
        for projections in self._shared:
            projections.detach()
        self._shared = []

    def apply_max_norm_regularization(self, max_norm: float, device: torch.device) -> tuple[int, float, float]:
        """Scale deltas of a larger Frobenius norm down to ``max_norm``.

        Returns:
            How many were scaled, the mean and the largest norm afterwards.
        """
        return limit_norms(list(self.modules_by_name.values()), max_norm)

    # --- files ---

    def load_weights(self, file: str | os.PathLike[str] | LoraFile) -> LoadReport:
        """Fill the factors and alphas from a LoRA file of any format.

        Modules of the audio branch may be missing on either side (a warning), others may not.

        Raises:
            UserError: the file is no LTX-2 LoRA, modules do not correspond, or ranks differ.
        """
        lora = as_lora(file)
        report = compare_modules(self.modules_by_name, lora.modules, lora.source)
        for name in report.matched:
            _check_sizes(name, self.modules_by_name[name], lora.modules[name], lora.source)
        with torch.no_grad():
            for name in report.matched:
                module, given = self.modules_by_name[name], lora.modules[name]
                module.lora_down.weight.copy_(given.down)
                module.lora_up.weight.copy_(given.up)
                module.set_alpha(given.alpha or given.info.rank)
                if isinstance(module, DoRALinear):
                    module.set_lengths(given.dora_scale, over_base=lengths_over_base(lora.format))
        return report

    def as_lora_file(self, metadata: Mapping[str, str] | None = None, fmt: Format = "native") -> LoraFile:
        """What the network adds to the original base, under canonical names, with the lengths of DoRA as in ``fmt``.

        These are its current weights (no copies), less the start where it began at one.
        """
        return LoraFile(_Trained(self.modules_by_name, fmt), dict(metadata or {}), fmt)

    def save_weights(
        self,
        path: str | os.PathLike[str],
        dtype: torch.dtype | None = torch.bfloat16,
        metadata: Mapping[str, str] | None = None,
        *,
        fmt: Format = "native",
    ) -> Path:
        """Write a LoRA file with hashes, whole or not at all; ``dtype`` None keeps float32."""
        return save_lora(self.as_lora_file(metadata, fmt), path, fmt, dtype=dtype, require_finite=False)

    def verdict(self) -> Verdict:
        """What the weights, which have to be finite, change."""
        return measure(self.as_lora_file().modules.items())

    def save_checked(
        self,
        path: str | os.PathLike[str],
        verdict: Verdict,
        dtype: torch.dtype,
        metadata: Mapping[str, str],
        *,
        fmt: Format = "native",
    ) -> Path:
        """Like :meth:`save_weights`, but the file is read back and compared before it gets its name.

        Raises:
            UserError: it does not hold what the network does, or a value is not finite.
        """
        lora = self.as_lora_file(metadata, fmt)
        return save_lora(lora, path, fmt, dtype=dtype, check=lambda written: check_file(written, lora, verdict))

    # --- reporting ---

    def describe(self) -> str:
        """One line for the log."""
        ranks = sorted({m.rank for m in self.modules_by_name.values()})
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        return f"LoRA of rank {rank}: {self.describe_counts()}"


def as_lora(file: str | os.PathLike[str] | LoraFile) -> LoraFile:
    """A file that may have been read already."""
    return file if isinstance(file, LoraFile) else load_lora(file)


def _check_sizes(name: str, module: LoRALinear, given: LoraModule, source: str) -> None:
    have, want = given.info, module
    sizes = (want.lora_down.in_features, want.lora_up.out_features)
    if (have.in_features, have.out_features) != sizes:
        raise UserError(
            f"{source}: {name} is made for a layer of {have.in_features} -> {have.out_features} features, "
            f"the model's has {sizes[0]} -> {sizes[1]}; it is a LoRA of another model"
        )
    if have.dora != isinstance(want, DoRALinear):
        raise UserError(
            f"{source}: {name} is {'a DoRA' if have.dora else 'no DoRA'} module, that of the network is"
            f"{' not' if have.dora else ''}; use --network_args use_dora={have.dora}"
        )
    if have.rank != want.rank:
        raise UserError(
            f"{source}: {name} has rank {have.rank}, the network {want.rank}; "
            f"use --network_dim {have.rank} (or rank_pattern in --network_args)"
        )
