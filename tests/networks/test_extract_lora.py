"""The difference of two checkpoints as a LoRA."""

from __future__ import annotations

import pytest
import torch
from checkpoint_files import PREFIX, contents, save_checkpoint, save_fp8_checkpoint, tiny_weights
from lora_samples import random_lora

from musubi_tuner.ltx2_extract_lora import main
from musubi_tuner.ltx2_merge_lora_to_model import main as merge
from musubi_tuner.networks.base_weights import BaseWeights
from musubi_tuner.networks.file_tools.extract import RankRule, low_rank
from musubi_tuner.networks.files.lora_reader import load_lora
from musubi_tuner.networks.files.lora_writer import save_lora

Q, A = "transformer_blocks.0.attn1.to_q", "transformer_blocks.1.audio_ff.net.2"
LORA = random_lora({Q: (3, 32, 32, 2.0), A: (5, 96, 24, None)})


@pytest.fixture
def base(tmp_path):
    return save_checkpoint(tmp_path / "base.safetensors", tiny_weights())


@pytest.fixture
def tuned(tmp_path, base):
    path = save_lora(LORA, tmp_path / "lora.safetensors")
    target = tmp_path / "tuned.safetensors"
    merge(["--ltx2_checkpoint", str(base), "--lora_weight", str(path), "--save_merged_model", str(target)])
    return target


def extract(base, tuned, *options):
    target = base.with_name("extracted.safetensors")
    main(["--base_model", str(base), "--tuned_model", str(tuned), "--save_extracted_lora", str(target),
          "--save_precision", "fp32", "--device", "cpu", *options])  # fmt: skip
    return target


@pytest.mark.parametrize("options", [[], ["--exact_svd"]])
def test_extracting_at_the_rank_gives_the_same_product(base, tuned, options):
    path = extract(base, tuned, "--network_dim", "5", *options)
    for written, fmt in ((path, "native"), (path.with_name("extracted.comfy.safetensors"), "comfy")):
        found = load_lora(written)
        assert found.format == fmt
        assert set(found.modules) == {Q, A}
        for name, module in found.modules.items():
            torch.testing.assert_close(module.delta(), LORA.modules[name].delta(), rtol=1e-4, atol=1e-4)


def test_energy_takes_as_few_directions_as_hold_it(base, tuned):
    found = load_lora(extract(base, tuned, "--energy", "0.8")).modules
    for name, module in found.items():
        exact = LORA.modules[name].delta()
        rank, total = module.info.rank, exact.square().sum()
        values = torch.linalg.svdvals(exact)
        assert values[:rank].square().sum() >= 0.8 * total
        assert values[: rank - 1].square().sum() < 0.8 * total
    assert {m.info.rank for m in found.values()} != {64}


def test_ratio_drops_weak_directions(base, tuned):
    found = load_lora(extract(base, tuned, "--singular_ratio", "0.7")).modules
    for name, module in found.items():
        values = torch.linalg.svdvals(LORA.modules[name].delta())
        assert module.info.rank == int((values > 0.7 * values[0]).sum())


def test_rank_is_that_of_the_change_where_more_is_allowed(base, tuned):
    """What rounding adds beyond it stays small, and is no part of the product."""
    found = load_lora(extract(base, tuned, "--network_dim", "64", "--singular_ratio", "1e-5")).modules
    assert {n: m.info.rank for n, m in found.items()} == {Q: 3, A: 5}


def test_randomised_decomposition_finds_the_largest_values():
    g = torch.Generator().manual_seed(0)
    values = 0.8 ** torch.arange(80.0)
    u, v = (torch.linalg.qr(torch.randn(n, 80, generator=g))[0] for n in (300, 200))
    matrix = (u * values) @ v.T
    left, found, right = low_rank(matrix, 10, "any")
    assert len(found) == 26
    torch.testing.assert_close(found[:10], values[:10], rtol=1e-4, atol=0)
    best = (u[:, :10] * values[:10]) @ v[:, :10].T
    torch.testing.assert_close((left[:, :10] * found[:10]) @ right[:10], best, rtol=0, atol=1e-3)
    assert torch.equal(low_rank(matrix, 10, "any")[1], found)


def test_rank_rule():
    values = torch.tensor([4.0, 2.0, 1.0, 0.5])
    total = float(values.square().sum())
    assert RankRule(3).rank(values, total) == 3
    assert RankRule(4, energy=16 / total).rank(values, total) == 1
    assert RankRule(4, energy=16.1 / total).rank(values, total) == 2
    assert RankRule(4, ratio=0.3).rank(values, total) == 2
    assert RankRule(1, energy=0.99).rank(values, total) == 1


def test_fp8_checkpoints_are_compared_with_their_scales(tmp_path):
    weights = tiny_weights(dtype=torch.bfloat16)
    base = save_fp8_checkpoint(tmp_path / "base.safetensors", weights)
    weights[f"{Q}.weight"] = weights[f"{Q}.weight"] * 2
    tuned = save_fp8_checkpoint(tmp_path / "tuned.safetensors", weights)
    module = load_lora(extract(base, tuned)).modules[Q]
    name = f"{Q}.weight"
    exact = BaseWeights(tuned).dense(name) - BaseWeights(base).dense(name)
    torch.testing.assert_close(module.delta(), exact, rtol=0, atol=1e-5)


def test_tensors_that_a_lora_cannot_hold_are_told(tmp_path, base, tuned, capsys):
    weights = {k.removeprefix(PREFIX): t for k, t in contents(tuned).items() if k.startswith(PREFIX)}
    weights["scale_shift_table"] = weights["scale_shift_table"] + 1
    extract(base, save_checkpoint(tmp_path / "other.safetensors", weights))
    message = "1 tensors differ that a LoRA cannot hold (biases, norms, tables), such as scale_shift_table"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tuned", "arguments", "message"),
    [
        ("base", [], "does not differ from"),
        ("2.0", [], "is no variant of"),
        ("nan", [], "attn1.to_q.weight holds NaN or infinity"),
        ("base", ["--network_dim", "0"], "--network_dim 0: expected at least 1"),
        ("base", ["--energy", "0"], "--energy 0.0: expected above 0"),
        ("base", ["--tuned_model", "none.safetensors"], "none.safetensors: not found"),
    ],
)
def test_bad_requests_give_one_message_and_no_file(tmp_path, base, capsys, tuned, arguments, message):
    folder = tmp_path / "in"
    folder.mkdir()
    path = folder / "tuned.safetensors"
    if tuned == "nan":
        weights = tiny_weights()
        weights[f"{Q}.weight"][0, 0] = float("nan")
        save_checkpoint(path, weights)
    else:
        save_checkpoint(path, tiny_weights("2.0" if tuned == "2.0" else "2.3"), "2.3")
    with pytest.raises(SystemExit) as status:
        extract(base, path, *arguments)
    assert status.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors", "in"]
