"""The one place where features are put on the transformer, in the order that keeps them correct.

1. quantised linears, put in place while loading, 2. network, attention kernel, layers computed in parts, 3. compile, 4.
block swap, 5. gradient checkpointing around the block, 6. taps on blocks (later). Model code has no branch for any of
them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from musubi_tuner.common.devices import host_memory
from musubi_tuner.common.errors import ConfigErrors, UserError
from musubi_tuner.common.tables import format_bytes
from musubi_tuner.config.memory import CompileSettings, MemorySettings
from musubi_tuner.memory.activation_offload import ActivationOffload
from musubi_tuner.memory.block_swap import BlockSwap, swap_blocks, swapped_positions
from musubi_tuner.memory.checkpointing import checkpoint_blocks, checkpointed_positions
from musubi_tuner.memory.chunking import chunk_feed_forward, split_attention
from musubi_tuner.memory.compilation import compile_blocks
from musubi_tuner.memory.transfer import PinnedBudget, make_transfer
from musubi_tuner.models.attention_backends import check_backend
from musubi_tuner.models.ltx2.load import build_transformer, load_transformer, transformer_config
from musubi_tuner.models.ltx2.quantize import quantize_plainly
from musubi_tuner.models.ltx2.transformer import LTX2Transformer
from musubi_tuner.networks.adapter_network import AdapterNetwork
from musubi_tuner.quantization.fp8_products import Fp8Products
from musubi_tuner.quantization.linear import use_products

from .base import Base
from .quantization import LoftQRequest, LoftQStart

logger = logging.getLogger(__name__)

NetworkFactory = Callable[[LTX2Transformer], AdapterNetwork]

_PLAIN = MemorySettings()

# Systems lock no more of their memory, and the rest of a run needs some.
_PINNED_SHARE = 0.5


def check_memory(settings: MemorySettings, base: Base) -> None:
    """Say before anything is loaded what cannot be done with these weights on this device.

    Raises:
        UserError: more blocks than there are, or an attention kernel that is missing or computes something else.
    """
    config = transformer_config(base.checkpoint)
    problems = []
    if settings.blocks_to_swap >= config.num_layers:
        problems.append(
            f"--blocks_to_swap {settings.blocks_to_swap}: the model has {config.num_layers} blocks, of which one stays "
            f"on the device; use 0 to {config.num_layers - 1}"
        )
    if (settings.blocks_to_checkpoint or 0) > config.num_layers:
        problems.append(
            f"--blocks_to_checkpoint {settings.blocks_to_checkpoint}: the model has {config.num_layers} blocks; "
            "use fewer, or -1 for all"
        )
    if problems:
        raise UserError(problems[0]) if len(problems) == 1 else ConfigErrors(problems, "invalid arguments")
    if settings.attention != "sdpa":
        for head_dim in {config.attention_head_dim, config.audio_attention_head_dim}:
            check_backend(settings.attention, device=base.device, dtype=base.dtype, head_dim=head_dim)


def assemble_transformer(
    base: Base,
    *,
    network: NetworkFactory | None = None,
    compilation: CompileSettings | None = None,
    memory: MemorySettings = _PLAIN,
    loftq: LoftQRequest | None = None,
) -> tuple[LTX2Transformer, AdapterNetwork | None]:
    """Load the frozen transformer and attach what training asked for.

    ``network`` makes the network for the loaded transformer; it is applied here. ``compilation``: how the blocks are
    compiled, ``None`` for not at all. ``loftq``: how the network starts, ``None`` for as it is made.
    """
    config = transformer_config(base.checkpoint)
    adapter = start = None
    if network is not None and loftq is not None:
        adapter = network(build_transformer(config, base.streams))  # names and sizes are all that it reads
        start = LoftQStart(loftq, adapter, base)
    transformer = load_transformer(
        base.checkpoint,
        mode=base.streams,
        dtype=base.dtype,
        device=base.device,
        quantization=base.quantization,
        host_blocks=swapped_positions(config.num_layers, memory.blocks_to_swap),
        quantize=quantize_plainly if start is None else start.quantize,
        edits=base.edits,
    )
    if start is not None:
        start.report()
    if base.quantization is not None and base.quantization.products is not None:
        _use_products(transformer, base.quantization.products)
    if network is not None:
        adapter = adapter or network(transformer)
        adapter.to(base.device)  # first: what it computes of the base weights (DoRA), it computes there
        adapter.apply_to(transformer)
    attach_to_blocks(
        transformer, memory, compilation, device=base.device, draws=adapter is not None and adapter.draws_random
    )
    return transformer, adapter


def attach_to_blocks(
    transformer: LTX2Transformer,
    memory: MemorySettings,
    compilation: CompileSettings | None,
    *,
    device: torch.device,
    draws: bool = False,
) -> BlockSwap | None:
    """What acts on blocks, after the network; returns what swaps them.

    ``draws``: something in the blocks draws random numbers (dropout).
    """
    blocks = transformer.transformer_blocks
    transformer.set_attention_backend(memory.attention)
    if memory.split_attention is not None:
        split_attention(blocks, memory.split_attention, memory.split_mode, memory.split_queries)
    if memory.chunk_feed_forward is not None:
        chunk_feed_forward(blocks, memory.chunk_feed_forward, memory.chunk_tokens, preserve_rng_state=draws)
    if compilation is not None:
        compile_blocks(blocks, compilation)
    recomputed = checkpointed_positions(len(blocks), memory.blocks_to_checkpoint if memory.checkpointing else 0)
    swap = _swap(transformer, memory, recomputed, device) if memory.blocks_to_swap else None
    if recomputed:
        offload = ActivationOffload(device, make_transfer(device)) if memory.offload_inputs else None
        checkpoint_blocks([blocks[i] for i in recomputed], preserve_rng_state=draws, offload=offload)
    return swap


def _use_products(transformer: LTX2Transformer, products: Fp8Products) -> None:
    count, total = use_products(transformer, products)
    logger.info("products in FP8 in %d of %d quantised layers (%s)", count, total, products.kernel)
    if count < total:
        logger.warning(
            "--fp8_w8a8: %d layers dequantise their weights: they are in blocks of a row, e5m2 or of odd sizes",
            total - count,
        )


def _swap(transformer: LTX2Transformer, memory: MemorySettings, recomputed: range, device: torch.device) -> BlockSwap:
    pinned = None
    if device.type != "cuda":
        logger.warning("--blocks_to_swap saves nothing on %s: the weights are in host memory in any case", device)
    elif memory.pin_swapped:
        pinned = PinnedBudget(int(_PINNED_SHARE * host_memory()))
    swap = swap_blocks(
        transformer.transformer_blocks, memory.blocks_to_swap, device=device, recomputed=recomputed, pinned=pinned
    )
    logger.info(
        "block swap: %d of %d blocks in host memory (%s, %s of it pinned), %d at a time on %s",
        memory.blocks_to_swap,
        len(transformer.transformer_blocks),
        format_bytes(swap.host_bytes),
        format_bytes(0 if pinned is None else pinned.used),
        swap.num_slots,
        device,
    )
    return swap
