"""Linear layers whose matrix products are in FP8: activations and gradients are quantised on the way in.

Forward, x [M, K] and a frozen weight q [N, K] with a scale s for the tensor or each row::

    y = (xq q^T) * sx * s^T                 xq, sx = rows of x in e4m3
    dx = (gq q) * sg                        gq, sg = rows of dy * s^T in e4m3

s lies on the axis that the second product sums over, so it goes into the gradient before that is quantised; the
weight itself is never quantised again. Each row's largest magnitude becomes 448. On normal values this leaves a
relative error of 3.7% in y and in dx; a quantised weight alone leaves 2.6%.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from .fp8 import dequantize_fp8
from .rows import row_chunks

logger = logging.getLogger(__name__)

Kernel = Literal["rowwise", "tensorwise", "reference"]
"""Who computes xq q^T: PyTorch's FP8 product with both scales, or without and the scales are applied to what it
gives, or a product in fp32. All three have the same numbers going in."""

MULTIPLE = 16  # of N and K, what FP8 products need

_FORMAT = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FORMAT).max
# Gradients of a mean over many elements are small, so this is far below any; a row of zeros stays one.
_LEAST = 1e-30


@dataclass(frozen=True)
class Fp8Products:
    """How the products of a layer are computed.

    Attributes:
        kernel: for the products.
        backward: for the gradient of the input as well; else it goes through the dequantised weight.
        fused: rows are quantised by a compiled kernel.
    """

    kernel: Kernel
    backward: bool = True
    fused: bool = False


def fits_products(weight: Tensor, scale: Tensor) -> bool:
    """Whether products with a packed weight can be in FP8: e4m3, no scales within rows, sizes that kernels take."""
    whole = scale.shape[1] == 1 and not any(size % MULTIPLE for size in weight.shape)
    return weight.dtype == _FORMAT and whole


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, products: Fp8Products) -> Tensor:
    """[..., K] to [..., N] in the dtype of x.

    Args:
        x: any floating dtype.
        weight: e4m3 [N, K], frozen.
        scale: fp32 [1 or N, 1].
        bias: [N] in the dtype of x, frozen.
        products: how.
    """
    return _Fp8Linear.apply(x, weight, scale, bias, products.kernel, products.backward, products.fused)


class _Fp8Linear(torch.autograd.Function):
    """The settings come one by one, which compilers take."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, kernel: Kernel, backward: bool, fused: bool
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.kernel, ctx.in_fp8, ctx.fused = kernel, backward, fused
        rows, row_scale = _quantize_rows(x.reshape(-1, x.shape[-1]), None, fused)
        y = _product(rows, row_scale, weight, scale.t(), x.dtype, kernel, fused)
        if bias is not None:
            y += bias
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 6
        if not ctx.needs_input_grad[0]:
            return None, *nothing
        weight, scale = ctx.saved_tensors
        if not ctx.in_fp8:
            return grad @ dequantize_fp8(weight, scale, grad.dtype), *nothing
        rows, row_scale = _quantize_rows(grad.reshape(-1, grad.shape[-1]), scale.t(), ctx.fused)
        # Kernels take both factors with the summed axis last, so q is transposed each time, 1 byte an element.
        turned = weight.view(torch.uint8).t().contiguous().view(weight.dtype)
        dx = _product(rows, row_scale, turned, scale.new_ones(1, 1), grad.dtype, ctx.kernel, ctx.fused)
        return dx.view(*grad.shape[:-1], dx.shape[-1]), *nothing


def _product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, kernel: Kernel, fused: bool
) -> Tensor:
    """``(a b^T) * a_scale * b_scale`` [M, N].

    Args:
        a: FP8 [M, K].
        a_scale: fp32 [M, 1].
        b: FP8 [N, K].
        b_scale: fp32 [1, 1 or N].
        dtype: of the result.
        kernel: who multiplies.
        fused: scales are applied by a compiled kernel.
    """
    half = dtype == torch.bfloat16  # float16 ends at 65504, far below what unscaled products reach
    if kernel == "rowwise" and half:
        columns = b_scale.expand(1, b.shape[0]).contiguous()
        return torch._scaled_mm(a, b.t(), scale_a=a_scale, scale_b=columns, out_dtype=dtype)
    if kernel == "reference":
        raw = a.float() @ b.float().t()
    else:
        one = a_scale.new_ones(())
        raw = torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=dtype if half else torch.float32)
    if fused and not torch.compiler.is_compiling():
        return _compiled(_scaled)(raw, a_scale, b_scale, dtype)
    return _scaled(raw, a_scale, b_scale, dtype)


