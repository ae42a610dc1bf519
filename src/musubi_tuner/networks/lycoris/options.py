"""Options of a LyCORIS network: ``--lycoris_config`` and ``--network_args``, for each layer by its path."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from musubi_tuner.common.errors import ConfigErrors, UserError, did_you_mean
from musubi_tuner.common.text_files import read_toml
from musubi_tuner.networks.network_args import NetworkArgs, boolean, parse_network_args, probability

ALGOS = ("lora", "locon", "loha", "lokr", "ia3")
_OTHERS = ("full", "glora", "dylora", "diag-oft", "boft", "tlora", "norm")
_CLASSES = ("BasicAVTransformerBlock", "Attention", "FeedForward", "GELUApprox")
_DEFAULT_DIM = 4


@dataclass(frozen=True)
class LayerOptions:
    """How one layer is adapted.

    Attributes:
        factor: into how many parts LoKr splits a width; -1: as square as it gets.
        dora_wd: train direction and length apart; ``wd_on_output``: a length for each output, else for each input.
        rs_lora: the scale is alpha / sqrt(dim).
        train_on_input: IA3 scales inputs, else outputs.
    """

    algo: str = "lora"
    dim: int = _DEFAULT_DIM
    alpha: float = 1.0
    factor: int = -1
    decompose_both: bool = False
    full_matrix: bool = False
    unbalanced_factorization: bool = False
    dora_wd: bool = False
    wd_on_output: bool = True
    rs_lora: bool = False
    train_on_input: bool = False
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0


@dataclass(frozen=True)
class LycorisOptions:
    """A whole network's.

    Attributes:
        base: of layers that no pattern names.
        layers: pattern -> what differs from ``base``, in the order of the file; the first that matches counts.
        lokr_norm: standard deviation at which the second factor of LoKr starts; ``None``: at zero.
        args: those that networks have in common.
    """

    base: LayerOptions
    layers: Mapping[str, Mapping[str, Any]]
    lokr_norm: float | None
    args: NetworkArgs

    def of(self, path: str) -> LayerOptions:
        """The options of a layer by its dotted path."""
        for pattern, values in self.layers.items():
            if _matches(pattern, path):
                return replace(self.base, **values)
        return self.base

    def check_patterns(self, paths: Sequence[str]) -> None:
        """Raise UserError for a pattern that matches none of the adapted layers."""
        for pattern in self.layers:
            if not any(_matches(pattern, path) for path in paths):
                near = did_you_mean(pattern, [*_CLASSES, *dict.fromkeys(_parts(paths))])
                raise UserError(
                    f"LyCORIS modules {pattern!r}: matches none of the {len(paths)} adapted layers{near}; give a path "
                    f"with * such as '*attn1*', or one of the classes {', '.join(_CLASSES)}; layers are named like "
                    f"{paths[0]}"
                )

    def described(self) -> dict[str, Any]:
        """For the metadata: what is not a default, as ``--network_args`` would say it."""
        default = LayerOptions()
        found = {k: v for k, v in vars(self.base).items() if v != vars(default)[k] and k not in ("dim", "alpha")}
        found = {"algo": self.base.algo, **found}
        found |= {f"modules.{pattern}.{k}": v for pattern, values in self.layers.items() for k, v in values.items()}
        if self.lokr_norm is not None:
            found["init.lokr_norm"] = self.lokr_norm
        return found | self.args.described()


def read_lycoris_options(
    network_dim: int | None,
    network_alpha: float | None,
    *,
    dropout: object = None,
    lycoris_config: Path | None = None,
    init_lokr_norm: float | None = None,
    **network_args: object,
) -> LycorisOptions:
    """Put the flags, the TOML file and ``--network_args`` together; the later win.

    Args:
        network_args: options of all layers, ``modules.<pattern>.<option>``, ``init.lokr_norm``, and the arguments
            that networks have in common. Values may be strings.

    Raises:
        UserError: unknown keys, unreadable values, or options that exclude each other; all in one message.
    """
    reading = _Reading()
    reading.base |= reading.values("", {"dropout": dropout} if dropout else {}, "--network_dropout", ("dropout",))
    if lycoris_config is not None:
        reading.toml(read_toml(lycoris_config), str(lycoris_config))
    common = reading.arguments(network_args)
    if init_lokr_norm is not None:
        reading.norm("--init_lokr_norm", init_lokr_norm)
    base = {"dim": network_dim or _DEFAULT_DIM, "alpha": network_alpha or 0.0, **reading.base}
    options = LycorisOptions(LayerOptions(**base), reading.layers, reading.lokr_norm, NetworkArgs())
    problems = [*reading.problems, *_contradictions(options)]
    if problems:
        raise ConfigErrors(problems, "invalid LyCORIS options") if len(problems) > 1 else UserError(problems[0])
    return replace(options, args=parse_network_args(common))


class _Reading:
    """What has been read so far, and what is wrong with it."""

    def __init__(self) -> None:
        self.base: dict[str, Any] = {}
        self.layers: dict[str, dict[str, Any]] = {}
        self.lokr_norm: float | None = None
        self.problems: list[str] = []

    def toml(self, content: Mapping[str, Any], source: str) -> None:
        """``[network]`` with ``base_...``, ``[network.modules.<pattern>]``, ``[network.init]``."""
        self._unknown(source, content, ("network",))
        network = self._table(content, "network", source)
        base_keys = [f"base_{k}" for k in _BASE]
        self._unknown(f"{source}: [network]", network, (*base_keys, "modules", "init"))
        given = {k.removeprefix("base_"): v for k, v in network.items() if k in base_keys}
        self.base |= self.values("base_", given, f"{source}: [network]", _BASE)
        for pattern, values in self._table(network, "modules", source).items():
            where = f'{source}: [network.modules."{pattern}"]'
            if isinstance(values, Mapping):
                self.layers.setdefault(pattern, {}).update(self.values("", values, where, tuple(_READERS)))
            else:
                self.problems.append(f"{where}: expected a table of options, got {values!r}")
        init = self._table(network, "init", source)
        self._unknown(f"{source}: [network.init]", init, ("lokr_norm",))
        if "lokr_norm" in init:
            self.norm(f"{source}: [network.init] lokr_norm", init["lokr_norm"])

    def arguments(self, given: Mapping[str, object]) -> dict[str, object]:
        """``--network_args``; returns what networks have in common, unread."""
        common: dict[str, object] = {}
        plain: dict[str, object] = {}
        for key, value in given.items():
            if key.startswith("modules.") and key.count(".") > 1:
                pattern, _, option = key.removeprefix("modules.").rpartition(".")
                where = f"--network_args modules.{pattern}."
                self.layers.setdefault(pattern, {}).update(self.values("", {option: value}, where, tuple(_READERS)))
            elif key == "init.lokr_norm":
                self.norm("--network_args init.lokr_norm", value)
            elif key in _COMMON:
                common[key] = value
            else:
                plain[key] = value
        known = (*_BASE, *_COMMON, "init.lokr_norm", "modules.<pattern>.<option>")
        self.base |= self.values("", plain, "--network_args", _BASE, known)
        return common

    def values(
        self,
        prefix: str,
        given: Mapping[str, object],
        where: str,
        allowed: Sequence[str],
        known: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Options read; ``prefix`` stands before their names in messages."""
        self._unknown(where, given, known or allowed, tuple(allowed))
        found = {}
        for key in given.keys() & set(allowed):
            try:
                found[key] = _READERS[key](given[key])
            except (ValueError, TypeError) as error:
                self.problems.append(f"{where} {prefix}{key} = {given[key]}: {error}")
        return found

    def norm(self, where: str, value: object) -> None:
        try:
            self.lokr_norm = _positive(value)
        except (ValueError, TypeError) as error:
            self.problems.append(f"{where} {value}: {error}")

    def _table(self, content: Mapping[str, Any], key: str, source: str) -> Mapping[str, Any]:
        table = content.get(key, {})
        if isinstance(table, Mapping):
            return table
        self.problems.append(f"{source}: {key}: expected a table, got {table!r}")
        return {}

    def _unknown(
        self, where: str, given: Iterable[str], known: Sequence[str], allowed: Sequence[str] | None = None
    ) -> None:
        for key in given:
            if key in (known if allowed is None else allowed):
                continue
            if key in _ELSEWHERE:
                self.problems.append(f"{where} {key}: {_ELSEWHERE[key]}")
            else:
                self.problems.append(
                    f"{where}: unknown key {key!r}{did_you_mean(key, known)}; known: {', '.join(known)}"
                )


