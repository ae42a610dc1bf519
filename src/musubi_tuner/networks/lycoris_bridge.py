"""Networks of the LyCORIS library for the LTX-2 transformer (``--network_module lycoris.kohya``)."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.common.errors import UserError
from musubi_tuner.config.network import LYCORIS

from .adapter_math import delta_norm
from .adapter_network import AdapterNetwork, LoadReport, absent_modules, compare_modules
from .attached import Switch
from .formats import Format
from .lycoris_files import LycorisFile, LycorisModule, LycorisReader, stored_over_base, write_lycoris
from .lycoris_layer import LycorisLinear, fits, make_layer
from .lycoris_options import LycorisOptions, read_lycoris_options
from .network_args import NetworkArgs, probability
from .targets import linear_names, modality_of, select_targets
from .verdict import StreamChange, Verdict

logger = logging.getLogger(__name__)

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
        file = _read(file)
        report = compare_modules(self.modules_by_name, file.modules, file.source)
        for name in report.matched:
            _check(name, self.modules_by_name[name], file.modules[name], file.source)
        for name in report.matched:
            _fill(self.modules_by_name[name], file.modules[name], file.format)
        if report.missing or report.unexpected:
            logger.warning("%s: %s", file.source, report)
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
) -> dict[str, int]:
    """For each layer that would be adapted the rank at which a LoRA has as many parameters, rounded up.

    ``shapes``: (N, K) of all layers by dotted path.
    """
    options, names = _chosen(list(shapes), network_dim, network_alpha, arguments, quiet=True)
    ranks, known = {}, {}
    for name in names:
        N, K = shapes[name]
        key = (options.of(name), N, K)
        if key not in known:
            with torch.random.fork_rng(devices=[]):
                layer = make_layer(nn.Linear(K, N, device="meta"), key[0], None, Switch())
            known[key] = math.ceil(sum(p.numel() for p in layer.parameters()) / (N + K))
        ranks[name] = known[key]
    return ranks


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
    file = _read(file)
    available = {n: m for n, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    absent = absent_modules(file.modules, available, file.source)
    if absent:
        logger.warning(
            "%s: %d of %d modules are left out, since the mode builds no such part of the transformer (such as %s)",
            *(file.source, len(absent), len(file.modules), absent[0]),
        )
    switch, drops = Switch(), (probability(dropout or 0.0), 0.0, 0.0)
    modules = {}
    for name, given in file.modules.items():
        if name in available:
            modules[name] = _layer_of(name, available[name], given, drops, switch, file)
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


def sizes_of_file(path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """As :func:`planned_sizes` for the modules of a file."""
    modules = _read(path).modules
    return {
        name: math.ceil(sum(t.numel() for t in modules[name].tensors.values()) / sum(shape))
        for name, shape in shapes.items()
        if name in modules
    }


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
    dora = None if given.lengths is None else _axis(given.lengths)
    layer = LycorisLinear(base, given.tensors, given.alpha or 0.0, dora=dora, dropouts=drops, switch=switch)
    if given.lengths is not None:
        layer.set_lengths(given.lengths, over_base=stored_over_base(file.format, given.lengths))
    return layer


def _axis(lengths: Tensor) -> int:
    return 1 if lengths.dim() == 2 and lengths.shape[0] == 1 else 0


def _chosen(
    linears: Sequence[str],
    network_dim: int | None,
    network_alpha: float | None,
    arguments: Mapping[str, object],
    *,
    quiet: bool = False,
) -> tuple[LycorisOptions, list[str]]:
    options = read_lycoris_options(network_dim, network_alpha, **arguments)
    args: NetworkArgs = options.args
    names = select_targets(linears, args.lora_target_preset, args.include_patterns, args.exclude_patterns, quiet=quiet)
    if not names:
        raise UserError(
            f"the targets match none of the {len(linears)} linear layers of the transformer; check "
            "--lora_target_preset and include_patterns, exclude_patterns"
        )
    options.check_patterns(names)
    return options, names


def _read(file: str | os.PathLike[str] | LycorisFile) -> LycorisFile:
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
