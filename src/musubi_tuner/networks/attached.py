"""Taking over the forward of a layer that stays where it is in the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

START_BUFFERS = ("start_down", "start_up")
"""Where training starts, if that counts as part of the base: made with its weights, and so absent before."""


class Switch:
    """Shared by all modules of a network: whether their deltas are added at all, and whether with a strength of one.

    Bools cost nothing when off and give a compiled block few variants.
    """

    def __init__(self) -> None:
        self.on = True
        self.as_trained = True


class AttachedLinear(nn.Module, ABC):
    """Computes instead of a Linear layer, of which it knows how it computed before.

    Attributes:
        rank: of its factors; 0 where they have none.
        alpha_value: what the change is scaled by is ``alpha / rank``.
        multiplier: strength of the change.
        dropout, rank_dropout, module_dropout: probabilities.
    """

    rank: int
    alpha_value: float
    multiplier: float
    dropout: float
    rank_dropout: float
    module_dropout: float
    start_down: Tensor | None  # where training starts, if that counts as part of the base

    def __init__(self, switch: Switch | None = None) -> None:
        super().__init__()
        self.switch = switch or Switch()
        self._base: nn.Module | None = None
        self._base_forward: Callable[[Tensor], Tensor] | None = None

    def attach(self, base: nn.Module) -> None:
        """Take over ``base.forward``."""
        # Not through setattr: the base must not become a submodule of the network.
        self.__dict__["_base"] = base
        self._base_forward = base.forward
        base.forward = self.forward

    def detach(self) -> None:
        """Give ``base.forward`` back. Of several networks on a model the last attached leaves first."""
        if self._base is not None:
            if self._base.forward != self.forward:
                raise RuntimeError("another network was attached later and has to be detached first")
            # The class's own forward shows again unless the base had been patched before.
            self._base.forward = self._base_forward
            if self._is_own(self._base):
                del self._base.forward
            self.__dict__["_base"] = self._base_forward = None

    def _is_own(self, base: nn.Module) -> bool:
        """Whether what was patched is the layer itself, not the network below."""
        return getattr(self._base_forward, "__func__", None) is type(base).forward

    @property
    def stored_size(self) -> tuple[int, float]:
        """Rank and alpha of the layer in a file."""
        return self.rank, self.alpha_value

    @abstractmethod
    def set_multiplier(self, value: float) -> None:
        """Scale the change by ``value`` on top of alpha / r."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}alpha" in state_dict:
            self.set_alpha(float(state_dict[f"{prefix}alpha"]))

    @abstractmethod
    def set_alpha(self, value: float) -> None:
        """Scale the change by another alpha."""
