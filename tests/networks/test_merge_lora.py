"""Merging LoRA files, and the script that does it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lora_samples import random_lora
from safetensors import safe_open

from musubi_tuner.common.errors import UserError
from musubi_tuner.ltx2_merge_lora import main
from musubi_tuner.networks.file_tools.merge import concat_method, merge_loras, orthogonal_method
from musubi_tuner.networks.files.lora_file import LoraModule
from musubi_tuner.networks.files.lora_reader import load_lora
from musubi_tuner.networks.files.lora_writer import save_lora

A, B, C = (f"transformer_blocks.{i}.attn1.to_q" for i in range(3))
FIRST = random_lora({A: (3, 20, 12, 1.5), B: (2, 10, 14, None)}, seed=1)
SECOND = random_lora({B: (5, 10, 14, 1.0), C: (4, 8, 8, 4.0)}, seed=2)


@pytest.fixture
def files(tmp_path):
    return [
        save_lora(FIRST, tmp_path / "first.safetensors", "native"),
        save_lora(SECOND, tmp_path / "second.safetensors", "comfy"),
    ]


@pytest.mark.parametrize("multipliers", [(), (0.5,), (0.7, -2.0), (0.0, 1.0)])
def test_concat_is_the_exact_sum(tmp_path, files, multipliers):
    output = tmp_path / "merged.safetensors"
    merge_loras(files, output, concat_method(), multipliers=multipliers)
    merged = load_lora(output).modules
    factors = (1.0, 1.0) if not multipliers else multipliers * (3 - len(multipliers))
    parts = [(lora, m) for lora, m in zip((FIRST, SECOND), factors, strict=True) if m]
    assert set(merged) == {n for lora, _ in parts for n in lora.modules}
    for name, module in merged.items():
        have = [(lora.modules[name], m) for lora, m in parts if name in lora.modules]
        assert module.info.rank == sum(p.info.rank for p, _ in have)
        torch.testing.assert_close(module.delta(), sum(p.delta(m) for p, m in have), rtol=1e-5, atol=1e-5)


def test_single_file_of_strength_one_keeps_its_bits(tmp_path, files):
    output = tmp_path / "merged.safetensors"
    merge_loras(files[1:], output, concat_method())
    for name, module in load_lora(output).modules.items():
        assert torch.equal(module.delta(), load_lora(files[1]).modules[name].delta())


@pytest.mark.parametrize(("order", "emit_alpha", "alphas"), [((0, 1), False, 3), ((1, 0), False, 0), ((1, 0), True, 3)])
def test_format_of_the_first_file_and_alpha_equal_to_the_rank(tmp_path, files, order, emit_alpha, alphas):
    output = tmp_path / "merged.safetensors"
    rows = merge_loras([files[i] for i in order], output, concat_method(), emit_alpha=emit_alpha)
    merged = load_lora(output)
    assert merged.format == rows[-1].format == ("native", "comfy")[order[0]]
    with safe_open(output, framework="pt") as file:
        keys = list(file.keys())
        assert sum(k.endswith(".alpha") for k in keys) == alphas
        metadata = file.metadata()
    assert all(m.info.scale == 1 for m in merged.modules.values())
    assert metadata["ss_merge_method"] == "concat"
    assert json.loads(metadata["ss_merge_sources"]) == [files[i].name for i in order]
    assert metadata["ss_network_dim"] == "Dynamic"
    assert len(metadata["sshs_model_hash"]) == 64


@pytest.mark.parametrize(
    ("inputs", "requested", "expected"),
    [
        ((torch.bfloat16, torch.bfloat16), None, torch.bfloat16),
        ((torch.bfloat16, torch.float16), None, torch.float32),
        ((torch.float64, torch.bfloat16), None, torch.float32),
        ((torch.float32, torch.bfloat16), torch.float16, torch.float16),
    ],
)
def test_dtype(tmp_path, inputs, requested, expected):
    paths = [
        save_lora(lora, tmp_path / f"{i}.safetensors", dtype=dtype)
        for i, (lora, dtype) in enumerate(zip((FIRST, SECOND), inputs, strict=True))
    ]
    rows = merge_loras(paths, tmp_path / "merged.safetensors", concat_method(), dtype=requested)
    merged = load_lora(tmp_path / "merged.safetensors").modules
    assert {m.up.dtype for m in merged.values()} | {m.down.dtype for m in merged.values()} == {expected}
    assert rows[-1].dtype == str(expected).removeprefix("torch.")


def test_agreed_metadata_is_kept(tmp_path, caplog):
    common = {"ss_base_model_version": "2.3"}
    a = save_lora(FIRST, tmp_path / "a.safetensors", metadata={**common, "ss_reference_downscale_factor": "1"})
    b = save_lora(SECOND, tmp_path / "b.safetensors", metadata={**common, "ss_reference_downscale_factor": "2"})
    merge_loras([a, b], tmp_path / "c.safetensors", concat_method())
    metadata = load_lora(tmp_path / "c.safetensors").metadata
    assert metadata["ss_base_model_version"] == "2.3"
    assert "ss_reference_downscale_factor" not in metadata
    assert "differ in ss_reference_downscale_factor" in caplog.text


# --- orthogonal ---


def orthogonal(tmp_path, first, second, **options):
    paths = [save_lora(lora, tmp_path / f"{i}.safetensors") for i, lora in enumerate((first, second))]
    merge_loras(paths, tmp_path / "out.safetensors", orthogonal_method(**options))
    return load_lora(tmp_path / "out.safetensors").modules[A]


PAIR = tuple(random_lora({A: (r, 30, 24, alpha)}, seed=s) for r, alpha, s in ((4, 2.0, 5), (6, 6.0, 6)))


def dense_orthogonal(first: LoraModule, second: LoraModule, k_fraction: float, rank: int) -> torch.Tensor:
    w = [first.delta().double(), second.delta().double()]
    tops = [
        torch.linalg.svd(x)[2][: round(k_fraction * m.info.rank)].T for x, m in zip(w, (first, second), strict=True)
    ]
    total = w[0] - w[0] @ tops[1] @ tops[1].T + w[1] - w[1] @ tops[0] @ tops[0].T
    u, s, vh = torch.linalg.svd(total)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("mode", ["sum", "max", "min"])
@pytest.mark.parametrize("k_fraction", [0.0, 0.5, 1.0])
def test_orthogonal_equals_dense_algebra(tmp_path, k_fraction, mode):
    merged = orthogonal(tmp_path, *PAIR, k_fraction=k_fraction, rank_mode=mode)
    parts = [p.modules[A] for p in PAIR]
    rank = {"sum": 10, "max": 6, "min": 4}[mode]
    assert merged.info.rank == rank
    expected = dense_orthogonal(*parts, k_fraction, rank).float()
    torch.testing.assert_close(merged.delta(), expected, rtol=1e-3, atol=1e-4)


def test_orthogonal_without_projection_is_the_sum(tmp_path):
    merged = orthogonal(tmp_path, *PAIR, k_fraction=0.0)
    torch.testing.assert_close(merged.delta(), sum(p.modules[A].delta() for p in PAIR), rtol=1e-4, atol=1e-4)


def test_orthogonal_rank_is_at_most_that_of_the_layer(tmp_path):
    small = tuple(random_lora({A: (4, 6, 5, None)}, seed=s) for s in (1, 2))
    assert orthogonal(tmp_path, *small).info.rank == 5


def test_orthogonal_keeps_modules_of_one_file(tmp_path, files):
    merge_loras(files, tmp_path / "out.safetensors", orthogonal_method())
    merged = load_lora(tmp_path / "out.safetensors").modules
    for name, source in ((A, FIRST), (C, SECOND)):
        torch.testing.assert_close(merged[name].delta(), source.modules[name].delta())


# --- bad requests ---


def test_layers_of_different_sizes(tmp_path):
    a = save_lora(FIRST, tmp_path / "a.safetensors")
    b = save_lora(random_lora({A: (2, 21, 12, None)}), tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"b\.safetensors is made for a layer of 21 -> 12.*a\.safetensors for 20 -> 12"):
        merge_loras([a, b], tmp_path / "c.safetensors", concat_method())
    assert not (tmp_path / "c.safetensors").exists()


def test_output_that_is_a_folder_is_refused(tmp_path, files):
    folder = tmp_path / "out.safetensors"
    folder.mkdir()
    with pytest.raises(UserError, match="is a folder"):
        merge_loras(files, folder, concat_method())


def test_merging_loras_of_different_versions_warns(tmp_path, caplog):
    inputs = [
        save_lora(FIRST, tmp_path / f"{version}.safetensors", metadata={"ss_ltx_version": version})
        for version in ("2.0", "2.3")
    ]
    merge_loras(inputs, tmp_path / "c.safetensors", concat_method())
    assert "different versions of LTX-2: 2.0, 2.3" in caplog.text


def test_output_must_not_be_an_input(tmp_path, files):
    before = files[0].read_bytes()
    with pytest.raises(UserError, match="one of the inputs"):
        merge_loras(files, tmp_path / "." / "first.safetensors", concat_method())
    assert files[0].read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--lora_weight: name at least one"),
        (["--lora_weight", "{0}", "{1}", "--lora_multiplier", "1", "2", "3"], "3 values for 2 files"),
        (["--lora_weight", "{0}", "{1}", "--lora_multiplier", "0"], "nothing to merge"),
        (["--lora_weight", "{0}", "missing.safetensors"], "missing.safetensors does not exist"),
        (["--lora_weight", "{0}", "--merge_method", "orthogonal"], "takes exactly 2 files, got 1"),
        (["--lora_weight", "{0}", "{1}", "--orthogonal_k_fraction", "1.5"], "expected 0 to 1"),
        (["--lora_weight", "{0}", "--dtype", "float8"], "expected one of auto"),
        (["--lora_weigth", "{0}"], "did you mean --lora_weight"),
        (["--lora_weight", "{0}", "--lora_multiplier", "nan"], "expected a number"),
        (["--lora_weight", "{0}", "--lora_multiplier", "1e9", "--dtype", "float16"], "use bfloat16"),
    ],
)
def test_bad_requests_give_one_message_and_no_file(tmp_path, files, capsys, arguments, message):
    output = tmp_path / "merged.safetensors"
    arguments = [a.format(*files) for a in arguments]
    with pytest.raises(SystemExit) as status:
        main([*arguments, "--save_merged_lora", str(output)])
    assert status.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first.safetensors", "second.safetensors"]


@pytest.mark.parametrize("method", ["concat", "orthogonal"])
def test_script_prints_a_table(tmp_path, files, capsys, method):
    output = tmp_path / "sub" / "merged.safetensors"
    paths = [str(f) for f in files]
    main(["--lora_weight", *paths, "--lora_multiplier", "1", "-0.5", "--save_merged_lora", str(output),
          "--merge_method", method])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["file", "format", "multiplier", "modules", "rank", "dtype"]
    assert lines[2].split() == ["first.safetensors", "native", "1", "2", "2-3", "float32"]
    assert lines[3].split() == ["second.safetensors", "comfy", "-0.5", "2", "4-5", "float32"]
    assert lines[4].split() == ["merged.safetensors", "native", "3", "3-7", "float32"]
    assert str(output) in lines[-1]
    assert output.is_file()


def test_help_is_quick():
    script = Path(__file__).parents[2] / "ltx2_merge_lora.py"
    start = time.perf_counter()
    result = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True)
    assert "--orthogonal_rank_mode" in result.stdout
    imports = subprocess.run(
        [sys.executable, "-c", "import sys, musubi_tuner.ltx2_merge_lora; print('torch' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert imports.stdout.strip() == "False"
    assert time.perf_counter() - start < 10
