"""Copies between host and device that run beside the computation, behind one interface for GPU and CPU.

What uses it (block swap, offloaded activations) is the same code on both: on a GPU copies are queued on a stream of
their own, on a CPU they happen at once.
"""

from __future__ import annotations

import logging
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class Transfer(Protocol):
    """Starts copies and waits for them.

    A copy may begin once everything is done that was queued on the current stream when it was started; what is queued
    after :meth:`wait` sees the copy. Copies of one engine happen in the order in which they were started.
    """

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Start copying; returns what :meth:`wait` takes."""

    def wait(self, ticket: Any) -> None:
        """Let the computation wait for a copy."""

    def host_buffer(self, nbytes: int) -> Tensor:
        """Flat uint8 memory on the host that copies can reach without a detour."""

    def finish(self) -> None:
        """Return when every copy is done."""


class DirectTransfer:
    """For models on the CPU: a copy is done when it returns."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def wait(self, ticket: None) -> None:
        pass

    def host_buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def finish(self) -> None:
        pass


class StreamTransfer:
    """For CUDA: copies on a side stream.

    From pageable memory the driver would copy while the host waits; a thread copies such sources into one of two
    pinned buffers first, so that the host can go on queueing work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._worker: ThreadPoolExecutor | None = None
        self._staging: list[Tensor] = []
        self._staged: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def copy(self, target: Tensor, source: Tensor) -> Future[torch.cuda.Event] | torch.cuda.Event:
        # Taken before the side stream becomes the current one: the copy has to wait for the computation.
        ready = torch.cuda.current_stream(self._device).record_event()
        for tensor in (target, source):
            if tensor.is_cuda:
                tensor.record_stream(self._stream)
        pageable = source.device.type == "cpu" and not source.is_pinned()
        if not pageable and self._worker is None:
            return self._queue(target, source, ready)
        # Once there is a worker all copies go through it, so that they keep their order.
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="block-swap")
        return self._worker.submit(self._copy_in_thread, target, source, ready, pageable)

    def wait(self, ticket: Future[torch.cuda.Event] | torch.cuda.Event) -> None:
        done = ticket.result() if isinstance(ticket, Future) else ticket
        torch.cuda.current_stream(self._device).wait_event(done)

    def host_buffer(self, nbytes: int) -> Tensor:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:  # the system's limit of locked memory
            logger.warning("%d bytes of memory could not be pinned (%s); copies will be slower", nbytes, error)
            return torch.empty(nbytes, dtype=torch.uint8)

    def finish(self) -> None:
        if self._worker is not None:
            self._worker.submit(int).result()
        self._stream.synchronize()

    def _queue(self, target: Tensor, source: Tensor, ready: torch.cuda.Event) -> torch.cuda.Event:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def _copy_in_thread(
        self, target: Tensor, source: Tensor, ready: torch.cuda.Event, pageable: bool
    ) -> torch.cuda.Event:
        if not pageable:
            return self._queue(target, source, ready)
        turn = self._turn = 1 - self._turn
        if self._staged[turn] is not None:
            self._staged[turn].synchronize()  # the buffer has left for the device
        staged = self._stage(turn, source)
        self._staged[turn] = self._queue(target, staged, ready)
        return self._staged[turn]

    def _stage(self, turn: int, source: Tensor) -> Tensor:
        flat = source.view(-1).view(torch.uint8)
        if not self._staging or self._staging[turn].numel() < flat.numel():
            self._stream.synchronize()
            self._staging = [self.host_buffer(flat.numel()) for _ in range(2)]
        return self._staging[turn][: flat.numel()].copy_(flat).view(source.dtype).view(source.shape)


def make_transfer(device: torch.device) -> Transfer:
    """The engine for a device."""
    return StreamTransfer(device) if device.type == "cuda" else DirectTransfer()


class PinnedBudget:
    """Locks memory of tensors in place, up to a number of bytes, so that a GPU can read it directly.

    The memory is registered where it lies: PyTorch's allocator of pinned memory rounds each block up to a power of two.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def pin(self, tensor: Tensor) -> bool:
        """Lock a flat CPU tensor for as long as it lives; ``False`` where the budget or the system says no."""
        nbytes = tensor.numel() * tensor.element_size()
        if self.used + nbytes > self.limit:
            return False
        if int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), nbytes, 0)) != 0:
            self.limit = self.used  # the next one would fail as well
            return False
        self.used += nbytes
        weakref.finalize(tensor, torch.cuda.cudart().cudaHostUnregister, tensor.data_ptr()).atexit = False
        return True
