"""FP8 products against the products of what they quantise to, and their error against the dense product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from musubi_tuner.networks.lora import LoRALinear
from musubi_tuner.quantization import fp8_products, rows
from musubi_tuner.quantization.fp8 import dequantize_fp8, quantize_fp8
from musubi_tuner.quantization.fp8_products import Fp8Products, find_products, fits_products, trial_problem
from musubi_tuner.quantization.linear import QuantizedLinear, use_products
from musubi_tuner.quantization.packed import Fp8, Packed

KERNELS = ["rowwise", "tensorwise", "reference"]
CPU = torch.device("cpu")
N, K = 48, 256


def made(kernel="reference", *, scales=(N, 1), bias=False, backward=True, dtype=torch.float32) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator) * torch.rand(N, 1, generator=generator)
    offset = torch.randn(N, generator=generator).to(dtype) if bias else None
    layer = QuantizedLinear(Packed(*quantize_fp8(weight, scales)), offset)
    assert use_products(layer, Fp8Products(kernel, backward)) == (1, 1)
    return layer


def inputs(shape=(7,), dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """x whose rows differ by orders of magnitude, and a gradient as small as those of a mean over a big batch."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, K, generator=generator)
    x = x * 10 ** torch.linspace(-3, 3, shape[-1]).unsqueeze(-1)
    grad = torch.randn(*shape, N, generator=generator) * 1e-9
    return x.to(dtype), grad.to(dtype)


def run(layer, x, grad) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    return y.detach(), x.grad


def rounded(rows_of: Tensor) -> Tensor:
    """What a matrix with a scale for each row comes back as, in fp64; by the weights' quantisation, row by row."""
    flat = rows_of.float().reshape(-1, rows_of.shape[-1])
    # That one has a least scale of 1e-8; a power of two in front of it changes no rounding.
    back = torch.cat([dequantize_fp8(*quantize_fp8(r * 2.0**60, (1, 1)), torch.float64) for r in flat.split(1)])
    return (back * 2.0**-60).view(rows_of.shape)


