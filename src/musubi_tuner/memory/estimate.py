"""Peak memory of training, on the device and in host memory, from sizes alone.

Weights, gradients and optimizer states are counted exactly, activations as in :mod:`.activations`. The walk through the
backward pass finds the moment at which most is held: with every block one set of activations goes and gradients come.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from musubi_tuner.config.memory import MemorySettings
from musubi_tuner.models.ltx2.config import TransformerConfig

from .activation_offload import AHEAD, MIN_BYTES
from .activations import Adapted, BatchShape, BlockActivations, Numbers, block_activations
from .block_layout import ALIGNMENT
from .block_swap import NUM_SLOTS, swapped_positions
from .checkpointing import checkpointed_positions

ACTIVATION_TOLERANCE = 0.15
"""How far the activations of a run may be off, either way."""

_GPU_RESERVE = 512 << 20  # workspaces of kernels, and memory that is free only in pieces
_CPU_RESERVE = 64 << 20
_FP32, _BF16 = 4, 2


@dataclass(frozen=True)
class Weights:
    """Bytes of the frozen weights as they are held.

    Attributes:
        blocks: of each transformer block.
        rest: of what is in front of and behind the blocks.
        largest_dense: of the weight that a quantised layer makes for a product; 0 where none is quantised.
    """

    blocks: tuple[int, ...]
    rest: int
    largest_dense: int = 0


@dataclass(frozen=True)
class Trained:
    """What is trained, by block.

    Attributes:
        blocks: the adapted layers of each, by their names in it.
        state_bytes: of the optimizer, for each value; see :func:`optimizer_state_bytes`.
        accumulating: gradients of earlier batches are held while the next is computed.
        averaged: a running average in fp32 is kept.
        corrects: they began at a correction of the base, which is kept in bf16 (LoftQ).
        gradient_parts: the optimizer steps whenever this share of all gradients is there, and frees it; 1 = at the end.
    """

    blocks: tuple[Mapping[str, Adapted], ...]
    state_bytes: float
    accumulating: bool = False
    averaged: bool = False
    corrects: bool = False
    gradient_parts: int = 1

    @property
    def params(self) -> tuple[int, ...]:
        """Trained values of each block."""
        return tuple(sum(layer.params for layer in block.values()) for block in self.blocks)


@dataclass(frozen=True)
class Request:
    """A run, as far as its memory goes.

    Attributes:
        decoders: bytes of the decoders of previews; 0 without previews.
        on_gpu: the device has memory of its own.
    """

    config: TransformerConfig
    weights: Weights
    trained: Trained
    batch: BatchShape
    numbers: Numbers
    settings: MemorySettings
    decoders: int = 0
    on_gpu: bool = True


@dataclass(frozen=True)
class Item:
    """Bytes of one thing at the peak."""

    name: str
    device: int = 0
    host: int = 0
    is_activation: bool = False


@dataclass(frozen=True)
class Estimate:
    """Where the memory goes when most of it is taken.

    Attributes:
        on_gpu: device and host are two memories; else one holds both.
    """

    items: tuple[Item, ...]
    on_gpu: bool

    @property
    def device(self) -> int:
        """Bytes on the device; without a GPU, of everything."""
        own = sum(item.device for item in self.items)
        return own if self.on_gpu else own + sum(item.host for item in self.items)

    @property
    def host(self) -> int:
        """Bytes in host memory for a GPU; 0 without one."""
        return sum(item.host for item in self.items) if self.on_gpu else 0

    @property
    def uncertainty(self) -> int:
        """Bytes by which ``device`` may be off."""
        activations = sum(item.device + item.host for item in self.items if item.is_activation)
        return round(ACTIVATION_TOLERANCE * activations)

    @property
    def needed(self) -> int:
        """Bytes that the device should have free: the upper end, and what is never of use to PyTorch."""
        return self.device + self.uncertainty + (_GPU_RESERVE if self.on_gpu else _CPU_RESERVE)


@dataclass(frozen=True)
class Moment:
    """Bytes at one place of the backward pass."""

    kept: int  # by other blocks
    block: int  # by the one that is computed
    gradients: int

    @property
    def total(self) -> int:
        return self.kept + self.block + self.gradients


def estimate(request: Request) -> Estimate:
    """The items of the peak, in the order in which a table shows them."""
    weights, trained, settings = request.weights, request.trained, request.settings
    blocks = _blocks(request)
    moment = _worst_moment(request, blocks)
    swapped = swapped_positions(len(weights.blocks), settings.blocks_to_swap)
    moved = [weights.blocks[i] for i in swapped]
    params = sum(trained.params)
    items = [
        Item("weights of the transformer", device=sum(weights.blocks) - sum(moved) + weights.rest),
        Item("weights of swapped blocks", host=sum(moved)),
        Item("buffers of swapped blocks", device=_slots(moved), host=_staging(request, moved)),
        Item("weights that are trained", device=params * request.numbers.trained),
        Item("where these began", device=params * _BF16 if trained.corrects else 0),
        Item("running average of these", device=params * _FP32 if trained.averaged else 0),
        Item("optimizer state", device=round(params * trained.state_bytes)),
        Item("gradients", device=moment.gradients),
        Item("text, positions, noise", device=_inputs(request), is_activation=True),
        Item("activations kept for the backward pass", device=moment.kept, is_activation=True),
        Item("the same in host memory", host=_offloaded(request, blocks), is_activation=True),
        Item("forward and backward pass of one block", device=moment.block, is_activation=True),
        Item("decoders of previews, between them", host=request.decoders),
    ]
    return Estimate(tuple(item for item in items if item.device or item.host), request.on_gpu)


def optimizer_state_bytes(class_name: str, *, trained: int = _FP32, momentum: bool = False) -> float:
    """Bytes that an optimizer keeps for each trained value: two moments, where nothing else is known.

    Args:
        class_name: of the optimizer.
        trained: bytes of a trained value, in whose dtype most keep their moments.
        momentum: whether SGD has one.
    """
    name = class_name.lower()
    if "adafactor" in name:
        return 0.1  # rows and columns
    if "sgd" in name:
        return trained if momentum else 0.0
    if "came" in name:
        return trained + 0.2
    moments = 1 if "lion" in name or "muon" in name else 4 if "prodigy" in name else 2
    return moments * (1.02 if "8bit" in name else trained)  # one scale for 256 values of 8 bit


def with_settings(request: Request, *, weights: Weights | None = None, **changes: object) -> Request:
    """The same run with other :class:`MemorySettings`, and maybe weights that are held otherwise."""
    settings = replace(request.settings, **changes)
    return replace(request, settings=settings, weights=weights or request.weights)


def _blocks(request: Request) -> list[BlockActivations]:
    """Of each block; blocks that are adapted alike are counted once."""
    known: dict[frozenset[tuple[str, Adapted]], BlockActivations] = {}
    found = []
    for adapted in request.trained.blocks:
        key = frozenset(adapted.items())
        if key not in known:
            known[key] = block_activations(
                request.config,
                adapted,
                request.batch,
                request.numbers,
                request.settings,
                largest_weight=request.weights.largest_dense,
            )
        found.append(known[key])
    return found


def _recomputed(request: Request) -> range:
    settings = request.settings
    count = settings.blocks_to_checkpoint if settings.checkpointing else 0
    return checkpointed_positions(len(request.weights.blocks), count)


def _worst_moment(request: Request, blocks: list[BlockActivations]) -> Moment:
    """Backwards through the blocks: what is kept by those in front, what one computes, the gradients so far."""
    trained = request.trained
    kept = [_kept(request, blocks, position) for position in range(len(blocks))]
    gradients = [count * request.numbers.trained for count in trained.params]
    most = sum(gradients) // trained.gradient_parts  # at a time
    moments = [Moment(sum(kept), _head(request), most if trained.accumulating else 0)]
    for position, block in enumerate(blocks):
        held = most if trained.accumulating else min(most, sum(gradients[position + 1 :]))
        arriving = _arriving(request, blocks, position)
        moments.append(Moment(sum(kept[:position]) + arriving, block.peak, held))
    moments.append(Moment(0, 0, most))  # the optimizer's step
    return max(moments, key=lambda moment: moment.total)


def _kept(request: Request, blocks: list[BlockActivations], position: int) -> int:
    """Bytes that a block leaves on the device between its forward and its backward pass."""
    recomputed, block = _recomputed(request), blocks[position]
    if position not in recomputed:
        return block.kept
    if request.settings.offload_inputs and position != recomputed[-1]:
        return sum(size for size in block.inputs if size < MIN_BYTES)
    return sum(block.inputs)


def _arriving(request: Request, blocks: list[BlockActivations], position: int) -> int:
    """Bytes that are on their way back while a block is recomputed: tensors of the blocks in front of it."""
    recomputed = _recomputed(request)
    if not request.settings.offload_inputs or position not in recomputed:
        return 0
    before = [size for i in reversed(recomputed[:position]) for size in blocks[i].inputs if size >= MIN_BYTES]
    return sum(before[:AHEAD])


def _offloaded(request: Request, blocks: list[BlockActivations]) -> int:
    if not request.settings.offload_inputs:
        return 0
    sizes = [size for i in _recomputed(request)[:-1] for size in blocks[i].inputs if size >= MIN_BYTES]
    # Pinned memory comes in powers of two.
    return sum(1 << (size - 1).bit_length() if request.on_gpu else size for size in sizes)


def _slots(moved: list[int]) -> int:
    return min(NUM_SLOTS, len(moved)) * _aligned(max(moved, default=0))


def _staging(request: Request, moved: list[int]) -> int:
    """Memory in front of copies: two buffers where pageable memory goes to a GPU, else one block while loading."""
    buffers = 2 if request.on_gpu and not request.settings.pin_swapped else 1 if request.on_gpu else 0
    return buffers * _aligned(max(moved, default=0))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _inputs(request: Request) -> int:
    """What all blocks read besides the hidden states."""
    config, batch, size = request.config, request.batch, request.numbers.activation
    streams = [
        (batch.video, config.width, config.in_channels, 3),
        (batch.audio, config.audio_width, config.audio_in_channels, 1),
    ]
    both = batch.video > 0 and batch.audio > 0
    total = 0
    for tokens, width, channels, axes in streams:
        if tokens == 0:
            continue
        tables = tokens * (width + (config.audio_width if both else 0)) * _FP32  # cosines and sines of half the width
        text = batch.samples * batch.text * width * size
        if config.has_caption_projection:
            text += batch.samples * batch.text * config.caption_channels * size
        tokens_and_noise = tokens * (channels * (2 * _FP32 + size) + 2 * axes * _FP32 + 3 * _FP32)
        rows = batch.samples * (config.num_modulation_rows + 6) * width * _FP32
        total += tables + text + tokens_and_noise + rows
    return total


def _head(request: Request) -> int:
    """Output layers and the loss: the last hidden states, the prediction and the errors in fp32, their gradients."""
    config, batch, size = request.config, request.batch, request.numbers.activation
    hidden = 3 * (batch.video * config.width + batch.audio * config.audio_width) * size
    values = batch.video * config.out_channels + batch.audio * config.audio_out_channels
    return hidden + 6 * values * _FP32