def class_names(path: str) -> tuple[str, ...]:
    """Classes of the modules that hold a layer, from the block inwards, known from its dotted path."""
    part = path.split(".")[2]
    if part.endswith("ff"):
        return ("BasicAVTransformerBlock", "FeedForward", *(("GELUApprox",) if path.endswith(".proj") else ()))
    return ("BasicAVTransformerBlock", "Attention")


def _matches(pattern: str, path: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or pattern in class_names(path)


def _parts(paths: Iterable[str]) -> Iterable[str]:
    for path in paths:
        yield from path.split(".")[2:]


def _contradictions(options: LycorisOptions) -> Iterable[str]:
    everywhere = {"": options.base} | {p: replace(options.base, **v) for p, v in options.layers.items()}
    for pattern, layer in everywhere.items():
        if layer.algo == "ia3" and layer.dora_wd:
            where = f" of modules {pattern!r}" if pattern else ""
            yield f"algo ia3{where} has no dora_wd; use it with lora, locon, loha or lokr"
    if options.lokr_norm is not None and not any(layer.algo == "lokr" for layer in everywhere.values()):
        yield f"--init_lokr_norm (lokr_norm) needs algo lokr; got {', '.join({e.algo: 0 for e in everywhere.values()})}"


def _algo(value: object) -> str:
    name = str(value).lower()
    if name in ALGOS:
        return name
    known = f"expected one of {', '.join(ALGOS)}"
    if name in _OTHERS:
        raise ValueError(f"this algorithm of LyCORIS is not offered; {known}")
    raise ValueError(f"unknown algorithm{did_you_mean(name, ALGOS)}; {known}")


def _whole(value: object) -> int:
    number = float(value)
    if isinstance(value, bool) or number != int(number):
        raise ValueError("expected an integer")
    return int(number)


def _dim(value: object) -> int:
    if _whole(value) < 1:
        raise ValueError("expected at least 1")
    return _whole(value)


def _factor(value: object) -> int:
    if _whole(value) != -1 and _whole(value) < 1:
        raise ValueError("expected -1 or at least 1")
    return _whole(value)


def _positive(value: object) -> float:
    if isinstance(value, bool) or not 0 < float(value) < float("inf"):
        raise ValueError("expected a number above 0")
    return float(value)


_READERS: dict[str, Callable[[object], Any]] = {
    "algo": _algo,
    "dim": _dim,
    "alpha": _positive,
    "factor": _factor,
    **dict.fromkeys(("decompose_both", "full_matrix", "unbalanced_factorization", "dora_wd"), boolean),
    **dict.fromkeys(("wd_on_output", "rs_lora", "train_on_input"), boolean),
    **dict.fromkeys(("dropout", "rank_dropout", "module_dropout"), probability),
}
assert set(_READERS) == {f.name for f in fields(LayerOptions)}
_BASE = tuple(k for k in _READERS if k not in ("dim", "alpha"))
_COMMON = (
    *("lora_target_preset", "include_patterns", "exclude_patterns", "loraplus_lr_ratio"),
    *("conv_dim", "conv_alpha", "verbose"),
)
# Known elsewhere, and what to do instead.
_ELSEWHERE = {
    **dict.fromkeys(("dim", "network_dim", "base_dim"), "use --network_dim, or dim of a table of modules"),
    **dict.fromkeys(("alpha", "network_alpha", "base_alpha"), "use --network_alpha, or alpha of a table of modules"),
    "preset": "which layers are adapted is chosen by --lora_target_preset, include_patterns and exclude_patterns",
    "bypass_mode": "the base is always left as it is, with what the network adds computed beside it; leave it out",
    **dict.fromkeys(("use_tucker", "use_cp", "use_conv_cp"), "LTX-2's blocks hold no convolutions; leave it out"),
    **dict.fromkeys(("use_scalar", "train_norm", "rescaled", "constraint", "block_size"), "not offered; leave it out"),
}
