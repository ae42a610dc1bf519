"""Averages over saved LoRA files."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from checkpoint_files import contents
from lora_samples import random_lora

from musubi_tuner.common.safetensors_io import SafetensorsFile, save_safetensors
from musubi_tuner.ltx2_lora_post_hoc_ema import main
from musubi_tuner.networks.file_tools.post_hoc_ema import linear_betas, power_betas, power_exponent, shares
from musubi_tuner.networks.files.lora_writer import save_lora

NAMES = {"transformer_blocks.0.attn1.to_q": (4, 6, 8, 2.0), "transformer_blocks.1.audio_ff.net.2": (2, 6, 8, 1.0)}


@pytest.fixture
def files(tmp_path):
    """Five files of a run, written in order; their names sort in another."""
    paths = []
    for i in range(5):
        path = tmp_path / f"{9 - i}.safetensors"
        paths.append(save_lora(random_lora(NAMES, seed=i), path, metadata={"ss_steps": str(i)}))
        os.utime(path, (1000 + i, 1000 + i))
    return paths


def average(files, *options):
    output = files[0].with_name("average.safetensors")
    main([*map(str, files), "--output_file", str(output), *options])
    return contents(output)


def weighted(files, weights):
    tensors = [contents(p) for p in files]
    return {k: sum(w * t[k].double() for w, t in zip(weights, tensors, strict=True)).float() for k in tensors[0]}


def assert_close(found, expected):
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6)


def test_average_is_the_closed_form(files):
    b = 0.9
    weights = [b**4, *((1 - b) * b ** (4 - i) for i in range(1, 5))]
    assert_close(average(files, "--beta", "0.9"), weighted(files, weights))


def test_beta_goes_to_beta2_in_equal_steps(files):
    assert linear_betas(5, 0.8, 0.95) == pytest.approx([0.8, 0.85, 0.9, 0.95])
    assert linear_betas(2, 0.8, 0.95) == [0.8]
    assert_close(average(files, "--beta", "0.8", "--beta2", "0.95"), weighted(files, shares([0.8, 0.85, 0.9, 0.95])))


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.28])
def test_power_function_has_the_width_that_was_asked_for(sigma_rel):
    gamma = power_exponent(sigma_rel)
    s = sigma_rel**-2
    (root,) = [r.real for r in np.roots([1, 7, 16 - s, 12 - s]) if abs(r.imag) < 1e-9 and r.real > 0]
    assert gamma == pytest.approx(root)
    # The share of the file at t is that of the profile t ** gamma, up to the discretisation.
    found = np.array(shares(power_betas(4000, sigma_rel)))
    t = np.arange(1, 4001) / 4000
    mean = (found * t).sum()
    assert np.sqrt((found * (t - mean) ** 2).sum()) == pytest.approx(sigma_rel, rel=2e-3)
    assert found.sum() == pytest.approx(1)


def test_sigma_rel_of_the_script(files):
    assert_close(average(files, "--sigma_rel", "0.2"), weighted(files, shares(power_betas(5, 0.2))))


def test_order_is_that_of_writing_unless_asked_otherwise(files):
    shuffled = [files[i] for i in (3, 0, 4, 2, 1)]
    assert_close(average(shuffled), average(files))
    assert_close(average(shuffled, "--no_sort"), weighted(shuffled, shares([0.95] * 4)))


def test_file_averaged_with_itself_keeps_its_bits(files, tmp_path):
    path = save_lora(random_lora(NAMES), tmp_path / "a.safetensors", dtype=torch.bfloat16)
    copy = tmp_path / "b.safetensors"
    copy.write_bytes(path.read_bytes())
    found, before = average([path, copy], "--beta", "0.5"), contents(path)
    assert all(torch.equal(found[k], before[k]) and found[k].dtype == before[k].dtype for k in before)


def test_lycoris_files_are_averaged_too(tmp_path):
    key = "lora_unet_transformer_blocks_0_attn1_to_q"
    paths = []
    for i in range(2):
        tensors = {f"{key}.lokr_w1": torch.full((2, 2), float(i)), f"{key}.alpha": torch.tensor(4.0)}
        paths.append(tmp_path / f"{i}.safetensors")
        save_safetensors({**tensors, f"{key}.lokr_w2": torch.ones(2, 2)}, paths[-1])
    found = average(paths, "--beta", "0.25", "--no_sort")
    assert torch.equal(found[f"{key}.lokr_w1"], torch.full((2, 2), 0.75))
    assert found[f"{key}.alpha"] == 4


def test_metadata_is_of_the_last_file(files):
    average(files)
    metadata = SafetensorsFile(files[0].with_name("average.safetensors")).metadata
    assert metadata["ss_steps"] == "4"
    assert metadata["ss_post_hoc_ema"] == "beta 0.95"
    assert metadata["sshs_model_hash"] not in {SafetensorsFile(f).metadata["sshs_model_hash"] for f in files}


def test_table_and_shares(files, capsys):
    average(files, "--beta", "0.5")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["file", "beta", "share"]
    assert lines[2].split() == ["9.safetensors", "6.25%"]
    assert lines[6].split() == ["5.safetensors", "0.5000", "50.00%"]


OTHER = {"transformer_blocks.0.attn1.to_q": (3, 6, 8, 2.0)}


@pytest.mark.parametrize(
    ("other", "arguments", "message"),
    [
        ({"names": OTHER}, [], "tensors are not those of"),
        ({"names": NAMES | {"transformer_blocks.0.attn1.to_q": (4, 6, 8, 3.0)}}, [], "alpha is another than in"),
        ({"names": NAMES, "fmt": "comfy"}, [], "is in the comfy format"),
        ({"names": NAMES, "nan": True}, [], "holds NaN or infinity; leave the file out"),
        ({"names": NAMES}, ["--beta", "1.5"], "--beta 1.5: expected 0 to 1"),
        ({"names": NAMES}, ["--sigma_rel", "0.3"], "expected above 0 and below 0.2887"),
        ({"names": NAMES}, ["--sigma_rel", "0.2", "--beta", "0.9"], "leave out --beta"),
        ({"names": NAMES}, ["--output_file", "{first}"], "this is one of the inputs"),
        ({"names": NAMES}, ["--path", "none.safetensors"], "none.safetensors: not found"),
        (None, [], "name at least two LoRA files, got 1"),
    ],
)
def test_bad_requests_give_one_message_and_no_file(tmp_path, capsys, other, arguments, message):
    paths = [save_lora(random_lora(NAMES), tmp_path / "a.safetensors")]
    if other is not None:
        lora = random_lora(other["names"], seed=1)
        if other.get("nan"):
            next(iter(lora.modules.values())).up[0, 0] = float("inf")
        path = tmp_path / "b.safetensors"
        paths.append(save_lora(lora, path, other.get("fmt", "native"), require_finite=False))
    with pytest.raises(SystemExit) as status:
        average(paths, *(a.format(first=paths[0]) for a in arguments))
    assert status.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error:") == 1
    assert sorted(tmp_path.iterdir()) == paths


def test_files_of_another_model_are_refused(tmp_path, capsys):
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path in paths:
        save_safetensors({f"lora_unet_down_blocks_0.lora_{s}.weight": torch.ones(2, 2) for s in ("up", "down")}, path)
    with pytest.raises(SystemExit):
        average(paths)
    assert "a LoRA of another model" in capsys.readouterr().err
