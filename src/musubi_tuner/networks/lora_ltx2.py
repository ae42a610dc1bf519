"""The LoRA network of the LTX-2 transformer (``--network_module networks.lora_ltx2``)."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from musubi_tuner.common.errors import UserError

from .adapter_network import AdapterNetwork, LoadReport, absent_modules, compare_modules
from .attached import Switch
from .dora import DoRALinear
from .formats import Format, lengths_over_base
from .lora import LoRALinear
from .lora_file import LoraFile, LoraModule
from .lora_reader import load_lora
from .lora_writer import save_lora
from .max_norm import limit_norms
from .module_options import ModuleOptions, check_patterns, dropouts, module_options
from .network_args import NetworkArgs, parse_network_args
from .shared_input import SharedProjections, share_inputs
from .targets import linear_names, select_targets
from .verdict import Verdict, check_file, measure

logger = logging.getLogger(__name__)


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
        lora = _read(file)
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
        if report.missing or report.unexpected:
            logger.warning("%s: %s", lora.source, report)
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


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    transformer: nn.Module,
    *,
    dropout: float | None = None,
    **network_args: object,
) -> LoRANetwork:
    """Make a LoRA network for ``transformer`` (not yet applied to it).

    Args:
        multiplier: factor on all deltas.
        network_dim: rank r of every module; ``None`` is 4.
        network_alpha: deltas are scaled by alpha / r; ``None`` or 0 is r.
        transformer: only names and sizes of its Linear layers are read, so it may be on the meta device.
        dropout: probability of dropping an element of the r-wide activation in training.
        network_args: see :class:`NetworkArgs`; values may be the strings of the command line.

    Raises:
        UserError: a bad argument, or nothing to adapt.
    """
    args = parse_network_args(network_args)
    names = _chosen(linear_names(transformer), args)
    _notice_gates(names, args)
    options = module_options(args, network_dim, network_alpha, dropout)
    switch = Switch()
    modules = {name: options.make(name, transformer.get_submodule(name), switch) for name in names}
    network = LoRANetwork(modules, switch, args)
    network.multiplier = multiplier
    if args.verbose:
        logger.info("\n".join(f"{n}: rank {m.rank}, alpha {m.alpha_value:g}" for n, m in modules.items()))
    return network


def check_arguments(
    linears: Sequence[str],
    network_dim: int | None,
    network_alpha: float | None,
    *,
    dropout: float | None = None,
    **network_args: object,
) -> None:
    """Raise UserError where :func:`create_network` would, knowing only the dotted paths of the model's Linears."""
    args = parse_network_args(network_args)
    names = _chosen(linears, args, quiet=True)  # creating the network will warn
    module_options(args, network_dim, network_alpha, dropout).make(names[0], nn.Linear(1, 1, device="meta"), Switch())


def _chosen(linears: Sequence[str], args: NetworkArgs, *, quiet: bool = False) -> list[str]:
    patterns = args.include_patterns, args.exclude_patterns
    names = select_targets(linears, args.lora_target_preset, *patterns, quiet=quiet)
    if not names:
        raise UserError(f"the LoRA targets match none of the {len(linears)} linear layers of the transformer; "
                        "check --lora_target_preset and include_patterns, exclude_patterns")  # fmt: skip
    check_patterns(args, names)
    return names


def planned_ranks(
    names: Collection[str], network_dim: int | None, network_args: Mapping[str, object]
) -> dict[str, int]:
    """Rank of every layer that :func:`create_network` would adapt, by its path; ``names`` are those of all layers.

    Raises:
        UserError: a bad argument.
    """
    args = parse_network_args(network_args)
    targets = select_targets(names, args.lora_target_preset, args.include_patterns, args.exclude_patterns, quiet=True)
    rank_of = module_options(args, network_dim, None, None).rank_of
    return {name: rank_of(name) for name in targets}


def create_network_from_weights(
    multiplier: float,
    file: str | os.PathLike[str] | LoraFile,
    transformer: nn.Module,
    *,
    dropout: float | None = None,
    **network_args: object,
) -> LoRANetwork:
    """Make a network with exactly the modules, ranks, alphas and weights of a LoRA file (not yet applied).

    Audio-branch and connector modules that ``transformer`` lacks are left out with a warning.

    Args:
        network_args: as for :func:`create_network`, but only those that do not choose modules or ranks.

    Raises:
        UserError: the file is no LTX-2 LoRA or does not fit the transformer, or an argument has no place here.
    """
    lora, args = _read(file), _without_choices(network_args)
    available = {n: m for n, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    absent = absent_modules(lora.modules, available, lora.source)
    if absent:
        logger.warning(
            "%s: %d of %d modules are left out, since the mode builds no such part of the transformer (such as %s)",
            *(lora.source, len(absent), len(lora.modules), absent[0]),
        )
    given = {name: module for name, module in lora.modules.items() if name in available}
    options = ModuleOptions(
        rank_of=lambda name: given[name].info.rank,
        alpha_of=lambda name: given[name].alpha or 0.0,
        dora=lambda name: given[name].dora_scale is not None,
        options=dropouts(args, dropout),
    )
    switch = Switch()
    network = LoRANetwork({name: options.make(name, available[name], switch) for name in given}, switch, args)
    network.load_weights(replace(lora, modules=given))
    network.multiplier = multiplier
    return network


def check_file_arguments(options: Mapping[str, object]) -> None:
    """Raise UserError for keywords that :func:`create_network_from_weights` does not take."""
    _without_choices({k: v for k, v in options.items() if k != "dropout"})


def _without_choices(network_args: Mapping[str, object]) -> NetworkArgs:
    """Arguments of a network whose modules a file chooses.

    Raises:
        UserError: one would choose them.
    """
    args = parse_network_args(network_args)
    kept = ("rank_dropout", "module_dropout", "loraplus_lr_ratio", "conv_dim", "conv_alpha", "verbose")
    wrong = [k for k in args.described() if k not in kept]
    if wrong:
        raise UserError(
            f"--network_args {', '.join(wrong)}: modules, ranks and alphas are those of the file "
            "(--dim_from_weights); leave it out"
        )
    return args


def _notice_gates(names: list[str], args: NetworkArgs) -> None:
    gates = sum(n.endswith("to_gate_logits") for n in names)
    if gates and args.lora_target_preset == "full" and not args.include_patterns:
        logger.info(
            "preset full also adapts %d attention gates (to_gate_logits), reported to harm LTX-2.3 LoRAs; "
            "--network_args \"exclude_patterns=['.*to_gate_logits']\" leaves them out",
            gates,
        )


def _read(file: str | os.PathLike[str] | LoraFile) -> LoraFile:
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
