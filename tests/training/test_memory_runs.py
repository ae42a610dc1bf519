"""Whole runs that save memory train, validate and sample exactly as plain ones; what does not fit is said at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from musubi_tuner.ltx2_generate_video import main as generate
from musubi_tuner.ltx2_train_network import main as train


def arguments(assets, output: Path, *flags: str) -> list[str]:
    return [
        *("--dataset_config", str(assets.dataset), "--ltx2_checkpoint", str(assets.checkpoint)),
        *("--ltx2_mode", "av", "--ltx_version", "2.3", "--mixed_precision", "no", "--network_dim", "4"),
        *("--network_alpha", "4", "--learning_rate", "1e-3", "--max_train_steps", "2", "--seed", "5"),
        *("--max_data_loader_n_workers", "0", "--output_dir", str(output), "--output_name", "x"),
        # Adam makes a whole step of any gradient, also of one that is nothing but rounding.
        *("--save_precision", "fp32", "--optimizer_args", "eps=1e-6", *flags),
    ]


def run(assets, output: Path, *flags: str) -> dict[str, torch.Tensor]:
    train(arguments(assets, output, *flags))
    return load_file(output / "x.safetensors")


EXACT = {
    "swap": ("--blocks_to_swap", "1"),
    "swap and checkpointing": ("--blocks_to_swap", "1", "--gradient_checkpointing"),
    "offload": ("--gradient_checkpointing_cpu_offload", "--blocks_to_swap", "1"),
    "some blocks": ("--gradient_checkpointing", "--blocks_to_checkpoint", "1", "--blocks_to_swap", "1"),
}
CLOSE = {
    "parts": (
        *("--ffn_chunk_target", "all", "--ffn_chunk_size", "16", "--split_attn_target", "all"),
        *("--split_attn_mode", "query", "--split_attn_chunk_size", "16", "--gradient_checkpointing"),
    ),
}


@pytest.fixture(scope="module")
def plain(cached_demo, tmp_path_factory) -> dict[str, torch.Tensor]:
    return run(cached_demo(), tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("name", [*EXACT, *CLOSE])
def test_the_same_lora_comes_out(name, plain, cached_demo, tmp_path: Path):
    found = run(cached_demo(), tmp_path, *(EXACT | CLOSE)[name])
    bound = {"rtol": 0, "atol": 0} if name in EXACT else {"rtol": 1e-3, "atol": 1e-5}
    for key, tensor in plain.items():
        torch.testing.assert_close(found[key], tensor, **bound)


@pytest.mark.parametrize("base", [("--fp8_base", "--fp8_scaled"), ("--nf4_base",)], ids=["fp8", "nf4"])
def test_quantised_weights_that_are_swapped(base, cached_demo, tmp_path: Path):
    expected = run(cached_demo(), tmp_path / "resident", *base)
    found = run(cached_demo(), tmp_path / "swapped", *base, *EXACT["offload"])
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)


def without_time(path: Path) -> str:
    parts = path.name.split("_")
    return "_".join(parts[:3] + parts[4:])


def test_previews_and_validation_between_the_steps(plain, cached_demo, tmp_path: Path, logged):
    """They pass through swapped blocks without gradients, and move the model away while the decoders run."""
    assets = cached_demo()
    prompts = ("--sample_prompts", str(assets.prompts), "--use_precached_sample_prompts", "--sample_with_offloading")
    previews = (*prompts, "--sample_every_n_steps", "2")
    results = []
    for name, flags in {"plain": (), "swapped": (*EXACT["offload"],)}.items():
        logged.clear()
        found = run(assets, tmp_path / name, *flags, *previews)
        for key, tensor in plain.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)
        files = (tmp_path / name / "sample").glob("*.wav")  # the encoder of videos does not repeat itself exactly
        results.append(({without_time(p): p.read_bytes() for p in files}, dict(logged)))
    (expected, scalars), (found, found_scalars) = results
    assert expected.keys() == found.keys()
    assert expected
    assert [name for name in expected if expected[name] != found[name]] == []
    assert found_scalars == scalars


def test_sampling_with_swapped_blocks(cached_demo, tmp_path: Path):
    assets = cached_demo()

    def latents(name: str, *flags: str) -> dict[str, torch.Tensor]:
        argv = ["--ltx2_checkpoint", str(assets.checkpoint), "--ltx2_mode", "av", "--gemma_root", str(assets.gemma)]
        argv += ["--prompt", "a fox", "--height", "64", "--width", "64", "--sample_num_frames", "9", "--seed", "3"]
        argv += ["--sample_steps", "3", "--device", "cpu", "--mixed_precision", "no", "--output_type", "latent"]
        generate([*argv, "--output_dir", str(tmp_path / name), *flags])
        return load_file(next((tmp_path / name).glob("*.safetensors")))

    plain, found = latents("plain"), latents("swapped", "--blocks_to_swap", "1")
    assert plain.keys() == found.keys()
    for key, tensor in plain.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)


REFUSED = {
    "as many as there are": (("--blocks_to_swap", "48"), "blocks_to_swap 48: the model has"),
    "below 0": (("--blocks_to_swap", "-1"), "--blocks_to_swap: expected 0 or more, got -1"),
    "pinned alone": (("--use_pinned_memory_for_block_swap",), "needs --blocks_to_swap"),
    "too many to checkpoint": (
        ("--blocks_to_checkpoint", "99", "--gradient_checkpointing"),
        "--blocks_to_checkpoint 99: the model has",
    ),
    "checkpoint what": (("--blocks_to_checkpoint", "1"), "--blocks_to_checkpoint needs --gradient_checkpointing"),
    "mode alone": (("--split_attn_mode", "query"), "need --split_attn_target"),
    "queries of samples": (
        ("--split_attn_target", "all", "--split_attn_chunk_size", "8"),
        "--split_attn_chunk_size needs --split_attn_mode query",
    ),
    "negative part": (("--ffn_chunk_target", "all", "--ffn_chunk_size", "-4"), "--ffn_chunk_size: expected 0 or more"),
    "two kernels": (("--flash_attn", "--xformers"), "--flash_attn, --xformers exclude each other"),
}


@pytest.mark.parametrize(("flags", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_said_before_anything_loads(flags, said, cached_demo, tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(arguments(cached_demo(), tmp_path / "out", *flags))
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert said in text
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--cudnn_attn", "--flash_attn", "--flash3", "--xformers"])
def test_a_kernel_that_cannot_be_had(flag, cached_demo, tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        train(arguments(cached_demo(), tmp_path / "out", flag))
    assert "use --sdpa" in capsys.readouterr().err


def test_a_part_without_its_size_is_told(cached_demo, tmp_path: Path, capsys):
    train(arguments(cached_demo(), tmp_path, "--ffn_chunk_target", "all", "--max_train_steps", "1"))
    assert "--ffn_chunk_target and --ffn_chunk_size act only together" in capsys.readouterr().err
