"""A LoRA that starts at a correction of the base: what it computes, what its files hold, stored factors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.safetensors_io import save_safetensors
from musubi_tuner.config.loftq_names import loftq_path
from musubi_tuner.networks.files.loftq_factors import StoredLoftQ
from musubi_tuner.networks.files.lora_reader import load_lora
from musubi_tuner.networks.loftq import LoftQ
from musubi_tuner.networks.lora_ltx2 import create_network
from musubi_tuner.networks.lora_network import LoRANetwork
from musubi_tuner.quantization.linear import QuantizedLinear
from musubi_tuner.quantization.packed import Nf4

PATH = "transformer_blocks.0.attn1.to_q"
RANK, ALPHA = 4, 2.0


class Block(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.attn1 = nn.Module()
        self.attn1.to_q = nn.Linear(*reversed(weight.shape), bias=False)
        self.attn1.to_q.weight.data = weight

    def forward(self, x: Tensor) -> Tensor:
        return self.attn1.to_q(x)


def model_of(weight: Tensor) -> nn.Module:
    model = nn.Module()
    model.transformer_blocks = nn.ModuleList([Block(weight)])
    return model


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(64, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def started(weight) -> tuple[nn.Module, LoRANetwork]:
    """A quantised model and a network of LoftQ on it."""
    model = model_of(weight)
    network = create_network(1.0, RANK, ALPHA, model)
    packed = LoftQ(network.modules_by_name, 2).quantize(f"{PATH}.weight", weight, Nf4())
    model.transformer_blocks[0].attn1.to_q = QuantizedLinear(packed)
    network.apply_to(model)
    return model, network


def parts(network: LoRANetwork) -> tuple[Tensor, Tensor]:
    """What the network adds to its base now, and what it added at the start."""
    module = network.modules_by_name[PATH]
    scale = ALPHA / RANK
    now = module.lora_up.weight @ module.lora_down.weight
    return scale * now.detach(), scale * (module.start_up.float() @ module.start_down.float())


def train_a_little(network: LoRANetwork, amount: float) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in network.parameters():
        parameter.data += amount * torch.randn(parameter.shape, generator=generator)


def acts_as(model: nn.Module) -> Tensor:
    """[N, K]: the weight that the layer acts with."""
    with torch.no_grad():
        return model.transformer_blocks[0](torch.eye(96)).T


def test_starts_nearer_to_the_original(weight, started):
    model, _ = started
    plain = Nf4().quantize(weight).dense(torch.float32)
    assert (acts_as(model) - weight).norm() < 0.95 * (plain - weight).norm()


def test_a_weight_that_loses_nothing_is_learnt_from_where_a_lora_starts():
    """With both factors at zero neither would ever have a gradient."""
    zeros = torch.zeros(64, 96)
    model = model_of(zeros)
    network = create_network(1.0, RANK, ALPHA, model)
    packed = LoftQ(network.modules_by_name, 2).quantize(f"{PATH}.weight", zeros, Nf4())
    model.transformer_blocks[0].attn1.to_q = QuantizedLinear(packed)
    network.apply_to(model)
    module = network.modules_by_name[PATH]
    assert not module.lora_up.weight.any()
    assert not module.trained_factors()[0][RANK:].any()
    model.transformer_blocks[0](torch.ones(1, 96)).sum().backward()
    assert module.lora_up.weight.grad.abs().max() > 0


@pytest.mark.parametrize("gain", [0.0, 1.0, -1.0, 0.5])
def test_the_multiplier_scales_what_was_trained(started, gain):
    model, network = started
    base = model.transformer_blocks[0].attn1.to_q.dense_weight(torch.float32)
    train_a_little(network, 0.05)
    now, start = parts(network)
    assert (now - start).norm() > 0.1 * start.norm()
    with network.gain(gain):
        torch.testing.assert_close(acts_as(model), base + start + gain * (now - start))
    torch.testing.assert_close(acts_as(model), base + now)


def test_without_training_every_gain_is_the_same(started):
    model, network = started
    expected = acts_as(model)
    for gain in (0.0, -1.0, 2.0):
        with network.gain(gain):
            torch.testing.assert_close(acts_as(model), expected, atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_a_plain_lora(weight, started):
    model, network = started
    plain = model_of(model.transformer_blocks[0].attn1.to_q.dense_weight(torch.float32))
    twin = create_network(1.0, RANK, ALPHA, plain)
    twin.apply_to(plain)
    module, other = network.modules_by_name[PATH], twin.modules_by_name[PATH]
    other.load_state_dict({k: v for k, v in module.state_dict().items() if "start" not in k})
    grads = []
    for m, net in ((model, network), (plain, twin)):
        x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1)).requires_grad_()
        m.transformer_blocks[0](x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in net.parameters())])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("fmt", ["native", "comfy"])
@pytest.mark.parametrize("amount", [0.05, 1e-4])
def test_files_hold_what_was_trained(tmp_path: Path, started, fmt, amount):
    """Also a change that is far smaller than the start survives bfloat16."""
    _, network = started
    train_a_little(network, amount)
    now, start = parts(network)
    path = network.save_checked(tmp_path / "x.safetensors", network.verdict(), torch.bfloat16, {}, fmt=fmt)
    written = load_lora(path).modules[PATH]
    assert written.info.rank == 2 * RANK
    assert (written.delta() - (now - start)).norm() < 0.01 * (now - start).norm()


def test_nothing_trained_is_no_change(tmp_path: Path, started):
    _, network = started
    verdict = network.verdict()
    assert verdict.untouched(["video"]) == ["video"]
    path = network.save_checked(tmp_path / "x.safetensors", verdict, torch.bfloat16, network.metadata())
    assert torch.equal(load_lora(path).modules[PATH].delta(), torch.zeros(64, 96))
    with safe_open(path, "pt") as file:
        described = file.metadata()
    assert (described["ss_network_dim"], described["ss_network_alpha"]) == (str(2 * RANK), f"{2 * ALPHA:g}")


def test_states_keep_the_start(weight, started):
    _, network = started
    train_a_little(network, 0.05)
    other = create_network(1.0, RANK, ALPHA, model_of(weight))
    LoftQ(other.modules_by_name, 1).quantize(f"{PATH}.weight", weight, Nf4())
    other.load_state_dict(network.state_dict())
    for name, module in network.as_lora_file().modules.items():
        assert torch.equal(other.as_lora_file().modules[name].delta(), module.delta())


def test_the_rank_is_at_most_that_of_the_weight(weight):
    network = create_network(1.0, 65, ALPHA, model_of(weight))
    with pytest.raises(UserError, match=r"to_q has a weight of \[64, 96\], so no rank 65; lower --network_dim"):
        LoftQ(network.modules_by_name, 1).quantize(f"{PATH}.weight", weight, Nf4())


@pytest.fixture
def stored(tmp_path: Path, weight):
    """Write a file of factors beside a checkpoint; the checkpoint's path."""

    def write(rank: int = RANK, *, leave_out: str = "none", **metadata: str) -> Path:
        prefix = "lora_unet_transformer_blocks_0_attn1_to_q"
        factors = {f"{prefix}.lora_A": torch.ones(rank, 96), f"{prefix}.lora_B": torch.ones(64, rank)}
        known = {"loftq_rank": str(rank), "nf4_block_size": "32", **metadata}
        kept = {key: t for key, t in factors.items() if not key.endswith(leave_out)}
        save_safetensors(kept, loftq_path(tmp_path / "m-nf4.safetensors", rank), known)
        return tmp_path / "m-nf4.safetensors"

    return write


