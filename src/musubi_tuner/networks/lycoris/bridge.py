"""Networks of the LyCORIS library for the LTX-2 transformer (``--network_module lycoris.kohya``)."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from musubi_tuner.common.errors import UserError
from musubi_tuner.networks.adapter_network import adapted_layers
from musubi_tuner.networks.attached import Switch
from musubi_tuner.networks.network_args import choose_layers, probability
from musubi_tuner.networks.targets import linear_names

from .files import LycorisFile, LycorisModule, LycorisReader, stored_over_base
from .layer import LycorisLinear, fits, kept_per_token, make_layer
from .network import LycorisNetwork, as_lycoris
from .options import LycorisOptions, read_lycoris_options

logger = logging.getLogger(__name__)


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    transformer: nn.Module,
    **arguments: object,
) -> LycorisNetwork:
    """Make a network for ``transformer`` (not yet applied to it).

    Args:
        multiplier: factor on all changes.
        network_dim, network_alpha: of layers for which nothing else is said; ``None``: 4, and the rank.
        transformer: only names and sizes of its Linear layers are read, so it may be on the meta device.
        arguments: see :func:`read_lycoris_options`.

    Raises:
        UserError: a bad argument, or nothing to adapt.
    """
    options, names = _chosen(linear_names(transformer), network_dim, network_alpha, arguments)
    switch = Switch()
    modules = {
        name: make_layer(transformer.get_submodule(name), options.of(name), options.lokr_norm, switch) for name in names
    }
    network = LycorisNetwork(modules, switch, options)
    network.multiplier = multiplier
    if options.args.verbose:
        logger.info("\n".join(f"{name}: {module}" for name, module in modules.items()))
    return network


def decomposed_layers(
    linears: Sequence[str], network_dim: int | None, network_alpha: float | None, arguments: Mapping[str, object]
) -> list[str]:
    """Those of the layers, by their dotted paths, that would be adapted with ``dora_wd``, which reads the weights.

    Raises:
        UserError: where :func:`create_network` would.
    """
    options, names = _chosen(linears, network_dim, network_alpha, arguments, quiet=True)
    return [name for name in names if options.of(name).dora_wd]


def decomposed_in_file(path: str | os.PathLike[str], linears: Collection[str]) -> list[str]:
    """As :func:`decomposed_layers` for the modules of a file."""
    return [name for name in LycorisReader(path).decomposed if name in linears]


def refuse_quantised(decomposed: Sequence[str]) -> None:
    """Raise UserError where layers with ``dora_wd`` are to lie over weights that are not dense."""
    if decomposed:
        raise UserError(
            f"LyCORIS dora_wd reads the base weights, quantised here by --fp8_base, --int8_base or --nf4_base, in "
            f"{len(decomposed)} layers such as {decomposed[0]}; leave out dora_wd, train on dense weights, or use "
            "--network_module networks.lora_ltx2 with --network_args use_dora=True"
        )


def check_formats(arguments: Mapping[str, object], *, comfy: bool) -> None:
    """Raise UserError for options that cannot be read, or that a file for ComfyUI cannot hold."""
    options = read_lycoris_options(None, None, **arguments)
    algos = {options.base.algo, *(values.get("algo") for values in options.layers.values())}
    if comfy and "ia3" in algos:
        raise UserError("LyCORIS algo ia3: ComfyUI reads no IA3; add --no_convert_to_comfy, or use another algo")


def planned_sizes(
    shapes: Mapping[str, tuple[int, int]],
    network_dim: int | None,
    network_alpha: float | None,
    arguments: Mapping[str, object],
) -> dict[str, tuple[int, int]]:
    """For each layer that would be adapted the trained values, and those that are kept for each token.

    ``shapes``: (N, K) of all layers by dotted path.
    """
    options, names = _chosen(list(shapes), network_dim, network_alpha, arguments, quiet=True)
    sizes, known = {}, {}
    for name in names:
        N, K = shapes[name]
        key = (options.of(name), N, K)
        if key not in known:
            with torch.random.fork_rng(devices=[]):
                layer = make_layer(nn.Linear(K, N, device="meta"), key[0], None, Switch())
            known[key] = _sizes(layer)
        sizes[name] = known[key]
    return sizes


def create_network_from_weights(
    multiplier: float,
    file: str | os.PathLike[str] | LycorisFile,
    transformer: nn.Module,
    *,
    dropout: float | None = None,
    **network_args: object,
) -> LycorisNetwork:
    """Make a network with exactly the modules and weights of a file (not yet applied).

    Audio-branch modules that ``transformer`` lacks are left out with a warning.

    Raises:
        UserError: the file is no adapter of LTX-2 or does not fit the transformer, or an argument has no place here.
    """
    check_file_arguments(network_args)
    file = as_lycoris(file)
    layers = adapted_layers(file.modules, transformer, file.source)
    switch, drops = Switch(), (probability(dropout or 0.0), 0.0, 0.0)
    modules = {name: _layer_of(name, layer, file.modules[name], drops, switch, file) for name, layer in layers.items()}
    network = LycorisNetwork(modules, switch)
    network.multiplier = multiplier
    return network


def check_file_arguments(arguments: Mapping[str, object]) -> None:
    """Raise UserError for keywords that :func:`create_network_from_weights` does not take."""
    given = [name for name in arguments if name != "dropout"]
    if given:
        raise UserError(
            f"--network_args {', '.join(given)}: modules and sizes are those of the file (--dim_from_weights); leave "
            "it out"
        )


def sizes_of_file(path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """As :func:`planned_sizes` for the modules of a file."""
    sizes, file, drops = {}, as_lycoris(path), (0.0, 0.0, 0.0)
    for name in file.modules.keys() & shapes.keys():
        N, K = shapes[name]
        layer = _layer_of(name, nn.Linear(K, N, device="meta"), file.modules[name], drops, Switch(), file)
        sizes[name] = _sizes(layer)
    return sizes


def _sizes(layer: LycorisLinear) -> tuple[int, int]:
    """Trained values, and those that are kept for each token."""
    return sum(p.numel() for p in layer.parameters()), kept_per_token(layer)


def _layer_of(
    name: str,
    base: nn.Linear,
    given: LycorisModule,
    drops: tuple[float, float, float],
    switch: Switch,
    file: LycorisFile,
) -> LycorisLinear:
    shape = (base.out_features, base.in_features)
    if not fits(shape, given.kind, given.tensors):
        raise UserError(
            f"{file.source}: {name} is made for a layer of {given.shape[1]} -> {given.shape[0]} features, the model's "
            f"has {shape[1]} -> {shape[0]}; it is an adapter of another model"
        )
    dora = None if given.lengths is None else int(given.of_inputs)
    layer = LycorisLinear(base, given.tensors, given.alpha or 0.0, dora=dora, dropouts=drops, switch=switch)
    if given.lengths is not None:
        layer.set_lengths(given.lengths, over_base=stored_over_base(file.format, given.lengths))
    return layer


def _chosen(
    linears: Sequence[str],
    network_dim: int | None,
    network_alpha: float | None,
    arguments: Mapping[str, object],
    *,
    quiet: bool = False,
) -> tuple[LycorisOptions, list[str]]:
    options = read_lycoris_options(network_dim, network_alpha, **arguments)
    names = choose_layers(linears, options.args, quiet=quiet)
    options.check_patterns(names)
    return options, names
