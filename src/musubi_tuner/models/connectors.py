"""The text connectors: hidden states of every Gemma layer to the embeddings that the transformer reads.

The network is diffusers' ``LTX2TextConnectors``; the weights come from the official single file. LTX-2.0
normalises over the whole prompt and shares one projection; LTX-2.3 normalises each token and has one
projection a modality.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.safetensors_io import TensorInfo

from .checkpoint import TEXT_PROJECTION_PREFIX, Checkpoint
from .component_loading import Component, build_empty, fill, read_renamed

if TYPE_CHECKING:  # diffusers takes seconds to import, and few runs encode prompts
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

_SHARED_PROJECTION = TEXT_PROJECTION_PREFIX + "aggregate_embed.weight"
_VIDEO_PROJECTION = TEXT_PROJECTION_PREFIX + "video_aggregate_embed.weight"


class Connectors(Component):
    """Feature extraction and the two connector transformers.

    Attributes:
        hidden_size: width of the Gemma states that are expected (3840).
        num_states: their number, layers + 1 (49).
        num_registers: prompts are padded to a multiple of this (128).
    """

    def __init__(self, module: LTX2TextConnectors) -> None:
        super().__init__(module)
        self.hidden_size: int = module.config.caption_channels
        self.num_states: int = module.config.text_proj_in_factor
        self.num_registers: int = module.config.video_connector_num_learnable_registers

    @torch.no_grad()
    def __call__(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Video embeddings [B, S, Dv], audio embeddings [B, S, Da] and their mask [B, S] bool.

        Args:
            states: [B, S, D, L], all Gemma states, prompts padded on the left.
            mask: [B, S], 1 where there is a token. Padding is replaced by learned registers, so the mask that
                comes back is all true.
        """
        states = states.to(self.device, self.dtype)
        video, audio, mask = self._module(states, mask.to(self.device), padding_side="left")
        return video, audio, mask.bool()


def connectors_config(
    section: Mapping[str, Any], tensors: Mapping[str, TensorInfo], *, hidden_size: int | None = None
) -> dict[str, Any]:
    """Arguments of ``LTX2TextConnectors``.

    Args:
        section: the metadata section ``transformer`` (``{}``: as released, told apart by the tensors).
        tensors: official connector names (as :meth:`Checkpoint.component_keys` gives) to what is stored.
        hidden_size: width of the text encoder, where it is loaded; the metadata's is checked against it.

    Raises:
        UserError: a setting that the class cannot represent.
    """
    per_modality = _VIDEO_PROJECTION in tensors
    _check_projection_flags(section, per_modality)
    out_features, in_features = tensors[_VIDEO_PROJECTION if per_modality else _SHARED_PROJECTION].shape
    width = hidden_size or (section.get("caption_channels", 3840) if per_modality else out_features)
    if in_features % width or (not per_modality and width != out_features):
        raise UserError(
            f"the checkpoint's text projection takes {in_features} values a token, which is no multiple of the "
            f"text encoder's width {width}; use the Gemma model that belongs to this checkpoint"
        )
    heads, head_dim = section.get("connector_num_attention_heads"), section.get("connector_attention_head_dim")
    video = {
        "num_attention_heads": heads or (32 if per_modality else 30),
        "attention_head_dim": head_dim or 128,
        "num_layers": section.get("connector_num_layers") or _count_blocks(tensors, "video"),
    }
    audio = {
        "num_attention_heads": section.get("audio_connector_num_attention_heads")
        or (heads or (32 if per_modality else 30)),
        "attention_head_dim": section.get("audio_connector_attention_head_dim")
        or (head_dim or (64 if per_modality else 128)),
        "num_layers": section.get("audio_connector_num_layers") or _count_blocks(tensors, "audio"),
    }
    gated = any(name.endswith(".to_gate_logits.weight") for name in tensors)
    config: dict[str, Any] = {
        "caption_channels": width,
        "text_proj_in_factor": in_features // width,
        "connector_rope_base_seq_len": (section.get("connector_positional_embedding_max_pos") or [4096])[0],
        "rope_theta": 10000.0,
        "rope_double_precision": section.get("frequencies_precision", "float64") == "float64",
        "rope_type": section.get("rope_type", "split"),
        "causal_temporal_positioning": False,
        "per_modality_projections": per_modality,
        "proj_bias": per_modality,
    }
    if per_modality:
        config["video_hidden_dim"] = out_features
        config["audio_hidden_dim"] = tensors[_VIDEO_PROJECTION.replace("video", "audio")].shape[0]
    for modality, values in (("video", video), ("audio", audio)):
        registers = tensors[f"{modality}_embeddings_connector.learnable_registers"].shape[0]
        config[f"{modality}_gated_attn"] = section.get("connector_apply_gated_attention", gated)
        config[f"{modality}_connector_num_learnable_registers"] = registers
        config |= {f"{modality}_connector_{key}": value for key, value in values.items()}
    return config


