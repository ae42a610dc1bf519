"""Run a video VAE over overlapping tiles and cross-fade the results.

Our own loops instead of those of diffusers (0.42), for two reasons. Its temporal decoding drops the last
instead of the first frame of every later tile, so seams repeat a frame and later tiles lag by one. Its spatial
tiles may end in one of a single latent cell, which the reflecting convolutions of the LTX-2.0 decoder cannot
pad. Here the last tile moves back to be as large as the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from musubi_tuner.common.errors import UserError

SPACE, TIME = 32, 8  # pixels a latent cell, frames a latent frame

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tiling:
    """Tile sizes in pixels and pixel frames; a size of 0 leaves that direction whole.

    Raises:
        UserError: sizes that do not fit the VAE's strides of 32 pixels and 8 frames.
    """

    spatial_tile: int = 0
    spatial_overlap: int = 64
    temporal_tile: int = 0
    temporal_overlap: int = 24

    def __post_init__(self) -> None:
        _check("spatial", self.spatial_tile, self.spatial_overlap, stride=SPACE, least=2 * SPACE)
        _check("temporal", self.temporal_tile, self.temporal_overlap, stride=TIME, least=2 * TIME)


def _check(name: str, tile: int, overlap: int, *, stride: int, least: int) -> None:
    if tile == 0:
        return
    if tile < least or tile % stride:
        raise UserError(f"VAE {name} tile size {tile}: expected a multiple of {stride}, at least {least} (0 = whole)")
    if not 0 <= overlap < tile or overlap % stride:
        raise UserError(
            f"VAE {name} tile overlap {overlap}: expected a multiple of {stride} below the tile size {tile}"
        )


def tiled_encode(network: Network, pixels: Tensor, tiling: Tiling) -> Tensor:
    """Apply ``network``, [B, 3, F, H, W] to [B, C, (F-1)/8+1, H/32, W/32], in tiles."""
    return _tiled(network, pixels, tiling, encode=True)


def tiled_decode(network: Network, latents: Tensor, tiling: Tiling) -> Tensor:
    """Apply ``network``, [B, C, f, h, w] to [B, 3, 8(f-1)+1, 32h, 32w], in tiles."""
    return _tiled(network, latents, tiling, encode=False)


def _tiled(network: Network, x: Tensor, tiling: Tiling, *, encode: bool) -> Tensor:
    """Time outermost, then rows, then columns."""
    if tiling.spatial_tile:
        tile = tiling.spatial_tile // SPACE
        step = tile - tiling.spatial_overlap // SPACE
        for dim in (4, 3):
            network = partial(_over_space, network, dim=dim, tile=tile, step=step, encode=encode)
    if tiling.temporal_tile:
        tile = tiling.temporal_tile // TIME
        step = tile - tiling.temporal_overlap // TIME
        network = partial(_over_time, network, tile=tile, step=step, encode=encode)
    return network(x)


def _over_space(network: Network, x: Tensor, *, dim: int, tile: int, step: int, encode: bool) -> Tensor:
    """``tile`` and ``step`` in latent cells."""
    unit_in, unit_out = (SPACE, 1) if encode else (1, SPACE)
    count = x.shape[dim] // unit_in
    starts = _starts(count, tile, step)
    if len(starts) == 1:
        return network(x)
    pieces = ((i * unit_out, network(x.narrow(dim, i * unit_in, tile * unit_in))) for i in starts)
    return _join(pieces, dim=dim, total=count * unit_out)


def _over_time(network: Network, x: Tensor, *, tile: int, step: int, encode: bool) -> Tensor:
    """``tile`` and ``step`` in latent frames.

    A tile reads one latent frame more. To the network its first latent frame is a single pixel frame, which is
    right at the beginning of the clip only; for later tiles it serves as history and is dropped, so that the
    tile from latent i on begins at latent i + 1, which is pixel frame 8i + 1.
    """
    unit_in, unit_out = (TIME, 1) if encode else (1, TIME)
    count = (x.shape[2] - 1) // unit_in + 1
    starts = _starts(count, tile + 1, step)
    if len(starts) == 1:
        return network(x)

    def pieces() -> Iterable[tuple[int, Tensor]]:
        for i in starts:
            piece = network(x.narrow(2, i * unit_in, tile * unit_in + 1))
            yield (0, piece) if i == 0 else (i * unit_out + 1, piece[:, :, 1:])

    return _join(pieces(), dim=2, total=(count - 1) * unit_out + 1)


def _starts(count: int, tile: int, step: int) -> list[int]:
    """Where tiles begin so that they cover ``count``; the last one ends there."""
    return [*range(0, count - tile, step), count - tile] if count > tile else [0]


def _join(pieces: Iterable[tuple[int, Tensor]], *, dim: int, total: int) -> Tensor:
    """Lay pieces along ``dim``, each at its start, in order; what two share is faded linearly."""
    result: Tensor | None = None
    filled = 0
    for start, piece in pieces:
        if result is None:
            shape = list(piece.shape)
            shape[dim] = total
            result = piece.new_empty(shape)
        if (shared := filled - start) > 0:
            old = torch.linspace(1, 0, shared + 2, device=piece.device)[1:-1].to(piece.dtype)
            old = old.view(-1, *(1,) * (piece.ndim - 1 - dim))
            piece.narrow(dim, 0, shared).lerp_(result.narrow(dim, start, shared), old)
        result.narrow(dim, start, piece.shape[dim]).copy_(piece)
        filled = start + piece.shape[dim]
    assert result is not None
    assert filled == total
    return result
