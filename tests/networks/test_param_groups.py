"""Learning rates per module, and the name of the network module."""

from __future__ import annotations

import sys

import pytest
from lora_samples import tiny_transformer

from musubi_tuner.common.errors import UserError
from musubi_tuner.networks.lora_ltx2 import create_network
from musubi_tuner.networks.param_groups import param_groups
from musubi_tuner.networks.resolve import resolve_network_module


@pytest.fixture
def network():
    return create_network(1.0, 2, 1.0, tiny_transformer("2.0"), lora_target_preset="v2v")


def rates(network, groups):
    """Learning rate of each parameter by name; every one is in exactly one group."""
    names = {id(p): n for n, p in network.named_parameters()}
    found = [(names[id(p)], g["lr"]) for g in groups for p in g["params"]]
    assert len(found) == len(dict(found))
    return dict(found)


def test_one_rate_is_one_group(network):
    (group,) = param_groups(network, 1e-4)
    assert (group["label"], group["lr"]) == ("unet", 1e-4)
    assert len(group["params"]) == len(list(network.parameters()))


def test_documented_example(network):
    """--learning_rate 1e-4 --audio_lr 1e-5 --lr_args audio_attn=1e-6 video_to_audio=5e-6"""
    groups = param_groups(network, 1e-4, 1e-5, ["audio_attn=1e-6", "video_to_audio=5e-6"])
    assert {g["label"]: g["lr"] for g in groups} == {
        "unet_video": 1e-4,
        "unet_audio": 1e-5,
        "unet_audio_attn": 1e-6,
        "unet_video_to_audio": 5e-6,
    }
    for name, lr in rates(network, groups).items():
        if "video_to_audio" in name:  # also contains audio_attn, which is the shorter pattern
            assert lr == 5e-6
        elif "audio_attn" in name:
            assert lr == 1e-6
        else:
            assert lr == (1e-5 if "audio_" in name else 1e-4)
    assert len(rates(network, groups)) == len(list(network.parameters()))


def test_audio_rate_holds_for_both_cross_modal_directions(network):
    found = rates(network, param_groups(network, 1e-4, 1e-5))
    assert {lr for n, lr in found.items() if "audio_to_video" in n or "video_to_audio" in n} == {1e-5}


def test_loraplus_splits_every_group(network):
    groups = param_groups(network, 1e-4, 1e-5, loraplus_lr_ratio=4)
    assert {g["label"]: g["lr"] for g in groups} == {
        "unet_video": 1e-4,
        "unet_video plus": 4e-4,
        "unet_audio": 1e-5,
        "unet_audio plus": 4e-5,
    }
    for name, lr in rates(network, groups).items():
        assert (lr in (4e-4, 4e-5)) == ("lora_up" in name)


def test_rate_zero_freezes(network):
    groups = param_groups(network, 1e-4, 0.0, ["attn2=0"])
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    assert trained == set(rates(network, groups))
    assert trained
    assert not any("audio_" in n or "attn2" in n for n in trained)
    with pytest.raises(UserError, match="nothing to train"):
        param_groups(network, 0.0)


def test_pattern_is_split_at_the_last_equals_sign_and_may_be_a_regex(network):
    groups = param_groups(network, 1e-4, lr_args=["(?=lora_unet).*blocks_1_attn1.to_q=3e-5"])
    assert [n for n, lr in rates(network, groups).items() if lr == 3e-5] == [
        f"lora_unet_transformer_blocks_1_attn1_to_q.lora_{s}.weight" for s in ("down", "up")
    ]


def test_pattern_without_match_warns(network, caplog):
    param_groups(network, 1e-4, lr_args=["connector=1e-6"])
    assert "'connector' matches no module" in caplog.text


@pytest.mark.parametrize("item", ["audio_attn", "audio_attn=", "=1e-4", "a=fast", "a=-1", "a=nan", "a=inf", "(=1e-4"])
def test_bad_rates(network, item):
    with pytest.raises(UserError, match="--lr_args"):
        param_groups(network, 1e-4, lr_args=[item])


def test_network_module_of_the_package_comes_first():
    from musubi_tuner.networks import lora_ltx2

    assert resolve_network_module("networks.lora_ltx2") is lora_ltx2
    assert resolve_network_module("musubi_tuner.networks.lora_ltx2") is lora_ltx2


def test_network_module_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "own_network.py").write_text("def create_network(): pass\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_network_module("own_network") is sys.modules["own_network"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("networks.lora_ltx", "did you mean 'networks.lora_ltx2'"),
        ("lycoriss.kohya", "did you mean 'lycoris.kohya'"),
        ("json", "json has no function create_network; known: networks.lora_ltx2, lycoris.kohya"),
        ("networks.lora", r"no function create_network \(did you mean 'networks.lora_ltx2'"),
        ("..", "no such module"),
    ],
)
def test_bad_network_module(name, message):
    with pytest.raises(UserError, match=message):
        resolve_network_module(name)
