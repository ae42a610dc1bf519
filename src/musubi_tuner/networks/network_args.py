"""``--network_args key=value ...`` of the LTX-2 LoRA network."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from musubi_tuner.common.errors import UserError, did_you_mean

from .targets import select_targets


@dataclass(frozen=True)
class NetworkArgs:
    """``--network_args key=value ...`` after parsing."""

    lora_target_preset: str | None = None
    include_patterns: tuple[str, ...] = ()
    exclude_patterns: tuple[str, ...] = ()
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    audio_dim: int | None = None  # for modules whose path contains audio_
    audio_alpha: float | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # regex of the dotted path -> rank; longest wins
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False  # the scale is alpha / sqrt(r)
    use_dora: bool = False
    loraplus_lr_ratio: float | None = None
    conv_dim: int | None = None  # of other networks; LTX-2's blocks hold no convolution
    conv_alpha: float | None = None
    verbose: bool = False

    def described(self) -> dict[str, Any]:
        """What is not a default."""
        default = vars(NetworkArgs())
        return {k: v for k, v in vars(self).items() if v != default[k]}


def _literal(value: object, expected: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise ValueError(f"not a Python literal; {expected}") from None


def _strings(value: object) -> tuple[str, ...]:
    expected = "expected a list of strings such as ['.*to_k$']"
    items = _literal(value, expected)
    if not isinstance(items, (list, tuple)) or not all(isinstance(i, str) for i in items):
        raise ValueError(expected)
    return tuple(items)


def boolean(value: object) -> bool:
    """``True``, ``False``, ``1`` or ``0``, or ``ValueError``."""
    text = str(value).lower()
    if text not in ("true", "false", "1", "0"):
        raise ValueError("expected True or False")
    return text in ("true", "1")


def probability(value: object) -> float:
    """A number in [0, 1), or ``ValueError``."""
    number = float(value)
    if not 0 <= number < 1:
        raise ValueError("expected a number in [0, 1)")
    return number


def _positive(value: object) -> float:
    number = float(value)
    if not 0 < number < float("inf"):
        raise ValueError("expected a number above 0")
    return number


def _at_least_one(value: object) -> int:
    number = int(value)
    if number < 1:
        raise ValueError("expected an integer >= 1")
    return number


def _table(of: Callable[[object], Any]) -> Callable[[object], dict[str, Any]]:
    def read(value: object) -> dict[str, Any]:
        expected = "expected a table such as {'attn1': 8}"
        table = _literal(value, expected)
        if not isinstance(table, dict):
            raise ValueError(expected)
        return {str(k): of(v) for k, v in table.items()}

    return read


_READERS: dict[str, Callable[[object], Any]] = {
    "lora_target_preset": str,
    "include_patterns": _strings,
    "exclude_patterns": _strings,
    "rank_dropout": probability,
    "module_dropout": probability,
    "audio_dim": _at_least_one,
    "audio_alpha": float,
    "rank_pattern": _table(_at_least_one),
    "alpha_pattern": _table(float),
    "use_rslora": boolean,
    "use_dora": boolean,
    "loraplus_lr_ratio": _positive,
    "conv_dim": int,
    "conv_alpha": float,
    "verbose": boolean,
}


def parse_network_args(network_args: Mapping[str, object]) -> NetworkArgs:
    """Read the values (strings of the command line, or already typed) of ``--network_args``.

    Raises:
        UserError: unknown key or unreadable value.
    """
    values = {}
    for key, raw in network_args.items():
        if key not in _READERS:
            known = ", ".join(_READERS)
            raise UserError(f"--network_args: unknown key {key!r}{did_you_mean(key, _READERS)}; known: {known}")
        if raw is None:
            continue
        try:
            values[key] = _READERS[key](raw)
        except (ValueError, TypeError) as error:
            raise UserError(f"--network_args {key}={raw}: {error}") from None
    return NetworkArgs(**values)


def choose_layers(linears: Sequence[str], args: NetworkArgs, *, quiet: bool = False) -> list[str]:
    """Those of the layers, by their dotted paths, that preset and patterns choose; see :func:`select_targets`.

    Raises:
        UserError: none, an unknown preset or an invalid pattern.
    """
    names = select_targets(linears, args.lora_target_preset, args.include_patterns, args.exclude_patterns, quiet=quiet)
    if not names:
        raise UserError(
            f"the targets match none of the {len(linears)} linear layers of the transformer; check "
            "--lora_target_preset and include_patterns, exclude_patterns"
        )
    return names
