"""The LoRA network of the LTX-2 transformer (``--network_module networks.lora_ltx2``)."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import nn

from musubi_tuner.common.errors import UserError

from .adapter_network import adapted_layers
from .attached import Switch
from .files.lora_file import LoraFile
from .lora_network import LoRANetwork, as_lora
from .module_options import ModuleOptions, check_patterns, dropouts, module_options
from .network_args import NetworkArgs, choose_layers, parse_network_args
from .targets import linear_names, select_targets

logger = logging.getLogger(__name__)


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
    names = choose_layers(linears, args, quiet=quiet)
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
    lora, args = as_lora(file), _without_choices(network_args)
    layers = adapted_layers(lora.modules, transformer, lora.source)
    given = {name: lora.modules[name] for name in layers}
    options = ModuleOptions(
        rank_of=lambda name: given[name].info.rank,
        alpha_of=lambda name: given[name].alpha or 0.0,
        dora=lambda name: given[name].dora_scale is not None,
        options=dropouts(args, dropout),
    )
    switch = Switch()
    network = LoRANetwork({name: options.make(name, layer, switch) for name, layer in layers.items()}, switch, args)
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
