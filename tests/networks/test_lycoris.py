"""LyCORIS networks on a tiny transformer: identities, closed forms, gradients, files, merging."""

from __future__ import annotations

from pathlib import Path

import ltx2_tiny
import pytest
import torch
from checkpoint_files import load, save_checkpoint, tiny_weights
from lora_samples import run, tiny_transformer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd import gradcheck

from musubi_tuner.common.errors import UserError
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.ltx2.load import load_transformer, transformer_shapes
from musubi_tuner.networks.attached import Switch
from musubi_tuner.networks.file_tools.convert import Part, convert_adapter
from musubi_tuner.networks.file_tools.magnitudes import comfy_magnitudes
from musubi_tuner.networks.file_tools.merge_model import merge_into_model
from musubi_tuner.networks.files.adapter_file import AdapterFile
from musubi_tuner.networks.lora_ltx2 import create_network as create_lora
from musubi_tuner.networks.lycoris.bridge import create_network, create_network_from_weights
from musubi_tuner.networks.lycoris.files import LycorisReader, is_lycoris_file, open_adapter
from musubi_tuner.networks.lycoris.layer import LycorisLinear, make_layer
from musubi_tuner.networks.lycoris.network import LycorisNetwork
from musubi_tuner.networks.lycoris.options import LayerOptions
from musubi_tuner.networks.merge_on_load import open_base_weights, weight_edits
from musubi_tuner.networks.verdict import Verdict

ADDING = {
    "locon": {"algo": "locon"},
    "loha": {"algo": "loha"},
    "lokr": {"algo": "lokr"},
    "lokr, factor": {"algo": "lokr", "factor": 2},
    "lokr, both": {"algo": "lokr", "decompose_both": True},
    "lokr, full": {"algo": "lokr", "full_matrix": True},
    "lokr, unbalanced": {"algo": "lokr", "unbalanced_factorization": True},
    "rslora": {"algo": "lora", "rs_lora": True},
}
OTHERS = {
    "ia3": {"algo": "ia3"},
    "ia3, inputs": {"algo": "ia3", "train_on_input": True},
    "dora": {"algo": "lora", "dora_wd": True},
    "dokr": {"algo": "lokr", "dora_wd": True},
    "doha, inputs": {"algo": "loha", "dora_wd": True, "wd_on_output": False},
}
ALL = ADDING | OTHERS


def network_of(model: nn.Module, *, seed: int = 2, dim: int = 2, alpha: float = 3.0, **options) -> LycorisNetwork:
    """A network that changes the output: no factor is zero."""
    torch.manual_seed(seed)
    network = create_network(1.0, dim, alpha, model, **{"lora_target_preset": "no_gates", **options})
    for module in network.modules_by_name.values():
        for tensor in module.tensors().values():
            if tensor.is_floating_point():
                nn.init.normal_(tensor, std=0.3)
    return network


def vary_lengths(network: LycorisNetwork) -> None:
    for module in network.modules_by_name.values():
        if module.dora is not None:
            factors = torch.linspace(0.7, 1.4, module.dora_scale.numel()).view_as(module.dora_scale)
            module.set_lengths(module.lengths() * factors)


def delta_of(module: LycorisLinear) -> Tensor:
    """``dW`` written down from the papers, in float64."""
    t = {name: tensor.detach().double() for name, tensor in module.named_parameters()}
    if module.kind == "lora":
        return t["lora_up.weight"] @ t["lora_down.weight"] * (module.alpha_value / module.rank)
    if module.kind == "loha":
        return (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]) * module.alpha_value / module.rank
    first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    second = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    whole = "lokr_w1" in t and "lokr_w2" in t
    return torch.kron(first, second) * (1 if whole else module.alpha_value / module.rank)


def changed_weight(module: LycorisLinear, weight: Tensor, strength: float = 1.0) -> Tensor:
    """``W'``, in float64."""
    if module.kind == "ia3":
        factors = module.weight.detach().double()
        return weight + strength * weight * (factors if module.on_input else factors[:, None])
    delta = delta_of(module)
    if module.dora is None:
        return weight + strength * delta
    new = weight + delta
    new = module.dora_scale.detach().double() * new / new.norm(dim=1 - module.dora, keepdim=True)
    return weight + strength * (new - weight)


