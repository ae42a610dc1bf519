"""NF4: 4-bit codes at the quantiles of a normal distribution (Dettmers et al. 2023, arXiv:2305.14314).

A weight [N, K] is cut along K into blocks. Each block is divided by its largest magnitude, and every value becomes the
index of the nearest of 16 levels. Codes and scales are those of ``bitsandbytes.functional.quantize_4bit``, bit for
bit, on every device.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .rows import row_chunks

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_LEAST = 1e-8  # divisor of a block of zeros


def quantize_nf4(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """``weight`` [N, K] to codes [N, K / 2] uint8, two a byte, the first in the high bits; absmax [N, K / block] fp32.

    K must be a multiple of ``block_size``, which must be even.
    """
    n, k = weight.shape
    packed = torch.empty(n, k // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(n, k // block_size, dtype=torch.float32, device=weight.device)
    levels = torch.tensor(LEVELS, device=weight.device)
    borders = (levels[1:] + levels[:-1]) / 2
    for rows in row_chunks(n, k):
        blocks = weight[rows].float().view(-1, k // block_size, block_size)
        absmax[rows] = blocks.abs().amax(dim=-1)
        shares = blocks / absmax[rows].clamp(min=_LEAST).unsqueeze(-1)
        codes = torch.bucketize(shares, borders, out_int32=True).to(torch.uint8).view(-1, k // 2, 2)
        packed[rows] = (codes[..., 0] << 4) | codes[..., 1]
    return packed, absmax


def dequantize_nf4(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes [N, K / 2] and absmax [N, K / block] to the weight [N, K]; the product is rounded once, from fp32."""
    if packed.is_cuda and _kernel_is_there:
        return dequantize_with_bitsandbytes(packed, absmax, dtype)
    n, k = packed.shape[0], 2 * packed.shape[1]
    if torch.compiler.is_compiling():
        return _unpacked(packed, absmax, _pairs(packed.device)).view(n, k).to(dtype)
    pairs = _cached_pairs(packed.device)
    weight = torch.empty(n, k, dtype=dtype, device=packed.device)
    for rows in row_chunks(n, k):
        weight[rows] = _unpacked(packed[rows], absmax[rows], pairs).view(-1, k)
    return weight


def dequantize_with_bitsandbytes(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """The same by one kernel of bitsandbytes, without temporaries."""
    shape = [packed.shape[0], 2 * packed.shape[1]]
    block_size = shape[1] // absmax.shape[1]
    # The kernel reads absmax as fp32 whatever its dtype says.
    absmax = absmax.to(torch.float32).contiguous().view(-1)
    flat = packed.view(-1, 1)
    return torch.ops.bitsandbytes.dequantize_4bit(flat, absmax, block_size, "nf4", shape, dtype)


def _unpacked(packed: Tensor, absmax: Tensor, pairs: Tensor) -> Tensor:
    """[n, K / 2] to [n, blocks, block size] in fp32."""
    values = torch.nn.functional.embedding(packed.int(), pairs)  # [n, K / 2, 2]
    return values.view(packed.shape[0], absmax.shape[1], -1) * absmax.unsqueeze(-1)


def _pairs(device: torch.device) -> Tensor:
    """[256, 2] fp32: the two levels that a byte stands for."""
    levels = torch.tensor(LEVELS, device=device)
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=-1)


_cached_pairs = lru_cache(maxsize=16)(_pairs)  # a compiler makes a constant of the table by itself

_kernel_is_there = False


def find_kernel() -> None:
    """Look for bitsandbytes, whose kernel then dequantises NF4 on CUDA. Importing it takes seconds."""
    global _kernel_is_there
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, RuntimeError, OSError):  # an installation without its library
        return
    _kernel_is_there = hasattr(torch.ops.bitsandbytes, "dequantize_4bit")
