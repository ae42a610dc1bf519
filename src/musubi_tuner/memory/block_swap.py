"""Transformer blocks whose frozen weights live on the host and visit the device for their turn.

A few device buffers go round: while one block computes, the weights of the next are copied into another buffer.
Nothing is copied back, since frozen weights do not change. All of it happens in one step in front of a block's own
forward, so it works alike in the forward pass, in recomputation (checkpointing wraps around it) and without gradients.
A block that is not recomputed needs its weights once more in the backward pass: what autograd keeps of it is then the
place of a weight instead of the weight, and looking it up brings the block back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .block_layout import FrozenTensors
from .transfer import PinnedBudget, Transfer, make_transfer

logger = logging.getLogger(__name__)

NUM_SLOTS = 2


@dataclass
class _Slot:
    """One buffer on the device, as large as the largest block."""

    flat: Tensor
    holds: int | None = None  # which of the swapped blocks
    arriving: bool = False  # nothing has waited for its copy yet
    ticket: Any = None  # of that copy
    views: dict[int, list[Tensor]] = field(default_factory=dict)  # by swapped block
    used: int = 0  # when last


@dataclass(frozen=True)
class _Place:
    """What autograd keeps of a weight."""

    offset: int  # bytes in the slot
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class BlockSwap:
    """Brings swapped blocks to the device, in the order in which they are asked for, and the next one ahead of time.

    Blocks are numbered among the swapped ones.

    Args:
        blocks: their frozen tensors.
        device: where they compute.
        num_slots: swapped blocks on the device at a time; two let one be copied while the other computes.
    """

    def __init__(
        self,
        blocks: Sequence[FrozenTensors],
        *,
        device: torch.device,
        transfer: Transfer,
        num_slots: int = NUM_SLOTS,
    ) -> None:
        self._blocks = blocks
        self._device = device
        self._transfer = transfer
        self.num_slots = min(num_slots, len(blocks))
        self._slots: list[_Slot] = []
        self._current: _Slot | None = None
        self._clock = 0

    @property
    def resident(self) -> frozenset[int]:
        """The swapped blocks whose weights are on the device or on their way."""
        return frozenset(slot.holds for slot in self._slots if slot.holds is not None)

    @property
    def host_bytes(self) -> int:
        """Memory of the weights at home."""
        return sum(block.nbytes for block in self._blocks)

    @property
    def device_bytes(self) -> int:
        """Memory of the buffers on the device."""
        return sum(slot.flat.numel() for slot in self._slots)

    def acquire(self, index: int) -> None:
        """Make a block ready to compute, and start to fetch the one that will follow."""
        if self._current is not None and self._current.holds == index:
            return
        before = None if self._current is None else self._current.holds
        self._current = self._fetch(index)
        if self._current.arriving:
            self._transfer.wait(self._current.ticket)
            self._current.arriving = False
        self._bind(self._current)
        following = self._following(index, before)
        if following is not None and self.num_slots > 1:
            self._fetch(following)

    def release(self) -> None:
        """Give up the memory on the device; the next block asked for takes it again."""
        self._transfer.finish()
        for block in self._blocks:
            block.go_home()
        self._slots, self._current = [], None

    def _following(self, index: int, before: int | None) -> int | None:
        """The block after ``index``: upwards in a forward pass, downwards in a backward pass."""
        last = len(self._blocks) - 1
        backwards = before is not None and 0 < index < before
        if backwards:
            return index - 1
        if index < last:
            return index + 1
        # The end of a forward pass. Training turns round, and finds the last two where they are; else it begins anew.
        return None if torch.is_grad_enabled() else 0

    def _fetch(self, index: int) -> _Slot:
        """The slot of a block, after starting its copy where it has none."""
        self._clock += 1
        for slot in self._slots:
            if slot.holds == index:
                slot.used = self._clock
                return slot
        slot = self._free_slot()
        if slot.holds is not None:
            self._blocks[slot.holds].go_home()
        block = self._blocks[index]
        # It waits for all that is queued: whatever computed with the slot's old weights is done by then.
        slot.ticket = self._transfer.copy(slot.flat[: block.nbytes], block.home)
        slot.holds, slot.used, slot.arriving = index, self._clock, True
        return slot

    def _free_slot(self) -> _Slot:
        """A new slot, else the one that was used longest ago."""
        if len(self._slots) < self.num_slots:
            nbytes = max(block.nbytes for block in self._blocks)
            self._slots.append(_Slot(torch.empty(nbytes, dtype=torch.uint8, device=self._device)))
            return self._slots[-1]
        return min((s for s in self._slots if s is not self._current or self.num_slots == 1), key=lambda s: s.used)

    def _bind(self, slot: _Slot) -> None:
        if slot.holds not in slot.views:
            slot.views[slot.holds] = self._blocks[slot.holds].views(slot.flat)
        self._blocks[slot.holds].bind(slot.views[slot.holds])

    # --- what autograd keeps ---

    def pack(self, tensor: Tensor) -> Tensor | _Place:
        """A tensor that autograd wants to keep; where it is a weight of the current block, its place."""
        slot = self._current
        if tensor.device != slot.flat.device or _storage(tensor) != _storage(slot.flat):
            return tensor
        offset = tensor.storage_offset() * tensor.element_size()
        return _Place(offset, tensor.shape, tensor.stride(), tensor.dtype)

    def unpack(self, index: int, kept: Tensor | _Place) -> Tensor:
        """What :meth:`pack` made of a tensor of block ``index``; the block is ready to compute after that."""
        self.acquire(index)
        if not isinstance(kept, _Place):
            return kept
        typed = self._current.flat[kept.offset : kept.offset + _span(kept)].view(kept.dtype)
        return typed.as_strided(kept.shape, kept.stride, typed.storage_offset())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _span(place: _Place) -> int:
    """Bytes from the first to the last element."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(place.shape, place.stride, strict=True))
    return elements * place.dtype.itemsize


