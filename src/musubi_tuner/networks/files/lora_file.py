"""A LoRA in memory: canonical module names to factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .formats import Format


@dataclass(frozen=True)
class ModuleInfo:
    """Sizes of one adapted Linear (in_features K, out_features N), known from the header."""

    rank: int
    in_features: int
    out_features: int
    dtype: torch.dtype
    alpha: float | None = None  # None: the rank
    dora: bool = False

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class LoraModule:
    """Factors of one adapted Linear; its weight changes by ``alpha / r * up @ down``."""

    down: Tensor  # [r, K]
    up: Tensor  # [N, r]
    alpha: float | None = None  # None: the rank
    dora_scale: Tensor | None = None  # [N, 1] lengths of the adapted weight's rows

    @property
    def info(self) -> ModuleInfo:
        (rank, in_features), out_features = self.down.shape, self.up.shape[0]
        dtype = torch.promote_types(self.down.dtype, self.up.dtype)
        return ModuleInfo(rank, in_features, out_features, dtype, self.alpha, self.dora_scale is not None)

    def delta(self, multiplier: float = 1.0) -> Tensor:
        """The change of the weight, [N, K] in float32."""
        return (self.up.float() * (multiplier * self.info.scale)) @ self.down.float()

    def folded(self, multiplier: float = 1.0) -> LoraModule:
        """The delta times ``multiplier``, with alpha = r; ``up`` becomes float32 unless nothing changes."""
        scale = multiplier * self.info.scale
        return replace(self, up=self.up if scale == 1 else self.up.float() * scale, alpha=None)

    def to(self, dtype: torch.dtype) -> LoraModule:
        return replace(self, down=self.down.to(dtype), up=self.up.to(dtype))


@dataclass(frozen=True)
class LoraFile:
    """A LoRA in memory, under canonical names."""

    modules: Mapping[str, LoraModule]
    metadata: Mapping[str, str]
    format: Format = "native"
    source: str = "the LoRA"  # what messages call it
