"""The LTX-2 diffusion transformer (arXiv 2601.03233): tokens of both streams to predicted velocities.

Parameter names are those of the official checkpoints. The blocks are run by a plain loop; checkpointing,
block swapping, compilation and feature taps attach to them from outside.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.common.av import AV, Modality
from musubi_tuner.models.attention_backends import ATTENTION_BACKENDS

from .adaln import AdaLayerNormSingle, Levels, Modulation, add_one, distinct_levels, modulate
from .attention import Attention, text_mask, weight_mask
from .block import KEEP_ALL, BasicAVTransformerBlock, CrossConditioning, Keep, StreamConditioning
from .config import Mode, TransformerConfig
from .inputs import CrossTimestep, ModalityInput, Perturbations
from .rope import RopeTable, rope_table

_PREFIX: dict[Modality, str] = {"video": "", "audio": "audio_"}
_HEAD_EPS = 1e-6

# Which rows of a modulation are scales: (shift, scale, gate) x 2 or 3; (scale, shift) x 2; (shift, scale).
_SCALES = slice(1, None, 3)
_CROSS_SCALES = slice(0, None, 2)
_TEXT_SCALES = slice(1, None, 2)


class CaptionProjection(nn.Module):
    """Text embeddings to the width of a stream (2.0; later releases do it in the text connectors)."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, context: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(context), approximate="tanh"))


