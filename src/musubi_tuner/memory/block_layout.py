"""A block's frozen tensors as one flat piece of memory, so that one copy moves them all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALIGNMENT = 256  # bytes; what kernels expect of a tensor's start


@dataclass(frozen=True)
class Piece:
    """Where one tensor lies in the flat memory."""

    offset: int  # bytes
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def view(self, flat: Tensor) -> Tensor:
        """The tensor in ``flat`` (uint8)."""
        part = flat[self.offset : self.offset + self.nbytes].view(self.dtype)
        return part.as_strided(self.shape, self.stride, part.storage_offset())


class FrozenTensors:
    """The parameters without gradient and the buffers of a block, of any dtype, and their home in host memory.

    The block's modules keep their parameter objects; :meth:`bind` lets these look at another memory. Parameters that
    are trained stay where they are.

    Attributes:
        home: flat uint8 on the host: the values, which nothing ever writes.
    """

    def __init__(self, block: nn.Module, *, copy_to: torch.device) -> None:
        self._owners: list[tuple[nn.Module, str, int]] = []  # module, name, position in _pieces
        tensors: list[Tensor] = []
        positions: dict[int, int] = {}
        for module, name, tensor in _frozen(block):
            position = positions.setdefault(id(tensor), len(tensors))
            if position == len(tensors):
                tensors.append(tensor)
            self._owners.append((module, name, position))
        self._pieces = _lay_out(tensors)
        self.nbytes = max((p.offset + p.nbytes for p in self._pieces), default=0)
        self.home = torch.empty(self.nbytes, dtype=torch.uint8, device=copy_to)
        for piece, tensor in zip(self._pieces, tensors, strict=True):
            piece.view(self.home).copy_(tensor.detach())
        self._at_home = self.views(self.home)
        self.bind(self._at_home)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The tensors in another piece of memory with the values of ``home``."""
        return [piece.view(flat) for piece in self._pieces]

    def bind(self, views: list[Tensor]) -> None:
        """Let the modules compute with ``views``."""
        for module, name, position in self._owners:
            if name in module._parameters:
                module._parameters[name].data = views[position]
            else:
                module._buffers[name] = views[position]

    def go_home(self) -> None:
        """Let the modules show the values in host memory: for whoever looks, not for computing."""
        self.bind(self._at_home)


def _frozen(block: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.requires_grad:
                yield module, name, parameter
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield module, name, buffer


def _lay_out(tensors: list[Tensor]) -> list[Piece]:
    pieces, offset = [], 0
    for tensor in tensors:
        # Dense tensors keep their order of dimensions (FP8 kernels ask for columns), others become contiguous.
        stride = torch.empty_like(tensor, device="meta").stride()
        pieces.append(Piece(offset, tensor.shape, stride, tensor.dtype))
        offset += -(-pieces[-1].nbytes // ALIGNMENT) * ALIGNMENT
    return pieces
