"""``--network_module``: a name to a module with ``create_network``."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from musubi_tuner.common.errors import UserError, did_you_mean

BUILT_IN = ("networks.lora_ltx2",)
_PACKAGE = "musubi_tuner"
_INSTALL = {"lycoris": 'pip install "lycoris-lora>=3.4"'}


def resolve_network_module(name: str) -> ModuleType:
    """Import a network module, a module of this package (``networks.lora_ltx2``) before one of that name.

    Raises:
        UserError: there is no such module, or it has no ``create_network``.
    """
    for candidate in (f"{_PACKAGE}.{name}", name):
        if _exists(candidate):
            module = importlib.import_module(candidate)
            break
    else:
        known = (*BUILT_IN, "lycoris.kohya")
        install = _INSTALL.get(name.partition(".")[0])
        hint = f"; install it: {install}" if install else did_you_mean(name, known)
        raise UserError(f"--network_module {name}: no such module{hint}; known: {', '.join(known)}")
    if not callable(getattr(module, "create_network", None)):
        raise UserError(f"--network_module {name}: {module.__name__} has no function create_network")
    return module


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a parent package is missing, or the name is malformed
        return False
