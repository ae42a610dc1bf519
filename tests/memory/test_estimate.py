"""The estimate of memory against bytes that PyTorch allocates, and against sums that are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ltx2_tiny import config_of, tiny_config, tiny_inputs, tiny_model
from measured_step import CASES, Case, measure, quantise, request_of

from musubi_tuner.assembly.memory_request import by_block, linear_layers, lora_layers, weights_of
from musubi_tuner.common.av import AV
from musubi_tuner.common.safetensors_io import TensorInfo
from musubi_tuner.config.memory import MemorySettings
from musubi_tuner.memory.activations import BatchShape, Numbers, block_activations, layer_sizes
from musubi_tuner.memory.estimate import (
    ACTIVATION_TOLERANCE,
    Estimate,
    Item,
    estimate,
    optimizer_state_bytes,
    with_settings,
)
from musubi_tuner.memory.proposals import Limits, propose, smallest
from musubi_tuner.models.ltx2.load import build_transformer
from musubi_tuner.models.ltx2.quantize import Quantization
from musubi_tuner.networks.lora_ltx2 import create_network, planned_ranks
from musubi_tuner.quantization.stored import Stored

GIB = 2**30


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_takes_what_was_estimated(case: Case):
    measured, expected = measure(case)
    assert expected.device == pytest.approx(measured, rel=ACTIVATION_TOLERANCE)
    assert measured <= expected.device + expected.uncertainty


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("preset", ["t2v", "full", "audio"])
@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_what_autograd_keeps_of_a_block(version: str, preset: str, dora: bool):
    """The difference between three blocks and two, so that what is in front of and behind them does not count."""
    size = {"video_tokens": 320, "audio_tokens": 64}
    kept = []
    for layers in (2, 3):
        config = tiny_config(
            version,
            num_layers=layers,
            **{"num_attention_heads": 4, "attention_head_dim": 32, "cross_attention_dim": 128},
            **{"audio_num_attention_heads": 4, "audio_attention_head_dim": 16, "audio_cross_attention_dim": 64},
        )
        model = tiny_model(config)
        network = create_network(1.0, 4, 4, model, lora_target_preset=preset, use_dora=dora)
        network.apply_to(model)
        kept.append(bytes_kept(model, network, tiny_inputs(config, batch=1, **size)))
    names = linear_layers((name for name, _ in model.named_parameters()), "av")
    ranks = planned_ranks(names, 4, {"lora_target_preset": preset})
    adapted = by_block(lora_layers(ranks, config, lengths=dora), config)
    shape = BatchShape(1, size["video_tokens"], size["audio_tokens"], 7)
    block = block_activations(config, adapted[1], shape, Numbers(4), MemorySettings())
    assert block.kept == pytest.approx(kept[1] - kept[0], rel=0.03)


def bytes_kept(model: torch.nn.Module, network: torch.nn.Module, inputs: AV) -> int:
    own = {t.untyped_storage().data_ptr() for m in (model, network) for t in (*m.parameters(), *m.buffers())}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that its place is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model(inputs)
        del out
    return sum(nbytes for nbytes, _ in kept.values())


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_layers_are_those_of_the_model(version: str):
    config = tiny_config(version)
    block = build_transformer(config, "av").transformer_blocks[0]
    linears = {n: (m.out_features, m.in_features) for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    assert layer_sizes(config) == linears


@pytest.mark.parametrize("base", [None, "fp8", "int8", "nf4"])
@pytest.mark.parametrize("mode", ["video", "av"])
def test_weights_are_counted_as_they_are_held(mode: str, base: str | None):
    case = Case(base=base, mode=mode)
    model = tiny_model(case.config, mode, dtype=case.dtype)
    found = request_of(case, model).weights
    if base is not None:
        quantise(model, case.quantization)
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert sum(found.blocks) + found.rest == held
    assert found.largest_dense == (0 if base is None else 4 * 128 * 128 * 2)


@pytest.mark.parametrize(
    ("version", "mode", "quantization", "gib"),
    [
        ("2.0", "av", None, 34.52),
        ("2.3", "av", None, 34.57),
        ("2.3", "video", None, 24.03),
        ("2.0", "av", Quantization("nf4"), 10.80),  # scales in fp32
    ],
)
def test_the_blocks_of_the_released_models(version: str, mode: str, quantization: Quantization | None, gib: float):
    model = build_transformer(config_of(version), mode)
    infos = {n: TensorInfo(torch.bfloat16, tuple(p.shape), 0, 2 * p.numel()) for n, p in model.named_parameters()}
    weights = weights_of(infos, Stored("dense"), mode, torch.bfloat16, quantization)
    assert sum(weights.blocks) / GIB == pytest.approx(gib, abs=0.01)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("preset", ["t2v", "v2v", "audio", "full"])
def test_trained_values_are_those_of_the_network(preset: str, dora: bool):
    config = tiny_config("2.3")
    model = build_transformer(config, "av")
    arguments = {"lora_target_preset": preset, "audio_dim": "2", "rank_pattern": "{'attn1': 3}"}
    arguments["use_dora"] = str(dora)
    network = create_network(1.0, 5, 5, model, **arguments)
    names = linear_layers((name for name, _ in model.named_parameters()), "av")
    adapted = lora_layers(planned_ranks(names, 5, arguments), config, lengths=dora)
    assert sum(layer.params for layer in adapted.values()) == sum(p.numel() for p in network.parameters())


def test_where_a_corrected_base_began_is_kept():
    """The factors once more in bf16, beside those that are trained."""
    case = Case()
    model = tiny_model(case.config, case.mode, dtype=case.dtype)
    plain = request_of(case, model)
    network = create_network(1.0, case.rank, case.rank, model, lora_target_preset=case.preset)
    for module in network.modules_by_name.values():
        module.start_from(module.lora_down.weight, module.lora_up.weight)
    held = sum(t.nbytes for name, t in network.named_buffers() if name.endswith(("start_down", "start_up")))
    corrected = replace(plain, trained=replace(plain.trained, corrects=True))
    assert estimate(corrected).device - estimate(plain).device == held > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), [("AdamW", {}), ("SGD", {}), ("SGD", {"momentum": 0.9})])
def test_optimizer_state(name: str, options: dict, dtype: torch.dtype):
    parameter = torch.nn.Parameter(torch.zeros(64, 32, dtype=dtype))
    optimizer = getattr(torch.optim, name)([parameter], lr=0.1, **options)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer.state.get(parameter, {}).values()
    held = sum(t.nbytes for t in state if isinstance(t, torch.Tensor) and t.dim())
    assert optimizer_state_bytes(name, trained=dtype.itemsize, momentum="momentum" in options) * 2048 == held


# --- a run of true size ---


@pytest.fixture(scope="module")
def true_size():
    """2.3 av in bf16 on a GPU, rank 32, 49 frames of 768x512; and the other ways to hold its weights."""
    config = config_of("2.3")
    model = build_transformer(config, "av")
    infos = {n: TensorInfo(torch.bfloat16, tuple(p.shape), 0, 2 * p.numel()) for n, p in model.named_parameters()}
    request = request_of(Case(), tiny_model(Case().config))
    names = linear_layers(infos, "av")
    adapted = by_block(lora_layers(planned_ranks(names, 32, {}), config), config)
    bases = {
        name: (weights_of(infos, Stored("dense"), "av", torch.bfloat16, quantization), flags)
        for name, quantization, flags in (
            ("dense", None, ()),
            ("fp8", Quantization("fp8", requantise=True), ("--fp8_base --fp8_scaled",)),
            ("nf4", Quantization("nf4"), ("--nf4_base",)),
        )
    }
    request = replace(
        request,
        config=config,
        weights=bases["dense"][0],
        trained=replace(request.trained, blocks=adapted),
        batch=BatchShape(1, 2688, 50, 1024),
        numbers=Numbers(2, fused_norms=True),
        on_gpu=True,
    )
    return request, bases


def test_swapping_moves_all_but_two_blocks(true_size):
    request, _ = true_size
    plain, swapped = estimate(request), estimate(with_settings(request, blocks_to_swap=24, pin_swapped=True))
    block = request.weights.blocks[0]
    assert plain.device - swapped.device == pytest.approx(22 * block, rel=1e-4)
    assert plain.host == 0
    assert swapped.host == pytest.approx(25 * block, rel=1e-4)  # one is on its way while loading


def test_partial_checkpointing_lies_between(true_size):
    request, _ = true_size
    some = [
        estimate(with_settings(request, checkpointing=True, blocks_to_checkpoint=n)).device for n in (0, 12, 24, 48)
    ]
    assert some == sorted(some, reverse=True)
    assert len(set(some)) == 4
    assert estimate(request).device == some[0]
    assert estimate(with_settings(request, checkpointing=True)).device == some[-1]


def test_without_a_gpu_one_memory_holds_it_all():
    items = (Item("a", device=5, is_activation=True), Item("b", host=7))
    assert (Estimate(items, on_gpu=True).device, Estimate(items, on_gpu=True).host) == (5, 7)
    assert (Estimate(items, on_gpu=False).device, Estimate(items, on_gpu=False).host) == (12, 0)


@pytest.mark.parametrize("free", [12, 16, 24, 32, 48])
def test_what_is_proposed_fits(true_size, free: int):
    request, bases = true_size
    limits = Limits(free * GIB, 64 * GIB)
    found = propose(request, bases, limits)
    assert found
    for proposal in found:
        assert proposal.estimate.needed <= limits.device
        assert proposal.estimate.host <= limits.host
        assert "--gradient_checkpointing" in str(proposal)


def test_proposals_from_blocks_recomputed_in_part_have_the_flag_for_all(true_size):
    """What is estimated is every block recomputed, which offloading alone does not ask for."""
    request, bases = true_size
    some = with_settings(request, checkpointing=True, blocks_to_checkpoint=10)
    for free in range(8, 40, 2):
        for proposal in propose(some, bases, Limits(free * GIB, 64 * GIB)):
            changed = any("--gradient_checkpointing" in flag or "--blocks_to_swap" in flag for flag in proposal.flags)
            assert not changed or "--blocks_to_checkpoint -1" in proposal.flags


def test_the_fastest_comes_first_and_swaps_no_more_than_needed(true_size):
    request, bases = true_size
    assert str(propose(request, bases, Limits(48 * GIB, 64 * GIB))[0]) == "--gradient_checkpointing"
    on_24 = propose(request, bases, Limits(24 * GIB, 64 * GIB))
    assert str(on_24[0]) in (
        "--nf4_base --gradient_checkpointing",
        "--fp8_base --fp8_scaled --gradient_checkpointing",
    )
    swapping = next(p for p in on_24 if "--blocks_to_swap" in str(p) and "base" not in str(p))
    count = int(str(swapping).split("--blocks_to_swap ")[1].split()[0])
    fewer = estimate(with_settings(request, checkpointing=True, blocks_to_swap=count - 1, pin_swapped=True))
    assert fewer.needed > 24 * GIB


def test_host_memory_limits_swapping(true_size):
    request, bases = true_size
    found = propose(request, bases, Limits(14 * GIB, 8 * GIB))
    assert all("--nf4_base" in str(proposal) for proposal in found)


def test_nothing_fits_a_tiny_card(true_size):
    request, bases = true_size
    assert propose(request, bases, Limits(2 * GIB, 64 * GIB)) == []
    least = smallest(request, bases)
    assert {"--nf4_base", "--blocks_to_swap 47"} <= set(least.flags)
    assert least.estimate.device < estimate(request).device / 5
