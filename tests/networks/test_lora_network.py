"""The LoRA network on a tiny transformer: identities, gradients, dropout, switching, arguments."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from lora_samples import random_network, run, tiny_transformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from musubi_tuner.common.errors import UserError
from musubi_tuner.networks.attached import Switch
from musubi_tuner.networks.lora import LoRALinear
from musubi_tuner.networks.lora_ltx2 import check_arguments, create_network
from musubi_tuner.networks.network_args import parse_network_args
from musubi_tuner.networks.targets import linear_names


def assert_same(a: dict, b: dict) -> None:
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)


def differs(a: dict, b: dict) -> bool:
    return all(not torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_new_network_changes_nothing_and_multiplier_zero_is_the_base(version):
    model = tiny_transformer(version)
    base = run(model, version)
    fresh = create_network(1.0, 4, 1.0, model, lora_target_preset="full")
    fresh.apply_to(model)
    assert_same(run(model, version), base)
    fresh.detach()
    network = random_network(model, lora_target_preset="full")
    network.apply_to(model)
    assert differs(run(model, version), base)
    with network.gain(0.0):
        assert_same(run(model, version), base)


def test_merged_weights_equal_the_applied_network():
    model = tiny_transformer()
    network = random_network(model, lora_target_preset="full")
    network.apply_to(model)
    network.multiplier = 0.7
    applied = run(model)
    network.detach()
    for name, module in network.as_lora_file().modules.items():
        model.get_submodule(name).weight += module.delta(0.7)
    merged = run(model)
    for key in applied:
        torch.testing.assert_close(merged[key], applied[key], rtol=1e-4, atol=1e-5)


def test_detach_restores_the_model():
    model = tiny_transformer()
    base = run(model)
    first, second = random_network(model), random_network(model, seed=3)
    first.apply_to(model)
    one = run(model)
    second.apply_to(model)
    assert differs(run(model), one)
    with pytest.raises(RuntimeError, match="attached later"):
        first.detach()
    second.detach()
    assert_same(run(model), one)
    first.detach()
    assert_same(run(model), base)
    assert not any("forward" in vars(m) for m in model.modules())


def test_gain_returns_to_the_previous_value_even_after_an_error():
    model = tiny_transformer()
    network = random_network(model)
    network.apply_to(model)
    network.multiplier = 0.5
    half = run(model)
    with network.gain(-1.0):
        assert network.multiplier == -1.0
        with network.gain(0.0):
            assert network.multiplier == 0.0
        assert network.multiplier == -1.0
        assert differs(run(model), half)
    with pytest.raises(ZeroDivisionError), network.gain(0.0):
        raise ZeroDivisionError
    assert network.multiplier == 0.5
    assert_same(run(model), half)


def test_network_lives_outside_the_model():
    model = tiny_transformer()
    before = set(model.state_dict())
    network = random_network(model)
    network.apply_to(model)
    assert set(model.state_dict()) == before
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in network.parameters())
    own = {id(p) for p in model.parameters()}
    assert not own & {id(p) for p in network.parameters()}


def test_gradients_against_finite_differences():
    torch.manual_seed(0)
    base = nn.Linear(5, 3).double().requires_grad_(False)
    module = LoRALinear(base, 2, 3.0)
    nn.init.normal_(module.lora_up.weight)
    module.double().attach(base)
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)

    def f(x, down, up):
        return torch.func.functional_call(module, {"lora_down.weight": down, "lora_up.weight": up}, (x,), strict=False)

    factors = [p.detach().clone().requires_grad_() for p in (module.lora_down.weight, module.lora_up.weight)]
    assert torch.autograd.gradcheck(f, (x, *factors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_with_float32_factors(dtype):
    torch.manual_seed(0)
    base = nn.Linear(32, 48).requires_grad_(False)
    module = LoRALinear(base, 4, 8.0)
    nn.init.normal_(module.lora_up.weight, std=0.2)
    x = torch.randn(3, 7, 32)
    expected = base(x) + 2 * F.linear(F.linear(x, module.lora_down.weight), module.lora_up.weight)
    expected.sum().backward()
    wanted = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    base.to(dtype)
    module.attach(base)
    y = base(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.03, atol=0.03)
    y.sum().backward()
    for parameter, grad in zip(module.parameters(), wanted, strict=True):
        assert parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, grad, rtol=0.05, atol=0.3)


class _ViewingFunction(torch.autograd.Function):
    """Like a quantised layer's: its output is a view made inside the function."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return (x.reshape(-1, x.shape[-1]) @ weight.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.saved_tensors[0], None