def _check_projection_flags(section: Mapping[str, Any], per_modality: bool) -> None:
    """The projection before the connectors comes with three parts of the older one switched off."""
    if not section:
        return
    older = ("caption_projection_first_linear", "caption_proj_input_norm", "caption_projection_second_linear")
    before = bool(section.get("caption_proj_before_connector", False))
    if before != per_modality or (before and any(section.get(key) for key in older)):
        found = {key: section.get(key) for key in ("caption_proj_before_connector", *older)}
        raise UserError(
            f"text connectors: the checkpoint's metadata has {found} with "
            f"{'two text projections' if per_modality else 'one text projection'}; this combination is not known"
        )
    if section.get("connector_ff_bias", True) is not True:
        raise UserError("text connectors: connector_ff_bias is false in the checkpoint's metadata; not supported")


def _count_blocks(tensors: Mapping[str, TensorInfo], modality: str) -> int:
    head = f"{modality}_embeddings_connector.transformer_1d_blocks."
    return 1 + max((int(n[len(head) :].split(".")[0]) for n in tensors if n.startswith(head)), default=-1)


_RENAMES = (
    ("video_embeddings_connector.", "video_connector."),
    ("audio_embeddings_connector.", "audio_connector."),
    ("transformer_1d_blocks.", "transformer_blocks."),
    (".q_norm.", ".norm_q."),
    (".k_norm.", ".norm_k."),
    ("text_embedding_projection.aggregate_embed.", "text_proj_in."),
    ("text_embedding_projection.video_aggregate_embed.", "video_text_proj_in."),
    ("text_embedding_projection.audio_aggregate_embed.", "audio_text_proj_in."),
)


def connectors_name(name: str) -> str:
    """diffusers' name of an official connector parameter (``model.diffusion_model.`` removed)."""
    for official, ours in _RENAMES:
        name = name.replace(official, ours)
    return name


def connectors_official_name(name: str) -> str:
    """Inverse of :func:`connectors_name`."""
    if name.startswith("text_proj_in."):
        return name.replace("text_proj_in.", "text_embedding_projection.aggregate_embed.", 1)
    for official, ours in _RENAMES:
        if ours != "text_proj_in.":  # also the tail of the two others
            name = name.replace(ours, official)
    return name


def load_connectors(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    hidden_size: int | None = None,
) -> Connectors:
    """Read the text connectors. ``hidden_size`` is the text encoder's width, if it is known.

    Raises:
        UserError: the file has none, or such as do not fit the text encoder.
    """
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    checkpoint.require("connectors", "encoding prompts")
    keys = checkpoint.component_keys("connectors")
    tensors = {name: checkpoint.tensors[key] for name, key in keys.items()}
    config = connectors_config(checkpoint.config.get("transformer", {}), tensors, hidden_size=hidden_size)
    module = build_empty(lambda: LTX2TextConnectors(**config))
    renamed = {connectors_name(name): key for name, key in keys.items()}
    weights = read_renamed(checkpoint, renamed, dtype=dtype, device=device, desc="text connectors")
    return Connectors(fill(module, weights, source=f"{checkpoint.path}: text connectors", device=device))
