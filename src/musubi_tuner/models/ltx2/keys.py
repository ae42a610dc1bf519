"""Names of the diffusion transformer's tensors: prefixes, owners and the diffusers spelling."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from musubi_tuner.common.errors import UserError

Mode = Literal["video", "av", "audio"]
Owner = Literal["video", "av", "audio"]

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
"""Where the transformer lives in a file: official, repacked, bare."""

_BLOCKS = "transformer_blocks."

# The text connectors share the transformer's prefix; the rest are other sections of a file without a prefix.
_FOREIGN = (
    "video_embeddings_connector.",
    "audio_embeddings_connector.",
    "text_embedding_projection.",
    "vae.",
    "audio_vae.",
    "vocoder.",
    "model.",
)

# First component of a name, official to diffusers.
_TOP_LEVEL = {
    "patchify_proj": "proj_in",
    "audio_patchify_proj": "audio_proj_in",
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
}

# Any component of a name inside a block, official to diffusers.
_IN_BLOCK = {
    "scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
    "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}

_TOP_LEVEL_BACK = {theirs: ours for ours, theirs in _TOP_LEVEL.items()}
_IN_BLOCK_BACK = {theirs: ours for ours, theirs in _IN_BLOCK.items()}

_CROSS_MODAL = ("av_ca_", "scale_shift_table_a2v_ca_", "audio_to_video_attn", "video_to_audio_attn")


def find_prefix(keys: Iterable[str]) -> str | None:
    """The prefix of the transformer's keys among ``keys``, or None when they hold no transformer."""
    keys = list(keys)
    for prefix in PREFIXES:
        start = prefix + _BLOCKS
        if any(key.startswith(start) for key in keys):
            return prefix
    return None


def transformer_keys(keys: Iterable[str]) -> dict[str, str]:
    """Official name (no prefix) to the file's key of every transformer tensor among ``keys``, in their order.

    The text connectors, which share the prefix, and other sections of the file are left out.

    Raises:
        UserError: when no key belongs to a transformer block.
    """
    keys = list(keys)
    prefix = find_prefix(keys)
    if prefix is None:
        raise UserError(
            f"no diffusion transformer found: none of the {len(keys)} tensors is called "
            f"{PREFIXES[0]}{_BLOCKS}*; give a file that holds the LTX-2 transformer"
        )
    names = {key[len(prefix) :]: key for key in keys if key.startswith(prefix)}
    return {name: key for name, key in names.items() if not name.startswith(_FOREIGN)}


def owner(name: str) -> Owner:
    """Which stream a tensor or module belongs to: one of the streams, or ``av`` when it joins both.

    ``name`` is official, without prefix.
    """
    part = _component_that_names_the_stream(name)
    if part.startswith(_CROSS_MODAL):
        return "av"
    return "audio" if part.startswith("audio_") else "video"


def in_mode(name: str, mode: Mode) -> bool:
    """Whether a transformer built for ``mode`` has this tensor."""
    return mode == "av" or owner(name) == mode


def to_diffusers(name: str) -> str:
    """Official name to that of diffusers' ``LTX2VideoTransformer3DModel``."""
    return _rename(name, _TOP_LEVEL, _IN_BLOCK)


def from_diffusers(name: str) -> str:
    """The inverse of :func:`to_diffusers`."""
    return _rename(name, _TOP_LEVEL_BACK, _IN_BLOCK_BACK)


def _component_that_names_the_stream(name: str) -> str:
    parts = name.split(".")
    return parts[2] if parts[0] == _BLOCKS[:-1] and len(parts) > 2 else parts[0]


def _rename(name: str, top_level: dict[str, str], in_block: dict[str, str]) -> str:
    # Whole components are compared: "norm_q" is also part of other names.
    first, *rest = name.split(".")
    return ".".join([top_level.get(first, first), *(in_block.get(part, part) for part in rest)])