def _scaled(raw: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    if b_scale.numel() == 1:
        return raw.mul_(a_scale * b_scale).to(dtype)
    return raw.mul_(a_scale).mul_(b_scale).to(dtype)


def _quantize_rows(x: Tensor, factor: Tensor | None, fused: bool) -> tuple[Tensor, Tensor]:
    """``x * factor`` [M, K] to e4m3 and a scale [M, 1] fp32 for each row. ``factor``: fp32 [1, 1 or K]."""
    if torch.compiler.is_compiling():
        return _rows_to_fp8(x, factor)
    if fused:
        return _compiled(_rows_to_fp8)(x, factor)
    m, k = x.shape
    quantized = torch.empty(m, k, dtype=_FORMAT, device=x.device)
    scale = torch.empty(m, 1, dtype=torch.float32, device=x.device)
    for rows in row_chunks(m, k):
        part, scale[rows] = _rows_to_fp8(x[rows], factor)
        quantized.view(torch.uint8)[rows] = part.view(torch.uint8)
    return quantized, scale


def _rows_to_fp8(x: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    values = x.float() if factor is None else x.float() * factor
    scale = (values.abs().amax(dim=-1, keepdim=True) / _LARGEST).clamp(min=_LEAST)
    # What is not finite makes its whole row so, rather than becoming the largest number.
    return (values / scale).to(_FORMAT), scale


@lru_cache(maxsize=2)
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One kernel for all sizes instead of a pass over the matrix for each operation."""
    return torch.compile(function, dynamic=True)


# --- choosing ---


def find_products(device: torch.device, *, backward: bool) -> Fp8Products | None:
    """How products in FP8 are computed on a device; ``None`` where they are not.

    CPU: products in fp32 of the same numbers. CUDA: PyTorch's FP8 product, with row-wise scales on compute capability
    9.x, else with the scales applied to what it gives, and with compiled kernels around it where there is Triton; the
    first of these ways that computes a small trial right. Row-wise kernels are missing on other cards, or hang (8.9
    before PyTorch 2.12).
    """
    if device.type == "cpu":
        return Fp8Products("reference", backward)
    if device.type != "cuda":
        return None
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    kernels: list[Kernel] = ["rowwise", "tensorwise"] if hopper else ["tensorwise"]
    for fused in (True, False) if _has_triton() else (False,):
        for kernel in kernels:
            products = Fp8Products(kernel, backward, fused)
            problem = trial_problem(products, device)
            if problem is None:
                return products
            logger.debug("%s on %s: %s", products, device, problem)
    return None


def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


_TRIAL = (300, 256, 128)  # M, K, N
_TOLERANCE = 0.01  # relative; roundings to bf16 leave 0.003


def trial_problem(products: Fp8Products, device: torch.device) -> str | None:
    """What is wrong with a way to compute, on small random matrices; ``None`` for nothing."""
    m, k, n = _TRIAL
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(m, k, generator=generator), torch.randn(m, n, generator=generator)
    weight = torch.randn(n, k, generator=generator).to(_FORMAT)
    scale = torch.rand(n, 1, generator=generator) + 0.5
    try:
        ours = _run_trial([x, weight, scale, grad], products, device)
    except Exception as error:  # kernels and compilers fail in many ways
        return f"{type(error).__name__}: {error}"
    reference = Fp8Products("reference", products.backward)
    expected = _run_trial([x, weight, scale, grad], reference, torch.device("cpu"))
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(ours, expected, strict=True)]
    # Written so that NaN is a problem.
    return None if max(errors) < _TOLERANCE else f"differs by {max(errors):.3g} of the reference"


def _run_trial(tensors: list[Tensor], products: Fp8Products, device: torch.device) -> list[Tensor]:
    """y and dx in bf16."""
    x, weight, scale, grad = (t.to(device) for t in tensors)
    x = x.bfloat16().requires_grad_()
    with torch.enable_grad():
        y = fp8_linear(x, weight, scale, None, products)
        y.backward(grad.bfloat16())
    return [y.detach().float().cpu(), x.grad.float().cpu()]
