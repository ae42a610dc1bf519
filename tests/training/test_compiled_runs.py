"""``--compile`` and ``--dynamo_backend``: the same training, in graphs that all blocks share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from musubi_tuner.config.memory import CompileConfig, CompileSettings
from musubi_tuner.ltx2_train_network import main as train
from musubi_tuner.memory.compilation import compile_blocks

pytestmark = pytest.mark.usefixtures("fresh_compiler")
COMPILE = ("--compile", "--compile_backend", "eager", "--compile_fullgraph")


def run(assets, output: Path, *flags: str) -> dict[str, torch.Tensor]:
    train(
        [
            *("--dataset_config", str(assets.dataset), "--ltx2_checkpoint", str(assets.checkpoint)),
            *("--ltx2_mode", "av", "--ltx_version", "2.3", "--mixed_precision", "no", "--network_dim", "4"),
            *("--network_alpha", "4", "--learning_rate", "1e-3", "--max_train_steps", "2", "--seed", "5"),
            *("--max_data_loader_n_workers", "0", "--output_dir", str(output), "--output_name", "x"),
            *("--save_precision", "fp32", "--gradient_checkpointing", *flags),
        ]
    )
    return load_file(output / "x.safetensors")


def test_compiled_blocks_train_the_same(cached_demo, tmp_path: Path):
    assets = cached_demo()
    plain = run(assets, tmp_path / "plain")
    compiled = run(assets, tmp_path / "compiled", *COMPILE)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert plain.keys() == compiled.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_accelerates_flags_ask_for_the_same():
    assert CompileConfig().settings is None
    ours = CompileConfig(compile=True, compile_backend="aot_eager", compile_fullgraph=True, compile_dynamic="true")
    theirs = CompileConfig(dynamo_backend="AOT_EAGER", dynamo_fullgraph=True, dynamo_dynamic=True)
    assert ours.settings == theirs.settings == CompileSettings("aot_eager", dynamic=True, fullgraph=True)
    assert CompileConfig(compile=True, compile_dynamic="auto").settings.dynamic is None


def test_more_kinds_of_batches_than_pytorch_allows_for_are_compiled():
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    block = torch.nn.Linear(3, 3)
    compile_blocks([block], CompileSettings(backend=count, dynamic=False, graphs=12))
    for rows in range(2, 14):
        block(torch.ones(rows, 3))
    assert len(graphs) == 12 > 8


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--compile", "--dynamo_backend", "INDUCTOR"], "--compile and --dynamo_backend INDUCTOR exclude each other"),
        (["--compile_mode", "max-autotune"], "--compile_mode needs --compile"),
        (["--dynamo_dynamic"], "--dynamo_dynamic needs --dynamo_backend"),
        (["--compile", "--compile_backend", "indctor"], "torch.compile has no backend 'indctor' here; it has eager"),
        (["--compile", "--compile_cache_size_limit", "0"], "--compile_cache_size_limit 0: expected at least 1"),
        (["--sdpa", "--xformers"], "--sdpa, --xformers exclude each other; give one"),
        (["--sage_attn"], "--sage_attn has no backward pass"),
        (["--cuda_memory_fraction", "1.5"], "--cuda_memory_fraction 1.5: expected more than 0, at most 1"),
        (["--audio_ref_identity_guidance_scale", "-1"], "--audio_ref_identity_guidance_scale: expected 0 or more"),
    ],
)
def test_flags_that_do_not_fit(tmp_path: Path, capsys, flags: list[str], expected: str):
    for name in ("model.safetensors", "data.toml"):
        (tmp_path / name).write_text("not read", encoding="utf-8")
    argv = ["--ltx2_checkpoint", str(tmp_path / "model.safetensors"), "--dataset_config", str(tmp_path / "data.toml")]
    with pytest.raises(SystemExit):
        train([*argv, "--output_dir", str(tmp_path / "out"), *flags])
    assert expected in capsys.readouterr().err


def test_flags_without_effect_are_told_of(cached_demo, tmp_path: Path, capsys):
    assets = cached_demo()
    other = ("--dit", str(assets.gemma), "--vae", str(assets.checkpoint))
    run(assets, tmp_path, *other, "--disable_numpy_memmap", "--cuda_allow_tf32", "--weighting_scheme", "mode")
    log = capsys.readouterr().err
    assert "--dit has no effect: the transformer is in --ltx2_checkpoint" in log
    assert "--vae has" not in log, "it names the same file"
    assert "--disable_numpy_memmap has no effect" in log
    assert "--weighting_scheme mode has no effect" in log
    assert ("the flags --cuda_* have no effect" in log) != torch.cuda.is_available()
