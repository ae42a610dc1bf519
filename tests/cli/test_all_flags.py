"""Every flag that users of musubi-tuner know, with its type and its default: one table for each script."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from musubi_tuner.cli.parser import FlagSpec, flag_specs, parse
from musubi_tuner.cli.scripts import SCRIPTS
from musubi_tuner.common.errors import UserError


@dataclass(frozen=True)
class Row:
    """A flag, its default, and what some texts are read as."""

    flag: str
    default: Any
    values: tuple[tuple[str, Any], ...] = ()  # (text, value); texts with spaces are several words
    refused: tuple[str, ...] = ()


def switches(names: str, default: bool | None = False) -> list[Row]:
    return [Row(name, default) for name in names.split()]


def paths(names: str, default: Path | None = None) -> list[Row]:
    return [Row(name, default, (("a b/c.x", Path("a b/c.x")),)) for name in names.split()]


def texts(**defaults: str | None) -> list[Row]:
    return [Row(name, default, (("some_text", "some_text"),)) for name, default in defaults.items()]


def integers(**defaults: int | None) -> list[Row]:
    return [Row(name, default, (("7", 7),), ("x", "1.5")) for name, default in defaults.items()]


def numbers(**defaults: float | None) -> list[Row]:
    return [Row(name, default, (("0.25", 0.25), ("1e-3", 1e-3)), ("x", "nan")) for name, default in defaults.items()]


def lists(names: str) -> list[Row]:
    return [Row(name, (), (("a=1 b=2=3", ("a=1", "b=2=3")),)) for name in names.split()]


def choices(default: str | None, *names: str, **others: str) -> Row:
    """``choices("a", "flag", "a b")``; ``others``: short forms and what they stand for."""
    flag, allowed = names[0], names[1].split()
    values = [(text, text) for text in allowed] + list(others.items())
    return Row(flag, default, tuple(values), ("no_such_choice",))


MODE_FORMS = {"v": "video", "va": "av", "a": "audio"}
MODEL = [
    *paths("ltx2_checkpoint"),
    choices("video", "ltx2_mode", "video av audio", **MODE_FORMS),
    choices("video", "ltx_mode", "video av audio", **MODE_FORMS),
]
GEMMA = [
    *paths("gemma_root gemma_safetensors"),
    *switches("gemma_load_in_8bit gemma_load_in_4bit gemma_bnb_4bit_disable_double_quant"),
    choices("nf4", "gemma_bnb_4bit_quant_type", "nf4 fp4"),
    choices("auto", "gemma_bnb_4bit_compute_dtype", "auto fp16 bf16 fp32"),
]
SPLIT_TARGETS = "none all self cross text_cross av_cross video audio"
SAMPLINGS = (
    "sigma uniform sigmoid shift flux_shift flux2_shift qwen_shift logsnr qinglong_flux qinglong_qwen "
    "shifted_logit_normal"
)
SHARES = (("100", 100), ("0.1", 0.1), ("10%", 0.1), ("0", 0))

TRAINING = [
    *MODEL,
    *GEMMA,
    # Model and precision.
    *paths("dit vae"),
    choices("2.0", "ltx_version", "2.0 2.3"),
    choices("warn", "ltx_version_check_mode", "off warn error"),
    *switches("ltx2_audio_only_model full_fp16 full_bf16"),
    choices(None, "mixed_precision", "no fp16 bf16"),
    *texts(vae_dtype="bfloat16"),
    # Attention and memory.
    *switches("sdpa flash_attn flash3 xformers sage_attn split_attn"),
    choices(None, "split_attn_target", SPLIT_TARGETS),
    choices(None, "split_attn_mode", "batch query"),
    choices(None, "ffn_chunk_target", "none all video audio"),
    *integers(split_attn_chunk_size=0, ffn_chunk_size=0, blocks_to_swap=0),
    *switches("gradient_checkpointing gradient_checkpointing_cpu_offload use_pinned_memory_for_block_swap"),
    *switches("fp8_base fp8_scaled fp8_w8a8 int8_base nf4_base loftq_init awq_calibration"),
    choices(None, "fp8_w8a8_backward", "fp8 dense"),
    *integers(nf4_block_size=32, loftq_iters=2, awq_num_batches=8),
    *numbers(awq_alpha=0.25, cuda_memory_fraction=None),
    choices(None, "quantize_device", "cpu cuda", gpu="cuda"),
    *switches("cuda_allow_tf32 cuda_cudnn_benchmark img_in_txt_in_offloading disable_numpy_memmap"),
    *switches("compile compile_fullgraph dynamo_fullgraph dynamo_dynamic"),
    *texts(compile_backend="inductor"),
    choices("default", "compile_mode", "default reduce-overhead max-autotune max-autotune-no-cudagraphs"),
    choices(None, "compile_dynamic", "true false auto"),
    *integers(compile_cache_size_limit=None),
    choices("NO", "dynamo_backend", "NO EAGER AOT_EAGER INDUCTOR CUDAGRAPHS", inductor="INDUCTOR", no="NO"),
    choices(None, "dynamo_mode", "default reduce-overhead max-autotune"),
    # Dataset.
    *paths("dataset_config dataset_manifest"),
    *integers(max_data_loader_n_workers=8, min_audio_batches_per_accum=0, audio_only_sequence_resolution=64),
    *switches("persistent_data_loader_workers"),
    *switches("separate_audio_buckets", default=None),
    choices(None, "audio_bucket_strategy", "pad truncate"),
    *numbers(audio_bucket_interval=None, audio_batch_probability=None),
    # Network.
    *texts(network_module="networks.lora_ltx2", training_comment=None),
    *integers(network_dim=None, ema_update_every=1),
    *numbers(network_alpha=1.0, network_dropout=None, scale_weight_norms=None, init_lokr_norm=None, ema_decay=None),
    *lists("network_args"),
    *paths("network_weights lycoris_config"),
    *switches("dim_from_weights no_metadata"),
    Row("base_weights", (), (("a.x b.x", (Path("a.x"), Path("b.x"))),)),
    Row("base_weights_multiplier", (), (("1 0.5", (1.0, 0.5)),), ("x",)),
    choices("t2v", "lora_target_preset", "t2v v2v audio audio_ref_only_ic full"),
    # Optimizer, schedule, length.
    *texts(optimizer_type="AdamW", lr_scheduler="constant", lr_scheduler_type=""),
    *lists("optimizer_args lr_scheduler_args lr_args"),
    *numbers(learning_rate=2e-6, audio_lr=None, max_grad_norm=1.0),
    *numbers(lr_scheduler_power=1.0, lr_scheduler_min_lr_ratio=None),
    Row("lr_warmup_steps", 0, SHARES, ("1.5", "x", "-1")),
    Row("lr_decay_steps", 0, SHARES, ("1.5", "x", "-1")),
    *integers(lr_scheduler_num_cycles=1, lr_scheduler_timescale=None),
    *integers(max_train_steps=1600, max_train_epochs=None, gradient_accumulation_steps=1, seed=None),
    # Timesteps and loss.
    choices("shifted_logit_normal", "timestep_sampling", SAMPLINGS),
    choices(None, "shifted_logit_mode", "legacy stretched"),
    choices("none", "weighting_scheme", "none logit_normal mode cosmap sigma_sqrt"),
    choices(None, "show_timesteps", "image console"),
    choices("mse", "loss_type", "mse mae l1 huber smooth_l1"),
    choices("none", "audio_loss_balance_mode", "none inv_freq ema_mag"),
    *integers(min_timestep=None, max_timestep=None, num_timestep_buckets=None),
    *switches("preserve_distribution_shape independent_audio_timestep"),
    *numbers(logit_std=1.0, logit_mean=0.0, shifted_logit_eps=1e-3, shifted_logit_uniform_prob=0.1),
    *numbers(shifted_logit_shift=None, discrete_flow_shift=1.0, sigmoid_scale=1.0, mode_scale=1.29),
    *numbers(guidance_scale=1.0, huber_delta=1.0, video_loss_weight=1.0, audio_loss_weight=1.0),
    *numbers(audio_loss_balance_beta=0.01, audio_loss_balance_eps=0.05, audio_loss_balance_min=0.05),
    *numbers(audio_loss_balance_max=4.0, audio_loss_balance_ema_init=1.0, audio_loss_balance_target_ratio=0.33),
    *numbers(audio_loss_balance_ema_decay=0.99, caption_dropout_rate=0.0),
    # Audio, conditioning, regularisers.
    *switches("audio_silence_regularizer"),
    choices("off", "audio_supervision_mode", "off warn error"),
    *integers(audio_supervision_warmup_steps=50, audio_supervision_check_interval=50),
    *numbers(audio_silence_regularizer_weight=1.0, audio_supervision_min_ratio=0.9),
    *numbers(ltx2_first_frame_conditioning_p=0.1, audio_ref_identity_guidance_scale=0.0),
    *integers(reference_downscale=1, reference_frames=1),
    choices(None, "video_role", "generated frozen absent"),
    choices(None, "audio_role", "generated frozen absent"),
    *lists("video_conditions audio_conditions"),
    choices("auto", "ic_lora_strategy", "auto none v2v audio_ref_only_ic"),
    *switches("audio_ref_use_negative_positions audio_ref_mask_cross_attention_to_reference"),
    *switches("audio_ref_mask_reference_from_text_attention"),
    *switches("blank_preservation dop prior_divergence audio_dop use_precached_preservation crepa self_flow"),
    *lists("blank_preservation_args dop_args prior_divergence_args audio_dop_args crepa_args self_flow_args"),
    *paths("preservation_prompts_cache"),
    # Samples.
    *paths("sample_prompts sample_prompts_cache sample_latents_cache spatial_upsampler_path distilled_lora_path"),
    *switches("sample_at_first sample_with_offloading sample_tiled_vae sample_merge_audio sample_audio_only"),
    *switches("sample_disable_audio sample_disable_flash_attn sample_include_reference sample_two_stage"),
    *switches("precache_sample_prompts use_precached_sample_prompts"),
    *switches("use_precached_sample_latents", default=None),  # not given: where there is a cache
    *switches("sample_audio_subprocess sample_i2v_token_timestep_mask", default=True),
    *integers(sample_every_n_steps=None, sample_every_n_epochs=None),
    *integers(height=512, width=768, sample_num_frames=45, sample_stage2_steps=3),
    *integers(sample_vae_tile_size=512, sample_vae_tile_overlap=64),
    *integers(sample_vae_temporal_tile_size=0, sample_vae_temporal_tile_overlap=8),
    # Saving, resuming, the Hub.
    *paths("output_dir resume"),
    *texts(output_name="ltx2_lora"),
    *integers(save_every_n_epochs=None, save_every_n_steps=None, save_last_n_epochs=None, save_last_n_steps=None),
    *integers(save_last_n_epochs_state=None, save_last_n_steps_state=None),
    *switches("save_state save_state_on_train_end autoresume save_checkpoint_metadata"),
    *switches("no_convert_to_comfy no_save_original_lora"),
    *switches("save_original_lora", default=True),
    choices("bf16", "save_precision", "float fp32 fp16 bf16"),
    *texts(metadata_title=None, metadata_author=None, metadata_description=None, metadata_license=None),
    *texts(metadata_tags=None, metadata_arch=None),
    Row("metadata_reso", None, (("1280,720", "1280x720"),), ("x",)),
    *texts(huggingface_repo_id=None, huggingface_path_in_repo=None, huggingface_token=None),
    choices("model", "huggingface_repo_type", "model dataset space"),
    choices(None, "huggingface_repo_visibility", "public private"),
    *switches("save_state_to_huggingface resume_from_huggingface async_upload"),
    # Logging, validation, processes.
    *paths("logging_dir log_tracker_config"),
    choices(None, "log_with", "tensorboard wandb all"),
    *texts(log_prefix="", log_tracker_name="network_train", wandb_run_name=None, wandb_api_key=None),
    *switches("log_config ddp_gradient_as_bucket_view ddp_static_graph"),
    *integers(log_cuda_memory_every_n_steps=None, ddp_timeout=None),
    *integers(validate_every_n_steps=None, validate_every_n_epochs=None),
]

CACHING = [
    *MODEL,
    *paths("dataset_config save_dataset_manifest sample_prompts"),
    *integers(batch_size=None, num_workers=None),  # not given: the dataset's; CPU count - 1
    *texts(device=None),  # not given: cuda if present
    *switches("skip_existing keep_cache"),
]
LATENTS = [
    *CACHING,
    *paths("vae ltx2_audio_dir sample_latents_cache"),
    *texts(vae_dtype="bfloat16", ltx2_audio_dtype="float16", ltx2_audio_ext=".wav", audio_video_latent_dtype=None),
    *integers(vae_chunk_size=None, vae_spatial_tile_size=None, vae_spatial_tile_overlap=64),
    *integers(vae_temporal_tile_size=None, vae_temporal_tile_overlap=24),
    choices("video", "ltx2_audio_source", "video audio_files"),
    *integers(audio_only_target_resolution=None, audio_only_sequence_resolution=64, audio_video_latent_channels=None),
    *numbers(audio_only_target_fps=25.0),
    *integers(reference_frames=None, reference_downscale=None),  # not given: the dataset's, else 1
    *switches("precache_sample_latents disable_cudnn_backend"),
]
TEXT = [
    *CACHING,
    *GEMMA,
    *paths("ltx2_text_encoder_checkpoint sample_prompts_cache preservation_prompts_cache"),
    choices("no", "mixed_precision", "no fp16 bf16"),
    *switches("precache_sample_prompts precache_preservation_prompts blank_preservation dop"),
    *texts(dop_class_prompt=""),
]
MERGE = [
    Row("lora_weight", (), (("a.x b.x", (Path("a.x"), Path("b.x"))),)),
    Row("lora_multiplier", (), (("1 0.5", (1.0, 0.5)),), ("x",)),
    *paths("save_merged_lora"),
    choices("concat", "merge_method", "concat orthogonal"),
    *numbers(orthogonal_k_fraction=0.5),
    choices("sum", "orthogonal_rank_mode", "sum max min"),
    choices("auto", "dtype", "auto float32 float16 bfloat16"),
    *switches("emit_alpha"),
]
GENERATE = [
    *MODEL,
    *GEMMA,
    *paths("vae sample_prompts from_file sample_latents_cache"),
    *texts(vae_dtype="bfloat16", prompt=None, negative_prompt=None, output_name="ltx2_gen", device=None),
    *paths("output_dir", default=Path("output")),
    choices("bf16", "mixed_precision", "no fp16 bf16"),
    choices("video", "output_type", "video latent both"),
    *integers(height=512, width=768, frame_count=45, sample_num_frames=45, sample_steps=20, seed=None),
    *numbers(frame_rate=25.0, guidance_scale=1.0, cfg_scale=None),
    Row("lora_weight", (), (("a.x b.x", (Path("a.x"), Path("b.x"))),)),
    Row("lora_multiplier", (), (("1 0.5", (1.0, 0.5)),), ("x",)),
    *switches("sample_tiled_vae sample_merge_audio sample_audio_only sample_disable_audio sample_with_offloading"),
    *switches("precache_sample_prompts use_precached_sample_prompts audio_ref_use_negative_positions"),
    *switches("sample_i2v_token_timestep_mask", default=True),
]

TABLE = [
    *(("ltx2_train_network.py", row) for row in TRAINING),
    *(("ltx2_cache_latents.py", row) for row in LATENTS),
    *(("ltx2_cache_text_encoder_outputs.py", row) for row in TEXT),
    *(("ltx2_merge_lora.py", row) for row in MERGE),
    *(("ltx2_generate_video.py", row) for row in GENERATE),
]


def spec_of(script: str, flag: str) -> tuple[FlagSpec, bool]:
    """The declaration behind a spelling, and whether the spelling turns it off."""
    found = [s for s in flag_specs(SCRIPTS[script]) if flag in (*s.spellings, *s.negations)]
    assert len(found) == 1, f"{script}: --{flag} is declared {len(found)} times"
    return found[0], flag in found[0].negations


def value_of(script: str, spec: FlagSpec, *argv: str) -> Any:
    parsed = parse(SCRIPTS[script], argv, prog=script, description="")
    return getattr(getattr(parsed.config, spec.group), spec.name)


@pytest.mark.parametrize(("script", "row"), TABLE, ids=lambda x: x.flag if isinstance(x, Row) else x[5:-3])
def test_flag(script: str, row: Row, tmp_path: Path):
    spec, negated = spec_of(script, row.flag)
    assert value_of(script, spec) == (not row.default if negated else row.default)
    if spec.is_bool:
        assert not row.values
        check_switch(script, spec, row.flag, tmp_path / "run.toml", turns=not negated)
        return
    assert row.values
    for text, value in row.values:
        words = text.split() if spec.is_list else [text]
        assert value_of(script, spec, f"--{row.flag}", *words) == value
        assert value_of(script, spec, f"--{row.flag.replace('_', '-')}", *words) == value
        quoted = ", ".join(f"'{word}'" for word in words)
        (tmp_path / "run.toml").write_text(f"{row.flag} = {f'[{quoted}]' if spec.is_list else quoted}\n")
        assert value_of(script, spec, "--config_file", str(tmp_path / "run.toml")) == value
    for text in row.refused:
        with pytest.raises(UserError, match=spec.name):
            value_of(script, spec, f"--{row.flag}={text}")


def check_switch(script: str, spec: FlagSpec, flag: str, file: Path, *, turns: bool) -> None:
    """Both forms of a switch, on the command line and in a file, and that the command line wins."""
    opposite = flag.removeprefix("no_") if not turns else f"no_{flag}"
    for name, value in ((flag, turns), (opposite, not turns)):
        assert value_of(script, spec, f"--{name}") is value
        assert value_of(script, spec, f"--{name.replace('_', '-')}") is value
        for state in (True, False):
            file.write_text(f"{name} = {str(state).lower()}\n")
            assert value_of(script, spec, "--config_file", str(file)) is (value if state else not value)
            assert value_of(script, spec, "--config_file", str(file), f"--{flag}") is turns
            assert value_of(script, spec, "--config_file", str(file), f"--{opposite}") is not turns