class LTX2Transformer(nn.Module):
    """The transformer with both streams (``av``) or one; modules of an absent stream are not allocated."""

    def __init__(self, config: TransformerConfig, mode: Mode) -> None:
        super().__init__()
        self.config = config
        self.mode = mode
        video, audio = mode != "audio", mode != "video"
        if video:
            self._add_stream("", config.width, config.in_channels, config.out_channels)
            if config.use_keyframes_abs_pos_embedding:
                self.keyframes_abs_pos_embedding = nn.Parameter(torch.zeros(1, config.width))
        if audio:
            self._add_stream("audio_", config.audio_width, config.audio_in_channels, config.audio_out_channels)
        if video and audio:
            self.av_ca_video_scale_shift_adaln_single = AdaLayerNormSingle(config.width, 4)
            self.av_ca_audio_scale_shift_adaln_single = AdaLayerNormSingle(config.audio_width, 4)
            self.av_ca_a2v_gate_adaln_single = AdaLayerNormSingle(config.width, 1)
            self.av_ca_v2a_gate_adaln_single = AdaLayerNormSingle(config.audio_width, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicAVTransformerBlock(config, video=video, audio=audio) for _ in range(config.num_layers)
        )

    def _add_stream(self, prefix: str, width: int, in_channels: int, out_channels: int) -> None:
        config = self.config
        setattr(self, f"{prefix}patchify_proj", nn.Linear(in_channels, width))
        if config.has_caption_projection:
            setattr(self, f"{prefix}caption_projection", CaptionProjection(config.caption_channels, width))
        setattr(self, f"{prefix}adaln_single", AdaLayerNormSingle(width, config.num_modulation_rows))
        if config.has_prompt_adaln:
            setattr(self, f"{prefix}prompt_adaln_single", AdaLayerNormSingle(width, 2))
        setattr(self, f"{prefix}scale_shift_table", nn.Parameter(torch.randn(2, width) / width**0.5))
        setattr(self, f"{prefix}proj_out", nn.Linear(width, out_channels))

    def set_attention_backend(self, name: str) -> None:
        """Use another attention kernel, one of :data:`ATTENTION_BACKENDS`, in all blocks."""
        function = ATTENTION_BACKENDS[name]
        for module in self.transformer_blocks.modules():
            if isinstance(module, Attention):
                module.attention_function = function

    def forward(
        self,
        inputs: AV[ModalityInput],
        perturbations: Perturbations | None = None,
        cross_timestep: CrossTimestep = "hybrid",
    ) -> AV[Tensor]:
        """Predict the velocity ``noise - clean`` of every token, [B, N, C] for each stream given.

        Args:
            inputs: the streams; an ``av`` model given only one equals the model of that stream alone.
            perturbations: guidance switches per block and sample.
            cross_timestep: what modulates the attention between the streams. ``hybrid`` (official since May
                2026): scale and shift from the stream's own timesteps, gate from the other's sigma. ``own``
                and ``cross`` take both from the one or the other, as older releases did.
        """
        self._check(inputs)
        hidden = inputs.map_named(self._embed)
        levels = inputs.map(lambda stream: distinct_levels(stream.timesteps))
        blocks_and_head = inputs.map_named(lambda name, stream: self._modulation(name, stream, levels[name]))
        conditioning = inputs.map_named(
            lambda name, stream: StreamConditioning(
                modulation=blocks_and_head[name][0],
                text_modulation=self._text_modulation(name, stream),
                context=self._context(name, stream),
                context_mask=text_mask(stream.context_mask, stream.tokens.dtype),
                self_mask=weight_mask(stream.attention_mask, stream.tokens.dtype),
                rope=self._rope(name, stream.coords),
                reads_text=_reads_text(stream),
                enabled=stream.enabled,
                cross=self._cross_conditioning(name, inputs, levels[name], cross_timestep),
            )
        )
        video, audio = hidden.video, hidden.audio
        for index, block in enumerate(self.transformer_blocks):
            video, audio = block(video, audio, conditioning, _keep(perturbations, index))
        return AV(video=video, audio=audio).map_named(lambda name, x: self._head(name, x, blocks_and_head[name][1]))

    def _check(self, inputs: AV[ModalityInput]) -> None:
        absent = [name for name, _ in inputs.items() if self.mode not in (name, "av")]
        if absent or not inputs:
            given = " and ".join(name for name, _ in inputs.items()) or "nothing"
            raise ValueError(f"a transformer built for mode {self.mode!r} was given {given}")

    def _part(self, name: Modality, part: str) -> Any:
        return getattr(self, _PREFIX[name] + part)

    def _embed(self, name: Modality, stream: ModalityInput) -> Tensor:
        x = self._part(name, "patchify_proj")(stream.tokens)
        if name == "video" and self.config.use_keyframes_abs_pos_embedding and stream.keyframes_mask is not None:
            x = x + (stream.keyframes_mask > 0) * self.keyframes_abs_pos_embedding.to(x.dtype)
        return x  # [B, N, D]

    def _modulation(self, name: Modality, stream: ModalityInput, levels: Levels) -> tuple[Modulation, Modulation]:
        """For the blocks, and (shift and scale share one vector) for the output head."""
        rows, embedding = self._part(name, "adaln_single")(
            levels.values * self.config.timestep_scale_multiplier, stream.tokens.dtype
        )
        head = torch.stack([embedding, embedding + 1], dim=-2)
        return Modulation(add_one(rows, _SCALES), levels.index), Modulation(head, levels.index)

    def _text_modulation(self, name: Modality, stream: ModalityInput) -> Tensor | None:
        """Shift and scale of the text for the blocks to add their tables to, [B or 1, 1, 2, D]."""
        if not self.config.cross_attention_adaln:
            return None
        if not self.config.use_prompt_adaln_single:
            width = self._part(name, "scale_shift_table").shape[1]
            return add_one(torch.zeros(1, 1, 2, width, device=stream.tokens.device), _TEXT_SCALES)
        sigma = stream.sigma[:, None] * self.config.timestep_scale_multiplier
        rows, _ = self._part(name, "prompt_adaln_single")(sigma, stream.tokens.dtype)
        return add_one(rows, _TEXT_SCALES)

    def _context(self, name: Modality, stream: ModalityInput) -> Tensor:
        if not self.config.has_caption_projection:
            return stream.context
        return self._part(name, "caption_projection")(stream.context)  # [B, L, D]

    def _rope(self, name: Modality, coords: Tensor) -> RopeTable:
        config = self.config
        if name == "video":
            return self._table(coords, config.positional_embedding_max_pos, config.width)
        return self._table(coords, config.audio_positional_embedding_max_pos, config.audio_width)

    def _cross_rope(self, coords: Tensor) -> RopeTable:
        """Between the streams only time counts."""
        config = self.config
        longest = max(config.positional_embedding_max_pos[0], config.audio_positional_embedding_max_pos[0])
        return self._table(coords[:, :1], (longest,), config.audio_cross_attention_dim)

    def _table(self, coords: Tensor, max_pos: tuple[float, ...], width: int) -> RopeTable:
        config = self.config
        return rope_table(
            coords,
            max_pos=max_pos,
            width=width,
            heads=config.num_attention_heads,
            theta=config.positional_embedding_theta,
            float64=config.frequencies_precision == "float64",
            interleaved=config.rope_type == "interleaved",
        )

    def _cross_conditioning(
        self, name: Modality, inputs: AV[ModalityInput], own: Levels, cross_timestep: CrossTimestep
    ) -> CrossConditioning | None:
        if inputs.video is None or inputs.audio is None:
            return None
        stream, other = inputs[name], inputs["audio" if name == "video" else "video"]
        others = Levels(other.sigma[:, None])
        modulation, gate = {"own": (own, own), "hybrid": (own, others), "cross": (others, others)}[cross_timestep]
        config, dtype = self.config, stream.tokens.dtype
        scale_shift_adaln = getattr(self, f"av_ca_{name}_scale_shift_adaln_single")
        gate_adaln = self.av_ca_a2v_gate_adaln_single if name == "video" else self.av_ca_v2a_gate_adaln_single
        rows, _ = scale_shift_adaln(modulation.values * config.timestep_scale_multiplier, dtype)
        gate_rows, _ = gate_adaln(gate.values * config.av_ca_timestep_scale_multiplier, dtype)
        return CrossConditioning(
            modulation=Modulation(add_one(rows, _CROSS_SCALES), modulation.index),
            gate=Modulation(gate_rows, gate.index),
            rope=self._cross_rope(stream.coords),
            mask=weight_mask(stream.cross_mask, dtype),
        )

    def _head(self, name: Modality, x: Tensor, modulation: Modulation) -> Tensor:
        shift, scale = modulation.with_table(self._part(name, "scale_shift_table"))
        x = modulate(F.layer_norm(x, x.shape[-1:], eps=_HEAD_EPS), scale, shift, modulation.index)
        return self._part(name, "proj_out")(x)  # [B, N, C]


def _reads_text(stream: ModalityInput) -> Tensor | None:
    """[B, N, 1] in the dtype of the tokens."""
    return None if stream.reads_text is None else stream.reads_text.to(stream.tokens.dtype).unsqueeze(-1)


def _keep(perturbations: Perturbations | None, block: int) -> Keep:
    """The switches of one block, each [B, 1, 1]."""
    if perturbations is None:
        return KEEP_ALL
    switches = {field.name: getattr(perturbations, field.name).get(block) for field in fields(Perturbations)}
    return Keep(**{name: None if switch is None else switch[:, None, None] for name, switch in switches.items()})
