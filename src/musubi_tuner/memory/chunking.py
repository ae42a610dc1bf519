"""Feed-forward layers and attention computed part by part, attached from outside.

Each part is checkpointed by itself: autograd would otherwise keep what every part computed, and splitting would save
nothing. So the backward pass computes these layers once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FeedForwardTarget = Literal["all", "video", "audio"]
AttentionTarget = Literal["all", "self", "cross", "text_cross", "av_cross", "video", "audio"]
SplitMode = Literal["batch", "query"]
AttentionFunction = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]

DEFAULT_QUERIES = 1024

_FEED_FORWARD = {"video": ("ff",), "audio": ("audio_ff",), "all": ("ff", "audio_ff")}
_TEXT_CROSS = ("attn2", "audio_attn2")
_AV_CROSS = ("audio_to_video_attn", "video_to_audio_attn")
_ATTENTION = {
    "self": ("attn1", "audio_attn1"),
    "text_cross": _TEXT_CROSS,
    "av_cross": _AV_CROSS,
    "cross": (*_TEXT_CROSS, *_AV_CROSS),
    "video": ("attn1", "attn2"),
    "audio": ("audio_attn1", "audio_attn2"),
    "all": ("attn1", "audio_attn1", *_TEXT_CROSS, *_AV_CROSS),
}


def chunk_feed_forward(
    blocks: Iterable[nn.Module], target: FeedForwardTarget, size: int, *, preserve_rng_state: bool = False
) -> None:
    """Let feed-forward layers work on ``size`` tokens at a time. ``preserve_rng_state`` as in checkpointing."""
    for layer in _named(blocks, _FEED_FORWARD[target]):
        layer.forward = _by_tokens(layer.forward, size, preserve_rng_state)


def split_attention(
    blocks: Iterable[nn.Module], target: AttentionTarget, mode: SplitMode = "batch", size: int = DEFAULT_QUERIES
) -> None:
    """Let attention work on one sample at a time, or on ``size`` queries against all keys. After choosing a kernel."""
    for layer in _named(blocks, _ATTENTION[target]):
        kernel = layer.attention_function
        layer.attention_function = _by_sample(kernel) if mode == "batch" else _by_query(kernel, size)


def _named(blocks: Iterable[nn.Module], names: tuple[str, ...]) -> list[nn.Module]:
    """The layers of these names, in blocks that have them."""
    return [layer for block in blocks for name, layer in block.named_children() if name in names]


def _by_tokens(forward: Callable[[Tensor], Tensor], size: int, preserve_rng_state: bool) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        if x.shape[1] <= size:
            return forward(x)
        parts = [_part(forward, part, preserve_rng_state=preserve_rng_state) for part in x.split(size, dim=1)]
        return torch.cat(parts, dim=1)  # [B, N, D]

    return run


def _by_sample(kernel: AttentionFunction) -> AttentionFunction:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if len(q) == 1:
            return kernel(q, k, v, mask)
        masks = [None] * len(q) if mask is None else mask.expand(len(q), -1, -1, -1).split(1)
        samples = zip(q.split(1), k.split(1), v.split(1), masks, strict=True)
        return torch.cat([_part(kernel, *sample) for sample in samples])

    return run


def _by_query(kernel: AttentionFunction, size: int) -> AttentionFunction:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if q.shape[1] <= size:
            return kernel(q, k, v, mask)
        queries = q.split(size, dim=1)
        masks = [mask] * len(queries) if mask is None or mask.shape[2] == 1 else mask.split(size, dim=2)
        return torch.cat([_part(kernel, part, k, v, m) for part, m in zip(queries, masks, strict=True)], dim=1)

    return run


def _part(function: Callable[..., Tensor], *args: Tensor | None, preserve_rng_state: bool = False) -> Tensor:
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)
