"""Rank, alpha and kind of each module."""

from __future__ import annotations

import math

import pytest
import torch
from lora_samples import full_skeleton, random_network, run, tiny_transformer
from safetensors.torch import load_file

from musubi_tuner.common.errors import UserError
from musubi_tuner.networks.lora_ltx2 import check_arguments, create_network, create_network_from_weights
from musubi_tuner.networks.targets import linear_names


def test_rslora_scales_by_the_root_of_the_rank_and_says_so_in_the_file(tmp_path):
    model = tiny_transformer()
    plain = random_network(model, dim=4, alpha=2.0)
    plain.apply_to(model)
    expected = run(model)
    plain.detach()
    network = random_network(model, dim=4, alpha=1.0, use_rslora="True")
    assert {m.scale.item() for m in network.modules_by_name.values()} == {0.5}  # 1 / sqrt(4), as 2 / 4 is
    network.apply_to(model)
    assert all(torch.equal(value, expected[key]) for key, value in run(model).items())
    path = network.save_weights(tmp_path / "a.safetensors")
    assert {t.item() for n, t in load_file(path).items() if n.endswith(".alpha")} == {2.0}


def test_rslora_with_ranks_and_alphas_by_pattern():
    args = {"use_rslora": "True", "rank_pattern": "{'attn1': 9}", "alpha_pattern": "{'to_k': 6}"}
    network = create_network(1.0, 4, 2.0, tiny_transformer(), **args)
    for name, module in network.modules_by_name.items():
        rank, alpha = 9 if "attn1" in name else 4, 6 if "to_k" in name else 2
        assert (module.rank, module.scale.item()) == (rank, pytest.approx(alpha / math.sqrt(rank)))


@pytest.mark.parametrize("fmt", ["native", "comfy"])
def test_ranks_and_alphas_of_each_module_survive_a_file(tmp_path, fmt):
    model = tiny_transformer()
    args = {"rank_pattern": {"attn1": 2, r"\.1\.audio_attn2\.to_q": 7}, "alpha_pattern": {"to_v": 5.0}}
    network = random_network(model, dim=4, alpha=3.0, **args)
    network.apply_to(model)
    expected = run(model)
    network.detach()
    path = network.save_weights(tmp_path / "a.safetensors", None, fmt=fmt)
    if fmt == "native":
        alphas = {n.removeprefix("lora_unet_transformer_blocks_").removesuffix(".alpha"): t.item()
                  for n, t in load_file(path).items() if n.endswith(".alpha")}  # fmt: skip
        assert (alphas["0_attn1_to_q"], alphas["1_attn1_to_v"]) == (3.0, 5.0)
    again = create_network_from_weights(1.0, path, model)
    ranks = {n: m.rank for n, m in again.modules_by_name.items()}
    assert ranks == {n: m.rank for n, m in network.modules_by_name.items()}
    assert sorted(set(ranks.values())) == [2, 4, 7]
    again.apply_to(model)
    for key, value in run(model).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_found_nowhere_names_what_is_near(key):
    linears = linear_names(full_skeleton("2.3", "av"))
    for pattern, near in ((r".*attn1\.to_kk$", "'attn1.to_k'"), (r"audio_atn2\.to_q", "'audio_attn2.to_q'")):
        with pytest.raises(UserError, match=f"{key}: .* none of the 1152 adapted modules.*did you mean {near}"):
            check_arguments(linears, 4, 1.0, **{key: {pattern: 8}})
    with pytest.raises(UserError, match=r"they are named like transformer_blocks\.0\.attn1\.to_q"):
        check_arguments(linears, 4, 1.0, **{key: {r"ff\.net": 8}})  # the preset does not adapt it
    check_arguments(linears, 4, 1.0, lora_target_preset="v2v", **{key: {r"ff\.net": 8}})


def test_arguments_are_checked_without_a_model():
    linears = linear_names(tiny_transformer())
    for args, message in (
        ({"include_patterns": ["x"]}, "match none of the"),
        ({"rank_pattern": {"(": 8}}, "rank_pattern: .* not a valid regular expression"),
        ({"use_dora": "maybe"}, "use_dora=maybe: expected True or False"),
        ({"dropout": 2.0}, "--network_dropout"),
    ):
        with pytest.raises(UserError, match=message):
            check_arguments(linears, 4, 1.0, **args)
    with pytest.raises(UserError, match="--network_dim 0"):
        check_arguments(linears, 0, 1.0)


def test_a_file_chooses_modules_and_ranks(tmp_path):
    model = tiny_transformer()
    path = random_network(model, dim=3, include_patterns=[r".*\.attn1\.to_q"]).save_weights(tmp_path / "a.safetensors")
    network = create_network_from_weights(1.0, path, model, dropout=0.1, rank_dropout="0.2")
    assert list(network.modules_by_name) == [f"transformer_blocks.{i}.attn1.to_q" for i in range(2)]
    assert {(m.rank, m.dropout, m.rank_dropout) for m in network.modules_by_name.values()} == {(3, 0.1, 0.2)}
    with pytest.raises(UserError, match=r"--network_args rank_pattern, use_dora: .* those of the file"):
        create_network_from_weights(1.0, path, model, rank_pattern="{'attn1': 2}", use_dora="True")
