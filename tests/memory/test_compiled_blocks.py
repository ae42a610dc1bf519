"""Compiled blocks share their graphs, whatever holds their weights, and compute what uncompiled ones do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from memory_models import CPU, quantised_to, subject
from safetensors.torch import load_file

from musubi_tuner.assembly.transformer import attach_to_blocks
from musubi_tuner.config.memory import CompileSettings, MemorySettings
from musubi_tuner.ltx2_generate_video import main as generate
from musubi_tuner.networks.lora_ltx2 import create_network
from musubi_tuner.quantization.packed import Fp8, Nf4

pytestmark = pytest.mark.usefixtures("fresh_compiler")
SWAPPED = MemorySettings(blocks_to_swap=3)


def _as_it_is(model) -> None:
    pass


CASES = {
    "dense": (_as_it_is, MemorySettings()),
    "NF4, swapped, recomputed": (quantised_to(Nf4()), replace(SWAPPED, checkpointing=True)),
    "FP8, swapped": (quantised_to(Fp8()), SWAPPED),
    "FP8, swapped, offload": (quantised_to(Fp8()), replace(SWAPPED, checkpointing=True, offload_inputs=True)),
    "dense, swapped, parts": (_as_it_is, replace(SWAPPED, chunk_feed_forward="all", chunk_tokens=4)),
}
_SLOW = list(CASES)[2:]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in _SLOW)) for n in CASES])
def test_blocks_share_their_graphs(name: str):
    """In video mode, with a LoRA: one graph for the first block, whose input has no gradient, one for all others."""
    prepare, memory = CASES[name]
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    made = subject(4, mode="video", tokens=11, prepare=prepare)
    expected, shown = made.step(), made.outputs()
    attach_to_blocks(made.model, memory, CompileSettings(count, fullgraph=not memory.chunk_feed_forward), device=CPU)
    found = made.step()
    pieces = 1 if memory.chunk_feed_forward is None else len(graphs) // 2
    assert len(graphs) == 2 * pieces
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1.0, b.abs().max().item()))
    for a, b in zip(made.outputs(), shown, strict=True):
        torch.testing.assert_close(a, b)
    before = len(graphs)
    made.outputs()
    made.step()
    assert len(graphs) == before, "nothing is compiled a second time"


def test_samples_of_compiled_blocks(cached_demo, tmp_path: Path):
    """With a LoRA, guidance (two passes) and swapped blocks."""
    from musubi_tuner.models.checkpoint import Checkpoint
    from musubi_tuner.models.ltx2.load import load_transformer

    assets = cached_demo()
    model = load_transformer(Checkpoint.open(assets.checkpoint), mode="av", dtype=torch.float32, device=CPU)
    lora = create_network(1.0, 4, 4, model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.normal_(std=0.05)
    lora.save_weights(tmp_path / "lora.safetensors", torch.float32, {})

    def latents(name: str, *flags: str) -> dict[str, torch.Tensor]:
        argv = ["--ltx2_checkpoint", str(assets.checkpoint), "--ltx2_mode", "av", "--gemma_root", str(assets.gemma)]
        argv += ["--prompt", "a fox", "--height", "64", "--width", "64", "--sample_num_frames", "9", "--seed", "3"]
        argv += ["--sample_steps", "2", "--device", "cpu", "--mixed_precision", "no", "--output_type", "latent"]
        argv += ["--guidance_scale", "3", "--output_dir", str(tmp_path / name), *flags]
        assert not generate(argv)
        return load_file(next((tmp_path / name).glob("*.safetensors")))

    lora_flags = ("--lora_weight", str(tmp_path / "lora.safetensors"), "--blocks_to_swap", "1")
    without, plain = latents("without"), latents("plain", *lora_flags)
    torch._dynamo.utils.counters.clear()
    found = latents("compiled", *lora_flags, "--compile", "--compile_backend", "eager", "--compile_fullgraph")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for key, tensor in plain.items():
        assert not torch.equal(without[key], tensor), "the LoRA acts"
        torch.testing.assert_close(found[key], tensor, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--compile_mode", "max-autotune"), "--compile_mode needs --compile"),
        (("--compile", "--compile_backend", "indctor"), "torch.compile has no backend 'indctor' here"),
    ],
)
def test_flags_of_generation_that_do_not_fit(flags, said, cached_demo, tmp_path: Path, capsys):
    assets = cached_demo()
    argv = ["--ltx2_checkpoint", str(assets.checkpoint), "--gemma_root", str(assets.gemma), "--prompt", "a fox"]
    with pytest.raises(SystemExit):
        generate([*argv, "--device", "cpu", "--output_dir", str(tmp_path / "out"), *flags])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
