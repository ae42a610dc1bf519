"""A Linear layer that holds its frozen weight quantised and makes it dense for the time of one matrix product.

Everything that moves such layers may treat them as plain tensors: ``weight`` is a parameter that needs no gradient,
``weight_scale`` and ``input_scale``, if there is one, are buffers, all contiguous. They may be exchanged for tensors of
the same shape and dtype before ``forward``, for instance for views of a buffer on the device::

    layer.weight = nn.Parameter(slot[:n].view(layer.weight.dtype).view(layer.weight.shape), requires_grad=False)
    layer.weight_scale = slot[n:].view(torch.float32).view(layer.weight_scale.shape)

The backward pass reads the tensors that its forward pass read, so a slot must not be filled anew between the two. With
checkpointing around the block that is the forward pass of the recomputation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fp8_products import Fp8Products, fits_products, fp8_linear
from .packed import Packed, dequantize, is_nf4


class _Product(torch.autograd.Function):
    """``F.linear`` that keeps the quantised weight for the backward pass. Autograd would keep the dense one."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, dequantize(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        weight, scale = ctx.saved_tensors
        return grad @ dequantize(weight, scale, grad.dtype), None, None, None


class QuantizedLinear(nn.Linear):
    """``y = x W^T + b`` with W [N, K] dequantised to the dtype of x in each forward and backward pass.

    W and b are frozen; the gradient of x is exact for the dequantised W. Moving or casting the model around it moves
    the quantised tensors and leaves their dtypes alone.

    Attributes:
        products: how products are computed in FP8, for a weight that fits them; ``None``: dequantised as above.

    Args:
        packed: the weight.
        bias: [N], frozen.
    """

    def __init__(self, packed: Packed, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)  # not Linear's, which would allocate a dense weight
        self.out_features, self.in_features = packed.shape
        self.weight = _frozen(packed.weight)
        self.register_buffer("weight_scale", packed.scale)
        self.register_buffer("input_scale", packed.input_scale)
        self.register_parameter("bias", None if bias is None else _frozen(bias))
        self.products: Fp8Products | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        if self.input_scale is not None:
            x = _divided(x, self.input_scale)
        if self.products is not None:
            return fp8_linear(x, self.weight, self.weight_scale, self.bias, self.products)
        return _Product.apply(x, self.weight, self.weight_scale, self.bias)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """[N, K]: the weight that the layer acts with."""
        return Packed(self.weight, self.weight_scale, self.input_scale).dense(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # As bytes, so that a cast of the model passes by what is FP8 or a scale.
        weight, scale = self.weight.data, self.weight_scale
        self.weight = _frozen(fn(weight.view(torch.uint8)).view(weight.dtype))
        self.weight_scale = fn(scale.view(torch.uint8)).view(scale.dtype)
        if self.input_scale is not None:
            self.input_scale = fn(self.input_scale.view(torch.uint8)).view(self.input_scale.dtype)
        if self.bias is not None:
            self.bias = _frozen(fn(self.bias.data))
        return self

    def extra_repr(self) -> str:
        block = self.in_features // self.weight_scale.shape[1]
        name = "nf4" if is_nf4(self.weight) else str(self.weight.dtype).removeprefix("torch.")
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {name}, {block} values a scale"


def pack_linear(model: nn.Module, path: str, packed: Packed) -> None:
    """Put a :class:`QuantizedLinear` in the place of the Linear at ``path``, with that one's bias."""
    old = model.get_submodule(path)
    new = QuantizedLinear(packed, old.bias)
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def use_products(model: nn.Module, products: Fp8Products) -> tuple[int, int]:
    """Compute products in FP8 in the quantised layers whose weights fit; how many these are, and how many layers."""
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    fitting = [m for m in layers if fits_products(m.weight, m.weight_scale)]
    for layer in fitting:
        layer.products = products
    return len(fitting), len(layers)


def _divided(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale. In float16 at most its largest number: small scales belong to columns of nearly nothing, but infinity
    times nothing is not a number."""
    x = x / scale.to(x.dtype)
    if x.dtype != torch.float16:
        return x
    largest = torch.finfo(x.dtype).max
    return x.clamp(-largest, largest)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