@pytest.mark.parametrize("name", ALL)
def test_a_new_network_and_the_multiplier_zero_are_the_base(name):
    model = tiny_transformer()
    base = run(model)
    fresh = create_network(1.0, 2, 1.0, model, lora_target_preset="no_gates", **ALL[name])
    fresh.apply_to(model)
    for key, value in run(model).items():
        torch.testing.assert_close(value, base[key], rtol=1e-5, atol=1e-5)
    fresh.detach()
    network = network_of(model, **ALL[name])
    network.apply_to(model)
    assert all(not torch.allclose(value, base[key], atol=1e-3) for key, value in run(model).items())
    with network.gain(0.0):
        assert all(torch.equal(value, base[key]) for key, value in run(model).items())
    network.detach()
    assert all(torch.equal(value, base[key]) for key, value in run(model).items())
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("strength", [1.0, -0.6])
@pytest.mark.parametrize("name", ALL)
def test_the_forward_is_that_of_the_changed_weight(name, strength):
    """In float64 against weights written down independently; widths that differ, and a bias."""
    torch.manual_seed(0)
    base, x = nn.Linear(24, 36, dtype=torch.float64), torch.randn(2, 5, 24, dtype=torch.float64)
    holder = nn.Module()
    holder.transformer_blocks = nn.ModuleList([nn.Module()])
    holder.transformer_blocks[0].attn1 = nn.Module()
    holder.transformer_blocks[0].attn1.to_q = base
    network = network_of(holder, **ALL[name]).double()
    network.apply_to(holder)
    vary_lengths(network)
    network.multiplier = strength
    (module,) = network.modules_by_name.values()
    expected = x @ changed_weight(module, base.weight, strength).T + base.bias
    torch.testing.assert_close(base(x), expected)


@pytest.mark.parametrize("name", ADDING)
def test_gradients_of_factors_and_inputs(name):
    """Against differences of the function, in float64."""
    torch.manual_seed(1)
    base = nn.Linear(6, 8, dtype=torch.float64).requires_grad_(False)
    module = make_layer(base, LayerOptions(**{"dim": 1, "alpha": 2.0, **ADDING[name]}), None, Switch()).double()
    module.attach(base)
    parameters = list(module.parameters())
    values = [torch.randn_like(p) for p in parameters]
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, *factors: Tensor) -> Tensor:
        named = {name: f for (name, _), f in zip(module.named_parameters(), factors, strict=True)}
        return torch.func.functional_call(module, named, (x,))

    assert gradcheck(function, (x, *[v.requires_grad_() for v in values]))


@pytest.mark.parametrize("name", OTHERS)
def test_gradients_where_the_weight_counts(name):
    """Against autograd through the changed weight; its norm is a constant, as in the paper."""
    torch.manual_seed(1)
    base = nn.Linear(6, 8, dtype=torch.float64).requires_grad_(False)
    module = make_layer(base, LayerOptions(**{"dim": 1, "alpha": 2.0, **OTHERS[name]}), None, Switch()).double()
    module.attach(base)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 6, dtype=torch.float64)
    module(x).square().sum().backward()
    found = {n: p.grad.clone() for n, p in module.named_parameters()}
    module.zero_grad()
    t, scale = dict(module.named_parameters()), module.scale
    if module.kind == "ia3":
        new = base.weight * (1 + (t["weight"] if module.on_input else t["weight"][:, None]))
    else:
        if module.kind == "lora":
            delta = t["lora_up.weight"] @ t["lora_down.weight"]
        elif module.kind == "loha":
            delta = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
        else:
            second = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
            delta = torch.kron(t["lokr_w1"], second)
        sum_ = base.weight + scale * delta
        new = t["dora_scale"] * sum_ / sum_.norm(dim=1 - module.dora, keepdim=True).detach()
    (x @ new.T + base.bias).square().sum().backward()
    for key, parameter in module.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad)