def test_stored_factors_are_read(weight, stored):
    network = create_network(1.0, RANK, ALPHA, model_of(weight))
    file = StoredLoftQ(stored(), RANK, "32")
    assert file.start(network.modules_by_name, [PATH, "transformer_blocks.7.attn1.to_q"]) == [PATH]
    now, _ = parts(network)
    assert torch.equal(now, torch.full((64, 96), float(RANK)))


def test_another_rank_is_one_message(stored):
    with pytest.raises(UserError, match=r"only of rank 4; use --network_dim 4, or run ltx2_quantize_model.py") as error:
        StoredLoftQ(stored(), 8, "32")
    assert "--loftq_init --network_dim 8" in str(error.value)
    assert str(error.value).startswith(str(loftq_path(stored(), 8)))


def test_no_factors_at_all(tmp_path: Path):
    with pytest.raises(UserError, match="there are none; run ltx2_quantize_model.py"):
        StoredLoftQ(tmp_path / "m-nf4.safetensors", 8, "32")


def test_factors_of_other_blocks(stored):
    with pytest.raises(UserError, match="for NF4 blocks of 64, expected rank 4 and m-nf4.safetensors's blocks of 32"):
        StoredLoftQ(stored(nf4_block_size="64"), RANK, "32")


@pytest.mark.parametrize("options", [{"rank_pattern": "{'attn1': 2}"}, {}], ids=["another rank", "missing"])
def test_modules_that_do_not_fit(weight, stored, options):
    network = create_network(1.0, RANK, ALPHA, model_of(weight), **options)
    file = StoredLoftQ(stored(leave_out="none" if options else "lora_B"), RANK, "32")
    with pytest.raises(UserError, match=f"for {PATH}, expected"):
        file.start(network.modules_by_name, [PATH])