class _OtherLinear(nn.Linear):
    def forward(self, x):
        return _ViewingFunction.apply(x, self.weight)


def test_base_may_be_any_linear_subclass():
    torch.manual_seed(0)
    base = _OtherLinear(6, 5, bias=False).requires_grad_(False)
    module = LoRALinear(base, 2, 2.0)
    nn.init.normal_(module.lora_up.weight)
    x = torch.randn(2, 3, 6, requires_grad=True)
    weight = base.weight + module.lora_up.weight @ module.lora_down.weight
    expected = F.linear(x, weight)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x, retain_graph=True)
    module.attach(base)
    y = base(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], wanted)


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6), (2, 0, 6), (2, 1, 3, 6)])
def test_any_number_of_leading_dimensions(shape):
    base = nn.Linear(6, 5)
    module = LoRALinear(base, 2, 2.0)
    nn.init.normal_(module.lora_up.weight)
    x = torch.randn(shape)
    expected = F.linear(x, base.weight + module.lora_up.weight @ module.lora_down.weight, base.bias)
    module.attach(base)
    torch.testing.assert_close(base(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(base(x.transpose(0, -1).contiguous().transpose(0, -1)), expected, rtol=1e-4, atol=1e-5)


def _checkpoint_blocks(model):
    for block in model.transformer_blocks:
        inner = block.forward
        block.forward = lambda *a, _inner=inner, **k: checkpoint(_inner, *a, use_reentrant=False, **k)


@pytest.mark.parametrize("args", [{}, {"rank_dropout": 0.3, "module_dropout": 0.3, "dropout": 0.2}])
def test_gradients_are_equal_under_checkpointing(args):
    def gradients(checkpointed):
        model = tiny_transformer()
        network = random_network(model, lora_target_preset="full", **args)
        network.apply_to(model)
        if checkpointed:
            _checkpoint_blocks(model)
        torch.manual_seed(5)
        sum(v.square().mean() for v in run(model).values()).backward()
        return {n: p.grad for n, p in network.named_parameters()}

    plain, recomputed = gradients(False), gradients(True)
    assert any(g is not None for g in plain.values())
    for name, grad in plain.items():
        assert (grad is None) == (recomputed[name] is None)
        if grad is not None:
            torch.testing.assert_close(recomputed[name], grad, rtol=0, atol=0)


@pytest.mark.parametrize("args", [{"dropout": 0.5}, {"rank_dropout": 0.5}, {"module_dropout": 0.5}])
def test_dropout_acts_in_training_only(args):
    model = tiny_transformer()
    plain = random_network(model)
    plain.apply_to(model)
    expected = run(model)
    plain.detach()
    network = random_network(model, **args)
    network.apply_to(model)
    network.eval()
    assert_same(run(model), expected)
    network.train()
    assert differs(run(model), expected)


def test_rank_dropout_drops_whole_components_of_a_sample_and_keeps_the_mean():
    base = nn.Linear(1, 8, bias=False).requires_grad_(False)
    base.weight.zero_()
    module = LoRALinear(base, 8, 8.0, rank_dropout=0.25)
    with torch.no_grad():
        module.lora_down.weight.fill_(1.0)
        module.lora_up.weight.copy_(torch.eye(8))
    torch.manual_seed(0)
    module.requires_grad_(False).attach(base)
    out = base(torch.ones(4000, 3, 1))  # [sample, token, component]
    assert torch.equal(out[:, 0], out[:, 1])
    assert torch.equal(out[:, 0], out[:, 2])
    torch.testing.assert_close(out.unique(), torch.tensor([0, 4 / 3]))
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)


def test_casting_the_network_keeps_alpha_exact():
    model = tiny_transformer()
    network = create_network(1.0, 3, 1.0, model)
    network.to(torch.bfloat16)
    network.multiplier = 0.3
    module = next(iter(network.modules_by_name.values()))
    assert module.lora_up.weight.dtype == torch.bfloat16
    assert module.alpha.dtype == module.scale.dtype == torch.float32
    assert module.scale.item() == pytest.approx(0.1, rel=1e-6)


def test_state_dict_of_another_alpha_restores_the_scale():
    model = tiny_transformer()
    source, target = random_network(model, alpha=2.0), random_network(model, alpha=7.0, seed=9)
    target.load_state_dict(source.state_dict())
    source.apply_to(model)
    expected = run(model)
    source.detach()
    target.apply_to(model)
    assert_same(run(model), expected)


def test_names_of_the_state_dict_are_those_of_native_files():
    network = create_network(1.0, 4, 1.0, tiny_transformer())
    stem = "lora_unet_transformer_blocks_0_audio_to_video_attn_to_out_0"
    assert {f"{stem}.{s}" for s in ("lora_down.weight", "lora_up.weight", "alpha")} <= set(network.state_dict())


def test_multiplier_and_switching_never_recompile():
    from torch._dynamo.testing import CompileCounter

    model = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(4))
    switch = Switch()
    modules = []
    for block in model:
        for layer in (block[0], block[2]):
            module = LoRALinear(layer.requires_grad_(False), 2, 1.0, switch=switch)
            nn.init.normal_(module.lora_up.weight)
            module.attach(layer)
            modules.append(module)
    reference = nn.Sequential(*model)
    x = torch.randn(3, 5, 8, requires_grad=True)  # as the outputs of blocks do
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = [torch.compile(block.forward, backend=counter, fullgraph=True) for block in model]

    def forward():
        y = x
        for f in compiled:
            y = f(y)
        return y

    results = []
    for multiplier in (1.0, 0.5, -2.0):
        for module in modules:
            module.set_multiplier(multiplier)
        results.append(forward())
        torch.testing.assert_close(results[-1], reference(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    for state in (False, True, False, True):
        switch.on = state
        torch.testing.assert_close(forward(), reference(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2
    assert not torch.equal(results[0], results[1])


def test_peft_computes_the_same_outputs_and_gradients():
    peft = pytest.importorskip("peft")
    ours, theirs = tiny_transformer(), tiny_transformer()
    network = random_network(ours, dim=4, alpha=2.0)
    network.apply_to(ours)
    targets = list(network.modules_by_name)
    config = peft.LoraConfig(r=4, lora_alpha=2.0, target_modules=targets)
    wrapped = peft.get_peft_model(theirs, config)
    state = {
        f"base_model.model.{name}.lora_{letter}.weight": weight
        for name, m in network.as_lora_file().modules.items()
        for letter, weight in (("A", m.down.clone()), ("B", m.up.clone()))
    }
    result = peft.set_peft_model_state_dict(wrapped, state)
    assert not result.unexpected_keys
    a, b = run(ours), run(wrapped)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-5)
        a[key].square().sum().backward(retain_graph=True)
        b[key].square().sum().backward(retain_graph=True)
    grads = dict(wrapped.named_parameters())
    for name, module in network.modules_by_name.items():
        for letter, weight in (("A", module.lora_down.weight), ("B", module.lora_up.weight)):
            other = grads[f"base_model.model.{name}.lora_{letter}.default.weight"].grad
            if weight.grad is None:  # a layer that no output depends on
                assert other is None
            else:
                torch.testing.assert_close(weight.grad, other, rtol=1e-4, atol=1e-5)


# --- arguments ---


def test_arguments_of_the_command_line():
    args = parse_network_args(
        {
            "include_patterns": r"['.*\.to_k$','.*\.to_out\.0$']",
            "exclude_patterns": "['.*audio_.*']",
            "rank_dropout": "0.1",
            "loraplus_lr_ratio": "16",
            "audio_dim": "8",
            "rank_pattern": "{'attn1': 2}",
            "verbose": "False",
        }
    )
    assert args.include_patterns == (r".*\.to_k$", r".*\.to_out\.0$")
    assert args.exclude_patterns == (".*audio_.*",)
    assert (args.rank_dropout, args.loraplus_lr_ratio, args.audio_dim) == (0.1, 16.0, 8)
    assert args.rank_pattern == {"attn1": 2}
    assert args.verbose is False


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"include_pattern": "[]"}, "unknown key 'include_pattern'.*did you mean 'include_patterns'"),
        ({"include_patterns": "['unclosed"}, "include_patterns=.*not a Python literal"),
        ({"include_patterns": "attn1"}, "include_patterns=attn1: not a Python literal; expected a list of strings"),
        ({"rank_pattern": "attn1:8"}, "rank_pattern=attn1:8: not a Python literal; expected a table"),
        ({"include_patterns": "'.*to_k$'"}, "expected a list of strings"),
        ({"rank_dropout": "1.0"}, r"expected a number in \[0, 1\)"),
        ({"audio_dim": "0"}, "expected an integer >= 1"),
        ({"audio_dim": "x"}, "audio_dim=x"),
        ({"verbose": "maybe"}, "expected True or False"),
        ({"rank_pattern": "{'attn1': 0}"}, "expected an integer >= 1"),
    ],
)
def test_bad_arguments(args, message):
    with pytest.raises(UserError, match=message):
        parse_network_args(args)


