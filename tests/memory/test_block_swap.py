"""Blocks whose weights live elsewhere compute what resident ones do, with few of them resident at a time."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from memory_models import CPU, EagerTransfer, LateTransfer, assert_same, quantised_to, subject
from torch import nn

from musubi_tuner.memory.block_layout import FrozenTensors
from musubi_tuner.memory.block_swap import BlockSwap, swap_blocks, swapped_positions
from musubi_tuner.memory.checkpointing import checkpoint_blocks, checkpointed_positions
from musubi_tuner.quantization.linear import QuantizedLinear
from musubi_tuner.quantization.packed import Fp8, Int8, Nf4

LAYERS = 6


def swapped(count: int, *, checkpointed: int = 0, transfer=None, **options):
    """A model with swapped blocks, whose weights at home cannot be computed with; and what swaps them."""
    made = subject(LAYERS, **options)
    recomputed = checkpointed_positions(LAYERS, checkpointed)
    swap = swap_blocks(
        made.blocks,
        count,
        device=CPU,
        recomputed=recomputed,
        transfer=EagerTransfer() if transfer is None else transfer,
    )
    if recomputed:
        checkpoint_blocks([made.blocks[i] for i in recomputed])
    for block in swap._blocks:
        _poison(block)
    return made, swap


def _poison(block: FrozenTensors) -> None:
    """On a GPU weights at home have the wrong device; here they become wrong values."""
    block._at_home = block.views(torch.full_like(block.home, 255))  # NaN as float32
    block.go_home()


@pytest.mark.parametrize("transfer", [EagerTransfer, LateTransfer])
@pytest.mark.parametrize("checkpointed", [0, 3, LAYERS])
@pytest.mark.parametrize("count", [1, 2, LAYERS - 1])
def test_outputs_and_gradients_are_those_of_resident_blocks(count, checkpointed, transfer):
    expected = subject(LAYERS).step()
    model, _ = swapped(count, checkpointed=checkpointed, transfer=transfer())
    assert_same(model.step(), expected)
    assert_same(model.step(), expected)


@pytest.mark.parametrize("mode", ["video", "audio"])
@pytest.mark.parametrize("checkpointed", [0, LAYERS])
def test_models_of_one_stream(mode, checkpointed):
    expected = subject(LAYERS, mode=mode).step()
    model, _ = swapped(4, checkpointed=checkpointed, mode=mode)
    assert_same(model.step(), expected)


@pytest.mark.parametrize("checkpointed", [0, LAYERS])
def test_passes_without_gradient_between_steps(checkpointed):
    plain = subject(LAYERS)
    steps, outputs = plain.step(), plain.outputs()
    model, _ = swapped(4, checkpointed=checkpointed, transfer=LateTransfer())
    for _ in range(2):
        assert_same(model.outputs(), outputs)
        assert_same(model.outputs(), outputs)
        assert_same(model.step(), steps)


def test_two_forward_passes_before_one_backward():
    def two_passes(made):
        made.network.zero_grad()
        losses = [sum(x.square().sum() for _, x in made.model(made.inputs).items()) for _ in range(2)]
        (losses[0] * losses[1]).backward()
        return [p.grad for p in made.network.parameters()]

    expected = two_passes(subject(LAYERS))
    for checkpointed in (0, LAYERS):
        assert_same(two_passes(swapped(4, checkpointed=checkpointed)[0]), expected)


@pytest.mark.parametrize("checkpointed", [0, LAYERS])
def test_a_graph_that_is_kept_can_be_used_again(checkpointed):
    def twice(made):
        made.network.zero_grad()
        loss = sum(x.square().sum() for _, x in made.model(made.inputs).items())
        loss.backward(retain_graph=True)
        loss.backward()
        return [p.grad for p in made.network.parameters()]

    assert_same(twice(swapped(4, checkpointed=checkpointed)[0]), twice(subject(LAYERS)))


def bound_away_from_home(swap: BlockSwap) -> int:
    """How many swapped blocks have modules that look at device memory."""
    return sum(any(v.data_ptr() != h.data_ptr() for v, h in _seen(block)) for block in swap._blocks)


def _seen(block: FrozenTensors):
    for module, name, position in block._owners:
        yield getattr(module, name), block._at_home[position]


@pytest.mark.parametrize("checkpointed", [0, LAYERS])
@pytest.mark.parametrize("count", [1, 3, LAYERS - 1])
def test_few_blocks_are_on_the_device_at_a_time(count, checkpointed):
    model, swap = swapped(count, checkpointed=checkpointed)
    most = 0

    def watch(*_):
        nonlocal most
        most = max(most, bound_away_from_home(swap))
        assert len(swap.resident) <= 2

    for block in model.blocks:
        for linear in (m for m in block.modules() if isinstance(m, nn.Linear)):
            linear.register_forward_hook(watch)
    for parameter in model.network.parameters():
        parameter.register_hook(watch)
    model.step()
    model.outputs()
    size = max(block.nbytes for block in swap._blocks)
    assert swap.device_bytes == min(count, 2) * size
    assert 1 <= most <= 2


@pytest.mark.parametrize("checkpointed", [0, LAYERS])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_each_weight_is_copied_twice_a_step_and_never_back(count, checkpointed):
    """Once for each direction, but for the two blocks at which the direction turns."""
    transfer = EagerTransfer()
    model, swap = swapped(count, checkpointed=checkpointed, transfer=transfer)
    home = [block.home.clone() for block in swap._blocks]
    model.step()  # begins with empty buffers
    for _ in range(3):
        transfer.copied.clear()
        model.step()
        assert len(transfer.copied) == 2 * (count - min(count, 2))
    assert_same([block.home for block in swap._blocks], home)


def test_the_next_block_is_fetched_while_one_computes():
    transfer = LateTransfer()
    model, swap = swapped(5, checkpointed=LAYERS, transfer=transfer)
    positions = swapped_positions(LAYERS, 5)
    seen = []
    for index, position in enumerate(positions):
        first = model.blocks[position].attn1.to_q
        first.register_forward_hook(lambda *_, index=index: seen.append((index, swap.resident)))
    model.step()
    forward, backward = seen[:5], seen[5:]
    assert [index for index, _ in forward] == [0, 1, 2, 3, 4]
    assert all({index, index + 1} == resident for index, resident in forward[:4])
    assert [index for index, _ in backward] == [4, 3, 2, 1, 0]
    assert all({index, index - 1} == resident for index, resident in backward[1:4])
    seen.clear()
    model.outputs()
    assert seen[-1] == (4, frozenset({4, 0})), "sampling begins anew at the first block"


def test_trained_parameters_stay_on_the_device():
    """LoRA factors are no part of a block; a trained parameter inside of one is left where it is."""
    model = subject(LAYERS)
    model.blocks[3].scale_shift_table.requires_grad_(True)
    table = model.blocks[3].scale_shift_table
    before = table.data_ptr()
    swap_blocks(model.blocks, LAYERS - 1, device=CPU, transfer=EagerTransfer())
    model.step()
    assert table.data_ptr() == before
    assert table.grad is not None


class Packed(nn.Module):
    """A layer as quantised ones are: bytes and scales, a buffer, and a Function that saves them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        codes = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes.t().contiguous().t().view(torch.uint8), requires_grad=False)  # by columns
        self.register_buffer("scale", scale.to(torch.float64))
        self.register_buffer("zero", torch.tensor(0, dtype=torch.int64))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Dequantised.apply(x, self.weight, self.scale, self.zero) + self.bias


