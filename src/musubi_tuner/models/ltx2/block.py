"""One transformer block: a video and an audio stream that read the text and each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.common.av import AV

from .adaln import Modulation, gated_add, modulate
from .attention import Attention
from .config import TransformerConfig
from .norm import rms_norm
from .rope import RopeTable


@dataclass(frozen=True)
class CrossConditioning:
    """What one stream needs for the attention between the streams."""

    modulation: Modulation  # rows: scale, shift in audio-to-video; scale, shift in video-to-audio
    gate: Modulation  # row: gate of what this stream reads of the other
    rope: RopeTable  # of this stream's tokens, time only
    mask: Tensor | None  # additive: what this stream's queries may read of the other


@dataclass(frozen=True)
class StreamConditioning:
    """All that one stream's part of every block reads besides its hidden state; made once a step."""

    modulation: Modulation  # rows: shift, scale, gate of self-attention, of feed-forward, [of text attention]
    text_modulation: Tensor | None  # [B or 1, 1, 2, D] shift, scale of the text; None before 2.3
    context: Tensor  # [B, L, D]
    context_mask: Tensor | None  # additive [B, 1, 1, L]
    self_mask: Tensor | None  # additive [B or 1, 1, Nq or 1, N]
    rope: RopeTable
    reads_text: Tensor | None = None  # [B, N, 1]
    enabled: bool = True
    cross: CrossConditioning | None = None  # only when both streams are there


@dataclass(frozen=True)
class Keep:
    """Switches of guidance for one block, [B, 1, 1] each, 1 = keep; None = keep for all samples."""

    video_self: Tensor | None = None
    audio_self: Tensor | None = None
    a2v: Tensor | None = None
    v2a: Tensor | None = None


KEEP_ALL = Keep()