@pytest.mark.parametrize(("dim", "dropout"), [(0, None), (-1, None), (4, 1.5)])
def test_bad_dim_and_dropout(dim, dropout):
    with pytest.raises(UserError, match="--network_d"):
        create_network(1.0, dim, 1.0, tiny_transformer(), dropout=dropout)


def test_ranks_and_alphas_per_module():
    args = {"audio_dim": "6", "audio_alpha": "3", "rank_pattern": "{'attn1': 2, 'audio_attn1': 5}"}
    network = create_network(1.0, None, None, tiny_transformer(), **args)
    found = {n.split(".", 2)[2]: (m.rank, m.alpha_value) for n, m in network.modules_by_name.items()}
    assert found["attn2.to_q"] == (4, 4.0)
    assert found["attn1.to_q"] == (2, 2.0)
    assert found["audio_attn2.to_q"] == (6, 3.0)
    assert found["audio_attn1.to_q"] == (5, 3.0)


def test_summary_counts_each_stream():
    network = create_network(1.0, 4, 1.0, tiny_transformer("2.0"))
    summary = network.summary()
    assert {k: c.modules for k, c in summary.items()} == {"video": 16, "audio": 16, "cross": 16}
    assert summary["video"].params == 16 * 4 * 64
    assert sum(c.params for c in summary.values()) == sum(p.numel() for p in network.parameters())
    assert "48 modules" in network.describe()


def test_full_preset_mentions_the_gates(caplog):
    with caplog.at_level(logging.INFO):
        create_network(1.0, 4, 1.0, tiny_transformer(), lora_target_preset="full")
        assert "12 attention gates" in caplog.text


def test_arguments_for_convolutions_are_mentioned_once(caplog):
    """Arguments are read several times before the network is made."""
    model = tiny_transformer()
    check_arguments(linear_names(model), 4, 1.0, conv_dim="8")
    create_network(1.0, 4, 1.0, model, conv_dim="8")
    assert sum("hold no convolutions" in r.message for r in caplog.records) == 1
