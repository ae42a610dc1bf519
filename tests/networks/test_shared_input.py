"""Layers with one input, adapted together, against one at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from lora_samples import random_network, run, tiny_transformer
from torch import nn

from musubi_tuner.networks.lora import LoRALinear, adapt_together
from musubi_tuner.networks.lora_product import Member, dense_products
from musubi_tuner.quantization.linear import pack_linear
from musubi_tuner.quantization.packed import Fp8, Int8, Nf4


def layers(ranks=(2, 3, 1), width=8, dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    bases = (
        nn.Sequential(*(nn.Linear(width, 5 + i, bias=bias) for i in range(len(ranks)))).to(dtype).requires_grad_(False)
    )
    modules = []
    for base, rank in zip(bases, ranks, strict=True):
        modules.append(LoRALinear(base, rank, 3.0).to(dtype))
        nn.init.normal_(modules[-1].lora_up.weight)
    return bases, modules


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_the_product_against_finite_differences(bias):
    torch.manual_seed(0)
    double = {"dtype": torch.float64}
    ranks = (2, 1, 3)
    fixed = [(torch.randn(4, 6, **double), torch.randn(4, **double) if bias else None) for _ in ranks]
    masks = [torch.rand(5, 2, **double), None, torch.rand(5, 3, **double)]

    def f(rows, down, *ups):
        parts = zip(fixed, ups, (0.5, 1.0, -2.0), masks, strict=True)
        return dense_products(rows, down, [Member(w, b, up, scale, mask) for (w, b), up, scale, mask in parts])

    inputs = [torch.randn(5, 6, **double), torch.randn(6, 6, **double), *(torch.randn(4, r, **double) for r in ranks)]
    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in inputs])


def test_only_what_needs_a_gradient_gets_one():
    bases, modules = layers()
    for module, base in zip(modules, bases, strict=True):
        module.attach(base)
    modules[1].requires_grad_(False)
    x = torch.randn(4, 8, dtype=torch.float64)
    sum(y.sum() for y in adapt_together(modules, x)).backward()
    assert [m.lora_up.weight.grad is not None for m in modules] == [True, False, True]
    assert modules[1].lora_down.weight.grad is None
    assert modules[0].lora_down.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_the_merged_weights(bias):
    bases, modules = layers(bias=bias)
    for module, base in zip(modules, bases, strict=True):
        module.attach(base)
    modules[1].set_multiplier(-0.5)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    merged = [
        b.weight + m.multiplier * 3.0 / m.rank * m.lora_up.weight @ m.lora_down.weight
        for b, m in zip(bases, modules, strict=True)
    ]
    expected = [F.linear(x, w, b.bias) for w, b in zip(merged, bases, strict=True)]
    leaves = [x, *itertools.chain(*(m.parameters() for m in modules))]
    wanted = torch.autograd.grad(sum(y.square().sum() for y in expected), leaves)
    outputs = adapt_together(modules, x)
    for y, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(y, other)
    found = torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("method", [Fp8(), Fp8(None), Int8(), Nf4()], ids=["fp8", "fp8 rows", "int8", "nf4"])
def test_quantised_bases(method):
    bases, modules = layers(width=64, dtype=torch.float32)
    for i, module in enumerate(modules):
        pack_linear(bases, str(i), method.quantize(bases[i].weight))
        module.attach(bases[i])
    x = torch.randn(2, 3, 64, requires_grad=True)
    outputs = adapt_together(modules, x)
    expected = [
        F.linear(x, b.dense_weight(torch.float32) + 3.0 / m.rank * m.lora_up.weight @ m.lora_down.weight, b.bias)
        for b, m in zip(bases, modules, strict=True)
    ]
    leaves = [x, *itertools.chain(*(m.parameters() for m in modules))]
    wanted = torch.autograd.grad(sum(y.square().sum() for y in expected), leaves)
    found = torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves)
    for one, other in zip((*outputs, *found), (*expected, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(dtype):
    bases, modules = layers(width=32, dtype=torch.float32)
    for module, base in zip(modules, bases, strict=True):
        module.attach(base)
    x = torch.randn(2, 3, 32, requires_grad=True)
    expected = adapt_together(modules, x)
    with torch.autocast("cpu", dtype):
        outputs = adapt_together(modules, x)
    for y, other in zip(outputs, expected, strict=True):
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), other, rtol=0.05, atol=0.05)
    sum(y.float().square().sum() for y in outputs).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for m in modules for p in m.parameters())


@pytest.mark.parametrize("targets", [["to_q"], ["to_k", "to_v"], ["to_q", "to_k", "to_v"]], ids="+".join)
@pytest.mark.parametrize("args", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_whichever_projections_are_adapted(targets, args):
    model = tiny_transformer()
    patterns = [rf".*\.{name}" for name in targets]
    network = random_network(
        model, include_patterns=patterns, rank_pattern={"to_k": 3} if "to_k" in targets else {}, **args
    )
    network.apply_to(model)
    together = run(model)
    for module in model.modules():
        vars(module).pop("project", None)
    for key, value in run(model).items():
        torch.testing.assert_close(together[key], value, rtol=1e-4, atol=1e-5)


def test_a_second_network_of_other_projections_is_not_passed_by():
    model = tiny_transformer()
    first, second = random_network(model), random_network(model, seed=3, include_patterns=[r".*\.to_k"])
    base = run(model)
    first.apply_to(model)
    one = run(model)
    second.apply_to(model)
    both = run(model)
    assert not torch.equal(both["video"], one["video"])
    weights = {}
    second.detach()
    assert all(torch.equal(value, one[key]) for key, value in run(model).items())
    first.detach()
    assert all(torch.equal(value, base[key]) for key, value in run(model).items())
    assert not any("project" in vars(m) or "forward" in vars(m) for m in model.modules())
    for network in (first, second):
        for name, module in network.as_lora_file().modules.items():
            weights[name] = weights.get(name, 0) + module.delta()
    for name, delta in weights.items():
        model.get_submodule(name).weight += delta
    for key, value in run(model).items():
        torch.testing.assert_close(value, both[key], rtol=1e-4, atol=1e-5)


def test_hooks_on_a_projection_fire():
    model = tiny_transformer()
    random_network(model).apply_to(model)
    seen = []
    for block in model.transformer_blocks:
        block.attn1.to_k.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    run(model)
    assert len(seen) == 2


def test_projections_share_the_product_of_the_down_factors(monkeypatch):
    model = tiny_transformer("2.0", "video")
    random_network(model, dim=4).apply_to(model)
    attention = model.transformer_blocks[0].attn1
    ranks = []

    def record(rows, down, members):
        ranks.append(len(down))
        return dense_products(rows, down, members)

    monkeypatch.setattr("musubi_tuner.networks.lora.dense_products", record)
    x, context = torch.randn(1, 3, 32), torch.randn(1, 2, 32)
    attention(x)
    assert ranks == [12, 4], "queries, keys and values; the output"
    ranks.clear()
    attention(x, context)
    assert ranks == [4, 8, 4], "queries; keys and values; the output"
