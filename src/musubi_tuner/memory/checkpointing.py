"""Gradient checkpointing, attached to blocks from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(blocks: Iterable[nn.Module], *, preserve_rng_state: bool = False) -> None:
    """Recompute each block's activations in the backward pass instead of keeping them.

    Only what enters a block is kept: the hidden states, and by reference the conditioning that all blocks share.
    ``preserve_rng_state`` is needed only when something inside a block draws random numbers (dropout).
    Wraps ``block.forward``, so that hooks on the block itself still fire once per forward pass.
    """
    for block in blocks:
        block.forward = _recomputed(block.forward, preserve_rng_state)


def _recomputed(forward: Callable[..., Any], preserve_rng_state: bool) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Non-reentrant: the first block's inputs need no gradient, only the LoRA inside it does.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state, **kwargs)

    return run