@pytest.mark.parametrize("shape", [(7,), (2, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales", [(1, 1), (N, 1)], ids=["tensor", "row"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_they_are_products_of_the_quantised_numbers(kernel, scales, dtype, shape):
    layer = made(kernel, scales=scales, bias=True, dtype=dtype)
    x, grad = inputs(shape, dtype)
    if dtype == torch.float16:
        grad = grad * 0 + torch.randn(grad.shape, generator=torch.Generator().manual_seed(2)).half()
    y, dx = run(layer, x, grad)
    assert y.dtype == dx.dtype == dtype
    q, s = layer.weight.double(), layer.weight_scale.double()
    expected_y = rounded(x) @ (q * s).t() + layer.bias.double()
    expected_dx = rounded(grad.float() * layer.weight_scale.t()) @ q
    # Half precision is rounded to up to four times, relative to what a row can be.
    bound = {torch.float32: 1e-5, torch.bfloat16: 4 * 2**-9, torch.float16: 4 * 2**-11}[dtype]
    for ours, expected in ((y, expected_y), (dx, expected_dx)):
        error = (ours.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert error.max() < bound


@pytest.mark.parametrize("scales", [(1, 1), (512, 1)], ids=["tensor", "row"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_error_against_the_dense_product(kernel, scales):
    """Normal values: 3.7% with both factors in FP8; 2.6% through the dequantised weight."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(512, 1024, generator=generator), torch.randn(256, 1024, generator=generator)
    grad = torch.randn(256, 512, generator=generator)
    layer = QuantizedLinear(Packed(*quantize_fp8(weight, scales)))

    def errors() -> list[float]:
        found = zip(run(layer, x, grad), (x @ weight.t(), grad @ weight), strict=True)
        return [((a - b).norm() / b.norm()).item() for a, b in found]

    assert errors() == pytest.approx([0.026, 0.026], abs=0.001)
    layer.products = Fp8Products(kernel)
    assert errors() == pytest.approx([0.037, 0.037], abs=0.001)


def test_gradient_through_the_dequantised_weight():
    x, grad = inputs()
    y, dx = run(made(backward=False), x, grad)
    assert torch.equal(y, run(made(), x, grad)[0])
    assert torch.equal(dx, grad @ made().dense_weight(torch.float32))


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_of_zeros_and_of_no_numbers(kernel):
    layer = made(kernel)
    x, grad = inputs((4,))
    x[1], grad[2] = 0, 0
    x[3, 5] = torch.inf
    y, dx = run(layer, x, grad)
    assert not y[1].any()
    assert not dx[2].any()
    assert y[3].isnan().all(), "an overflow shows"
    assert y[:3].isfinite().all()
    assert dx.isfinite().all()


def test_chunks_of_rows_change_nothing(monkeypatch):
    x, grad = inputs((40,))
    whole = run(made(), x, grad)
    monkeypatch.setattr(rows, "_ELEMENTS", 3 * K)
    for ours, expected in zip(run(made(), x, grad), whole, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_to_one_graph(kernel):
    x, grad = inputs((2, 5))
    expected = run(made(kernel), x, grad)
    compiled = torch.compile(made(kernel), backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(run(compiled, x, grad), expected, strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_compiled_helpers_compute_the_same(monkeypatch):
    monkeypatch.setattr(fp8_products, "_compiled", lambda f: torch.compile(f, backend="aot_eager", dynamic=True))
    x, grad = inputs((2, 5), torch.bfloat16)
    expected = run(made("tensorwise", dtype=torch.bfloat16), x, grad)
    layer = made("tensorwise", dtype=torch.bfloat16)
    layer.products = Fp8Products("tensorwise", fused=True)
    for ours, theirs in zip(run(layer, x, grad), expected, strict=True):
        assert_close(ours, theirs, rtol=1e-2, atol=0)


def test_nothing_dense_is_kept_for_the_backward_pass():
    layer, kept = made(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, K, requires_grad=True))
    assert {t.data_ptr() for t in kept} == {layer.weight.data_ptr(), layer.weight_scale.data_ptr()}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("shape", [(7,), (2, 5)])
def test_lora_reads_what_is_not_quantised(shape, checkpointed):
    layer = made()
    x, _ = inputs(shape)
    base = layer(x)
    lora = LoRALinear(layer, 4, 4.0)
    nn.init.normal_(lora.lora_up.weight)
    lora.attach(layer)
    x.requires_grad_()
    y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
    down, up = lora.lora_down.weight, lora.lora_up.weight
    assert_close(y, base + F.linear(F.linear(x, down), up), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    flat = x.detach().view(-1, K)
    assert_close(up.grad, F.linear(flat, down).detach().sum(0).expand(N, 4), rtol=1e-4, atol=1e-4)


def test_which_weights_fit():
    def fits(method_or_scales, n=N, k=K, dtype=torch.float8_e4m3fn):
        return fits_products(torch.zeros(n, k).to(dtype), torch.ones(method_or_scales))

    assert fits((1, 1))
    assert fits((N, 1))
    assert not fits((N, 4)), "blocks of a row"
    assert not fits((1, 1), n=N + 8)
    assert not fits((1, 1), k=K + 8)
    assert not fits((1, 1), dtype=torch.float8_e5m2)
    assert not fits((N, 4), dtype=torch.uint8)


def test_layers_that_do_not_fit_are_left_alone():
    blocks = QuantizedLinear(Fp8(64).quantize(torch.randn(N, K)))
    model = nn.Sequential(made(), blocks, nn.Linear(N, N))
    assert use_products(model, Fp8Products("reference")) == (1, 2)
    assert blocks.products is None


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_trial_passes_here(kernel):
    assert trial_problem(Fp8Products(kernel), CPU) is None


def test_the_trial_finds_kernels_that_fail_or_compute_something_else(monkeypatch):
    original = torch._scaled_mm

    def unsupported(*args, **kwargs):
        raise RuntimeError("compute capability")

    def other(*args, **kwargs):
        return original(*args, **kwargs) * 1.02

    monkeypatch.setattr(torch, "_scaled_mm", unsupported)
    assert trial_problem(Fp8Products("tensorwise"), CPU) == "RuntimeError: compute capability"
    monkeypatch.setattr(torch, "_scaled_mm", other)
    assert "differs by 0.02" in trial_problem(Fp8Products("tensorwise"), CPU)
    monkeypatch.setattr(torch, "_scaled_mm", lambda *a, **k: original(*a, **k) * torch.nan)
    assert "differs by nan" in trial_problem(Fp8Products("tensorwise"), CPU)


CHOICES = {  # compute capability, what works: what is chosen
    "Hopper": ((9, 0), {"rowwise", "tensorwise"}, "rowwise"),
    "Hopper without row-wise kernels": ((9, 0), {"tensorwise"}, "tensorwise"),
    "Ada": ((8, 9), {"rowwise", "tensorwise"}, "tensorwise"),
    "Blackwell": ((12, 0), {"rowwise", "tensorwise"}, "tensorwise"),
    "Ampere": ((8, 6), set(), None),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("card", CHOICES)
def test_choice(monkeypatch, card, fused):
    capability, working, expected = CHOICES[card]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(fp8_products, "_has_triton", lambda: fused)
    monkeypatch.setattr(fp8_products, "trial_problem", lambda p, device: None if p.kernel in working else "no")
    found = find_products(torch.device("cuda"), backward=True)
    assert found == (expected and Fp8Products(expected, True, fused))


def test_choice_without_a_gpu():
    assert find_products(CPU, backward=False) == Fp8Products("reference", False)
    assert find_products(torch.device("mps"), backward=True) is None


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(7,), (2, 500)])
@pytest.mark.parametrize("scales", [(1, 1), (N, 1)], ids=["tensor", "row"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(dtype, scales, shape):
    """Numbers that a hair's breadth moves to the next in FP8 leave less than 1%."""
    products = find_products(torch.device("cuda"), backward=True)
    if products is None:
        pytest.skip("no FP8 products here")
    x, grad = inputs(shape, dtype)
    grad = (grad.float() * 1e9).to(dtype)
    layer = made(scales=scales, bias=True, dtype=dtype)
    expected = run(layer, x, grad)
    layer.to("cuda").products = products
    for ours, theirs in zip(run(layer, x.cuda(), grad.cuda()), expected, strict=True):
        assert ours.dtype == dtype
        error = (ours.cpu().double() - theirs.double()).norm(dim=-1) / theirs.double().norm(dim=-1)
        assert error.max() < 0.01