def test_a_small_change_survives_a_bfloat16_base():
    """Where the base is rounded to bfloat16, so is not what is added to it."""
    torch.manual_seed(0)
    base = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    module = make_layer(base, LayerOptions(algo="lokr", dim=4, alpha=4.0), None, Switch())
    with torch.no_grad():
        for tensor in module.tensors().values():
            tensor.normal_(std=0.01)
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    module.attach(base)
    before, added = module._base_forward(x), module._added(x, module._base_forward(x))
    exact = x.double() @ delta_of(module).T
    assert ((added.double() - exact).norm() / exact.norm()).item() < 0.02
    assert added.abs().max() < 0.05 * before.abs().max(), "a change that rebuilding W would lose"


@pytest.mark.parametrize("fmt", ["native", "comfy"])
@pytest.mark.parametrize("name", ALL)
def test_saved_and_loaded_again(name, fmt, tmp_path: Path):
    """Into a network made alike, and one made from the file; saved again from there, bit for bit the same."""
    model = tiny_transformer()
    network = network_of(model, **ALL[name])
    network.apply_to(model)
    vary_lengths(network)
    expected = run(model)
    path = network.save_checked(tmp_path / "a.safetensors", network.verdict(), None, {}, fmt=fmt)
    network.detach()
    same = create_network(1.0, 2, 3.0, model, lora_target_preset="no_gates", **ALL[name])
    same.load_weights(path)
    for loaded in (same, create_network_from_weights(1.0, path, model)):
        loaded.apply_to(model)
        for key, value in run(model).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
        again = loaded.save_checked(tmp_path / "b.safetensors", loaded.verdict(), None, {}, fmt=fmt)
        loaded.detach()
        tensors = load_file(again)
        exact = fmt == "native" or name not in ("dora", "dokr")
        for key, tensor in load_file(path).items():
            torch.testing.assert_close(tensors[key], tensor, **({"rtol": 0, "atol": 0} if exact else {}))


@pytest.mark.parametrize("name", ["dora", "dokr"])
def test_lengths_in_the_file_for_comfyui(name, tmp_path: Path):
    """It computes ``m (W + dW) / |W|``, which has to be the layer's weight."""
    model = tiny_transformer()
    network = network_of(model, **ALL[name])
    network.apply_to(model)
    vary_lengths(network)
    tensors = load_file(network.save_checked(tmp_path / "x.safetensors", network.verdict(), None, {}, fmt="comfy"))
    for path, module in network.modules_by_name.items():
        weight = model.get_submodule(path).weight.double()
        lengths = tensors[f"diffusion_model.{path}.dora_scale"].double()
        theirs = lengths * (weight + delta_of(module)) / weight.norm(dim=1, keepdim=True)
        torch.testing.assert_close(theirs, changed_weight(module, weight), rtol=1e-4, atol=1e-5)


def test_keys_of_both_formats(tmp_path: Path):
    """As the library spells them, and as ComfyUI does."""
    model = tiny_transformer()
    network = network_of(model, algo="lokr", **{"modules.*audio*.algo": "lora", "modules.*attn2*.algo": "loha"})
    native = load_file(network.save_checked(tmp_path / "n.safetensors", network.verdict(), torch.bfloat16, {}))
    comfy = load_file(
        network.save_checked(tmp_path / "c.safetensors", network.verdict(), torch.bfloat16, {}, fmt="comfy")
    )
    flat, dotted = "lora_unet_transformer_blocks_0_", "diffusion_model.transformer_blocks.0."
    for key in ("attn1_to_q.lokr_w1", "attn1_to_q.alpha", "attn2_to_q.hada_w2_b", "audio_ff_net_2.lora_up.weight"):
        assert flat + key in native
    for key in ("attn1.to_q.lokr_w1", "attn1.to_q.alpha", "attn2.to_q.hada_w2_b", "audio_ff.net.2.lora_B.weight"):
        assert dotted + key in comfy
    assert f"{dotted}audio_ff.net.2.alpha" not in comfy, "it is in lora_B"
    up = native[f"{flat}audio_ff_net_2.lora_up.weight"].float() * (3.0 / 2)
    torch.testing.assert_close(comfy[f"{dotted}audio_ff.net.2.lora_B.weight"].float(), up, rtol=0.01, atol=0.01)
    assert {t.dtype for k, t in native.items() if not k.endswith(".alpha")} == {torch.bfloat16}
    assert {t.dtype for k, t in native.items() if k.endswith(".alpha")} == {torch.float32}


