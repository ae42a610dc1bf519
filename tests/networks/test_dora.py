"""DoRA: its formula, its gradients, on every kind of base, in files."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lora_samples import random_network, run, tiny_transformer
from safetensors.torch import load_file
from torch import nn

from musubi_tuner.assembly.transformer import attach_to_blocks
from musubi_tuner.common.errors import UserError
from musubi_tuner.config.memory import MemorySettings
from musubi_tuner.networks.dora import DoRALinear
from musubi_tuner.networks.files.lora_reader import load_lora
from musubi_tuner.networks.lora import LoRALinear
from musubi_tuner.networks.lora_ltx2 import create_network, create_network_from_weights
from musubi_tuner.networks.lycoris.files import LycorisModule
from musubi_tuner.quantization.linear import pack_linear
from musubi_tuner.quantization.packed import Fp8, Int8, Nf4

ARGS = {"use_dora": "True", "lora_target_preset": "full"}


def random_dora(model, seed=2, **args):
    """A network that differs from its start in factors and lengths."""
    network = random_network(model, seed=seed, **{**ARGS, **args})
    network.apply_to(model)
    with torch.no_grad():
        for module in network.modules_by_name.values():
            module.dora_scale.mul_(1 + 0.2 * torch.randn_like(module.dora_scale))
    return network


def module_on(base, dtype=torch.float64, multiplier=1.0):
    torch.manual_seed(1)
    module = DoRALinear(base, 2, 3.0)
    nn.init.normal_(module.lora_up.weight, std=0.5)
    module.to(dtype).attach(base)
    with torch.no_grad():
        module.dora_scale.mul_(1.3)
    module.set_multiplier(multiplier)
    return module


def formula(module, weight, detach=True):
    """The adapted weight, as the paper writes it."""
    adapted = weight + module.alpha_value / module.rank * module.lora_up.weight @ module.lora_down.weight
    norms = adapted.norm(dim=1, keepdim=True)
    wanted = module.dora_scale * adapted / (norms.detach() if detach else norms)
    return weight + module.multiplier * (wanted - weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("multiplier", [1.0, 0.4])
def test_output_and_gradients_are_those_of_the_formula(bias, multiplier):
    torch.manual_seed(0)
    base = nn.Linear(7, 5, bias=bias).double().requires_grad_(False)
    module = module_on(base, multiplier=multiplier)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    expected = F.linear(x, formula(module, base.weight), base.bias)
    wanted = torch.autograd.grad(expected.square().sum(), [x, *module.parameters()])
    y = base(x)
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_against_finite_differences():
    """Of what the norms do not depend on, since the method holds those constant."""
    torch.manual_seed(0)
    module = module_on(nn.Linear(5, 3).double().requires_grad_(False))
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)

    def f(x, lengths):
        return torch.func.functional_call(module, {"dora_scale": lengths}, (x,), strict=False)

    assert torch.autograd.gradcheck(f, (x, module.dora_scale.detach().clone().requires_grad_()))


def test_peft_computes_the_same_outputs_and_gradients():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours, theirs = nn.Sequential(nn.Linear(9, 6)), nn.Sequential(nn.Linear(9, 6))
    theirs.load_state_dict(ours.state_dict())
    module = module_on(ours[0].requires_grad_(False), torch.float32)
    config = peft.LoraConfig(r=2, lora_alpha=3.0, target_modules=["0"], use_dora=True)
    wrapped = peft.get_peft_model(theirs, config)
    layer = wrapped.base_model.model[0]
    magnitude = layer.lora_magnitude_vector["default"].weight
    pairs = [
        (module.lora_down.weight, layer.lora_A["default"].weight),
        (module.lora_up.weight, layer.lora_B["default"].weight),
        (module.dora_scale, magnitude),
    ]
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine.view_as(other))
    x = torch.randn(4, 9)
    a, b = ours(x), wrapped(x)
    torch.testing.assert_close(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad.view_as(other), other.grad)


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_a_new_network_is_the_base_and_multiplier_zero_is_it_bit_for_bit(version):
    model = tiny_transformer(version)
    base = run(model, version)
    network = create_network(1.0, 4, 1.0, model, **ARGS)
    network.apply_to(model)
    for key, value in run(model, version).items():
        torch.testing.assert_close(value, base[key], rtol=1e-5, atol=1e-5)
    network.detach()
    network = random_dora(model)
    assert not torch.equal(run(model, version)["video"], base["video"])
    with network.gain(0.0):
        assert all(torch.equal(value, base[key]) for key, value in run(model, version).items())


def test_merged_weights_equal_the_applied_network():
    model = tiny_transformer()
    network = random_dora(model)
    network.multiplier = 0.7
    applied = run(model)
    network.detach()
    for name, module in network.as_lora_file().modules.items():
        weight = model.get_submodule(name).weight
        weight += LycorisModule.of(module).change(slice(None), weight.clone(), 0.7, over_base=False)
    for key, value in run(model).items():
        torch.testing.assert_close(value, applied[key], rtol=1e-4, atol=1e-5)


def test_networks_on_top_of_one_another_add_their_changes():
    torch.manual_seed(0)
    base = nn.Linear(6, 5).requires_grad_(False)
    weight, x = base.weight.clone(), torch.randn(3, 6)
    lora = LoRALinear(base, 2, 2.0)
    nn.init.normal_(lora.lora_up.weight)
    lora.attach(base)
    dora = module_on(base, torch.float32)
    wanted = formula(dora, weight) + lora.lora_up.weight @ lora.lora_down.weight
    torch.testing.assert_close(base(x), F.linear(x, wanted, base.bias))


@pytest.mark.parametrize("method", [Fp8(), Fp8(None), Int8(), Nf4()], ids=["fp8", "fp8 rows", "int8", "nf4"])
def test_on_a_quantised_base_the_norm_is_that_of_the_weight_it_acts_with(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32)).requires_grad_(False)
    pack_linear(model, "0", method.quantize(model[0].weight))
    base = model[0]
    module = module_on(base, torch.float32)
    x = torch.randn(2, 5, 64, requires_grad=True)
    expected = F.linear(x, formula(module, base.dense_weight(torch.float32)), base.bias)
    wanted = torch.autograd.grad(expected.square().sum(), [x, *module.parameters()])
    y = base(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    found = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_lengths_are_not_rounded_to_half_precision():
    torch.manual_seed(0)
    base = nn.Linear(64, 512, bias=False).to(torch.bfloat16).requires_grad_(False)
    module = DoRALinear(base, 2, 2.0)
    module.attach(base)
    x = torch.randn(256, 64, dtype=torch.bfloat16)
    before = base(x).float()
    with torch.no_grad():
        module.dora_scale.mul_(1.01)  # between two neighbours of bf16, 1.0078 and 1.0156
    change = (base(x).float() * before).sum() / before.square().sum() - 1
    assert change.item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(
    "settings", [{"checkpointing": True}, {"checkpointing": True, "blocks_to_swap": 1}, {"blocks_to_swap": 1}]
)
def test_gradients_are_equal_with_blocks_that_come_and_go(settings):
    def gradients(settings):
        model = tiny_transformer()
        network = random_dora(model)
        attach_to_blocks(model, MemorySettings(**settings), None, device=torch.device("cpu"))
        sum(v.square().mean() for v in run(model).values()).backward()
        return {n: p.grad for n, p in network.named_parameters() if p.grad is not None}

    expected, found = gradients({}), gradients(settings)
    assert expected
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=0)


def test_one_graph_for_all_blocks():
    from torch._dynamo.testing import CompileCounter

    model = tiny_transformer()
    random_dora(model)
    expected = run(model)
    torch._dynamo.reset()
    counter = CompileCounter()
    for block in model.transformer_blocks:
        block.forward = torch.compile(block.forward, backend=counter, fullgraph=True)
    for key, value in run(model).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
    # The first block's inputs need no gradient, those of the second do.
    assert counter.frame_count == 2


# --- files ---


def test_native_file_reloads_as_it_was(tmp_path):
    model = tiny_transformer()
    network = random_dora(model)
    applied = run(model)
    path = network.save_weights(tmp_path / "a.safetensors", torch.bfloat16)
    lengths = {n: t for n, t in load_file(path).items() if n.endswith(".dora_scale")}
    assert len(lengths) == len(network.modules_by_name)
    assert all(t.dtype == torch.float32 and t.shape[1] == 1 for t in lengths.values())
    path = network.save_weights(tmp_path / "b.safetensors", None)
    network.detach()
    again = create_network_from_weights(1.0, path, model)
    again.apply_to(model)
    assert all(torch.equal(value, applied[key]) for key, value in run(model).items())


def test_comfy_file_says_what_comfyui_makes_of_it(tmp_path):
    """ComfyUI divides by the norms of the base weight, not by those of the adapted one."""
    model = tiny_transformer()
    network = random_dora(model)
    applied = run(model)
    path = network.save_weights(tmp_path / "a.safetensors", None, fmt="comfy")
    network.detach()
    tensors = load_file(path)
    name = "transformer_blocks.1.ff.net.2"
    stem = f"diffusion_model.{name}."
    weight, module = model.get_submodule(name).weight, network.modules_by_name[name]
    adapted = weight + tensors[stem + "lora_B.weight"] @ tensors[stem + "lora_A.weight"]
    in_comfyui = adapted * tensors[stem + "dora_scale"] / weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(in_comfyui, formula(module, weight), rtol=1e-4, atol=1e-5)
    fresh = create_network(1.0, 4, 2.0, model, **ARGS)
    fresh.apply_to(model)
    fresh.load_weights(path)
    assert_close(run(model), applied)
    fresh.detach()
    create_network_from_weights(1.0, path, model).apply_to(model)
    assert_close(run(model), applied)


def assert_close(found, expected):
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_done_with_lengths_is_refused(tmp_path):
    from musubi_tuner.networks.file_tools.merge import concat_method, merge_loras

    model = tiny_transformer()
    network = random_dora(model)
    path = network.save_weights(tmp_path / "dora.safetensors")
    with pytest.raises(UserError, match="make others of those with ltx2_convert_lora"):
        network.save_weights(tmp_path / "b.safetensors", fmt="diffusers")
    with pytest.raises(UserError, match=r"dora\.safetensors: DoRA cannot be merged"):
        merge_loras([path], tmp_path / "merged.safetensors", concat_method())
    assert [p.name for p in tmp_path.iterdir()] == ["dora.safetensors"]
    network.detach()
    plain = create_network(1.0, 4, 2.0, model, lora_target_preset="full")
    with pytest.raises(
        UserError, match="is a DoRA module, that of the network is not; use --network_args use_dora=True"
    ):
        plain.load_weights(load_lora(path))
