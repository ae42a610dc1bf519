"""Gradient checkpointing, attached to blocks from outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .activation_offload import ActivationOffload


def checkpoint_blocks(
    blocks: Sequence[nn.Module],
    *,
    preserve_rng_state: bool = False,
    offload: ActivationOffload | None = None,
) -> None:
    """Recompute each block's activations in the backward pass instead of keeping them.

    Only what enters a block is kept: the hidden states, and by reference the conditioning that all blocks share. With
    ``offload`` the hidden states are kept on the host, but for the last block, which the backward pass asks for first.
    ``preserve_rng_state`` is needed only when something inside a block draws random numbers (dropout).
    Wraps ``block.forward``, so that hooks on the block itself still fire once per forward pass.
    """
    for position, block in enumerate(blocks):
        is_last = position == len(blocks) - 1
        keeping = offload.keeping if offload is not None and not is_last else nullcontext
        block.forward = _recomputed(block.forward, preserve_rng_state, keeping)


def checkpointed_positions(num_blocks: int, count: int | None) -> range:
    """Which blocks are checkpointed, of all or of ``count``: the first.

    So the activations that the others keep are gone before the first block is recomputed.
    """
    return range(num_blocks if count is None else min(count, num_blocks))


def _recomputed(
    forward: Callable[..., Any], preserve_rng_state: bool, keeping: Callable[[], AbstractContextManager[Any]]
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Non-reentrant: the first block's inputs need no gradient, only the LoRA inside it does. What it keeps of the
        # arguments passes through the hooks that are set around it; what is inside, through its own.
        with keeping():
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state, **kwargs)

    return run
