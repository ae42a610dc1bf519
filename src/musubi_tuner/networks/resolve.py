"""``--network_module``: a name to a module with ``create_network``."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from musubi_tuner.common.errors import UserError, did_you_mean
from musubi_tuner.config.network import LYCORIS

BUILT_IN = ("networks.lora_ltx2",)
_PACKAGE = "musubi_tuner"
_BRIDGE = f"{_PACKAGE}.networks.lycoris.bridge"
_INSTALL = 'pip install "lycoris-lora>=4.1"'


def resolve_network_module(name: str) -> ModuleType:
    """Import a network module, a module of this package (``networks.lora_ltx2``) before one of that name.

    Raises:
        UserError: there is no such module, or it has no ``create_network``.
    """
    if name == LYCORIS:
        return lycoris_bridge(f"--network_module {name}")
    for candidate in (f"{_PACKAGE}.{name}", name):
        if _exists(candidate):
            module = importlib.import_module(candidate)
            break
    else:
        raise UserError(f"--network_module {name}: no such module{_known(name)}")
    if not callable(getattr(module, "create_network", None)):
        raise UserError(f"--network_module {name}: {module.__name__} has no function create_network{_known(name)}")
    return module


def lycoris_bridge(what: str) -> ModuleType:
    """The module of LyCORIS networks; the library is imported with it.

    Raises:
        UserError: the library is missing; ``what`` needs it.
    """
    if not _exists("lycoris"):
        raise UserError(f"{what} needs the LyCORIS library, which is not installed; {_INSTALL}")
    return importlib.import_module(_BRIDGE)


def _known(name: str) -> str:
    known = (*BUILT_IN, LYCORIS)
    return f"{did_you_mean(name, known)}; known: {', '.join(known)}"


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a parent package is missing, or the name is malformed
        return False