class Dequantised(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, codes, scale, zero):
        ctx.save_for_backward(codes, scale, zero)
        return x @ Dequantised.weight(codes, scale, zero).t()

    @staticmethod
    def backward(ctx, grad):
        return grad @ Dequantised.weight(*ctx.saved_tensors), None, None, None

    @staticmethod
    def weight(codes, scale, zero):
        return ((codes.view(torch.int8).to(torch.float64) - zero) * scale).float()


def pack_linears(model) -> None:
    for block in model.transformer_blocks:
        for layer in (block.attn1, block.audio_attn2, block.audio_to_video_attn):
            layer.to_q, layer.to_v = Packed(layer.to_q), Packed(layer.to_v)


@pytest.mark.parametrize("checkpointed", [0, LAYERS])
def test_tensors_of_any_dtype_and_layout(checkpointed):
    expected = subject(LAYERS, prepare=pack_linears, include_patterns="['.*to_k']").step()
    model, _ = swapped(4, checkpointed=checkpointed, prepare=pack_linears, include_patterns="['.*to_k']")
    assert_same(model.step(), expected)


@pytest.mark.parametrize("method", [Fp8(), Int8(), Nf4()], ids=["fp8", "int8", "nf4"])
@pytest.mark.parametrize("checkpointed", [0, LAYERS])
def test_quantised_blocks(method, checkpointed):
    prepare = quantised_to(method)
    plain = subject(LAYERS, prepare=prepare)
    assert sum(isinstance(m, QuantizedLinear) for m in plain.model.modules()) >= 10 * LAYERS
    model, swap = swapped(4, checkpointed=checkpointed, prepare=prepare)
    assert swap.host_bytes < swapped(4)[1].host_bytes
    assert_same(model.step(), plain.step())
    assert_same(model.outputs(), plain.outputs())


def test_a_tensor_that_two_layers_share_is_moved_once():
    block = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)).requires_grad_(False)
    block[1].weight = block[0].weight
    frozen = FrozenTensors(block, copy_to=CPU)
    assert frozen.nbytes == 8 * 8 * 4
    frozen.bind(frozen.views(frozen.home.clone()))
    assert block[0].weight is block[1].weight


def test_moving_the_model_leaves_swapped_blocks_and_frees_the_buffers():
    model, swap = swapped(4, checkpointed=LAYERS)
    expected = model.step()
    home = swap._blocks[0].home.data_ptr()
    model.model.to("meta")  # stands for the other device
    assert swap.device_bytes == 0
    assert not swap.resident
    assert all(p.device == CPU for i in swapped_positions(LAYERS, 4) for p in model.blocks[i].parameters())
    assert swap._blocks[0].home.data_ptr() == home
    fresh, _ = swapped(4, checkpointed=LAYERS)
    fresh.model.to(CPU)
    assert_same(fresh.step(), expected)


def test_casting_a_swapped_model_is_refused():
    model, _ = swapped(2)
    with pytest.raises(RuntimeError, match="cannot be cast"):
        model.model.to(torch.float64)


def test_values_can_be_read_off_a_swapped_model():
    state = subject(LAYERS).model.state_dict()
    model = subject(LAYERS)
    swap_blocks(model.blocks, 4, device=CPU)
    model.step()
    found = model.model.state_dict()
    assert_same([found[name] for name in state], list(state.values()))


def test_positions_are_spread_evenly():
    assert swapped_positions(48, 3) == [8, 24, 40]
    assert swapped_positions(48, 0) == []
    for count in range(1, 48):
        positions = swapped_positions(48, count)
        gaps = {b - a for a, b in pairwise(positions)}
        assert len(set(positions)) == count
        assert not gaps or max(gaps) - min(gaps) <= 1
    with pytest.raises(ValueError, match="48 of 48"):
        swapped_positions(48, 48)
