"""Names of the LTX-2 modules that a LoRA file may hold, in the spellings of four file formats.

The canonical name is the dotted path of the official checkpoint, e.g.
``transformer_blocks.0.audio_to_video_attn.to_out.0``. Flat names (dots replaced by underscores) cannot be
split again by looking at them (``to_out_0``, ``prompt_adaln_single``), so they are looked up in a table of
everything that exists, generated once.
"""

from __future__ import annotations

from functools import lru_cache

from musubi_tuner.models.ltx2.keys import to_diffusers

MAX_BLOCKS = 128
_MAX_CONNECTOR_BLOCKS = 16

NATIVE_PREFIX = "lora_unet_"
# What musubi-tuner's LTX-2 code writes: its transformer is the attribute ``model`` of a wrapper.
MUSUBI_PREFIX = "lora_unet_model_"

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "to_gate_logits")
_FEED_FORWARD = ("net.0.proj", "net.2")
_BLOCK_ATTENTIONS = (
    "attn1",
    "attn2",
    "audio_attn1",
    "audio_attn2",
    "audio_to_video_attn",
    "video_to_audio_attn",
)
_ADALN = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")

_TOP_LEVEL_ADALN = (
    *("adaln_single", "audio_adaln_single", "prompt_adaln_single", "audio_prompt_adaln_single"),
    *("av_ca_video_scale_shift_adaln_single", "av_ca_audio_scale_shift_adaln_single"),
    *("av_ca_a2v_gate_adaln_single", "av_ca_v2a_gate_adaln_single"),
)
# Beside the transformer: no ``diffusion_model.`` in front, and its own place in diffusers.
_TEXT_PROJECTION = "text_embedding_projection."
_DIFFUSERS_TEXT_PROJECTION = {
    f"{_TEXT_PROJECTION}{kind}aggregate_embed": f"connectors.{kind}text_proj_in" for kind in ("", "video_", "audio_")
}
# Longest first: each is tried in turn.
_DOTTED_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "")


def _block_linears() -> list[str]:
    names = [f"{a}.{p}" for a in _BLOCK_ATTENTIONS for p in _ATTENTION]
    return names + [f"{ff}.{p}" for ff in ("ff", "audio_ff") for p in _FEED_FORWARD]


@lru_cache(maxsize=1)
def known_names() -> dict[str, None]:
    """Canonical names of every Linear a file may adapt, as an ordered set."""
    names = [f"transformer_blocks.{i}.{n}" for i in range(MAX_BLOCKS) for n in _block_linears()]
    names += ["patchify_proj", "audio_patchify_proj", "proj_out", "audio_proj_out"]
    names += [f"{a}caption_projection.linear_{i}" for a in ("", "audio_") for i in (1, 2)]
    names += [f"{a}.{p}" for a in _TOP_LEVEL_ADALN for p in _ADALN]
    connector = [f"attn1.{p}" for p in _ATTENTION] + [f"ff.{p}" for p in _FEED_FORWARD]
    names += [
        f"{m}_embeddings_connector.transformer_1d_blocks.{i}.{n}"
        for m in ("video", "audio")
        for i in range(_MAX_CONNECTOR_BLOCKS)
        for n in connector
    ]
    names += _DIFFUSERS_TEXT_PROJECTION
    return dict.fromkeys(names)


def flat_name(name: str) -> str:
    """``transformer_blocks.0.attn1.to_q`` to ``transformer_blocks_0_attn1_to_q``."""
    return name.replace(".", "_")


def in_transformer(name: str) -> bool:
    """Whether a canonical name lies in the diffusion transformer, not in the connectors or projections."""
    return not name.startswith(_TEXT_PROJECTION) and "_embeddings_connector." not in name


def diffusers_name(name: str) -> str:
    """Canonical to diffusers' path, with its prefix (``transformer.`` or ``connectors.``)."""
    if name in _DIFFUSERS_TEXT_PROJECTION:
        return _DIFFUSERS_TEXT_PROJECTION[name]
    return f"transformer.{to_diffusers(name)}"


def comfy_name(name: str) -> str:
    """Canonical to ComfyUI's path, with its prefix (``diffusion_model.``)."""
    return name if name.startswith(_TEXT_PROJECTION) else f"diffusion_model.{name}"


@lru_cache(maxsize=1)
def _from_flat() -> dict[str, str]:
    return {flat_name(n): n for n in known_names()}


@lru_cache(maxsize=1)
def _from_diffusers() -> dict[str, str]:
    return {diffusers_name(n): n for n in known_names()}


def canonical_name(spelling: str) -> str | None:
    """The canonical name of a module as any format spells it, prefix included; ``None``: not LTX-2's."""
    for prefix in (MUSUBI_PREFIX, NATIVE_PREFIX):
        if spelling.startswith(prefix):
            found = _from_flat().get(spelling.removeprefix(prefix))
            if found is not None:
                return found
    known, diffusers = known_names(), _from_diffusers()
    for prefix in _DOTTED_PREFIXES:
        if spelling.startswith(prefix):
            path = spelling.removeprefix(prefix)
            if path in known:
                return path
            for renamed in (path, f"transformer.{path}"):
                if renamed in diffusers:
                    return diffusers[renamed]
    return None
