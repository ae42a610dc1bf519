"""Quantised weights of any format as two tensors, and the methods that make them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .fp8 import BLOCK_SIZE, dequantize_fp8, quantize_fp8
from .int8 import dequantize_int8, quantize_int8
from .nf4 import dequantize_nf4, quantize_nf4


@dataclass(frozen=True)
class Packed:
    """A quantised weight [N, K]. What the tensors mean follows from their dtypes and shapes alone.

    Attributes:
        weight: FP8 or int8 [N, K], or two NF4 codes a byte [N, K / 2] uint8.
        scale: fp32 [1 or N, G]; K / G values of a row share one.
        input_scale: fp32 [K]: inputs are divided by it, since the weight's columns were multiplied; ``None`` for ones.
    """

    weight: Tensor
    scale: Tensor
    input_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight that it stands for."""
        n, columns = self.weight.shape
        return n, 2 * columns if is_nf4(self.weight) else columns

    def to(self, device: torch.device | str) -> Packed:
        """The same on another device."""
        scale = None if self.input_scale is None else self.input_scale.to(device)
        return Packed(self.weight.to(device), self.scale.to(device), scale)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[N, K]: the weight that it stands for."""
        weight = dequantize(self.weight, self.scale, dtype)
        return weight if self.input_scale is None else weight / self.input_scale.to(dtype)


class Method(Protocol):
    """A way to quantise."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape can be quantised so."""
        ...

    def quantize(self, weight: Tensor) -> Packed:
        """``weight`` [N, K] in any floating dtype, on any device."""
        ...


@dataclass(frozen=True)
class Nf4:
    """NF4 with a scale for each ``block_size`` values of a row."""

    block_size: int = 32

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and shape[1] % self.block_size == 0

    def quantize(self, weight: Tensor) -> Packed:
        return Packed(*quantize_nf4(weight, self.block_size))


@dataclass(frozen=True)
class Fp8:
    """FP8 with a scale for each ``block_size`` values of a row, or for the row where it has no whole number of blocks.

    ``None``: always for the row.
    """

    block_size: int | None = BLOCK_SIZE

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2

    def blocks_of(self, k: int) -> int:
        """Scales of a row of ``k`` values."""
        return 1 if self.block_size is None or k % self.block_size else k // self.block_size

    def quantize(self, weight: Tensor) -> Packed:
        n, k = weight.shape
        return Packed(*quantize_fp8(weight, (n, self.blocks_of(k))))


@dataclass(frozen=True)
class Int8:
    """Int8 with a scale for each ``block_size`` values of a row, or for a row that is no whole number of them."""

    block_size: int = BLOCK_SIZE

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2

    def blocks_of(self, k: int) -> int:
        """Scales of a row of ``k`` values."""
        return 1 if k % self.block_size else k // self.block_size

    def quantize(self, weight: Tensor) -> Packed:
        return Packed(*quantize_int8(weight, self.blocks_of(weight.shape[1])))


def packed_bytes(method: Nf4 | Fp8 | Int8, shape: tuple[int, int]) -> int:
    """Bytes of a weight [N, K] that ``method`` has quantised, scales included."""
    n, k = shape
    if isinstance(method, Nf4):
        return n * k // 2 + 4 * n * (k // method.block_size)
    return n * k + 4 * n * method.blocks_of(k)


def is_nf4(weight: Tensor) -> bool:
    """Whether a packed weight is NF4; else it is FP8 or int8."""
    return weight.dtype == torch.uint8


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The two tensors of a :class:`Packed` to the weight [N, K]."""
    if is_nf4(weight):
        return dequantize_nf4(weight, scale, dtype)
    return (dequantize_int8 if weight.dtype == torch.int8 else dequantize_fp8)(weight, scale, dtype)