def swapped_positions(num_blocks: int, count: int) -> list[int]:
    """Which blocks are swapped: evenly spread, so that those between give the copies time.

    Raises:
        ValueError: not 0 <= count < num_blocks.
    """
    if not 0 <= count < num_blocks:
        raise ValueError(f"{count} of {num_blocks} blocks cannot be swapped")
    return [(2 * i + 1) * num_blocks // (2 * count) for i in range(count)]


def swap_blocks(
    blocks: Sequence[nn.Module],
    count: int,
    *,
    device: torch.device,
    recomputed: Collection[int] = (),
    pinned: PinnedBudget | None = None,
    transfer: Transfer | None = None,
) -> BlockSwap:
    """Let ``count`` of the blocks live on the host. To be called before checkpointing wraps ``block.forward``.

    Args:
        blocks: all blocks of the model. Those to be swapped may be anywhere; the others have to be on ``device``.
        recomputed: positions of the blocks that checkpointing will wrap.
        pinned: lock their memory as far as this allows; ``None`` for not at all.
        transfer: by default the device's own.
    """
    frozen = []
    for position in swapped_positions(len(blocks), count):
        frozen.append(FrozenTensors(blocks[position], copy_to=torch.device("cpu")))
        if pinned is not None and not pinned.pin(frozen[-1].home):
            logger.debug("block %d stays in pageable memory", position)
    swap = BlockSwap(frozen, device=device, transfer=transfer or make_transfer(device))
    for index, position in enumerate(swapped_positions(len(blocks), count)):
        block = blocks[position]
        block.forward = _on_device(block.forward, swap, index, keeps_weights=position not in recomputed)
        block._apply = _stays(block, swap, device)
    return swap


def _on_device(forward: Callable[..., Any], swap: BlockSwap, index: int, *, keeps_weights: bool) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        swap.acquire(index)
        if not (keeps_weights and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        # Not around a recomputed block: checkpointing has to see what autograd would keep.
        with torch.autograd.graph.saved_tensors_hooks(swap.pack, lambda kept: swap.unpack(index, kept)):
            return forward(*args, **kwargs)

    return run


def _stays(block: nn.Module, swap: BlockSwap, device: torch.device) -> Callable[..., nn.Module]:
    """``Module.to`` of the model passes a swapped block by; leaving the device frees the buffers there."""

    def apply(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        here = torch.empty(0, device=device)
        moved = fn(here)
        if moved.dtype != here.dtype:
            raise RuntimeError("a model whose blocks are swapped cannot be cast to another dtype")
        if moved.device != here.device:
            swap.release()
        return block

    return apply
