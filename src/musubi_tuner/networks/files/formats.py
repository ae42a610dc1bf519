"""Formats of adapter files: four spellings of the same thing.

========== ======================================================= =========================================
format     keys                                                    scale of the delta
========== ======================================================= =========================================
native     ``lora_unet_<flat>.lora_down|lora_up.weight, .alpha``   alpha / r
musubi     the same with ``lora_unet_model_<flat>``                alpha / r
comfy      ``diffusion_model.<dotted>.lora_A|lora_B.weight``       1: alpha / r is folded into B
diffusers  ``transformer.<dotted>.lora_A|lora_B.weight``           1, or alpha / r of PEFT's configuration
========== ======================================================= =========================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from musubi_tuner.networks.names import MUSUBI_PREFIX, NATIVE_PREFIX, comfy_name, diffusers_name, flat_name

Format = Literal["native", "musubi", "comfy", "diffusers"]

SPELLINGS: dict[str, Callable[[str], str]] = {
    "native": lambda name: NATIVE_PREFIX + flat_name(name),
    "musubi": lambda name: MUSUBI_PREFIX + flat_name(name),
    "comfy": comfy_name,
    "diffusers": diffusers_name,
}
FORMATS: tuple[str, ...] = tuple(SPELLINGS)
FLAT: tuple[Format, ...] = ("native", "musubi")
"""Those that spell a module's path with underscores and hold alpha in a tensor of its own."""


def format_of(key: str) -> Format:
    """The format of a file by a key of any adapted module."""
    if key.startswith(NATIVE_PREFIX):
        return "musubi" if key.startswith(MUSUBI_PREFIX) else "native"
    return "diffusers" if key.startswith(("transformer.", "connectors.", "base_model.")) else "comfy"


def lengths_over_base(fmt: Format) -> bool:
    """Whether a format's lengths of DoRA are divided by the base weight's norms, as ComfyUI does.

    Elsewhere they are divided by those of the base weight and the delta together.
    """
    return fmt == "comfy"
