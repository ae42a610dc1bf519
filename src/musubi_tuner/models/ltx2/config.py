"""What kind of LTX-2 transformer a checkpoint holds: read from its metadata or, without any, its shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from musubi_tuner.common.errors import UserError

from .keys import Mode, find_prefix, transformer_keys

__all__ = ["Mode", "TransformerConfig", "Version", "detect_version"]

Version = Literal["2.0", "2.3", "2.5"]
RopeType = Literal["split", "interleaved"]
Shapes = Mapping[str, Sequence[int]]

# Settings whose other values exist in the configuration format but in no released model.
_SUPPORTED: dict[str, Any] = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "av_cross_ada_norm": True,
    "cross_attention_norm": True,
    "double_self_attention": False,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "num_embeds_ada_norm": 1000,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "positional_embedding_type": "rope",
    "qk_norm": "rms_norm",
    "share_ff": False,
    "standardization_norm": "rms_norm",
    "upcast_attention": False,
    "use_audio_video_cross_attention": True,
    "use_linear_projection": False,
    "use_middle_indices_grid": True,
}

_DEFAULT_HEADS = 32


@dataclass(frozen=True)
class TransformerConfig:
    """The numbers and flags that define the transformer; names are those of the checkpoint's metadata.

    The defaults are the official code's, which apply to a key that the metadata lacks.
    """

    num_layers: int = 48
    num_attention_heads: int = _DEFAULT_HEADS
    attention_head_dim: int = 128
    audio_num_attention_heads: int = _DEFAULT_HEADS
    audio_attention_head_dim: int = 64
    in_channels: int = 128
    out_channels: int = 128
    audio_in_channels: int = 128
    audio_out_channels: int = 128
    cross_attention_dim: int = 4096
    audio_cross_attention_dim: int = 2048
    caption_channels: int = 3840
    norm_eps: float = 1e-6
    positional_embedding_theta: float = 10000.0
    positional_embedding_max_pos: tuple[int, ...] = (20, 2048, 2048)
    audio_positional_embedding_max_pos: tuple[int, ...] = (20,)
    timestep_scale_multiplier: float = 1000.0
    av_ca_timestep_scale_multiplier: float = 1.0
    rope_type: RopeType = "split"
    frequencies_precision: Literal["float32", "float64"] = "float32"
    apply_gated_attention: bool = False
    cross_attention_adaln: bool = False
    use_prompt_adaln_single: bool = True
    caption_proj_before_connector: bool = False
    ff_bias: bool = True
    audio_ff_bias: bool = True
    use_keyframes_abs_pos_embedding: bool = False

    @property
    def width(self) -> int:
        """Hidden width of the video stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def audio_width(self) -> int:
        """Hidden width of the audio stream."""
        return self.audio_num_attention_heads * self.audio_attention_head_dim

    @property
    def has_caption_projection(self) -> bool:
        """Whether the transformer itself projects the text to its widths (2.0 only)."""
        return not self.caption_proj_before_connector

    @property
    def has_prompt_adaln(self) -> bool:
        """Whether the modulation of the text depends on the noise level."""
        return self.cross_attention_adaln and self.use_prompt_adaln_single

    @property
    def num_modulation_rows(self) -> int:
        """Shift, scale and gate of self-attention and feed-forward, and from 2.3 on of text attention."""
        return 9 if self.cross_attention_adaln else 6

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            raise UserError(f"transformer configuration: {'; '.join(problems)}")

    @staticmethod
    def from_metadata(section: Mapping[str, Any] | None, tensors: Shapes) -> TransformerConfig:
        """Read the configuration of a checkpoint.

        Args:
            section: ``config.transformer`` of the file's metadata, None or empty when the file has none.
            tensors: every key of the file and its shape. They decide everything that a shape shows where
                there is no metadata, and the channel counts that the metadata leaves out.

        Raises:
            UserError: naming the key whose value is not supported or contradicts another.
        """
        names = transformer_keys(tensors)
        shapes = {name: tuple(tensors[key]) for name, key in names.items()}
        if not section:
            return TransformerConfig(**_from_shapes(shapes))
        _refuse_unsupported(section)
        known = {f.name: section[f.name] for f in fields(TransformerConfig) if section.get(f.name) is not None}
        return TransformerConfig(**{**_channels(shapes), **{k: _tidy(k, v) for k, v in known.items()}})


def detect_version(metadata: Mapping[str, Any], keys: Iterable[str]) -> Version:
    """The release a checkpoint belongs to, from ``model_version``, else its configuration, else its keys.

    The label is for messages and for choosing text encoders; models are built from the individual flags.

    Args:
        metadata: the file's metadata, values parsed as JSON where possible.
        keys: the file's tensor names.

    Raises:
        UserError: when nothing in the file tells.
    """
    config = metadata.get("config")
    return (
        _version_of_label(metadata.get("model_version"))
        or _version_of_config(config if isinstance(config, Mapping) else {})
        or _version_of_keys(set(keys))
    )


def _version_of_label(label: Any) -> Version | None:
    if label is None:
        return None
    # "2.3.0", "2.4-rc2", or 2.3 when the label parsed as a number.
    match = re.match(r"(\d+)\.(\d+)", str(label).replace("-", "."))
    if match is None:
        return None
    number = (int(match[1]), int(match[2]))
    if number >= (2, 5):
        return "2.5"
    return "2.3" if number >= (2, 3) else None


