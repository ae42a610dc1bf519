"""The one place where features are put on the transformer, in the order that keeps them correct.

1. quantised linears, put in place while loading, 2. network, 3. compile, 4. block swap (later), 5. gradient
checkpointing around the block, 6. taps on blocks (later). Model code has no branch for any of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from musubi_tuner.config.memory import CompileSettings
from musubi_tuner.memory.checkpointing import checkpoint_blocks
from musubi_tuner.memory.compilation import compile_blocks
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.ltx2.load import load_transformer
from musubi_tuner.models.ltx2.quantize import Quantization
from musubi_tuner.models.ltx2.transformer import LTX2Transformer
from musubi_tuner.networks.lora import LoRALinear
from musubi_tuner.networks.lora_ltx2 import LoRANetwork

NetworkFactory = Callable[[LTX2Transformer], LoRANetwork]


def assemble_transformer(
    checkpoint: Checkpoint,
    *,
    streams: str,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization | None = None,
    network: NetworkFactory | None = None,
    compilation: CompileSettings | None = None,
    gradient_checkpointing: bool = False,
) -> tuple[LTX2Transformer, LoRANetwork | None]:
    """Load the frozen transformer and attach what training asked for.

    ``streams`` is ``video``, ``av`` or ``audio``: which modules are built. ``quantization``: how the
    weights of its blocks are held, ``None`` for dense. ``network`` makes the network for the
    loaded transformer; it is applied here. ``compilation``: how the blocks are compiled, ``None`` for not at all.
    """
    transformer = load_transformer(checkpoint, mode=streams, dtype=dtype, device=device, quantization=quantization)
    adapter = None
    if network is not None:
        adapter = network(transformer)
        adapter.apply_to(transformer)
        adapter.to(device)
    if compilation is not None:
        compile_blocks(transformer.transformer_blocks, compilation)
    if gradient_checkpointing:
        draws = adapter is not None and any(_draws_random(m) for m in adapter.modules_by_name.values())
        checkpoint_blocks(transformer.transformer_blocks, preserve_rng_state=draws)
    return transformer, adapter


def _draws_random(module: LoRALinear) -> bool:
    return bool(module.dropout or module.rank_dropout or module.module_dropout)
