"""Tensors that autograd keeps, on the host instead of the device."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .transfer import Transfer

MIN_BYTES = 1 << 20
AHEAD = 2  # both streams of a block


class _HostBuffers:
    """Host memory that is used again; pinning it anew each step would take longer than copying."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._free: dict[int, list[Tensor]] = {}

    def take(self, nbytes: int) -> Tensor:
        free = self._free.get(nbytes)
        return free.pop() if free else self._transfer.host_buffer(nbytes)

    def give_back(self, buffer: Tensor) -> None:
        self._free.setdefault(buffer.numel(), []).append(buffer)


class _Offloaded:
    """A tensor on the host, and the way back."""

    def __init__(self, tensor: Tensor, transfer: Transfer, buffers: _HostBuffers, previous: _Offloaded | None) -> None:
        self._transfer = transfer
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        self._host = buffers.take(tensor.numel() * tensor.element_size())
        # Autograd lets go of this object when the graph goes; until then a second backward pass may ask again.
        weakref.finalize(self, buffers.give_back, self._host).atexit = False
        self._fetched: tuple[Tensor, Any] | None = None
        self.previous = None if previous is None else weakref.ref(previous)
        self.is_back = False
        transfer.copy(self._on_host(), tensor.contiguous())

    def fetch(self) -> None:
        """Start to copy it back."""
        if self._fetched is None:
            target = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._fetched = target, self._transfer.copy(target, self._on_host())

    def get(self) -> Tensor:
        """The tensor on its device; while it is used, the ones kept before it follow."""
        self.fetch()
        tensor, ticket = self._fetched
        self._transfer.wait(ticket)
        self._fetched, self.is_back = None, True
        self._fetch_previous()
        return tensor

    def _fetch_previous(self) -> None:
        reference, left = self.previous, AHEAD
        while reference is not None and left and (handle := reference()) is not None:
            if not handle.is_back:
                handle.fetch()
                left -= 1
            reference = handle.previous

    def _on_host(self) -> Tensor:
        return self._host.view(self._dtype).view(self._shape)


class ActivationOffload:
    """Keeps large tensors of the device on the host between the forward and the backward pass.

    Args:
        device: only its tensors are moved.
        min_bytes: smaller ones stay.
    """

    def __init__(self, device: torch.device, transfer: Transfer, *, min_bytes: int = MIN_BYTES) -> None:
        self._type = device.type
        self._transfer = transfer
        self._min_bytes = min_bytes
        self._buffers = _HostBuffers(transfer)
        self._last: weakref.ref[_Offloaded] | None = None

    def keeping(self) -> AbstractContextManager[Any]:
        """While it is open, what autograd keeps goes to the host."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | _Offloaded:
        if tensor.device.type != self._type or tensor.numel() * tensor.element_size() < self._min_bytes:
            return tensor
        previous = None if self._last is None else self._last()
        handle = _Offloaded(tensor.detach(), self._transfer, self._buffers, previous)
        self._last = weakref.ref(handle)
        return handle

    @staticmethod
    def _unpack(kept: Tensor | _Offloaded) -> Tensor:
        return kept.get() if isinstance(kept, _Offloaded) else kept