def _version_of_config(config: Mapping[str, Any]) -> Version | None:
    transformer = config.get("transformer")
    if not transformer:
        return None
    if transformer.get("use_keyframes_abs_pos_embedding") or transformer.get("ff_bias") is False:
        return "2.5"
    newer = (
        transformer.get("cross_attention_adaln")
        or transformer.get("caption_proj_before_connector")
        or (config.get("vocoder") or {}).get("bwe")
        or any(key.startswith("audio_connector_") for key in transformer)
    )
    return "2.3" if newer else "2.0"


def _version_of_keys(keys: set[str]) -> Version:
    prefix = find_prefix(keys)
    if prefix is not None:
        names = set(transformer_keys(keys))
        ff = "transformer_blocks.0.ff.net.0.proj"
        if "keyframes_abs_pos_embedding" in names or (f"{ff}.weight" in names and f"{ff}.bias" not in names):
            return "2.5"
        if any(".to_gate_logits." in name or "prompt_scale_shift_table" in name for name in names):
            return "2.3"
        if any("caption_projection.linear_1." in name for name in names):
            return "2.0"
    raise UserError(
        "cannot tell which LTX-2 release the checkpoint is: it has no model_version, no configuration in its "
        "metadata, and its tensor names match no release; give an official file or one converted from it"
    )


def _refuse_unsupported(section: Mapping[str, Any]) -> None:
    for key, supported in _SUPPORTED.items():
        if key in section and section[key] != supported:
            raise UserError(
                f"transformer configuration of the checkpoint: {key} = {section[key]!r} is not supported, "
                f"expected {supported!r}; the file is not an LTX-2 model that this program knows"
            )


def _tidy(key: str, value: Any) -> Any:
    return tuple(value) if key.endswith("max_pos") else value


def _problems(config: TransformerConfig) -> list[str]:
    problems = []
    if config.rope_type not in ("split", "interleaved"):
        problems.append(f"rope_type = {config.rope_type!r} is unknown, expected 'split' or 'interleaved'")
    if config.frequencies_precision not in ("float32", "float64"):
        problems.append(f"frequencies_precision = {config.frequencies_precision!r} is neither float32 nor float64")
    if config.num_attention_heads != config.audio_num_attention_heads:
        problems.append(
            f"num_attention_heads = {config.num_attention_heads} differs from "
            f"audio_num_attention_heads = {config.audio_num_attention_heads}"
        )
    for key, width in (
        ("cross_attention_dim", config.width),
        ("audio_cross_attention_dim", config.audio_width),
    ):
        if getattr(config, key) != width:
            problems.append(f"{key} = {getattr(config, key)} differs from heads x head dimension = {width}")
    for key, axes in (("positional_embedding_max_pos", 3), ("audio_positional_embedding_max_pos", 1)):
        if len(getattr(config, key)) != axes:
            problems.append(f"{key} = {list(getattr(config, key))} should have {axes} value(s)")
    for key in ("attention_head_dim", "audio_attention_head_dim"):
        if getattr(config, key) % 2:
            problems.append(f"{key} = {getattr(config, key)} is odd")
    return problems


def _channels(shapes: Shapes) -> dict[str, int]:
    """Token channels, as far as the tensors that are there show them."""
    found = {}
    for stream in ("", "audio_"):
        if f"{stream}patchify_proj.weight" in shapes:
            found[f"{stream}in_channels"] = shapes[f"{stream}patchify_proj.weight"][1]
        if f"{stream}proj_out.weight" in shapes:
            found[f"{stream}out_channels"] = shapes[f"{stream}proj_out.weight"][0]
    return found


def _from_shapes(shapes: Shapes) -> dict[str, Any]:
    """Everything that tensor names and shapes show.

    Three values leave no trace in the shapes; every released model has split rotary embeddings, a float64
    frequency ladder and a multiplier of 1000, whatever the code's defaults say.
    """
    text_adaln = any("prompt_scale_shift_table" in name for name in shapes)
    found: dict[str, Any] = {
        "rope_type": "split",
        "frequencies_precision": "float64",
        "av_ca_timestep_scale_multiplier": 1000.0,
        "num_layers": 1 + max(int(n.split(".")[1]) for n in shapes if n.startswith("transformer_blocks.")),
        "apply_gated_attention": any(".to_gate_logits." in name for name in shapes),
        "cross_attention_adaln": text_adaln,
        "use_prompt_adaln_single": not text_adaln or any("prompt_adaln_single." in name for name in shapes),
        "caption_proj_before_connector": not any("caption_projection." in name for name in shapes),
        "use_keyframes_abs_pos_embedding": "keyframes_abs_pos_embedding" in shapes,
        **_channels(shapes),
    }
    heads = next((s[0] for n, s in shapes.items() if n.endswith(".to_gate_logits.weight")), _DEFAULT_HEADS)
    for stream, default_head_dim in (("", 128), ("audio_", 64)):
        # A file of the other stream alone: any consistent value serves.
        width = shapes.get(f"{stream}patchify_proj.weight", (heads * default_head_dim,))[0]
        if width % heads:
            raise UserError(
                f"{stream}patchify_proj.weight is {width} wide, which {heads} attention heads do not divide, "
                "and the file has no transformer configuration in its metadata; use a file that kept it"
            )
        found[f"{stream}num_attention_heads"] = heads
        found[f"{stream}attention_head_dim"] = width // heads
        found[f"{stream}cross_attention_dim"] = width
        ff = f"transformer_blocks.0.{stream}ff.net.0.proj"
        found[f"{stream}ff_bias"] = f"{ff}.bias" in shapes or f"{ff}.weight" not in shapes
        if f"{stream}caption_projection.linear_1.weight" in shapes:
            found["caption_channels"] = shapes[f"{stream}caption_projection.linear_1.weight"][1]
    return found
