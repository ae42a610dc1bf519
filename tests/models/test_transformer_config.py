"""Configuration from metadata or shapes, versions, names and sizes."""

from __future__ import annotations

from collections import Counter

import pytest
from ltx2_tiny import VERSIONS, config_of, diffusers_twin, tiny_config, tiny_model, tiny_section
from torch import nn

from musubi_tuner.common.errors import UserError
from musubi_tuner.models.ltx2.config import TransformerConfig, detect_version
from musubi_tuner.models.ltx2.keys import (
    find_prefix,
    from_diffusers,
    in_mode,
    owner,
    to_diffusers,
    transformer_keys,
)
from musubi_tuner.models.ltx2.load import build_transformer

OFFICIAL_PREFIX = "model.diffusion_model."

# Parameters, tensors and Linears per block of the released sizes.
SIZES = {
    ("2.0", "av"): (18_876_174_592, 3510, 28),
    ("2.0", "video"): (13_041_520_768, 1215, 10),
    ("2.0", "audio"): (3_265_980_544, 1215, 10),
    ("2.3", "av"): (18_988_838_144, 4186, 34),
    ("2.3", "video"): (13_124_316_288, 1457, 12),
    ("2.3", "audio"): (3_286_408_320, 1457, 12),
    ("2.5", "av"): (18_987_859_200, 4091, 34),
    ("2.5", "video"): (13_123_337_344, 1362, 12),
    ("2.5", "audio"): (3_286_408_320, 1457, 12),
}


def shapes_of(version: str, prefix: str = OFFICIAL_PREFIX, **overrides) -> dict[str, tuple[int, ...]]:
    model = build_transformer(tiny_config(version, **overrides), "av")
    return {prefix + name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize(("version", "mode"), SIZES)
def test_released_sizes(version, mode):
    model = build_transformer(config_of(version), mode)
    linears = [m for m in model.transformer_blocks[0].modules() if isinstance(m, nn.Linear)]
    parameters = list(model.parameters())
    assert (sum(p.numel() for p in parameters), len(parameters), len(linears)) == SIZES[version, mode]
    assert all(p.is_meta and not p.requires_grad for p in parameters)


@pytest.mark.parametrize("version", VERSIONS)
def test_streams_share_no_tensor_and_make_up_their_part_of_the_whole(version):
    names = {
        mode: {n for n, _ in build_transformer(tiny_config(version), mode).named_parameters()}
        for mode in ("video", "av", "audio")
    }
    assert not names["video"] & names["audio"]
    for mode in ("video", "audio"):
        assert names[mode] == {name for name in names["av"] if owner(name) == mode}
        assert names[mode] == {name for name in names["av"] if in_mode(name, mode)}
    joint = names["av"] - names["video"] - names["audio"]
    assert {owner(name) for name in joint} == {"av"}


def test_owner_goes_by_the_part_not_by_the_word_audio():
    assert owner("av_ca_video_scale_shift_adaln_single.linear.weight") == "av"
    assert owner("transformer_blocks.7.scale_shift_table_a2v_ca_video") == "av"
    assert owner("transformer_blocks.7.audio_to_video_attn.to_q.weight") == "av"
    assert owner("transformer_blocks.7.audio_attn1.to_q.weight") == "audio"
    assert owner("audio_caption_projection.linear_1.weight") == "audio"
    assert owner("transformer_blocks.7.scale_shift_table") == "video"


@pytest.mark.parametrize("version", VERSIONS)
def test_diffusers_names_are_a_bijection(version):
    model = tiny_model(tiny_config(version))
    names = [name for name, _ in model.named_parameters()]
    assert {to_diffusers(n) for n in names} == set(diffusers_twin(model).state_dict())
    assert [from_diffusers(to_diffusers(n)) for n in names] == names


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", ""])
def test_transformer_keys_leave_other_sections_out(prefix):
    ours = shapes_of("2.3", prefix)
    foreign = [
        prefix + "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q.weight",
        prefix + "audio_embeddings_connector.learnable_registers",
        "text_embedding_projection.video_aggregate_embed.weight",
        "vae.encoder.conv_in.conv.weight",
        "audio_vae.decoder.conv_in.conv.weight",
        "vocoder.conv_pre.weight",
    ]
    found = transformer_keys([*foreign, *ours])
    assert list(found.values()) == list(ours)
    assert find_prefix(foreign) is None


def test_no_transformer_is_a_user_error():
    with pytest.raises(UserError, match="no diffusion transformer"):
        transformer_keys(["vae.encoder.conv_in.conv.weight"])


@pytest.mark.parametrize("version", VERSIONS)
def test_metadata_gives_the_configuration(version):
    assert TransformerConfig.from_metadata(tiny_section(version), shapes_of(version)) == tiny_config(version)


def test_absent_metadata_keys_take_the_defaults_of_the_official_code():
    section = tiny_section("2.0")
    for key in ("av_ca_timestep_scale_multiplier", "frequencies_precision", "audio_in_channels"):
        del section[key]
    config = TransformerConfig.from_metadata(section, shapes_of("2.0"))
    assert config.av_ca_timestep_scale_multiplier == 1.0
    assert config.frequencies_precision == "float32"
    assert config.audio_in_channels == 6  # from the weight


@pytest.mark.parametrize("version", VERSIONS)
def test_without_metadata_the_shapes_tell(version):
    """32 heads, as in every release; what no shape shows is as released, not as the code's defaults."""
    widths = {"num_attention_heads": 32, "audio_num_attention_heads": 32}
    dims = {"attention_head_dim": 4, "audio_attention_head_dim": 2}
    cross = {"cross_attention_dim": 128, "audio_cross_attention_dim": 64}
    expected = tiny_config(version, **widths, **dims, **cross)
    found = TransformerConfig.from_metadata(None, shapes_of(version, **widths, **dims, **cross))
    if version != "2.0":  # nothing in the file depends on the text encoder's width
        found = TransformerConfig(**{**vars(found), "caption_channels": expected.caption_channels})
    assert found == expected
    assert found.rope_type == "split"
    assert found.frequencies_precision == "float64"
    assert found.av_ca_timestep_scale_multiplier == 1000.0


def test_without_metadata_the_gates_tell_the_heads():
    found = TransformerConfig.from_metadata(None, shapes_of("2.3"))
    assert found.num_attention_heads == found.audio_num_attention_heads == 2
    assert (found.attention_head_dim, found.audio_attention_head_dim) == (16, 12)


def test_without_metadata_a_file_of_one_stream_is_enough():
    for mode in ("video", "audio"):
        shapes = {k: s for k, s in shapes_of("2.3", "").items() if owner(k) == mode}
        config = TransformerConfig.from_metadata(None, shapes)
        built = build_transformer(config, mode)
        assert {n: tuple(p.shape) for n, p in built.named_parameters()} == shapes


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qk_norm", "layer_norm"),
        ("activation_fn", "silu"),
        ("dropout", 0.1),
        ("share_ff", True),
        ("use_middle_indices_grid", False),
        ("rope_type", "spiral"),
        ("frequencies_precision", "float16"),
        ("audio_num_attention_heads", 4),
        ("cross_attention_dim", 48),
        ("positional_embedding_max_pos", [20, 2048]),
    ],
)
def test_unsupported_values_are_refused_by_name(key, value):
    with pytest.raises(UserError, match=key):
        TransformerConfig.from_metadata(tiny_section("2.3", **{key: value}), shapes_of("2.3"))


