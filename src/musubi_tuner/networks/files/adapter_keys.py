"""Keys of an adapter file of any kind: LoRA, DoRA and LyCORIS, in every spelling of the modules' names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from musubi_tuner.common.errors import UserError
from musubi_tuner.networks.names import canonical_name

from .formats import Format, format_of

DOWN, UP, ALPHA, MAGNITUDE = "down", "up", "alpha", "magnitude"

# lora_A and its like may be followed by PEFT's adapter name ("default").
_ROLES = {
    r"(?:lora_down|lora_A|lora\.down)(?:\.\w+)?\.weight": DOWN,
    r"(?:lora_up|lora_B|lora\.up)(?:\.\w+)?\.weight": UP,
    r"alpha": ALPHA,
    r"dora_scale|lora_magnitude_vector(?:\.\w+)?(?:\.weight)?": MAGNITUDE,
}
# Kept as they are spelled.
_LYCORIS = (
    r"lokr_w[12](?:_[ab])?|lokr_t2|hada_w[12]_[ab]|hada_t[12]|oft_blocks|oft_diag|rescale|scalar|on_input|diff(?:_b)?|"
    r"lora_mid\.weight|[ab][12]\.weight|weight|bias_(?:indices|values|size)|w_norm|b_norm"
)
_KEY = re.compile(r"(?P<module>.+?)\.(?:" + "|".join(f"({p})" for p in (*_ROLES, _LYCORIS)) + ")")
_BIAS = re.compile(r".*\.lora_(B|up)(\.\w+)?\.bias")


@dataclass(frozen=True)
class Adapters:
    """What an adapter file holds.

    Attributes:
        format: how its modules are spelled.
        modules: canonical name -> role -> key; a role is one of the constants above or LyCORIS's own suffix.
    """

    format: Format
    modules: dict[str, dict[str, str]]


def parse_keys(keys: Iterable[str]) -> Adapters:
    """Tell what the keys of a file are.

    Raises:
        UserError: a key is of no adapter, of another model, there twice, or without the key it belongs with.
    """
    keys = list(keys)
    modules: dict[str, dict[str, str]] = {}
    foreign, unknown = [], []
    for key in keys:
        match = _KEY.fullmatch(key)
        if match is None:
            unknown.append(key)
            continue
        name, role = canonical_name(match["module"]), _role(match)
        if name is None:
            foreign.append(match["module"])
        elif role in modules.setdefault(name, {}):
            raise UserError(f"{key} and {modules[name][role]} are the same; keep one of them")
        else:
            modules[name][role] = key
    _check(keys, modules, foreign, unknown)
    return Adapters(format_of(next(iter(next(iter(modules.values())).values()))), modules)


def is_lora(roles: Iterable[str]) -> bool:
    """Whether a module is a plain pair of factors, perhaps with alpha and a magnitude (DoRA)."""
    return set(roles) <= {DOWN, UP, ALPHA, MAGNITUDE}


def _role(match: re.Match[str]) -> str:
    index = match.lastindex or 0
    return [*_ROLES.values(), match[index]][index - 2]  # the first group is the module


def _check(keys: list[str], modules: dict[str, dict[str, str]], foreign: list[str], unknown: list[str]) -> None:
    # IA3 alone calls its factor "weight", as models do.
    unknown = unknown + [r["weight"] for r in modules.values() if "weight" in r and "on_input" not in r]
    if biased := [key for key in unknown if _BIAS.fullmatch(key)]:
        raise UserError(f"{biased[0]}: a LoRA with a bias, which no format but its own holds; train it without")
    if unknown or not (modules or foreign):
        example = f", such as {unknown[0]}" if unknown else ""
        raise UserError(f"is no LoRA: {len(unknown)} of {len(keys)} tensors are of no adapter{example}")
    if foreign:
        whose = "a LoRA of another model" if not modules else "holds modules of another model"
        raise UserError(
            f"{whose}: {len(set(foreign))} modules are unknown to LTX-2, such as {min(foreign)}; give a LoRA of LTX-2"
        )
    for name, roles in modules.items():
        if (DOWN in roles) != (UP in roles):
            have, lack = ("lora_down", "lora_up") if DOWN in roles else ("lora_up", "lora_down")
            raise UserError(f"{name} has {have} but no {lack} weight; the file is incomplete")
        if not set(roles) - {ALPHA, MAGNITUDE}:
            raise UserError(f"{name} has {', '.join(roles.values())} but no weights; the file is incomplete")
