"""Which layers the presets and patterns choose."""

from __future__ import annotations

import pytest
from lora_samples import full_skeleton

from musubi_tuner.common.errors import UserError
from musubi_tuner.networks.lora_ltx2 import create_network
from musubi_tuner.networks.names import flat_name, known_names
from musubi_tuner.networks.targets import linear_names, modality_of, select_targets

MODES = ("av", "video", "audio")

# (version, preset): modules in av, video and audio models, then parameters per unit of rank.
COUNTS = {
    ("2.0", "t2v"): ((1152, 384, 384), (6_684_672, 3_145_728, 1_572_864)),
    ("2.3", "t2v"): ((1152, 384, 384), (6_684_672, 3_145_728, 1_572_864)),
    ("2.0", "v2v"): ((1344, 480, 480), (9_633_792, 5_111_808, 2_555_904)),
    ("2.3", "v2v"): ((1344, 480, 480), (9_633_792, 5_111_808, 2_555_904)),
    ("2.3", "audio"): ((672, 0, 480), (3_538_944, 0, 2_555_904)),
    ("2.3", "audio_ref_only_ic"): ((864, 0, 480), (4_521_984, 0, 2_555_904)),
    ("2.0", "full"): ((1344, 480, 480), (9_633_792, 5_111_808, 2_555_904)),
    ("2.3", "full"): ((1632, 576, 576), (10_527_744, 5_508_096, 2_755_584)),
}


@pytest.fixture(scope="module")
def skeletons():
    return {(v, m): full_skeleton(v, m) for v in ("2.0", "2.3") for m in MODES}


@pytest.mark.parametrize("version_preset", COUNTS, ids="-".join)
def test_preset_counts_at_true_size(skeletons, version_preset):
    version, preset = version_preset
    modules, params = COUNTS[version_preset]
    for mode, num_modules, num_params in zip(MODES, modules, params, strict=True):
        model = skeletons[version, mode]
        names = select_targets(model, preset)
        layers = [model.get_submodule(n) for n in names]
        assert len(names) == len(set(names)) == num_modules
        assert sum(x.in_features + x.out_features for x in layers) == num_params


def test_default_preset_is_t2v(skeletons):
    model = skeletons["2.3", "av"]
    assert select_targets(model) == select_targets(model, "t2v")


def test_only_layers_of_the_blocks_are_candidates(skeletons):
    for model in skeletons.values():
        assert all(n.startswith("transformer_blocks.") for n in select_targets(model, "full"))


def test_every_linear_of_the_model_has_a_known_name(skeletons):
    from torch import nn

    for model in skeletons.values():
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        assert set(linears) <= set(known_names())


def test_flat_names_are_unique():
    assert len({flat_name(n) for n in known_names()}) == len(known_names())


def test_exclude_wins_over_preset_and_include(skeletons):
    model = skeletons["2.3", "av"]
    exclude = [r".*audio_.*"]
    assert len(select_targets(model, "t2v", exclude_patterns=exclude)) == 384
    chosen = select_targets(model, None, [r".*\.attn1\.to_q", r".*\.audio_attn1\.to_q"], exclude)
    assert chosen == [f"transformer_blocks.{i}.attn1.to_q" for i in range(48)]


def test_include_replaces_the_preset_with_a_warning(skeletons, caplog):
    chosen = select_targets(skeletons["2.0", "av"], "audio", [r".*\.attn2\.to_k$"])
    assert len(chosen) == 48
    assert "replace the target preset 'audio'" in caplog.text


def test_patterns_match_the_whole_path(skeletons, caplog):
    assert select_targets(skeletons["2.0", "video"], None, ["attn1"]) == []
    assert "'attn1' matches no layer" in caplog.text


def test_names_serve_as_well_as_a_model(skeletons):
    model = skeletons["2.3", "av"]
    assert select_targets(linear_names(model), "audio") == select_targets(model, "audio")


@pytest.mark.parametrize("field", ["include_patterns", "exclude_patterns"])
def test_bad_regex_is_an_error(skeletons, field):
    with pytest.raises(UserError, match=rf"{field}.*\(unclosed"):
        select_targets(skeletons["2.0", "video"], **{field: ["(unclosed"]})


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match=r"did you mean 'audio'.*known: t2v"):
        select_targets([], "audo")


def test_no_target_is_an_error(skeletons):
    with pytest.raises(UserError, match="match none of the"):
        create_network(1.0, 4, 1.0, skeletons["2.0", "video"], lora_target_preset="audio")


def test_modalities():
    block = "transformer_blocks.0."
    assert modality_of(block + "attn1.to_q") == modality_of(block + "ff.net.2") == "video"
    assert modality_of(block + "audio_attn1.to_q") == modality_of(block + "audio_ff.net.2") == "audio"
    assert modality_of(flat_name(block + "audio_to_video_attn.to_q")) == "cross"
    assert modality_of(block + "video_to_audio_attn.to_out.0") == "cross"
