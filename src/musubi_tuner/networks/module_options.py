"""Rank, alpha and kind of each module of a network, from its arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from musubi_tuner.common.errors import UserError, did_you_mean

from .attached import Switch
from .dora import DoRALinear
from .lora import LoRALinear
from .network_args import NetworkArgs, probability
from .targets import compile_patterns, longest_match

DEFAULT_DIM = 4


@dataclass(frozen=True)
class ModuleOptions:
    """What a network's modules are like.

    Attributes:
        rank_of, alpha_of: of a module by its dotted path.
        dora: which have trained lengths.
        options: keywords of :class:`LoRALinear`.
    """

    rank_of: Callable[[str], int]
    alpha_of: Callable[[str], float]
    dora: Callable[[str], bool]
    options: Mapping[str, Any]

    def make(self, name: str, base: nn.Linear, switch: Switch) -> LoRALinear:
        kind = DoRALinear if self.dora(name) else LoRALinear
        return kind(base, self.rank_of(name), self.alpha_of(name), switch=switch, **self.options)


def module_options(
    args: NetworkArgs, network_dim: int | None, network_alpha: float | None, dropout: float | None
) -> ModuleOptions:
    """The options of a new network.

    Raises:
        UserError: a number out of its range, or an invalid pattern.
    """
    rank_of = _chooser(args.rank_pattern, args.audio_dim, _checked_dim(network_dim), "rank_pattern")
    plain_alpha = _chooser(args.alpha_pattern, args.audio_alpha, network_alpha or 0.0, "alpha_pattern")

    def alpha_of(name: str) -> float:
        alpha, rank = plain_alpha(name) or float(rank_of(name)), rank_of(name)
        # So that alpha / r, which is what every reader of the file computes, is the scale.
        return alpha * math.sqrt(rank) if args.use_rslora else alpha

    return ModuleOptions(rank_of, alpha_of, lambda name: args.use_dora, dropouts(args, dropout))


def dropouts(args: NetworkArgs, dropout: float | None) -> dict[str, float]:
    """Keywords of :class:`LoRALinear`.

    Raises:
        UserError: ``dropout`` is no probability.
    """
    try:
        dropout = probability(dropout or 0.0)
    except ValueError as error:
        raise UserError(f"--network_dropout {dropout}: {error}") from None
    return {"dropout": dropout, "rank_dropout": args.rank_dropout, "module_dropout": args.module_dropout}


def check_patterns(args: NetworkArgs, names: Sequence[str]) -> None:
    """Raise UserError for a pattern of ranks or alphas that is found in none of the adapted modules."""
    for source, patterns in (("rank_pattern", args.rank_pattern), ("alpha_pattern", args.alpha_pattern)):
        for pattern in compile_patterns(patterns, source):
            if not any(pattern.search(name) for name in names):
                raise UserError(
                    f"--network_args {source}: {pattern.pattern!r} is found in none of the {len(names)} adapted modules"
                    f"{_nearest(pattern.pattern, names)}"
                )


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """A hint at what the pattern may have meant: parts of paths, then an example."""
    plain = pattern.replace("\\.", ".").strip(".*^$")
    return f"{did_you_mean(plain, _parts(names))}; they are named like {names[0]}"


def _parts(names: Iterable[str]) -> list[str]:
    """Runs of components of the paths, without the number of the block."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")[2:]
        for length in range(1, len(parts) + 1):
            found |= dict.fromkeys(".".join(parts[i : i + length]) for i in range(len(parts) - length + 1))
    return list(found)


def _chooser(patterns: Mapping[str, Any], audio: Any, default: Any, source: str) -> Callable[[str], Any]:
    """A module's value: of the longest pattern found in its path, else the audio one, else the common one."""
    compiled = compile_patterns(patterns, source)

    def choose(name: str) -> Any:
        pattern = longest_match(compiled, name)
        if pattern is not None:
            return patterns[pattern]
        return audio if audio is not None and "audio_" in name else default

    return choose


def _checked_dim(dim: int | None) -> int:
    if dim is not None and dim < 1:
        raise UserError(f"--network_dim {dim}: expected at least 1")
    return dim or DEFAULT_DIM