class GELUApprox(nn.Module):
    """Linear, then tanh-approximated GELU."""

    def __init__(self, width: int, inner: int, *, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Linear to four times the width, GELU, linear back."""

    def __init__(self, width: int, *, bias: bool) -> None:
        super().__init__()
        # The identity stands where the official model has a dropout; it keeps the second linear's name.
        self.net = nn.Sequential(
            GELUApprox(width, 4 * width, bias=bias), nn.Identity(), nn.Linear(4 * width, width, bias=bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicAVTransformerBlock(nn.Module):
    """Self-attention, text attention, attention to the other stream, feed-forward; for one stream or both.

    Modules of absent streams do not exist. Everything that depends on the step but not on the block comes in
    through the conditioning, so that recomputing a block repeats only the block.
    """

    def __init__(self, config: TransformerConfig, *, video: bool, audio: bool) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.text_adaln = config.cross_attention_adaln
        if video:
            self._add_stream("", config.width, config.attention_head_dim, config.ff_bias, config=config)
        if audio:
            self._add_stream(
                "audio_",
                config.audio_width,
                config.audio_attention_head_dim,
                config.audio_ff_bias,
                config=config,
            )
        if video and audio:
            self._add_cross_modal(config)

    def _add_stream(self, prefix: str, width: int, head_dim: int, ff_bias: bool, *, config: TransformerConfig) -> None:
        for name in ("attn1", "attn2"):
            setattr(self, prefix + name, _attention(config, width, width, head_dim))
        setattr(self, prefix + "ff", FeedForward(width, bias=ff_bias))
        setattr(self, prefix + "scale_shift_table", _table(config.num_modulation_rows, width))
        if config.cross_attention_adaln:
            setattr(self, prefix + "prompt_scale_shift_table", _table(2, width))

    def _add_cross_modal(self, config: TransformerConfig) -> None:
        video, audio, head_dim = config.width, config.audio_width, config.audio_attention_head_dim
        self.audio_to_video_attn = _attention(config, video, audio, head_dim)
        self.video_to_audio_attn = _attention(config, audio, video, head_dim)
        self.scale_shift_table_a2v_ca_video = _table(5, video)
        self.scale_shift_table_a2v_ca_audio = _table(5, audio)

    def forward(
        self,
        video: Tensor | None,
        audio: Tensor | None,
        conditioning: AV[StreamConditioning],
        keep: Keep = KEEP_ALL,
    ) -> tuple[Tensor | None, Tensor | None]:
        """``video`` [B, Nv, D] and ``audio`` [B, Na, Da], either None, to the same after the block."""
        v, a = conditioning.video, conditioning.audio
        run_video = video is not None and v.enabled
        run_audio = audio is not None and a.enabled
        if run_video:
            video_rows = v.modulation.with_table(self.scale_shift_table)
            video = self._read_itself_and_text("", video, v, video_rows, keep.video_self)
        if run_audio:
            audio_rows = a.modulation.with_table(self.audio_scale_shift_table)
            audio = self._read_itself_and_text("audio_", audio, a, audio_rows, keep.audio_self)
        if video is not None and audio is not None:
            video, audio = self._read_each_other(video, audio, v, a, keep)
        if run_video:
            video = self._feed_forward(self.ff, video, v, video_rows)
        if run_audio:
            audio = self._feed_forward(self.audio_ff, audio, a, audio_rows)
        return video, audio

    def _read_itself_and_text(
        self,
        prefix: str,
        x: Tensor,
        c: StreamConditioning,
        rows: tuple[Tensor, ...],
        keep: Tensor | None,
    ) -> Tensor:
        index = c.modulation.index
        shift, scale, gate = rows[:3]
        y = modulate(rms_norm(x, eps=self.eps), scale, shift, index)
        y = getattr(self, prefix + "attn1")(y, mask=c.self_mask, rope=c.rope, keep=keep)
        x = gated_add(x, y, gate, index)

        query, context = rms_norm(x, eps=self.eps), c.context
        if self.text_adaln:
            shift, scale, gate = rows[6:]
            query = modulate(query, scale, shift, index)
            context = self._modulate_text(prefix, c)
        y = getattr(self, prefix + "attn2")(query, context, mask=c.context_mask)
        if c.reads_text is not None:
            y = y * c.reads_text
        return gated_add(x, y, gate, index) if self.text_adaln else x + y

    def _modulate_text(self, prefix: str, c: StreamConditioning) -> Tensor:
        table = getattr(self, prefix + "prompt_scale_shift_table")
        rows = c.text_modulation + table
        shift, scale = rows.unbind(-2)
        return modulate(c.context, scale, shift)

    def _read_each_other(
        self, video: Tensor, audio: Tensor, v: StreamConditioning, a: StreamConditioning, keep: Keep
    ) -> tuple[Tensor, Tensor]:
        """Both directions read the streams as they were before either was updated."""
        video_rows = v.cross.modulation.with_table(self.scale_shift_table_a2v_ca_video[:4])
        audio_rows = a.cross.modulation.with_table(self.scale_shift_table_a2v_ca_audio[:4])
        video_normed, audio_normed = rms_norm(video, eps=self.eps), rms_norm(audio, eps=self.eps)

        def inputs(scale: int, shift: int) -> tuple[Tensor, Tensor]:
            return (
                modulate(video_normed, video_rows[scale], video_rows[shift], v.cross.modulation.index),
                modulate(audio_normed, audio_rows[scale], audio_rows[shift], a.cross.modulation.index),
            )

        video_new, audio_new = video, audio
        if v.enabled:
            query, context = inputs(scale=0, shift=1)
            y = self.audio_to_video_attn(
                query, context, mask=v.cross.mask, rope=v.cross.rope, context_rope=a.cross.rope
            )
            (gate,) = v.cross.gate.with_table(self.scale_shift_table_a2v_ca_video[4:])
            video_new = gated_add(video, _kept(y, keep.a2v), gate, v.cross.gate.index)
        if a.enabled:
            context, query = inputs(scale=2, shift=3)
            y = self.video_to_audio_attn(
                query, context, mask=a.cross.mask, rope=a.cross.rope, context_rope=v.cross.rope
            )
            (gate,) = a.cross.gate.with_table(self.scale_shift_table_a2v_ca_audio[4:])
            audio_new = gated_add(audio, _kept(y, keep.v2a), gate, a.cross.gate.index)
        return video_new, audio_new

    def _feed_forward(self, ff: FeedForward, x: Tensor, c: StreamConditioning, rows: tuple[Tensor, ...]) -> Tensor:
        shift, scale, gate = rows[3:6]
        index = c.modulation.index
        y = ff(modulate(rms_norm(x, eps=self.eps), scale, shift, index))
        return gated_add(x, y, gate, index)


def _attention(config: TransformerConfig, query_width: int, context_width: int, head_dim: int) -> Attention:
    return Attention(
        query_width,
        context_width,
        heads=config.num_attention_heads,
        head_dim=head_dim,
        eps=config.norm_eps,
        gated=config.apply_gated_attention,
    )


def _table(rows: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, width) / width**0.5)


def _kept(y: Tensor, keep: Tensor | None) -> Tensor:
    return y if keep is None else y * keep.to(y.dtype)
