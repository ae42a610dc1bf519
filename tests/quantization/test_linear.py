"""A quantised layer against a plain one with the same, dequantised weight: equal to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from musubi_tuner.networks.lora import LoRALinear
from musubi_tuner.quantization.linear import QuantizedLinear, pack_linear
from musubi_tuner.quantization.packed import Fp8, Int8, Nf4

METHODS = {"nf4": Nf4(32), "nf4 in blocks of 128": Nf4(128), "fp8": Fp8(), "fp8 by row": Fp8(None), "int8": Int8()}


@pytest.fixture(params=METHODS, ids=METHODS.keys())
def method(request):
    return METHODS[request.param]


def pair(method, dtype=torch.float32, *, bias=True) -> tuple[QuantizedLinear, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 256, generator=generator)
    offset = torch.randn(48, generator=generator).to(dtype) if bias else None
    packed = QuantizedLinear(method.quantize(weight), offset)
    plain = nn.Linear(256, 48, bias=bias, dtype=dtype).requires_grad_(False)
    plain.weight.copy_(packed.dense_weight(dtype))
    if bias:
        plain.bias.copy_(offset)
    return packed, plain


def run(layer, shape, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, 256, generator=generator).to(dtype).requires_grad_()
    y = layer(x)
    y.backward(torch.randn(y.shape, generator=generator).to(dtype))
    return y.detach(), x.grad


@pytest.mark.parametrize("shape", [(7,), (2, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradient_are_exact(method, shape, dtype, bias):
    packed, plain = pair(method, dtype, bias=bias)
    for ours, theirs in zip(run(packed, shape, dtype), run(plain, shape, dtype), strict=True):
        assert torch.equal(ours, theirs)


def test_nothing_dense_is_kept_for_the_backward_pass(method):
    packed, _ = pair(method)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        packed(torch.randn(3, 256, requires_grad=True))
    assert {t.data_ptr() for t in kept} == {packed.weight.data_ptr(), packed.weight_scale.data_ptr()}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_lora_on_top(method, checkpointed):
    grads = []
    for layer in pair(method):
        torch.manual_seed(0)
        lora = LoRALinear(layer, 4, 4.0)
        nn.init.normal_(lora.lora_up.weight)
        lora.attach(layer)
        x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        y.square().sum().backward()
        grads.append([y, x.grad, lora.lora_down.weight.grad, lora.lora_up.weight.grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_nothing_of_it_is_trained(method):
    packed, _ = pair(method)
    assert isinstance(packed, nn.Linear), "so that networks find it"
    assert not any(p.requires_grad for p in packed.parameters())
    packed(torch.randn(3, 256, requires_grad=True)).sum().backward()
    assert all(p.grad is None for p in packed.parameters())
    assert not packed(torch.randn(3, 256)).requires_grad


def test_casts_of_the_model_pass_by_the_quantised_tensors(method):
    packed, _ = pair(method)
    model = nn.Sequential(packed, nn.Linear(48, 8)).requires_grad_(False)
    before = {n: t.clone() for n, t in packed.state_dict().items() if n != "bias"}
    model.to(torch.bfloat16).to("cpu")
    assert model[0].bias.dtype == model[1].weight.dtype == torch.bfloat16
    after = model[0].state_dict()
    assert all(after[n].dtype == t.dtype for n, t in before.items())
    assert all(torch.equal(after[n].view(torch.uint8), t.view(torch.uint8)) for n, t in before.items())
    model.to("meta")
    assert model[0].weight.is_meta
    assert model[0].weight_scale.is_meta
    assert model[0].weight.dtype == before["weight"].dtype


def test_tensors_can_be_exchanged_for_views_of_a_buffer(method):
    packed, _ = pair(method)
    x = torch.randn(3, 256)
    expected = packed(x)
    sizes = [packed.weight.nbytes, packed.weight_scale.nbytes]
    slot = torch.empty(sum(sizes), dtype=torch.uint8)
    parts = slot.split(sizes)
    for part, tensor in zip(parts, (packed.weight.data, packed.weight_scale), strict=True):
        part.copy_(tensor.view(torch.uint8).flatten())
    weight = parts[0].view(packed.weight.dtype).view(packed.weight.shape)
    scale = parts[1].view(torch.float32).view(packed.weight_scale.shape)
    packed.weight, packed.weight_scale = nn.Parameter(weight, requires_grad=False), scale
    assert torch.equal(packed(x), expected)
    slot.zero_()
    assert not torch.equal(packed(x), expected)


def test_compiles_to_one_graph(method):
    packed, plain = pair(method)
    compiled = torch.compile(packed, backend="eager", fullgraph=True)
    for ours, theirs in zip(run(compiled, (7,), torch.float32), run(plain, (7,), torch.float32), strict=True):
        assert torch.equal(ours, theirs)


def test_takes_the_place_of_a_layer(method):
    _, plain = pair(method)
    model = nn.Sequential(nn.Sequential(plain))
    x = torch.randn(3, 256)
    expected = plain(x)
    pack_linear(model, "0.0", method.quantize(plain.weight))
    assert isinstance(model[0][0], QuantizedLinear)
    assert model[0][0].bias.data_ptr() == plain.bias.data_ptr()
    assert model[0][0](x).shape == expected.shape
