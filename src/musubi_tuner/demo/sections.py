"""The metadata ``config`` of the demo checkpoint: the real files' keys, with small numbers."""

from __future__ import annotations

from typing import Any

from musubi_tuner.models.ltx2.config import Version

from .gemma import HIDDEN_SIZE

HEADS = 4
HEAD_DIM = 64  # video width 256
AUDIO_HEAD_DIM = 32  # audio width 128, as many as a token has channels
LAYERS = 3


def official_config(version: Version) -> dict[str, dict[str, Any]]:
    """The sections ``transformer``, ``vae``, ``audio_vae``, ``vocoder`` and ``scheduler``."""
    if version not in ("2.0", "2.3"):
        raise ValueError(f"no demo checkpoint for version {version!r}; known: 2.0, 2.3")
    return {
        "transformer": _transformer(version),
        "vae": _video_vae(version),
        "audio_vae": _audio_vae(),
        "vocoder": _vocoder_with_bwe() if version == "2.3" else _vocoder(),
        "scheduler": {"_class_name": "RectifiedFlowScheduler", "sampler": "LinearQuadratic"},
    }


def _transformer(version: Version) -> dict[str, Any]:
    section: dict[str, Any] = {
        "_class_name": "AVTransformer3DModel",
        "num_layers": LAYERS,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "audio_num_attention_heads": HEADS,
        "audio_attention_head_dim": AUDIO_HEAD_DIM,
        "in_channels": 128,
        "out_channels": 128,
        "audio_out_channels": 128,
        "cross_attention_dim": HEADS * HEAD_DIM,
        "audio_cross_attention_dim": HEADS * AUDIO_HEAD_DIM,
        "caption_channels": HIDDEN_SIZE,
        "norm_eps": 1e-6,
        "positional_embedding_theta": 10000.0,
        "positional_embedding_max_pos": [20, 2048, 2048],
        "audio_positional_embedding_max_pos": [20],
        "positional_embedding_type": "rope",
        "rope_type": "split",
        "frequencies_precision": "float64",
        "use_middle_indices_grid": True,
        "timestep_scale_multiplier": 1000,
        "av_ca_timestep_scale_multiplier": 1000.0,
        "causal_temporal_positioning": True,
        "attention_type": "default",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "dropout": 0.0,
        "double_self_attention": False,
        "only_cross_attention": False,
        "cross_attention_norm": True,
        "norm_elementwise_affine": False,
        "norm_num_groups": 32,
        "num_embeds_ada_norm": 1000,
        "num_vector_embeds": None,
        "qk_norm": "rms_norm",
        "standardization_norm": "rms_norm",
        "upcast_attention": False,
        "use_linear_projection": False,
        "use_audio_video_cross_attention": True,
        "share_ff": False,
        "av_cross_ada_norm": True,
        "connector_num_layers": 1,
        "connector_num_attention_heads": 2,
        "connector_attention_head_dim": HIDDEN_SIZE // 2,
        "connector_num_learnable_registers": 128,
        "connector_positional_embedding_max_pos": [4096],
        "connector_norm_output": True,
    }
    if version == "2.3":
        section |= {
            "apply_gated_attention": True,
            "cross_attention_adaln": True,
            "caption_proj_before_connector": True,
            "caption_projection_first_linear": False,
            "caption_projection_second_linear": False,
            "caption_proj_input_norm": False,
            "text_encoder_norm_type": "per_token_rms",
            "connector_num_attention_heads": HEADS,
            "connector_attention_head_dim": HEAD_DIM,
            "audio_connector_num_attention_heads": HEADS,
            "audio_connector_attention_head_dim": AUDIO_HEAD_DIM,
            "connector_apply_gated_attention": True,
        }
    return section


def _video_vae(version: Version) -> dict[str, Any]:
    section: dict[str, Any] = {
        "_class_name": "CausalVideoAutoencoder",
        "dims": 3,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 128,
        "patch_size": 4,
        "norm_layer": "pixel_norm",
        "latent_log_var": "uniform",
        "causal_decoder": False,
        "timestep_conditioning": False,
        "decoder_base_channels": 16,
        "encoder_blocks": _between_residuals(
            ["compress_space_res", {"multiplier": 1}],
            ["compress_time_res", {"multiplier": 1}],
            ["compress_all_res", {"multiplier": 1}],
            ["compress_all_res", {"multiplier": 1}],
        ),
    }
    if version == "2.0":
        up = ["compress_all", {"residual": True, "multiplier": 2}]
        section["decoder_blocks"] = _between_residuals(up, up, up)
    else:
        section["spatial_padding_mode"] = "zeros"
        section["decoder_blocks"] = _between_residuals(
            ["compress_space", {"multiplier": 2}],
            ["compress_time", {"multiplier": 2}],
            ["compress_all", {"multiplier": 1}],
            ["compress_all", {"multiplier": 2}],
        )
    return section


def _between_residuals(*compress: list[Any]) -> list[Any]:
    blocks: list[Any] = [["res_x", {"num_layers": 1}]]
    for block in compress:
        blocks += [block, ["res_x", {"num_layers": 1}]]
    return blocks


def _audio_vae() -> dict[str, Any]:
    return {
        "model": {
            "params": {
                "sampling_rate": 16000,
                "ddconfig": {
                    "ch": 128,
                    "out_ch": 2,
                    "z_channels": 8,
                    "ch_mult": [1, 1, 1],
                    "num_res_blocks": 1,
                    "in_channels": 2,
                    "resolution": 256,
                    "norm_type": "pixel",
                    "causality_axis": "height",
                    "dropout": 0.0,
                    "double_z": True,
                    "mid_block_add_attention": False,
                    "attn_resolutions": [],
                    "mel_bins": 64,
                },
            }
        },
        "preprocessing": {
            "stft": {"filter_length": 1024, "hop_length": 160, "win_length": 1024, "causal": True},
            "mel": {"n_mel_channels": 64, "mel_fmin": 0, "mel_fmax": 8000},
        },
    }


def _vocoder() -> dict[str, Any]:
    return {
        "upsample_initial_channel": 32,
        "resblock": "1",
        "upsample_rates": [6, 5, 2, 2, 2],
        "upsample_kernel_sizes": [16, 15, 8, 4, 4],
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3, 5]],
        "stereo": True,
        "output_sampling_rate": 24000,
    }


def _vocoder_with_bwe() -> dict[str, Any]:
    common: dict[str, Any] = {
        "resblock": "AMP1",
        "activation": "snakebeta",
        "stereo": True,
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3, 5]],
        "use_tanh_at_final": False,
        "use_bias_at_final": False,
    }
    return {
        "vocoder": common
        | {
            "upsample_initial_channel": 64,
            "upsample_rates": [5, 2, 2, 2, 2, 2],
            "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
        },
        "bwe": common
        | {
            "upsample_initial_channel": 32,
            "upsample_rates": [6, 5, 2, 2, 2],
            "upsample_kernel_sizes": [12, 11, 4, 4, 4],
            "input_sampling_rate": 16000,
            "output_sampling_rate": 48000,
            "n_fft": 512,
            "hop_length": 80,
            "num_mels": 64,
        },
    }
