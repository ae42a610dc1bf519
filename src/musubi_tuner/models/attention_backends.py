"""Kernels for scaled dot-product attention, by name.

A backend is one function ``attention(q, k, v, mask) -> out``. All tensors are [B, N, H, head_dim] (the layout
in which projections come and flash kernels read), the scale is ``head_dim ** -0.5``, nothing is causal and
``mask`` is an additive [B or 1, 1, Nq or 1, Nk], None for none. None stays None down to the kernel: a mask
of zeros would rule the flash kernels out.

Kernels of other packages read no such mask: masked calls go to PyTorch's attention. Packages are imported when a
backend is first used; :func:`check_backend` does that before anything is loaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.registry import Registry

AttentionFunction: TypeAlias = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]

ATTENTION_BACKENDS: Registry[AttentionFunction] = Registry("attention backend")

# Largest difference to PyTorch's attention in fp32, relative to the largest value: several roundings to the dtype.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


@ATTENTION_BACKENDS.register("sdpa")
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's own choice among flash, memory-efficient, cuDNN's and plain attention."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2)  # [B, Nq, H, head_dim]


# What cuDNN cannot do (some masks, head sizes and GPUs) goes to the others, in PyTorch's own order.
_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@ATTENTION_BACKENDS.register("cudnn_attn")
def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's attention, by cuDNN wherever that can."""
    with sdpa_kernel(_CUDNN_FIRST, set_priority=True):
        return attention(q, k, v, mask)


def _cudnn_alone(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return attention(q, k, v, mask)
    except RuntimeError as error:  # PyTorch speaks of kernels that are turned off
        raise RuntimeError(f"cuDNN offers none here (PyTorch: {_first_line(error).rstrip('.')})") from None


@ATTENTION_BACKENDS.register("flash_attn")
def flash_attention_2(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """FlashAttention 2 (arXiv 2307.08691)."""
    if mask is not None:
        return attention(q, k, v, mask)
    return _kernel("flash_attn", "flash_attn_func", package="flash-attn")(q, k, v)


@ATTENTION_BACKENDS.register("flash3")
def flash_attention_3(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """FlashAttention 3 (arXiv 2407.08608), for Hopper GPUs."""
    if mask is not None:
        return attention(q, k, v, mask)
    out = _kernel("flash_attn_interface", "flash_attn_func", package="flash-attn 3 (its hopper folder)")(q, k, v)
    return out[0] if isinstance(out, tuple) else out  # earlier releases return the softmax sums as well


@ATTENTION_BACKENDS.register("xformers")
def xformers_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Memory-efficient attention of xformers."""
    if mask is not None:
        return attention(q, k, v, mask)
    return _kernel("xformers.ops", "memory_efficient_attention", package="xformers")(q, k, v)


@cache
def _kernel(module: str, name: str, *, package: str) -> Callable[..., Any]:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, OSError, AttributeError) as error:  # OSError: built for another CUDA
        raise UserError(
            f"the attention kernel {module}.{name} cannot be used: {_first_line(error)}; install {package} "
            f"built for this PyTorch ({torch.__version__}), or use --sdpa"
        ) from None


# Kernels that are to show at the start that they work, though others would step in for them.
_WITHOUT_HELP: dict[str, AttentionFunction] = {"cudnn_attn": _cudnn_alone}


def check_backend(name: str, *, device: torch.device, dtype: torch.dtype, heads: int = 4, head_dim: int = 64) -> None:
    """Compare a backend with PyTorch's attention in fp32, on small inputs with and without a mask, and its gradients.

    Kernels built for another GPU or PyTorch may compute something else without an error.

    Raises:
        UserError: the package is missing, the kernel fails, or its results differ.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 48, heads, head_dim), (2, 40, heads, head_dim), (2, 40, heads, head_dim))
    qkv = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    mask = torch.zeros(2, 1, 1, 40).masked_fill(torch.arange(40) >= 23, torch.finfo(dtype).min / 2)
    kernel = ATTENTION_BACKENDS[name]
    alone = _WITHOUT_HELP.get(name, kernel)
    for case, function, additive in (("without a mask", alone, None), ("with a mask", kernel, mask.to(device, dtype))):
        found = _probe(function, qkv, additive, name=name)
        expected = _probe(attention, [x.float() for x in qkv], None if additive is None else additive.float())
        for what, ours, theirs in zip(("output", "gradients", "gradients", "gradients"), found, expected, strict=True):
            error = ((ours.float() - theirs).abs().max() / theirs.abs().max()).item()
            if not error <= _TOLERANCES[dtype]:
                raise UserError(
                    f"--{name}: {what} {case} differ from PyTorch's attention by {error:.2g} of the largest value "
                    f"(expected at most {_TOLERANCES[dtype]:g}) on {device}; the package does not fit this GPU or "
                    "PyTorch. Build it again, or use --sdpa"
                )


def _probe(
    function: AttentionFunction, qkv: list[Tensor], mask: Tensor | None, *, name: str = "sdpa"
) -> tuple[Tensor, ...]:
    """Output and gradients of its squares with respect to queries, keys and values."""
    leaves = [x.clone().requires_grad_(True) for x in qkv]
    try:
        out = function(*leaves, mask)
        return out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AssertionError) as error:
        dtype, device = str(qkv[0].dtype).removeprefix("torch."), qkv[0].device
        raise UserError(
            f"--{name}: the kernel does not work with {dtype} on {device}: {_first_line(error)}; "
            "use --sdpa, or --mixed_precision bf16 on a GPU"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
