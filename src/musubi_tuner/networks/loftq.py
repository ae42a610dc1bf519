"""LoftQ start of a LoRA that is computed while the base is quantised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from musubi_tuner.common.errors import UserError
from musubi_tuner.quantization.loftq import quantize_with_factors
from musubi_tuner.quantization.packed import Method, Packed

from .lora import LoRALinear


class LoftQ:
    """Quantises weights for a loader and starts the LoRA modules of those that are adapted.

    Attributes:
        started: dotted paths of the modules that have a start.
    """

    def __init__(self, modules: Mapping[str, LoRALinear], iterations: int) -> None:
        self._modules = modules
        self._iterations = iterations
        self.started: list[str] = []

    def quantize(self, name: str, weight: Tensor, method: Method) -> Packed:
        """Alternate where the weight is adapted, else quantise it plainly."""
        path = name.removesuffix(".weight")
        module = self._modules.get(path)
        if module is None:
            return method.quantize(weight)
        check_rank(path, module.rank, weight.shape)
        packed, factors = quantize_with_factors(
            weight, method.quantize, rank=module.rank, iterations=self._iterations, name=name
        )
        module.start_from(factors.down, factors.up)
        self.started.append(path)
        return packed


def check_rank(path: str, rank: int, shape: Iterable[int]) -> None:
    """Raise UserError where a weight has no factors of this rank."""
    if rank > min(shape):
        raise UserError(f"--loftq_init: {path} has a weight of {list(shape)}, so no rank {rank}; lower --network_dim")
