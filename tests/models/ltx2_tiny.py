"""Tiny LTX-2 transformers with random weights, their inputs, and the same model built by diffusers."""

from __future__ import annotations

import torch
from torch import Tensor

from musubi_tuner.common.av import AV
from musubi_tuner.models.ltx2.config import Mode, TransformerConfig
from musubi_tuner.models.ltx2.inputs import CrossTimestep, ModalityInput
from musubi_tuner.models.ltx2.keys import to_diffusers
from musubi_tuner.models.ltx2.transformer import LTX2Transformer

VERSIONS = ("2.0", "2.3", "2.5")

_FLAGS: dict[str, dict] = {
    "2.0": {},
    "2.3": {
        "apply_gated_attention": True,
        "cross_attention_adaln": True,
        "caption_proj_before_connector": True,
    },
}
_FLAGS["2.5"] = {**_FLAGS["2.3"], "ff_bias": False, "use_keyframes_abs_pos_embedding": True}

_TINY = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "audio_in_channels": 6,
    "audio_out_channels": 6,
    "cross_attention_dim": 32,
    "audio_cross_attention_dim": 24,
    "caption_channels": 20,
}


def config_of(version: str, **overrides) -> TransformerConfig:
    """The true-size configuration of a release."""
    released = {"av_ca_timestep_scale_multiplier": 1000.0, "frequencies_precision": "float64"}
    return TransformerConfig(**{**released, **_FLAGS[version], **overrides})


def tiny_config(version: str, **overrides) -> TransformerConfig:
    """2 layers, 2 heads, widths 32 and 24, channels 4 and 6."""
    return config_of(version, **{**_TINY, **overrides})


def tiny_section(version: str, **overrides) -> dict:
    """``config.transformer`` of the metadata that describes :func:`tiny_config`."""
    released = {"av_ca_timestep_scale_multiplier": 1000.0, "frequencies_precision": "float64"}
    return {"_class_name": "AVTransformer3DModel", **released, **_FLAGS[version], **_TINY, **overrides}


def tiny_model(
    config: TransformerConfig, mode: Mode = "av", *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> LTX2Transformer:
    """Random weights of every kind (also the ones that training starts at zero), frozen."""
    generator = torch.Generator().manual_seed(seed)
    model = LTX2Transformer(config, mode)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("_norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise * (parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.2))
    return model.requires_grad_(False).to(dtype)


def tiny_inputs(
    config: TransformerConfig,
    *,
    video_tokens: int = 6,
    audio_tokens: int = 5,
    per_token: bool = False,
    batch: int = 2,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
) -> AV[ModalityInput]:
    """Random tokens, text and times; levels and positions of the two streams are unrelated."""
    g = torch.Generator().manual_seed(seed)

    def stream(tokens: int, channels: int, axes: int, width: int) -> ModalityInput:
        sigma = torch.rand(batch, generator=g)
        timesteps = sigma[:, None]
        if per_token:
            timesteps = sigma[:, None] * torch.randint(0, 3, (batch, tokens), generator=g) / 2
        extent = torch.tensor([4.0, 500.0, 500.0][:axes])[:, None]
        start = extent * torch.rand(batch, axes, tokens, generator=g)
        context = config.caption_channels if config.has_caption_projection else width
        return ModalityInput(
            tokens=torch.randn(batch, tokens, channels, generator=g).to(dtype),
            timesteps=timesteps,
            sigma=sigma,
            coords=torch.stack([start, start + 0.3], dim=-1),
            context=torch.randn(batch, 7, context, generator=g).to(dtype),
        )

    return AV(
        video=stream(video_tokens, config.in_channels, 3, config.width),
        audio=stream(audio_tokens, config.audio_in_channels, 1, config.audio_width),
    )


def diffusers_twin(model: LTX2Transformer, *, perturbed_attn: bool = False):
    """diffusers' ``LTX2VideoTransformer3DModel`` with the weights of an ``av`` model."""
    from diffusers import LTX2VideoTransformer3DModel

    config = model.config
    twin = LTX2VideoTransformer3DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        cross_attention_dim=config.cross_attention_dim,
        pos_embed_max_pos=config.positional_embedding_max_pos[0],
        gated_attn=config.apply_gated_attention,
        cross_attn_mod=config.cross_attention_adaln,
        audio_in_channels=config.audio_in_channels,
        audio_out_channels=config.audio_out_channels,
        audio_num_attention_heads=config.audio_num_attention_heads,
        audio_attention_head_dim=config.audio_attention_head_dim,
        audio_cross_attention_dim=config.audio_cross_attention_dim,
        audio_pos_embed_max_pos=config.audio_positional_embedding_max_pos[0],
        audio_gated_attn=config.apply_gated_attention,
        audio_cross_attn_mod=config.cross_attention_adaln,
        num_layers=config.num_layers,
        caption_channels=config.caption_channels,
        rope_double_precision=config.frequencies_precision == "float64",
        rope_type=config.rope_type,
        cross_attn_timestep_scale_multiplier=config.av_ca_timestep_scale_multiplier,
        use_prompt_embeddings=config.has_caption_projection,
        perturbed_attn=perturbed_attn,
        ff_bias=config.ff_bias,
        audio_ff_bias=config.audio_ff_bias,
        use_prompt_adaln_single=config.use_prompt_adaln_single,
        use_keyframes_abs_pos_embedding=config.use_keyframes_abs_pos_embedding,
    )
    state = {to_diffusers(name): tensor for name, tensor in model.state_dict().items()}
    twin.load_state_dict(state, strict=True)
    return twin.requires_grad_(False).to(next(model.parameters()).dtype)


def run_diffusers(twin, inputs: AV[ModalityInput], cross_timestep: CrossTimestep = "hybrid", **extra) -> AV[Tensor]:
    """The twin's prediction. It has no hybrid cross timestep: hooks exchange the input of its gates."""
    video, audio = inputs.video, inputs.audio
    hooks = []
    if cross_timestep == "hybrid":
        for gate, other in (("video_a2v_gate", audio), ("audio_v2a_gate", video)):
            module = getattr(twin, f"av_cross_attn_{gate}")
            multiplier = twin.config.cross_attn_timestep_scale_multiplier
            hooks.append(_replace_first_argument(module, other.sigma * multiplier))
    try:
        out = twin(
            hidden_states=video.tokens,
            audio_hidden_states=audio.tokens,
            encoder_hidden_states=video.context,
            audio_encoder_hidden_states=audio.context,
            encoder_attention_mask=video.context_mask,
            audio_encoder_attention_mask=audio.context_mask,
            timestep=1000 * video.timesteps,
            audio_timestep=1000 * audio.timesteps,
            sigma=1000 * video.sigma,
            audio_sigma=1000 * audio.sigma,
            video_coords=video.coords,
            audio_coords=audio.coords,
            video_self_attention_mask=video.attention_mask,
            video_keyframes_mask=video.keyframes_mask,
            use_cross_timestep=cross_timestep == "cross",
            **extra,
        )
    finally:
        for hook in hooks:
            hook.remove()
    return AV(video=out.sample, audio=out.audio_sample)


def _replace_first_argument(module: torch.nn.Module, value: Tensor):
    return module.register_forward_pre_hook(lambda _, args: (value, *args[1:]))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