@pytest.mark.parametrize("name", ["locon", "loha", "lokr, both", "lokr, full", "rslora", "dora", "dokr"])
def test_the_library_reads_our_file(name, tmp_path: Path):
    """Its own loader makes modules of it that compute the same."""
    from lycoris.kohya import create_network_from_weights as library

    model = tiny_transformer()
    base = run(model)
    network = network_of(model, **ALL[name])
    network.apply_to(model)
    vary_lengths(network)
    expected = run(model)
    path = network.save_checked(tmp_path / "x.safetensors", network.verdict(), None, {})
    network.detach()
    theirs, _ = library(1.0, str(path), None, None, model)
    theirs.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    assert len(theirs.unet_loras) == len(network.modules_by_name)
    for key, value in run(model).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(value, base[key], atol=1e-3)


def test_a_plain_lora_file_and_one_of_lora_layers_are_the_same_thing(tmp_path: Path):
    model = tiny_transformer()
    ours = network_of(model, algo="locon")
    path = ours.save_checked(tmp_path / "x.safetensors", ours.verdict(), None, {})
    assert not is_lycoris_file(path)
    lora = create_lora(1.0, 2, 3.0, model, lora_target_preset="no_gates")
    lora.load_weights(path)
    for name, module in lora.modules_by_name.items():
        assert torch.equal(module.lora_up.weight, ours.modules_by_name[name].tensors()["lora_up.weight"])


def test_converted_there_and_back(tmp_path: Path):
    model = tiny_transformer()
    network = network_of(model, algo="lokr", **{"modules.*attn2*.algo": "loha"})
    path = network.save_checked(tmp_path / "x.safetensors", network.verdict(), None, {})
    convert_adapter(AdapterFile(path), [Part(tmp_path / "comfy.safetensors")], "comfy")
    own = network.save_checked(tmp_path / "own.safetensors", network.verdict(), None, {}, fmt="comfy")
    converted = load_file(tmp_path / "comfy.safetensors")
    assert converted.keys() == load_file(own).keys()
    assert all(torch.equal(tensor, converted[key]) for key, tensor in load_file(own).items())


@pytest.mark.parametrize("name", ["dora", "dokr", "doha, inputs"])
def test_the_converted_file_with_lengths_gives_the_same_output(name, tmp_path: Path):
    base = save_checkpoint(tmp_path / "base.safetensors", tiny_weights())
    model = load(base)
    network = network_of(model, **ALL[name])
    network.apply_to(model)
    vary_lengths(network)
    expected, path = outputs(model), tmp_path / "native.safetensors"
    network.save_checked(path, network.verdict(), None, {})
    for fmt in ("comfy", "native"):
        source, path = AdapterFile(path), tmp_path / f"to_{fmt}.safetensors"
        convert_adapter(source, [Part(path)], fmt, magnitudes=comfy_magnitudes(source, fmt, base))
        fresh = load(base)
        create_network_from_weights(1.0, path, fresh).apply_to(fresh)
        for key, value in outputs(fresh).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)


def test_lengths_are_saved_in_float32(tmp_path: Path):
    """Half precision rounds them by more than training changes them."""
    model = tiny_transformer()
    network = network_of(model, algo="lokr", dora_wd=True)
    network.apply_to(model)
    vary_lengths(network)
    path = network.save_checked(tmp_path / "x.safetensors", network.verdict(), torch.bfloat16, {})
    stored = LycorisReader(path).read_all().modules
    for name, module in network.modules_by_name.items():
        assert torch.equal(stored[name].lengths, module.lengths())
        assert stored[name].tensors["lokr_w1"].dtype == torch.bfloat16


def outputs(model: nn.Module) -> dict[str, Tensor]:
    return dict(model(ltx2_tiny.tiny_inputs(ltx2_tiny.tiny_config("2.3"))).items())


