"""torch.compile, attached to blocks from outside."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from musubi_tuner.common.errors import UserError
from musubi_tuner.config.memory import CompileSettings


def check_backend(settings: CompileSettings) -> None:
    """Raise UserError for a backend that this PyTorch does not have."""
    if settings.backend not in torch.compiler.list_backends(exclude_tags=()):
        known = ", ".join(("eager", "aot_eager", *torch.compiler.list_backends()))
        raise UserError(f"torch.compile has no backend {settings.backend!r} here; it has {known}")


def compile_blocks(blocks: Iterable[nn.Module], settings: CompileSettings) -> None:
    """Compile each block's ``forward``; blocks of the same structure share their graphs.

    To be called after whatever changes the layers inside and before whatever wraps the block, such as
    checkpointing: a compiled block that contains a wrapper falls back to eager mode.
    """
    torch._dynamo.config.recompile_limit = max(settings.graphs, torch._dynamo.config.recompile_limit)
    for block in blocks:
        block.forward = torch.compile(
            block.forward,
            backend=settings.backend,
            mode=settings.mode,
            dynamic=settings.dynamic,
            fullgraph=settings.fullgraph,
        )