@pytest.mark.parametrize(
    ("label", "version"),
    [
        ("2.0.0", None),
        ("2.3.0", "2.3"),
        ("2.3.rc1", "2.3"),
        ("2.4-rc2", "2.3"),
        ("2.5.0", "2.5"),
        (2.3, "2.3"),
        ("3.0", "2.5"),
        ("dev", None),
        (None, None),
    ],
)
def test_version_by_label(label, version):
    metadata = {} if label is None else {"model_version": label}
    keys = shapes_of("2.0")
    assert detect_version(metadata, keys) == (version or "2.0")


@pytest.mark.parametrize(
    ("config", "version"),
    [
        ({"transformer": {"num_layers": 48}}, "2.0"),
        ({"transformer": {"cross_attention_adaln": True}}, "2.3"),
        ({"transformer": {"caption_proj_before_connector": True}}, "2.3"),
        ({"transformer": {"audio_connector_attention_head_dim": 64}}, "2.3"),
        ({"transformer": {"num_layers": 48}, "vocoder": {"bwe": {}}}, "2.0"),
        ({"transformer": {"num_layers": 48}, "vocoder": {"bwe": {"x": 1}}}, "2.3"),
        ({"transformer": {"num_layers": 48}, "vocoder": None}, "2.0"),
        ({"transformer": {"cross_attention_adaln": True, "ff_bias": False}}, "2.5"),
        ({"transformer": {"use_keyframes_abs_pos_embedding": True}}, "2.5"),
    ],
)
def test_version_by_configuration(config, version):
    assert detect_version({"config": config}, []) == version


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
@pytest.mark.parametrize("version", VERSIONS)
def test_version_by_keys(version, prefix):
    assert detect_version({}, shapes_of(version, prefix)) == version


def test_version_of_an_unknown_file_is_a_user_error():
    with pytest.raises(UserError, match="cannot tell which LTX-2 release"):
        detect_version({}, ["vae.encoder.conv_in.conv.weight"])


def test_class_names_that_lycoris_targets():
    model = build_transformer(tiny_config("2.3"), "av")
    counts = Counter(type(m).__name__ for m in model.modules())
    assert counts["BasicAVTransformerBlock"] == 2
    assert counts["Attention"] == 12
    assert counts["FeedForward"] == 4