@pytest.mark.parametrize("name", ADDING)
def test_merged_equals_applied(name, tmp_path: Path):
    path = save_checkpoint(tmp_path / "base.safetensors", tiny_weights())
    model = load(path)
    base, network = outputs(model), network_of(model, **ADDING[name]).eval()
    network.apply_to(model)
    network.multiplier = 0.7
    applied = outputs(model)
    file = network.save_checked(tmp_path / "x.safetensors", network.verdict(), None, {})
    done = merge_into_model(path, [(open_adapter(file), 0.7)], tmp_path / "merged.safetensors")
    assert done.merged == len(network.modules_by_name)
    for key, value in outputs(load(tmp_path / "merged.safetensors")).items():
        torch.testing.assert_close(value, applied[key], rtol=1e-3, atol=1e-5)
        assert not torch.allclose(value, base[key], atol=1e-4)


@pytest.mark.parametrize("fmt", ["native", "comfy"])
@pytest.mark.parametrize("name", ["ia3", "ia3, inputs", "dora", "dokr"])
def test_what_changes_more_than_a_sum_is_merged_as_applied(name, fmt, tmp_path: Path, monkeypatch):
    """Into a checkpoint and while loading, a few rows at a time."""
    monkeypatch.setattr("musubi_tuner.quantization.rows._ELEMENTS", 160)
    base = save_checkpoint(tmp_path / "base.safetensors", tiny_weights())
    model = load(base)
    network = network_of(model, **ALL[name]).eval()
    network.apply_to(model)
    vary_lengths(network)
    network.multiplier = 0.7
    expected = outputs(model)
    file = network.save_checked(tmp_path / "x.safetensors", network.verdict(), None, {}, fmt=fmt)
    merge_into_model(base, [(open_adapter(file), 0.7)], tmp_path / "merged.safetensors")
    edits = weight_edits(open_base_weights([file], [0.7]), transformer_shapes(Checkpoint.open(base), "av"))
    loaded = load_transformer(
        Checkpoint.open(base), mode="av", dtype=torch.float32, device="cpu", quantization=None, edits=edits
    )
    for merged in (load(tmp_path / "merged.safetensors"), loaded):
        for key, value in outputs(merged).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-5)


def test_lengths_of_inputs_are_not_merged(tmp_path: Path):
    path = save_checkpoint(tmp_path / "base.safetensors", tiny_weights())
    model = load(path)
    options = {"modules.*.attn2.*.dora_wd": "True", "modules.*.attn2.*.wd_on_output": "False"}
    network = network_of(model, algo="lokr", **options)
    network.apply_to(model)
    file = network.save_checked(tmp_path / "x.safetensors", network.verdict(), None, {})
    for merge in (
        lambda: merge_into_model(path, [(open_adapter(file), 1.0)], tmp_path / "merged.safetensors"),
        lambda: weight_edits(open_base_weights([file], []), transformer_shapes(Checkpoint.open(path), "av")),
    ):
        with pytest.raises(UserError, match="8 modules are DoRA with a length for each input"):
            merge()
    assert not (tmp_path / "merged.safetensors").exists()


@pytest.mark.parametrize("name", ADDING)
def test_norms_of_the_verdict_and_their_limit(name):
    model = tiny_transformer()
    network = network_of(model, **ADDING[name])
    layers = network.modules_by_name

    def norms() -> dict[str, float]:
        return {n: delta_of(m).norm().item() for n, m in layers.items()}

    before = norms()
    total = sum(norm**2 for norm in before.values()) ** 0.5
    verdict: Verdict = network.verdict()
    assert sum(s.norm**2 for s in verdict.streams.values()) ** 0.5 == pytest.approx(total, rel=1e-4)
    limit = sum(sorted(before.values())[27:29]) / 2
    scaled, mean, largest = network.apply_max_norm_regularization(limit, torch.device("cpu"))
    after = norms()
    assert scaled == sum(norm > limit for norm in before.values())
    assert largest == pytest.approx(limit, rel=1e-4)
    for layer, norm in before.items():
        assert after[layer] == pytest.approx(min(norm, limit), rel=1e-4)
    assert mean == pytest.approx(sum(after.values()) / len(after), rel=1e-4)


