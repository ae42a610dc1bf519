"""Blocks with FP8 products: everything that is put on blocks leaves their numbers alone."""

from __future__ import annotations

import pytest
import torch
from memory_models import CPU, Subject, assert_same, subject

from musubi_tuner.assembly.transformer import attach_to_blocks
from musubi_tuner.config.memory import CompileSettings, MemorySettings
from musubi_tuner.models.ltx2.quantize import Quantization, is_target
from musubi_tuner.quantization.fp8_products import Fp8Products
from musubi_tuner.quantization.linear import pack_linear, use_products

LAYERS = 4
SETTINGS = {
    "checkpointing": MemorySettings(checkpointing=True),
    "partial checkpointing": MemorySettings(checkpointing=True, blocks_to_checkpoint=2),
    "offload": MemorySettings(checkpointing=True, offload_inputs=True),
    "swap": MemorySettings(blocks_to_swap=3),
    "all": MemorySettings(checkpointing=True, offload_inputs=True, blocks_to_swap=3),
}


def quantised(products: Fp8Products | None, mode: str = "av") -> Subject:
    method = Quantization("fp8", by_row=True).method

    def prepare(model) -> None:
        for name, weight in list(model.named_parameters()):
            if is_target(name):
                pack_linear(model, name.removesuffix(".weight"), method.quantize(weight))
        if products is not None:
            fitting, total = use_products(model, products)
            assert fitting >= 10 * LAYERS
            if mode == "av":  # the audio stream is 24 wide, no multiple of 16
                assert fitting < total

    return subject(LAYERS, mode=mode, prepare=prepare)


@pytest.mark.parametrize("kernel", ["rowwise", "tensorwise", "reference"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_memory_saving_changes_nothing(settings, kernel):
    expected = quantised(Fp8Products(kernel)).step()
    made = quantised(Fp8Products(kernel))
    attach_to_blocks(made.model, settings, None, device=CPU)
    assert_same(made.step(), expected)
    assert_same(made.step(), expected)


def test_one_stream():
    expected = quantised(Fp8Products("reference"), "video").step()
    made = quantised(Fp8Products("reference"), "video")
    attach_to_blocks(made.model, SETTINGS["all"], None, device=CPU)
    assert_same(made.step(), expected)


def test_kernels_agree_on_a_whole_step():
    """In fp32 they differ by roundings only, of which few move a number to the next in FP8."""
    steps = [quantised(Fp8Products(kernel)).step() for kernel in ("rowwise", "tensorwise", "reference")]
    for ours in steps[:2]:
        for a, b in zip(ours, steps[2], strict=True):
            assert (a - b).norm() <= 0.01 * b.norm()


def test_error_of_a_whole_step():
    """Four blocks of it against weights that are dequantised."""
    dequantised = quantised(None).step()
    for backward in (True, False):
        ours = quantised(Fp8Products("reference", backward)).step()
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(ours, dequantised, strict=True)]
        assert 0.001 < max(errors[:2]) < 0.1, "outputs"
        gradients = torch.cat([g.flatten() for g in ours[2:]])
        expected = torch.cat([g.flatten() for g in dequantised[2:]])
        assert torch.cosine_similarity(gradients, expected, dim=0) > 0.99


def test_gradients_through_dequantised_weights_are_another_path():
    both, forward = (quantised(Fp8Products("reference", backward)).step() for backward in (True, False))
    assert_same(both[:2], forward[:2])
    assert any(not torch.equal(a, b) for a, b in zip(both[2:], forward[2:], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["tensorwise", "reference"])
@pytest.mark.parametrize("name", ["checkpointing", "all"])
def test_compiled_blocks(name, kernel):
    torch._dynamo.reset()
    made = quantised(Fp8Products(kernel))
    attach_to_blocks(made.model, SETTINGS[name], CompileSettings("aot_eager", fullgraph=True), device=CPU)
    for a, b in zip(made.step(), quantised(Fp8Products(kernel)).step(), strict=True):
        assert (a - b).norm() <= 0.01 * b.norm()
    torch._dynamo.reset()
