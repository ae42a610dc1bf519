"""FP8 weights: e4m3 numbers times a scale for the tensor, for each output channel or for each block of a row.

The largest magnitude that shares a scale becomes 448, the largest number of e4m3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import row_chunks

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
BLOCK_SIZE = 64
_LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
_LEAST = 1e-8  # scale of zeros


def quantize_fp8(weight: Tensor, num_scales: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """``weight`` [N, K] to e4m3 [N, K] and scales [1 or N, G] fp32.

    Args:
        weight: any floating dtype.
        num_scales: the scales' shape: (1, 1) for the tensor, (N, 1) for its rows, (N, G) for blocks of K / G.
    """
    n, k = weight.shape
    quantized = torch.empty(n, k, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty(num_scales, dtype=torch.float32, device=weight.device)
    if num_scales[0] == 1:
        scale.copy_(_scale_for(weight.abs().amax()))
    for rows in row_chunks(n, k):
        blocks = weight[rows].float().view(-1, num_scales[1], k // num_scales[1])
        if num_scales[0] == 1:
            own = scale
        else:
            own = scale[rows] = _scale_for(blocks.abs().amax(dim=-1))
        shares = (blocks / own.unsqueeze(-1)).clamp_(-_LARGEST, _LARGEST)
        # Copying bytes: PyTorch copies fp8 on every device, but not into a slice on all of them.
        quantized.view(torch.uint8)[rows] = shares.to(torch.float8_e4m3fn).view(-1, k).view(torch.uint8)
    return quantized, scale


def dequantize_fp8(quantized: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """FP8 [N, K] and scales [1 or N, G] fp32 to the weight [N, K]; the product is rounded once, from fp32."""
    n, k = quantized.shape
    # An fp8 number is exact in every wider dtype, so the cast needs no fp32 copy.
    if quantized.is_cuda or torch.compiler.is_compiling():
        return _scaled(quantized.to(dtype), scale)
    weight = torch.empty(n, k, dtype=dtype, device=quantized.device)
    for rows in row_chunks(n, k):  # mixed dtypes are computed through copies on a CPU
        weight[rows] = _scaled(quantized[rows].to(dtype), scale if scale.shape[0] == 1 else scale[rows])
    return weight


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    return weight.view(weight.shape[0], scale.shape[1], -1).mul_(scale.unsqueeze(-1)).view_as(weight)


def _scale_for(largest: Tensor) -> Tensor:
    return (largest.float() / _LARGEST).clamp(min=_LEAST)