@pytest.mark.parametrize("decompose_both", [False, True])
@pytest.mark.parametrize("dim", [4, 1000])
def test_the_start_of_lokr(dim, decompose_both):
    torch.manual_seed(0)
    options = LayerOptions(algo="lokr", dim=dim, alpha=float(dim), factor=8, decompose_both=decompose_both)
    module = make_layer(nn.Linear(1024, 512), options, 0.01, Switch())
    delta = delta_of(module)
    assert delta.std().item() == pytest.approx(0.01, rel=0.2)
    first = delta[: 512 // 8, : 1024 // 8]
    torch.testing.assert_close(delta[-512 // 8 :, -1024 // 8 :], first, msg="its first factor is one everywhere")


def test_dropout_is_drawn_in_training_alone_and_keyed_by_the_seed():
    model = tiny_transformer()
    for options in ({"dropout": 0.3}, {"rank_dropout": "0.5"}, {"module_dropout": "0.5"}):
        for algo in ("lora", "lokr", "loha"):
            network = network_of(model, algo=algo, **options)
            network.apply_to(model)
            assert network.draws_random
            outputs = []
            for seed in (7, 7, 8):
                torch.manual_seed(seed)
                outputs.append(run(model)["video"])
            assert torch.equal(outputs[0], outputs[1])
            assert not torch.equal(outputs[0], outputs[2])
            network.eval()
            assert torch.equal(run(model)["video"], run(model)["video"])
            network.detach()


def test_the_same_modules_as_a_lora_of_the_same_targets():
    model = tiny_transformer()
    for options in ({"lora_target_preset": "t2v"}, {"lora_target_preset": "audio"}, {"exclude_patterns": "['.*ff.*']"}):
        ours = create_network(1.0, 2, 1.0, model, algo="lokr", **options)
        lora = create_lora(1.0, 2, 1.0, model, **options)
        assert list(ours.modules_by_name) == list(lora.modules_by_name)
        assert {k: c.modules for k, c in ours.summary().items()} == {k: c.modules for k, c in lora.summary().items()}
    full = create_lora(1.0, 2, 1.0, model, lora_target_preset="full").modules_by_name
    chosen = create_lora(1.0, 2, 1.0, model, lora_target_preset="no_gates").modules_by_name
    assert [n for n in full if not n.endswith("to_gate_logits")] == list(chosen)
    assert len(chosen) < len(full)


def without_rank(name: str, tensor: Tensor) -> Tensor:
    return tensor[:, :0] if name.endswith("w2_a") else tensor[:0] if name.endswith("w2_b") else tensor


BAD = {
    "holds NaN or infinity": lambda t: {k: v * float("nan") for k, v in t.items()},
    "are of no algorithm known here": lambda t: {k: v for k, v in t.items() if not k.endswith("attn1_to_q.lokr_w1")},
    "unknown to LTX-2": lambda t: {k.replace("_attn1_", "_attn9_"): v for k, v in t.items()},
    "rank 0": lambda t: {k: without_rank(k, v) for k, v in t.items()},
    "is made for a layer of": lambda t: {k: v[:1] if k.endswith("lokr_w1") else v for k, v in t.items()},
    "does not fit the network": lambda t: {k: v for k, v in t.items() if "_blocks_0_attn1" not in k},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_files(message, tmp_path: Path):
    model = tiny_transformer()
    network = network_of(model, algo="lokr", dim=1)
    path = network.save_checked(tmp_path / "x.safetensors", network.verdict(), None, {})
    save_file({k: v.contiguous() for k, v in BAD[message](load_file(path)).items()}, tmp_path / "bad.safetensors")

    def load() -> None:
        file = LycorisReader(tmp_path / "bad.safetensors").read_all()
        create_network_from_weights(1.0, file, model)
        create_network(1.0, 1, 3.0, model, algo="lokr", lora_target_preset="no_gates").load_weights(file)

    with pytest.raises(UserError, match=message):
        load()


def test_files_of_another_kind_are_refused(tmp_path: Path):
    model = tiny_transformer()
    lokr = network_of(model, algo="lokr")
    path = lokr.save_checked(tmp_path / "x.safetensors", lokr.verdict(), None, {})
    with pytest.raises(UserError, match="is LoKr, that of the network LoHa"):
        network_of(model, algo="loha").load_weights(path)
    with pytest.raises(UserError, match="without DoRA, that of the network with it"):
        network_of(model, algo="lokr", dora_wd="True").load_weights(path)
    with pytest.raises(UserError, match="a LyCORIS LoKr file"):
        create_lora(1.0, 2, 1.0, model).load_weights(path)
