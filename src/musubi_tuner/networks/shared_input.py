"""Projections of an attention that read the same input, adapted together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .lora import LoRALinear, adapt_together

PROJECTIONS = ("to_q", "to_k", "to_v")


class SharedProjections:
    """Stands in for ``attention.project``: of the layers with one input, the down factors make one product.

    Args:
        attention: has ``to_q``, ``to_k``, ``to_v`` and ``project(x, context)`` to their outputs.
        adapted: the network's modules by those names, already attached.
    """

    def __init__(self, attention: nn.Module, adapted: Mapping[str, LoRALinear]) -> None:
        self._attention = attention
        self._adapted = dict(adapted)
        self._switch = next(iter(self._adapted.values())).switch
        self._below: Any = None

    def attach(self) -> None:
        """Take over ``attention.project``."""
        # What another network had put there is skipped: its layers are below this network's.
        self._below = vars(self._attention).get("project")
        self._attention.project = self

    def detach(self) -> None:
        """Give ``attention.project`` back."""
        del self._attention.project
        if self._below is not None:
            self._attention.project = self._below

    def __call__(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if context is x:
            return tuple(self._read(PROJECTIONS, x))
        return (*self._read(PROJECTIONS[:1], x), *self._read(PROJECTIONS[1:], context))

    def _read(self, names: Sequence[str], x: Tensor) -> list[Tensor]:
        outputs: dict[str, Tensor] = {}
        if self._switch.on:
            together = [name for name in names if name in self._adapted and not self._is_watched(name)]
            if len(together) > 1:
                products = adapt_together([self._adapted[name] for name in together], x)
                outputs = dict(zip(together, products, strict=True))
        return [outputs[name] if name in outputs else getattr(self._attention, name)(x) for name in names]

    def _is_watched(self, name: str) -> bool:
        """Whether hooks wait for the layer to be called by itself."""
        layer = getattr(self._attention, name)
        return bool(layer._forward_hooks or layer._forward_pre_hooks)


def share_inputs(transformer: nn.Module, modules: Mapping[str, LoRALinear]) -> list[SharedProjections]:
    """Attach to every attention of which a projection is adapted. ``modules``: by dotted path."""
    of_attention: dict[str, dict[str, LoRALinear]] = {}
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        if name in PROJECTIONS:
            of_attention.setdefault(parent, {})[name] = module
    shared = []
    for parent, adapted in of_attention.items():
        attention = transformer.get_submodule(parent)
        if hasattr(attention, "project"):
            shared.append(SharedProjections(attention, adapted))
            shared[-1].attach()
    return shared
